"""Locks that tell which chats are open: chat N is open while byte N of a file next to the journal is locked."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    _ALL = 2**31 - 1  # the longest range that `locking` accepts

    def _lock(file: int, start: int, length: int) -> None:
        os.lseek(file, start, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, length)

    def _unlock(file: int, start: int, length: int) -> None:
        os.lseek(file, start, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, length)

else:
    import fcntl

    _ALL = 0  # to the end of the file, however long it becomes

    def _lock(file: int, start: int, length: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)

    def _unlock(file: int, start: int, length: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)


class ChatLocks:
    """
    The locks of this process on the chats of a journal; `path` is the file that carries them.

    The system removes them when the process ends, however it ends; a process number in the journal would outlive it.
    POSIX drops all locks of a process on a file when it closes any descriptor of that file (fcntl(2)), so it is opened
    once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._held: set[int] = set()

    def acquire(self, chat_id: int) -> bool:
        """
        Lock a chat; return False if another process has it locked.

        Raises
        ------
        OSError: the file cannot be opened.
        """
        if chat_id not in self._held:
            if not self._try_lock(chat_id, 1):
                return False
            self._held.add(chat_id)
        return True

    def is_held(self, chat_id: int) -> bool:
        """Return True if this process has locked a chat."""
        return chat_id in self._held

    def release(self, chat_id: int) -> None:
        """Unlock a chat, if it is locked."""
        if chat_id in self._held and self._file is not None:
            self._held.discard(chat_id)
            _unlock(self._file, chat_id, 1)

    def acquire_all(self) -> bool:
        """Lock all chats, until `close`; return False if another process has one locked."""
        return not self._path.exists() or self._try_lock(0, _ALL)

    def close(self) -> None:
        """Unlock all chats."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._held.clear()

    def _try_lock(self, start: int, length: int) -> bool:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(PermissionError, BlockingIOError):  # POSIX allows either for a lock held elsewhere
            _lock(self._file, start, length)
            return True
        return False
