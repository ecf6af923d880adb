"""Write a thread into the journal while it grows: messages at once, a growing answer every half second."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qwenlocal.chat.thread import USER, Message, Thread, ThreadObserver
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from qwenlocal.chat.journal import Journal

WRITE_INTERVAL = 0.5  # seconds between two writes of a growing answer
_RETRY_INTERVAL = 5.0  # seconds after a failed write: waiting for a locked file holds up the answer


class JournalWriter(ThreadObserver):
    """
    Writes a thread into the journal as it changes.

    `chat_id` is None until the first message is written. `error` says why the last write failed, "" if it succeeded;
    what could not be written is written with the next change.
    """

    def __init__(
        self, journal: Journal, thread: Thread, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.thread, self.model = thread, model
        self.chat_id: int | None = None
        self.is_open = True
        self.error = ""
        self._journal, self._clock = journal, clock
        self._changed: dict[int, Message] = {}
        self._removed: set[int] = set()
        self._last_write = -WRITE_INTERVAL

    def changed(self, message: Message) -> None:
        self._changed[message.number] = message
        is_growing = message.role != USER and not message.finish_reason
        interval = _RETRY_INTERVAL if self.error else WRITE_INTERVAL
        if not is_growing or self._clock() - self._last_write >= interval:
            self.write()

    def removed(self, message: Message) -> None:
        self._changed.pop(message.number, None)
        self._removed.add(message.number)
        self.write()

    def moved(self, thread: Thread) -> None:
        if self.chat_id is not None or self._changed:
            self.write()

    def write(self) -> None:
        """Write all pending changes."""
        if self.chat_id is None and not self._changed:
            return
        self._last_write = self._clock()
        try:
            self._journal.write_thread(self, list(self._changed.values()), list(self._removed))
        except sqlite3.Error as error:
            self.error = describe_error(error)
            return
        self.error = ""
        self._changed.clear()
        self._removed.clear()

    def close(self) -> None:
        """Write pending changes and release the chat, so that another process can open it."""
        self.is_open = False
        self.write()


def describe_error(error: Exception) -> str:
    """Return why SQLite could not read or write the file, as part of a sentence."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return tr("it is locked by another program")
    is_inaccessible = isinstance(error, (PermissionError, FileNotFoundError))
    if is_inaccessible or "readonly" in text or "unable to open" in text:
        return tr("it cannot be written")
    if isinstance(error, OSError):
        return error.strerror or text
    return tr("it is damaged ({text})", text=text) if is_corruption(error) else text


def is_corruption(error: Exception) -> bool:
    """True if the file's contents are at fault, and not access to it."""
    return not isinstance(error, (OSError, sqlite3.OperationalError))
