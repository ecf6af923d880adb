"""What of a thread the model reads, and what leaves where the context has no room for all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qwenlocal.chat.thread import Message, Thread, Turn

OVERFLOWS = ("shift", "summarise", "stop")  # what can be done about a full context
FULL, MADE_FREE = 0.875, 0.5  # of the context: from where on turns leave, and until when
_SHORT = 40  # letters of a turn that is named
_INSTRUCTION = (
    "Summarise our conversation so far for yourself, in at most 120 words and in its language: who wants what, names, "
    "numbers, decisions, open questions. Only the summary."
)


def read_messages(thread: Thread) -> list[dict[str, str]]:
    """What the model reads: the system prompt with what stands for older turns, and the turns that are read."""
    return [*_system(thread), *_plain(message for turn in _read(thread) for message in turn.messages)]


def next_to_leave(thread: Thread) -> Turn | None:
    """The oldest turn that may leave; None where only pinned ones and the last are left."""
    return next((turn for turn in _read(thread)[:-1] if not turn.pinned), None)


def to_summarise(thread: Thread, leaving: Sequence[Turn]) -> list[dict[str, str]]:
    """A question after the summary of what `leaving` and all that left before say."""
    said = _plain(message for turn in leaving for message in turn.messages)
    return [*_system(thread), *said, {"role": "user", "content": _INSTRUCTION}]


def shortly(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"


def _read(thread: Thread) -> list[Turn]:
    return [turn for turn in thread.turns if is_read(thread, turn)]


def is_read(thread: Thread, turn: Turn) -> bool:
    """Whether the model reads a turn: it was not dropped and has not left, or is what is to be answered."""
    return turn.answer is None or not (turn.dropped or turn.question.number in thread.left)


def _system(thread: Thread) -> list[dict[str, str]]:
    text = thread.system
    if thread.summary:
        before = text or "You are a helpful assistant."
        text = f"{before}\n\nWhat was said before, in short:\n{thread.summary}"
    return [{"role": "system", "content": text}] if text else []


def _plain(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]
