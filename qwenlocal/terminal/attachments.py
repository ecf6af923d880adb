"""Files and long pastes in a message: their cost in tokens, and what to send if they are too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwenlocal.chat.chat_template import MAX_CHARACTERS
from qwenlocal.chat.documents import Document, select_passages, truncate_to_tokens
from qwenlocal.errors import NotEnoughMemory, TextTooLong, UsageError
from qwenlocal.formatting import format_count
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Session

_ANSWER_SHARE = 0.1  # of the context, reserved for the answer
_MIN_TIMED_TOKENS = 200  # for shorter files no time is estimated
_MAX_TOKEN_CHARACTERS = 128  # the longest token of Qwen's vocabulary is a run of as many spaces


def attach_documents(session: Session, text: str, documents: Sequence[Document]) -> str | None:
    """
    Put the documents before `text`. If they are too long, the user chooses what to send.

    Return None if nothing is to be sent.
    """
    if not documents:
        return text
    for document in documents:
        session.say(describe_cost(session, document))
    message = _join(documents, text)
    if session.conversation.count_tokens(message) <= _free_tokens(session):
        return message
    return _ask_how_to_fit(session, text, documents, lambda parts: _join(parts, text), _free_tokens(session))


def shorten_pastes(session: Session, text: str, pastes: Sequence[Document]) -> str | None:
    """
    Let the user choose what to send of `text`, which is too long and contains the pastes.

    Return None if nothing is to be sent.
    """

    def replace_pastes(parts: Sequence[Document]) -> str:
        message = text
        for paste, part in zip(pastes, parts, strict=True):
            message = message.replace(paste.text, part.text)
        return message

    can_evict = session.conversation.config.overflow != "stop"  # older turns make room for half of the context
    room = max(_free_tokens(session), session.conversation.n_ctx // 2 if can_evict else 0)
    question = replace_pastes([Document(paste.name, "") for paste in pastes])
    return _ask_how_to_fit(session, question, pastes, replace_pastes, room)


def describe_cost(session: Session, document: Document) -> str:
    """Return `notes.txt: 12,431 tokens, 152% of the free context, about 5 min to read`."""
    if len(document.text) > MAX_CHARACTERS:
        characters = format_count(len(document.text), "character")
        return tr("{name}: {characters}, more than any context holds", name=document.name, characters=characters)
    count, free = session.conversation.count_tokens(document.to_markdown()), _free_tokens(session)
    tokens = format_count(count, "token")
    if free > 0:
        cost = tr(
            "{name}: {tokens}, {share:.0%} of the free context",
            name=document.name,
            tokens=tokens,
            share=count / free,
        )
    else:
        cost = tr("{name}: {tokens}, but the context is full", name=document.name, tokens=tokens)
    speed = session.prompt_speed
    seconds = count / speed if speed > 0 and count > _MIN_TIMED_TOKENS else 0
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return cost + (tr(", about {time} to read", time=time) if seconds >= 1 else "")


def _free_tokens(session: Session) -> int:
    """Return the number of tokens that the next message may have."""
    conversation = session.conversation
    return int(conversation.n_ctx * (1 - _ANSWER_SHARE)) - conversation.prompt_tokens


def _join(documents: Sequence[Document], text: str) -> str:
    return "\n\n".join([*(document.to_markdown() for document in documents), text])


def _ask_how_to_fit(
    session: Session,
    question: str,
    documents: Sequence[Document],
    join: Callable[[Sequence[Document]], str],
    room: int,
) -> str | None:
    """Return the message that `join` makes of the documents, cut to `room` tokens or in a longer context."""
    session.say(
        tr(
            "Too long for the context. Send the [h]ead or the [p]assages that match the question, [w]iden the context, "
            "or [c]ancel?"
        )
    )
    while True:
        choice = session.ask(tr("h, p, w or c? ")).strip().lower()[:1]
        if choice == "w":
            if _widen_context(session, join(documents)):
                return join(documents)
        elif choice in ("h", "p"):
            return join(_cut_to_fit(session, question, documents, join, room, select=choice == "p"))
        elif choice in ("c", "", "\x03"):
            session.say(tr("Nothing was sent. Your message is below."))
            return None


def _cut_to_fit(
    session: Session,
    question: str,
    documents: Sequence[Document],
    join: Callable[[Sequence[Document]], str],
    room: int,
    *,
    select: bool,
) -> Sequence[Document]:
    """Cut each long document to its best passages (`select`) or to its beginning."""
    count = session.conversation.count_tokens
    overhead = count(join([Document(document.name, "") for document in documents]))
    limit = max(64, (room - overhead) // len(documents) - 16)
    cut = []
    for document in documents:
        head = document.text[: limit * _MAX_TOKEN_CHARACTERS]
        if len(head) == len(document.text) and count(head) <= limit:
            cut.append(document)
            continue
        if select:
            excerpt = select_passages(document.text, question, limit, count)
        else:
            excerpt = truncate_to_tokens(head, limit, count)
        shortened = Document(document.name, excerpt)
        session.say(
            tr(
                "{name}: sending {count:,} of {total:,} tokens.",
                name=document.name,
                count=count(shortened.to_markdown()),
                total=count(document.to_markdown()),
            )
        )
        cut.append(shortened)
    return cut


def _widen_context(session: Session, message: str) -> bool:
    if len(message) > MAX_CHARACTERS:
        error = TextTooLong(len(message), MAX_CHARACTERS)
        session.say(str(error))
        return False
    needed = session.conversation.count_tokens(message)
    minimum = int((session.conversation.prompt_tokens + needed) / (1 - _ANSWER_SHARE))
    n_ctx = -(-minimum // 1024) * 1024 + 1024
    try:
        session.conversation = session.models.resize_context(n_ctx, session.thread)
    except (NotEnoughMemory, UsageError) as error:
        session.say(f"{error} {error.hint}")
        return False
    session.say(tr("The context now holds {n_ctx:,} tokens.", n_ctx=session.conversation.n_ctx))
    return True
