"""File I/O at explicit offsets from several threads, atomic replacement, and hashes of whole files."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qwenlocal.errors import DiskFull, NotWritable

Lock = AbstractContextManager[Any]  # a lock or a reentrant one

_READ_SIZE = 1 << 20
_SAMPLES, _SAMPLE_SIZE = 16, 1 << 16  # parts of a file that `hash_samples` reads, and their bytes
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h

if hasattr(os, "preadv"):

    def _write_at(file: int, data: memoryview, offset: int, lock: Lock) -> int:
        return os.pwrite(file, data, offset)

    def read_at(file: int, buffer: memoryview, offset: int, lock: Lock) -> int:
        """Read into `buffer` from `offset` and return the number of bytes read, 0 at the end of the file."""
        return os.preadv(file, [buffer], offset)

else:  # Windows has neither: seek and write under the lock

    def _write_at(file: int, data: memoryview, offset: int, lock: Lock) -> int:
        with lock:
            os.lseek(file, offset, os.SEEK_SET)
            return os.write(file, data)

    def read_at(file: int, buffer: memoryview, offset: int, lock: Lock) -> int:
        with lock:
            os.lseek(file, offset, os.SEEK_SET)
            data = os.read(file, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def write_all(file: int, data: memoryview, offset: int, lock: Lock) -> None:
    """Write all of `data` at `offset`."""
    while data:
        written = _write_at(file, data, offset, lock)
        data, offset = data[written:], offset + written


def write_error(folder: Path, reason: OSError, missing: int) -> DiskFull | NotWritable:
    """Build the error for a failed write to `folder`; `missing` bytes are still to be written."""
    if reason.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return DiskFull(folder, missing, shutil.disk_usage(folder).free)
    if reason.errno == errno.EFBIG:
        return NotWritable(folder, "it does not allow files of this size")
    return NotWritable(folder, reason.strerror or str(reason))


def replace_text(path: Path, text: str, *, hint: str = "") -> None:
    """
    Write `text` next to `path` and rename it, so that the file is never incomplete.

    Raises
    ------
    NotWritable: the folder cannot be written; with this hint.
    """
    replace_file(path, text.encode("utf-8", errors="replace"), hint=hint)


def replace_file(path: Path, data: bytes, *, hint: str = "") -> None:
    """Write `data` as `replace_text` writes text."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise NotWritable(path.parent, error.strerror or str(error), hint=hint) from error


def start_writeback(file: int) -> bool:
    """
    Ask the disk to start writing the dirty pages of `file`; return False if that is unsupported or refused.

    Returns once the request is queued, which can take a while on a busy disk. Linux only (sync_file_range): fdatasync
    would also work, but delays every read that is waiting for the disk.
    """
    sync_file_range = _sync_file_range()
    return sync_file_range is not None and sync_file_range(file, 0, 0, _SYNC_FILE_RANGE_WRITE) == 0


@functools.cache
def _sync_file_range() -> Any | None:
    import ctypes  # 2 ms, which `list` does not need

    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def hash_file(path: Path, report: Callable[[int], object] = lambda _done: None) -> str:
    """Return the SHA-256 of a file; `report` gets the number of bytes read so far."""
    return hash_blocks(path, 0, report)[0]


def hash_blocks(
    path: Path, block_size: int, report: Callable[[int], object] = lambda _done: None
) -> tuple[str, list[int]]:
    """Return the SHA-256 of a file and the CRC-32 of each block of `block_size` bytes (no CRCs if that is 0)."""
    import hashlib

    digest, checksums, done, crc = hashlib.sha256(), list[int](), 0, 0
    read_size = min(_READ_SIZE, block_size) if block_size else _READ_SIZE
    with path.open("rb") as file:
        while data := file.read(read_size):
            digest.update(data)
            done += len(data)
            if block_size:
                crc = zlib.crc32(data, crc)
                if done % block_size == 0:
                    checksums.append(crc)
                    crc = 0
            report(done)
    if block_size and done % block_size:
        checksums.append(crc)
    return digest.hexdigest(), checksums


def hash_samples(file: Path | int) -> str:
    """Hash the size of a file and samples over its length: enough to tell it from others without reading all of it."""
    import hashlib

    with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened:
        size = os.fstat(opened.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for number in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_SIZE) * number // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_SIZE))
    return digest.hexdigest()


def fingerprint_file(file: Path | int) -> str:
    """
    Hash evidence of changes to a file that is cheap to read: samples of its contents, and its times.

    The time of modification can be set, and copying programs set it; the system alone sets the time of change of the
    inode. The inode's number does not help: exFAT and FUSE give out new ones after a restart.
    """
    state = os.stat(file)  # noqa: PTH116 - Path.stat takes no descriptor
    return f"{hash_samples(file)} {state.st_mtime_ns} {state.st_ctime_ns}"


def describe_pointer(begin: bytes) -> str:
    """Return what a file is that begins with `begin` if git-lfs left a pointer in its place; otherwise ""."""
    is_pointer = begin.startswith(b"version https://git-lfs")
    return "it is a git-lfs pointer, not the file itself; fetch it with: git lfs pull" if is_pointer else ""


def git_blob_sha1(path: Path) -> str:
    """Return git's hash of a small file, which is all a hub states for it: sha1 of "blob SIZE\\0" and the bytes."""
    import hashlib

    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
