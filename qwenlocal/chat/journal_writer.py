"""Write a thread into the journal while it grows: messages at once, a growing answer every half second."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from qwenlocal.chat.journal import Journal, default_title, describe_error, insert_chat
from qwenlocal.chat.journal_rows import ChatRow
from qwenlocal.chat.thread import USER, Message, Thread, ThreadObserver
from qwenlocal.errors import ChatNotFound, JournalError

WRITE_INTERVAL = 0.5  # seconds between two writes of a growing answer
_RETRY_INTERVAL = 5.0  # seconds after a failed write: waiting for a locked file holds up the answer


class JournalWriter(ThreadObserver):
    """
    Writes a thread into the journal as it changes, until it is closed.

    `chat_id` is None until the first message is written. `original` is the chat that the thread was loaded from if
    another process has it open; the first message goes to a copy of it, or to the chat itself if it has become free.
    `error` says why the last write failed, "" if it succeeded; what could not be written is written with the next
    change.
    """

    def __init__(
        self,
        journal: Journal,
        thread: Thread,
        model: str,
        chat_id: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Open the chat `chat_id`, which the thread was loaded from, or a new one if the thread has messages.

        A saved chat is not written before the thread changes: the last chat is the one that was written last.

        Raises
        ------
        JournalError: the chat cannot be locked.
        """
        self.thread, self.model = thread, model
        self.chat_id: int | None = None
        self.original: int | None = None
        self.error = ""
        self._journal, self._clock = journal, clock
        self._lock = threading.RLock()  # an answer grows in another thread than the one that closes the window
        self._is_closed = self._has_moved = False
        self._loaded: dict[int, Message] = {}
        self._changed: dict[int, Message] = {}
        self._removed: set[int] = set()
        self._last_write = -WRITE_INTERVAL
        if chat_id is None:
            self._changed = dict(thread.messages)
            self.write()
        elif journal.acquire(chat_id):
            self.chat_id = chat_id
        else:
            self.original = chat_id
            self._loaded = {number: replace(message) for number, message in thread.messages.items()}
        thread.observer = self

    def changed(self, message: Message) -> None:
        with self._lock:
            self._changed[message.number] = message
            is_growing = message.role != USER and not message.finish_reason
            interval = _RETRY_INTERVAL if self.error else WRITE_INTERVAL
            if not is_growing or self._clock() - self._last_write >= interval:
                self.write()

    def removed(self, message: Message) -> None:
        with self._lock:
            self._changed.pop(message.number, None)
            self._removed.add(message.number)
            self.write()

    def moved(self) -> None:
        with self._lock:
            self._has_moved = True
            self.write()

    def write(self) -> None:
        """Write all pending changes; those of a chat that is not saved yet wait for its first message."""
        with self._lock:
            is_pending = self._changed or (self.chat_id is not None and (self._removed or self._has_moved))
            if self._is_closed or not is_pending:
                return
            self._last_write = self._clock()
            try:
                if self.original is not None and self.chat_id is None:
                    self._open_original()
                self.chat_id = self._write_chat()
            except (sqlite3.Error, OSError) as error:
                self.error = describe_error(error)
                return
            self.error = ""
            self._has_moved = False
            self._changed.clear()
            self._removed.clear()

    def _write_chat(self) -> int:
        """Write the chat and its changed messages; return its number, a new one if it is new or was deleted."""
        thread, chat_id, messages, now = self.thread, self.chat_id, self._changed, time.time()
        with self._journal.transaction() as db:
            saved = db.execute("SELECT title, created FROM chats WHERE id = ?", (chat_id or self.original,)).fetchone()
            if saved is None:
                chat_id, messages = None, thread.messages
            title = saved[0] if saved else default_title(thread.messages.values())
            state = (self.model, thread.system, thread.leaf, tuple(thread.evicted), thread.summary)
            chat = ChatRow(chat_id or 0, title, *state, created=saved[1] if chat_id else now, changed=now)
            chat_id = insert_chat(db, chat, messages.values())
            self._journal.chat_locks.acquire(chat_id)
            db.executemany(
                "DELETE FROM messages WHERE chat = ? AND number = ?", [(chat_id, number) for number in self._removed]
            )
        return chat_id

    def close(self) -> None:
        """Write pending changes and release the chat, so that another process can open it. Later changes are lost."""
        with self._lock:
            if not self._is_closed:
                self.write()
                self._is_closed = True
                if self.chat_id is not None:
                    self._journal.release(self.chat_id)

    def _open_original(self) -> None:
        """Open the original chat if it is free and still has the messages that were loaded; else prepare a copy."""
        original = self.original
        assert original is not None
        with contextlib.suppress(JournalError, ChatNotFound):
            is_free = self._journal.acquire(original)
            if is_free and self._journal.load_thread(original).messages == self._loaded:
                self.chat_id, self.original = original, None
                return
        self._journal.release(original)
        self._changed = dict(self.thread.messages)
