"""Reading and writing at a place in a file, from several threads at once."""

from __future__ import annotations

import os
import threading

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
