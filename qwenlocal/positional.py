"""Reading and writing at a place in a file, from several threads at once."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from typing import Any

_WRITE = 2  # linux/fs.h: SYNC_FILE_RANGE_WRITE

if hasattr(os, "preadv"):

    def write_at(file: int, data: memoryview, offset: int, lock: threading.Lock) -> int:
        """Write some of `data` at `offset`; returns how many bytes."""
        return os.pwrite(file, data, offset)

    def read_at(file: int, buffer: memoryview, offset: int, lock: threading.Lock) -> int:
        """Fill some of `buffer` from `offset` on; returns how many bytes, 0 at the file's end."""
        return os.preadv(file, [buffer], offset)

else:  # Windows has neither; seek and write under the lock

    def write_at(file: int, data: memoryview, offset: int, lock: threading.Lock) -> int:
        """Write some of `data` at `offset`; returns how many bytes."""
        with lock:
            os.lseek(file, offset, os.SEEK_SET)
            return os.write(file, data)

    def read_at(file: int, buffer: memoryview, offset: int, lock: threading.Lock) -> int:
        """Fill some of `buffer` from `offset` on; returns how many bytes, 0 at the file's end."""
        with lock:
            os.lseek(file, offset, os.SEEK_SET)
            data = os.read(file, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def begin_to_write(file: int) -> bool:
    """
    Ask the disk to begin with what was written to `file`; False where there is no such request, or it was refused.

    It is waited for only until the disk takes the request, which a busy one may let take a while.

    Linux alone has one (sync_file_range). fdatasync would do, but goes before whatever somebody wants to read.
    """
    request = _sync_file_range()
    return request is not None and request(file, 0, 0, _WRITE) == 0


@functools.cache
def _sync_file_range() -> Any | None:
    if not sys.platform.startswith("linux"):
        return None
    request = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if request is not None:
        request.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return request
