"""Writing a thread down as it grows: every message at once, an answer every half second."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.language import tr

EVERY = 0.5  # seconds between two writes of an answer that is being given
_AFTER_TROUBLE = 5.0  # and where the last one failed: a locked file keeps an answer waiting


class Writer(Protocol):
    """Where to: a `Journal`."""

    def write(self, keeper: Keeper, messages: Sequence[Message], removed: Sequence[int]) -> None:
        """
        Raises
        ------
        sqlite3.Error: it cannot be written now.
        """
        ...


class Keeper:
    """
    Writes a thread into the journal as it grows. Fulfils `Recorder`.

    `id` is None until there is something to keep. `trouble` is why the last write failed, "" where it did not; what
    could not be written is tried again with the next change.
    """

    def __init__(
        self, journal: Writer, thread: Thread, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.thread, self.model = thread, model
        self.id: int | None = None
        self.is_open = True
        self.trouble = ""
        self._journal, self._clock = journal, clock
        self._waiting: dict[int, Message] = {}
        self._removed: set[int] = set()
        self._written = -EVERY

    def changed(self, message: Message) -> None:
        self._waiting[message.number] = message
        is_growing = message.role != USER and not message.why
        pause = _AFTER_TROUBLE if self.trouble else EVERY
        if not is_growing or self._clock() - self._written >= pause:
            self.write()

    def removed(self, message: Message) -> None:
        self._waiting.pop(message.number, None)
        self._removed.add(message.number)
        self.write()

    def moved(self, thread: Thread) -> None:
        if self.id is not None or self._waiting:
            self.write()

    def write(self) -> None:
        """Write what was not written yet."""
        if self.id is None and not self._waiting:
            return
        self._written = self._clock()
        try:
            self._journal.write(self, list(self._waiting.values()), list(self._removed))
        except sqlite3.Error as reason:
            self.trouble = in_words(reason)
            return
        self.trouble = ""
        self._waiting.clear()
        self._removed.clear()

    def close(self) -> None:
        """Write the rest; the chat may be opened elsewhere from now on."""
        self.is_open = False
        self.write()


def in_words(reason: Exception) -> str:
    """Why SQLite did not do something."""
    text = str(reason)
    if "locked" in text or "busy" in text:
        return tr("another program keeps it locked")
    is_shut = isinstance(reason, (PermissionError, FileNotFoundError))
    if is_shut or "readonly" in text or "unable to open" in text:
        return tr("it cannot be written there")
    if isinstance(reason, OSError):
        return reason.strerror or text
    return tr("it is damaged ({text})", text=text) if is_damage(reason) else text


def is_damage(reason: Exception) -> bool:
    """Whether the file holds what cannot be read, and not only cannot be had now."""
    return not isinstance(reason, (OSError, sqlite3.OperationalError))
