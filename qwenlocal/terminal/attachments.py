"""Files and long pastes in a message: their cost in tokens, and what to send if they are too long."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwenlocal.chat.chat_template import MAX_CHARACTERS
from qwenlocal.chat.context_window import ContextWindow
from qwenlocal.chat.documents import ANSWER_SHARE, Document, cut_documents
from qwenlocal.errors import NotEnoughMemory, TextTooLong, UsageError
from qwenlocal.formatting import format_count, format_percent
from qwenlocal.hints import describe_error
from qwenlocal.i18n import tr
from qwenlocal.terminal.pastes import Paste
from qwenlocal.terminal.session import Session

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
    message, window = _join(documents, text), session.conversation.window
    if window is None:
        return message
    draft = _Draft(session, window, text, documents, lambda parts: _join(parts, text), _free_tokens(session, window))
    is_huge = len(message) > MAX_CHARACTERS  # counting its tokens would take minutes
    fits = not is_huge and window.count_tokens(message) <= draft.room
    return message if fits else draft.ask_how_to_fit()


def shorten_pastes(session: Session, text: str, pastes: Sequence[Paste]) -> str | None:
    """
    Let the user choose what to send of `text`, which is too long and contains the pastes.

    Return None if nothing is to be sent.
    """
    window = session.conversation.window
    if window is None:
        return None
    can_evict = session.conversation.config.overflow != "stop"  # older turns make room for half of the context
    room = max(_free_tokens(session, window), window.n_ctx // 2 if can_evict else 0)
    question = replace_pastes(text, pastes, [replace(paste, text="") for paste in pastes])
    draft = _Draft(session, window, question, pastes, lambda parts: replace_pastes(text, pastes, parts), room)
    return draft.ask_how_to_fit()


def replace_pastes(text: str, pastes: Sequence[Paste], parts: Sequence[Document]) -> str:
    """Replace each paste in `text` by its part; a paste inside a longer one belongs to that."""
    replacements = {paste.text: part.text for paste, part in zip(pastes, parts, strict=True)}
    longest_first = sorted(map(re.escape, replacements), key=len, reverse=True)
    return re.sub("|".join(longest_first), lambda match: replacements[match[0]], text)


def describe_cost(session: Session, document: Document) -> str:
    """Return `notes.txt: 12,431 tokens, 152% of the free context, about 5 min to read`."""
    window = session.conversation.window
    if len(document.text) > MAX_CHARACTERS and window:
        characters = format_count(len(document.text), "character")
        return tr("{name}: {characters}, more than any context holds", name=document.name, characters=characters)
    if window is None:
        return f"{document.name}: {format_count(len(document.text), 'character')}"
    count, free = window.count_tokens(document.to_markdown()), _free_tokens(session, window)
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


def _free_tokens(session: Session, window: ContextWindow) -> int:
    """Return the number of tokens that the next message may have."""
    return int(window.n_ctx * (1 - ANSWER_SHARE)) - window.count_prompt_tokens(session.thread)


def _join(documents: Sequence[Document], text: str) -> str:
    return "\n\n".join([*(document.to_markdown() for document in documents), text])


@dataclass(frozen=True)
class _Draft:
    """
    A message that is too long: a question and documents, which `join` makes one text.

    There is room for `room` tokens.
    """

    session: Session
    window: ContextWindow
    question: str
    documents: Sequence[Document]
    join: Callable[[Sequence[Document]], str]
    room: int

    def ask_how_to_fit(self) -> str | None:
        """Return the message with its documents cut, or whole in a longer context; None if nothing is to be sent."""
        self.session.say(
            tr(
                "Too long for the context. Send the [h]ead or the [p]assages that match the question, [w]iden the "
                "context, or [c]ancel?"
            )
        )
        while True:
            choice = self.session.ask(tr("h, p, w or c? ")).strip().lower()[:1]
            if choice == "w" and self._widen_context():
                return self.join(self.documents)
            if choice in ("h", "p"):
                return self.join(self._cut_documents(select=choice == "p"))
            if choice in ("c", ""):
                self.session.say(tr("Nothing was sent. Your message is below."))
                return None

    def _cut_documents(self, *, select: bool) -> Sequence[Document]:
        """Cut each long document to its best passages (`select`) or to its beginning, and say so."""
        count = self.window.count_tokens
        parts = cut_documents(self.documents, self.join, self.question, self.room, count, select=select)
        for document, part in zip(self.documents, parts, strict=True):
            if part is not document:
                self.session.say(
                    tr(
                        "{name}: sending {tokens}, {share} of the text.",
                        name=document.name,
                        tokens=format_count(count(part.to_markdown()), "token"),
                        share=format_percent(len(part.text) / len(document.text)),
                    )
                )
        return parts

    def _widen_context(self) -> bool:
        session, message = self.session, self.join(self.documents)
        if len(message) > MAX_CHARACTERS:
            session.say(str(TextTooLong(len(message), MAX_CHARACTERS)))
            return False
        try:
            needed = self.window.count_prompt_tokens(session.thread) + self.window.count_tokens(message)
            n_ctx = -(-int(needed / (1 - ANSWER_SHARE)) // 1024) * 1024 + 1024
            session.conversation = session.models.resize_context(n_ctx, session.thread)
        except (NotEnoughMemory, UsageError) as error:
            session.say(describe_error(error))
            return False
        if window := session.conversation.window:
            session.say(tr("The context now holds {n_ctx:,} tokens.", n_ctx=window.n_ctx))
        return True
