"""
Partial downloads: resumable files (see `resumable`) whose blocks arrive in any order, each from its start to its end.

The first line of the journal is the identity of the file and the block size. Each further line is a block number, the
CRC-32 of the bytes that have arrived, and their number (may be left out if the block is complete). Checking the CRC-32
costs nothing: resuming reads every block anyway to hash the whole file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import DiskFull, NotWritable
from qwenlocal.fileio import read_at, write_all, write_error
from qwenlocal.resumable import JournalAppender, journal_path, part_path, read_journal, write_journal

BLOCK_SIZE = 16 << 20
_READ_SIZE = 1 << 20


class FileIdentity(NamedTuple):
    """The identity of a file being downloaded; a partial file is resumed only for the same size and digest or ETag."""

    name: str
    size: int
    sha256: str | None
    etag: str | None = None
    model: str = ""  # model name, for display


class BlockPrefix(NamedTuple):
    """The bytes of a block that have arrived: how many, from its start, and their CRC-32."""

    length: int = 0
    crc: int = 0


class DownloadJournal(NamedTuple):
    """The content of a journal: the file, the block size, and what has arrived of each block."""

    identity: FileIdentity
    block_size: int
    prefixes: dict[int, BlockPrefix]

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return sum(prefix.length for prefix in self.prefixes.values())


class PartialFile:
    """The blocks of one file, written by several threads."""

    def __init__(self, base: Path, identity: FileIdentity, *, block_size: int = BLOCK_SIZE) -> None:
        """
        Open or create `<base>.part`; the remains of a different file there are deleted.

        Raises
        ------
        NotWritable: the folder cannot be written.
        """
        from qwenlocal.huge_pages import PageCacheReservation  # 2 ms, which `list` need not spend

        self._base, self.folder, self.identity, self.block_size = base, base.parent, identity, block_size
        self.path, self.journal_path = part_path(base), journal_path(base)
        self.count = -(-identity.size // block_size)
        # The kernel lets one thread write to a file at a time; without a lock the others would spin.
        self._lock = threading.RLock()
        self._prefixes = [BlockPrefix()] * self.count
        self._unrecorded: set[int] = set()
        with self._write_errors():
            resumed = self._resume()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            if not resumed:
                os.ftruncate(self._file, 0)
                write_download_journal(base, identity, block_size, {})
            if sys.platform != "win32":  # where it would write zeros over the whole size
                os.ftruncate(self._file, identity.size)
            self._reservation = PageCacheReservation(self._file)
            self._journal = JournalAppender(self.journal_path)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as reason:
            raise write_error(self.folder, reason, self.identity.size - self.done) from reason

    def _resume(self) -> bool:
        journal = read_download_journal(self.journal_path)
        if journal is None or not self.path.exists():
            return False
        old, new = journal.identity, self.identity
        if (old.size, old.sha256, journal.block_size) != (new.size, new.sha256, self.block_size):
            return False
        if new.sha256 is None and old.etag != new.etag:
            return False
        for number, prefix in journal.prefixes.items():
            self._prefixes[number] = prefix
        return True

    def span(self, number: int) -> tuple[int, int]:
        """Return the start and end (exclusive) of block `number` in bytes."""
        return number * self.block_size, min((number + 1) * self.block_size, self.identity.size)

    def rest(self, number: int) -> tuple[int, int]:
        """Return the start and end of the bytes of a block that have not arrived."""
        start, end = self.span(number)
        return start + self._prefixes[number].length, end

    def has(self, number: int) -> bool:
        """Return True if the block is complete."""
        start, end = self.rest(number)
        return start == end

    def missing(self) -> list[int]:
        """Return the incomplete blocks, in order."""
        return [number for number in range(self.count) if not self.has(number)]

    def begun(self) -> list[int]:
        """Return the blocks of which any byte has arrived."""
        return [number for number, prefix in enumerate(self._prefixes) if prefix.length]

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return sum(prefix.length for prefix in self._prefixes)

    @property
    def checksums(self) -> list[int]:
        """The CRC-32 of every block, once all are complete."""
        return [prefix.crc for prefix in self._prefixes]

    def write(self, offset: int, data: bytes | memoryview) -> list[int]:
        """
        Write bytes that belong at `offset`, and return the blocks that they extend.

        Bytes that have arrived before, or do not follow directly those of their block, are ignored.

        Raises
        ------
        DiskFull: there is no space.
        """
        data, extended = memoryview(data), []
        while data:
            number = offset // self.block_size
            part = data[: self.span(number)[1] - offset]
            with self._write_errors(), self._lock:
                position, _ = self.rest(number)
                new = part[max(0, position - offset) :]
                if offset <= position and new:
                    self._reservation.reserve(position, len(new))
                    write_all(self._file, new, position, self._lock)
                    prefix = self._prefixes[number]
                    self._set(number, BlockPrefix(prefix.length + len(new), zlib.crc32(new, prefix.crc)))
                    extended.append(number)
            data, offset = data[len(part) :], offset + len(part)
        return extended

    def forget(self, number: int) -> None:
        """Mark a block as missing, because its bytes are damaged."""
        self._set(number, BlockPrefix())

    def _set(self, number: int, prefix: BlockPrefix) -> None:
        with self._lock:
            self._prefixes[number] = prefix
            self._unrecorded.add(number)

    def record(self) -> None:
        """
        Record the data that has arrived since the last call in the journal; a crash loses only unrecorded data.

        Raises
        ------
        DiskFull: there is no space.
        """
        with self._write_errors(), self._lock:
            for number in self._unrecorded:
                prefix = self._prefixes[number]
                self._journal.append(number, prefix.crc, prefix.length)
            self._unrecorded.clear()

    def read(self, number: int) -> Iterator[memoryview]:
        """Yield the bytes of a complete block; each chunk is valid until the next one is requested."""
        start, end = self.span(number)
        buffer = memoryview(bytearray(min(_READ_SIZE, end - start)))  # reused: allocating per chunk is slow
        while start < end:
            count = read_at(self._file, buffer[: end - start], start, self._lock)
            if not count:
                return
            yield buffer[:count]
            start += count

    def is_intact(self, number: int) -> bool:
        """Return True if the block's bytes still have the CRC-32 in the journal."""
        crc = 0
        for data in self.read(number):
            crc = zlib.crc32(data, crc)
        return crc == self._prefixes[number].crc

    def sync(self) -> None:
        """Flush everything written to the disk."""
        with self._write_errors():
            getattr(os, "fdatasync", os.fsync)(self._file)

    def publish(self, target: Path) -> None:
        """Move the complete file to `target` in one step, and delete the journal."""
        self.sync()
        self.close()
        try:
            self.path.replace(target)
        except OSError as reason:
            if reason.errno != errno.EXDEV:
                raise NotWritable(target.parent, reason.strerror or str(reason)) from reason
            self._copy_to_other_disk(target)
        self.journal_path.unlink(missing_ok=True)
        shutil.rmtree(scratch_folder(self._base), ignore_errors=True)

    def _copy_to_other_disk(self, target: Path) -> None:
        """Copy to a temporary name on the other disk first, so that `target` appears in one step."""
        temporary = target.with_name(f"{target.name}.arriving")
        free = shutil.disk_usage(target.parent).free
        if free < self.identity.size:
            raise DiskFull(target.parent, self.identity.size, free)
        with self._write_errors():
            try:
                shutil.copyfile(self.path, temporary)
                with temporary.open("r+b") as copy:
                    os.fsync(copy.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        self.path.unlink()

    def discard(self) -> None:
        """Close and delete the partial file."""
        self.close()
        remove_partial(self._base)

    def close(self) -> None:
        """Record what has arrived, and close the files; their content stays."""
        with self._lock:  # a thread that is left behind may be writing
            file, self._file = self._file, -1
        if file < 0:
            return
        try:
            self.record()
        finally:
            with contextlib.suppress(OSError):
                self._journal.close()
            self._reservation.close()
            os.close(file)


def scratch_folder(base: Path) -> Path:
    """Return the folder for temporary files of a byte source, such as the wheels that contain the file."""
    return base.with_name(base.name + ".wheels")


def lock_path(base: Path, locks: Path) -> Path:
    """Return the path of the lock that a process holds while it downloads the file."""
    return locks / f"{base.name[-60:]}-{zlib.crc32(os.fsencode(base)):08x}.lock"


def remove_partial(base: Path) -> None:
    """Delete a partial file, its journal and its temporary files."""
    part_path(base).unlink(missing_ok=True)
    journal_path(base).unlink(missing_ok=True)
    shutil.rmtree(scratch_folder(base), ignore_errors=True)


def read_download_journal(path: Path) -> DownloadJournal | None:
    """Read the journal of a partial download; None if there is none or its first line is damaged."""
    content = read_journal(path)
    if content is None:
        return None
    first = content.identity
    try:
        identity = FileIdentity(
            str(first["name"]), int(first["size"]), first["sha256"], first["etag"], str(first["model"])
        )
        block_size = int(first["block"])
    except (ValueError, KeyError, TypeError):
        return None
    if block_size <= 0 or identity.size < 0:
        return None
    prefixes: dict[int, BlockPrefix] = {}
    for number, crc, *lengths in (entry for entry in content.entries if 2 <= len(entry) <= 3):
        full_length = min(block_size, identity.size - number * block_size)
        length = lengths[0] if lengths else full_length
        if number >= 0 and full_length > 0 and 0 <= length <= full_length:
            prefixes[number] = BlockPrefix(length, crc)
    return DownloadJournal(identity, block_size, prefixes)


def write_download_journal(base: Path, identity: FileIdentity, block_size: int, checksums: Mapping[int, int]) -> None:
    """Write a journal with the CRC-32 of complete blocks, such as those of a damaged file that are still good."""
    write_journal(journal_path(base), {**identity._asdict(), "block": block_size}, checksums.items())
