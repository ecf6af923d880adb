"""Locks that tell which chats are open: chat N is open while byte N of a file next to the journal is locked."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import ClassVar

_EVERY_CHAT = 0  # in place of a chat's number, which is 1 or more

if sys.platform == "win32":
    import msvcrt

    _WHOLE_FILE = 2**31 - 1  # the longest range that `locking` accepts

    def _lock(file: int, start: int, length: int) -> None:
        os.lseek(file, start, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, length)

    def _unlock(file: int, start: int, length: int) -> None:
        os.lseek(file, start, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, length)

else:
    import fcntl

    _WHOLE_FILE = 0  # to the end of the file, however long it becomes

    def _lock(file: int, start: int, length: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)

    def _unlock(file: int, start: int, length: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)


class ChatLocks:
    """
    Locks on the chats of a journal; `path` is the file that carries them.

    The system removes them when the process ends, however it ends; a process number in the journal would outlive it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _LockFile | None = None
        self._held: set[int] = set()

    def acquire(self, chat_id: int) -> bool:
        """
        Lock a chat; return False if another process, or another object in this one, has it locked.

        Raises
        ------
        OSError: the file cannot be opened.
        """
        if chat_id not in self._held:
            self._file = self._file or _LockFile.open(self._path)
            if not self._file.lock(chat_id):
                return False
            self._held.add(chat_id)
        return True

    def is_held(self, chat_id: int) -> bool:
        """Return True if this object has locked a chat."""
        return chat_id in self._held

    def release(self, chat_id: int) -> None:
        """Unlock a chat, if it is locked."""
        if chat_id in self._held and self._file is not None:
            self._held.discard(chat_id)
            self._file.unlock(chat_id)

    def acquire_all(self) -> bool:
        """Lock all chats, until `close`; return False if one of them is locked elsewhere."""
        return not self._path.exists() or self.acquire(_EVERY_CHAT)

    def close(self) -> None:
        """Unlock all chats."""
        if self._file is not None:
            for chat_id in list(self._held):
                self.release(chat_id)
            self._file.close()
            self._file = None


class _LockFile:
    """
    The open file with the locks, which all `ChatLocks` of this process share.

    POSIX grants a process a lock that it has already, and drops all its locks on a file when it closes any descriptor
    of that file (fcntl(2)). So there is one descriptor, and a note of what is locked through it.
    """

    _files: ClassVar[dict[Path, _LockFile]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self._path, self._users, self._locked = path, 0, set[int]()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    @classmethod
    def open(cls, path: Path) -> _LockFile:
        """Return the file at `path`, for one more user."""
        path = path.resolve()
        with cls._guard:
            file = cls._files.get(path) or cls._files.setdefault(path, cls(path))
            file._users += 1
            return file

    def close(self) -> None:
        """Close the file if this was its last user."""
        with self._guard:
            self._users -= 1
            if not self._users:
                del self._files[self._path]
                os.close(self._descriptor)

    def lock(self, chat_id: int) -> bool:
        """Lock a chat, or every one; return False if it is locked already."""
        with self._guard, contextlib.suppress(PermissionError, BlockingIOError):  # POSIX allows either
            if not self._locked.isdisjoint((chat_id, _EVERY_CHAT)) or (chat_id == _EVERY_CHAT and self._locked):
                return False
            _lock(self._descriptor, chat_id, _length(chat_id))
            self._locked.add(chat_id)
            return True
        return False

    def unlock(self, chat_id: int) -> None:
        """Unlock what `lock` has locked."""
        with self._guard:
            self._locked.discard(chat_id)
            _unlock(self._descriptor, chat_id, _length(chat_id))


def _length(chat_id: int) -> int:
    return _WHOLE_FILE if chat_id == _EVERY_CHAT else 1
