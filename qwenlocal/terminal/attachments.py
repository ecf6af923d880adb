"""What attached files cost before they are sent, and what to do where they are too long."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.chat.documents import Document
from qwenlocal.chat.passages import head, pick_passages
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Session

_KEPT_FREE = 0.1  # of the context, for the answer
_WORTH_SAYING = 200  # tokens


def with_documents(session: Session, text: str, documents: Sequence[Document]) -> str | None:
    """
    `text` with the documents before it, as the user wants them where they are too long; None to send nothing.
    """
    if not documents:
        return text
    for document in documents:
        session.say(price(session, document))
    whole = _joined(documents, text)
    if session.conversation.tokens(whole) <= _room(session):
        return whole
    return _shortened(session, text, documents)


def price(session: Session, document: Document) -> str:
    """`notes.txt: 12,431 tokens = 152 % of what is left, about 5 min to read on this machine`."""
    count, room = session.conversation.tokens(document.as_message()), _room(session)
    if room > 0:
        said = tr(
            "{name}: {count:,} tokens = {share:.0%} of what is left",
            name=document.name,
            count=count,
            share=count / room,
        )
    else:
        said = tr("{name}: {count:,} tokens, and nothing is left", name=document.name, count=count)
    speed = session.reading_speed
    seconds = count / speed if speed > 0 and count > _WORTH_SAYING else 0
    about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return said + (tr(", about {time} to read on this machine", time=about) if seconds >= 1 else "")


def _room(session: Session) -> int:
    """Tokens that are left for a question."""
    talk = session.conversation
    return int((talk.n_ctx or 1 << 20) * (1 - _KEPT_FREE)) - talk.tokens_read


def _joined(documents: Sequence[Document], text: str) -> str:
    return "\n\n".join([*(document.as_message() for document in documents), text])


def _shortened(session: Session, text: str, documents: Sequence[Document]) -> str | None:
    session.say(
        tr("That is too long. [h]ead: the beginning; [p]assages that fit the question; [w]iden the context; [c]ancel")
    )
    while True:
        answer = session.ask(tr("h, p, w or c? ")).strip().lower()[:1]
        if answer == "w":
            if _widen(session, session.conversation.tokens(_joined(documents, text))):
                return _joined(documents, text)
        elif answer in ("h", "p"):
            return _cut(session, text, documents, passages=answer == "p")
        elif answer in ("c", "", "\x03"):
            session.say(tr("Nothing was sent; the line is below again."))
            session.default_text = text
            return None


def _cut(session: Session, text: str, documents: Sequence[Document], *, passages: bool) -> str:
    count = session.conversation.tokens
    frame = count(_joined([Document(document.name, "") for document in documents], text))
    each = max(64, (_room(session) - frame) // len(documents) - 16)
    cut = []
    for document in documents:
        if count(document.text) <= each:
            cut.append(document)
            continue
        short = pick_passages(document.text, text, each, count) if passages else head(document.text, each, count)
        session.say(
            tr(
                "{name}: {count:,} of {whole:,} tokens are read.",
                name=document.name,
                count=count(short),
                whole=count(document.text),
            )
        )
        cut.append(Document(document.name, short))
    return _joined(cut, text)


def _widen(session: Session, needed: int) -> bool:
    wanted = -(-int((session.conversation.tokens_read + needed) / (1 - _KEPT_FREE)) // 1024) * 1024 + 1024
    try:
        session.conversation = session.models.widen(wanted, session.thread)
    except (NotEnoughMemory, UsageError) as reason:
        session.say(f"{reason} {reason.hint}")
        return False
    session.say(tr("There is room for {n_ctx:,} tokens now.", n_ctx=session.conversation.n_ctx or 0))
    return True
