"""Files attached to a message: their cost in tokens, and what to send if they are too long."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.chat.documents import Document, select_passages, truncate_to_tokens
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.formatting import format_count
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Session

_ANSWER_SHARE = 0.1  # of the context, reserved for the answer
_MIN_TIMED_TOKENS = 200  # for shorter files no time is estimated


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
    return _ask_how_to_fit(session, text, documents)


def describe_cost(session: Session, document: Document) -> str:
    """Return `notes.txt: 12,431 tokens, 152% of the free context, about 5 min to read`."""
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


def _ask_how_to_fit(session: Session, text: str, documents: Sequence[Document]) -> str | None:
    session.say(
        tr(
            "Too long for the context. Send the [h]ead or the [p]assages that match the question, [w]iden the context, "
            "or [c]ancel?"
        )
    )
    while True:
        choice = session.ask(tr("h, p, w or c? ")).strip().lower()[:1]
        if choice == "w":
            if _widen_context(session, session.conversation.count_tokens(_join(documents, text))):
                return _join(documents, text)
        elif choice in ("h", "p"):
            return _cut_to_fit(session, text, documents, select=choice == "p")
        elif choice in ("c", "", "\x03"):
            session.say(tr("Nothing was sent. Your message is below."))
            session.default_text = text
            return None


def _cut_to_fit(session: Session, text: str, documents: Sequence[Document], *, select: bool) -> str:
    """Cut each long document to its best passages (`select`) or to its beginning."""
    count = session.conversation.count_tokens
    overhead = count(_join([Document(document.name, "") for document in documents], text))
    limit = max(64, (_free_tokens(session) - overhead) // len(documents) - 16)
    cut = []
    for document in documents:
        if count(document.text) <= limit:
            cut.append(document)
            continue
        if select:
            excerpt = select_passages(document.text, text, limit, count)
        else:
            excerpt = truncate_to_tokens(document.text, limit, count)
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
    return _join(cut, text)


def _widen_context(session: Session, needed: int) -> bool:
    minimum = int((session.conversation.prompt_tokens + needed) / (1 - _ANSWER_SHARE))
    n_ctx = -(-minimum // 1024) * 1024 + 1024
    try:
        session.conversation = session.models.resize_context(n_ctx, session.thread)
    except (NotEnoughMemory, UsageError) as error:
        session.say(f"{error} {error.hint}")
        return False
    session.say(tr("The context now holds {n_ctx:,} tokens.", n_ctx=session.conversation.n_ctx))
    return True
