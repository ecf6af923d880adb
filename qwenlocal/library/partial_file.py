"""
A file on its way: `<name>.part` holds the bytes, `<name>.part.journal` says which blocks of it are there.

The journal's first line describes the file, every further line one finished block and the CRC-32 of its bytes. Lines
are appended after the bytes were written; the checksum makes it safe to believe them after a crash or a power cut,
since whoever goes on reads the blocks again anyway to compute the whole file's digest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import CannotWrite, DiskFull
from qwenlocal.fileio import read_at, write_at

BLOCK = 16 << 20  # four blocks are under way at a time: at most 64 MiB are fetched twice after a crash
_READ = 1 << 20


class Identity(NamedTuple):
    """Which bytes a partial file collects. Two downloads share a partial file only if all of this is equal."""

    name: str
    size: int
    sha256: str | None
    etag: str | None = None
    model: str = ""  # what was asked for, for people


class Partial:
    """The blocks of one file, written in any order by several threads."""

    def __init__(self, base: Path, identity: Identity, *, block: int = BLOCK) -> None:
        """
        Open or begin `<base>.part`; what an earlier download of something else left there is thrown away.

        Raises
        ------
        CannotWrite: the folder does not allow it.
        """
        self._base, self.folder, self.identity, self.block = base, base.parent, identity, block
        self.path, self.journal_path = part_of(base), journal_of(base)
        self.count = -(-identity.size // block)
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._crc: dict[int, int] = {}
        try:
            fresh = not self._resume()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            if fresh:
                os.ftruncate(self._file, 0)
                self.journal_path.write_text(json.dumps({**identity._asdict(), "block": block}) + "\n")
            if sys.platform != "win32":  # there it would write zeros over the whole size
                os.ftruncate(self._file, identity.size)
            self._journal = self.journal_path.open("a", encoding="ascii")
        except OSError as reason:
            raise self._failure(reason) from reason

    def _failure(self, reason: OSError) -> DiskFull | CannotWrite:
        if reason.errno == errno.ENOSPC:
            return DiskFull(self.folder, self.identity.size - self.done, 0)
        return CannotWrite(self.folder, reason.strerror or str(reason))

    def _resume(self) -> bool:
        found = read_journal(self.journal_path)
        if found is None or not self.path.exists():
            return False
        identity, block, blocks = found
        if (identity.size, identity.sha256, identity.etag, block) != (
            self.identity.size,
            self.identity.sha256,
            self.identity.etag if self.identity.sha256 is None else identity.etag,
            self.block,
        ):
            return False
        self._crc = {number: crc for number, crc in blocks.items() if number < self.count}
        return True

    def span(self, number: int) -> tuple[int, int]:
        """The first byte of block `number` and the one after its last."""
        return number * self.block, min((number + 1) * self.block, self.identity.size)

    def has(self, number: int) -> bool:
        """Whether the block is there."""
        return number in self._crc

    def missing(self) -> list[int]:
        """The blocks still to be fetched, in order."""
        return [number for number in range(self.count) if number not in self._crc]

    @property
    def done(self) -> int:
        """Bytes in finished blocks."""
        with self._lock:
            return sum(end - start for start, end in map(self.span, self._crc))

    @property
    def checksums(self) -> list[int]:
        """The CRC-32 of every block, once all are there."""
        return [self._crc[number] for number in range(self.count)]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """
        Put bytes in their place.

        Raises
        ------
        DiskFull: there is no room for them.
        """
        view = memoryview(data)
        try:
            with (
                self._writing
            ):  # the kernel lets one thread write to a file at a time; the others would spin, not sleep
                while view:
                    written = write_at(self._file, view, offset, self._lock)
                    view, offset = view[written:], offset + written
        except OSError as reason:
            raise self._failure(reason) from reason

    def complete(self, number: int, crc: int) -> None:
        """Note that a block is there, `crc` being the CRC-32 of its bytes."""
        with self._lock:
            self._crc[number] = crc
        self._note(f"{number} {crc}\n")

    def forget(self, number: int) -> None:
        """The block turned out to be damaged; fetch it again."""
        with self._lock:
            self._crc.pop(number, None)
        self._note(f"{number} -1\n")

    def _note(self, line: str) -> None:
        try:
            with self._lock:
                self._journal.write(line)
                self._journal.flush()
        except OSError as reason:
            raise self._failure(reason) from reason

    def read(self, number: int) -> Iterator[memoryview]:
        """The bytes of a finished block; each piece is good until the next one is asked for."""
        start, end = self.span(number)
        buffer = memoryview(bytearray(min(_READ, end - start)))  # one for all: new memory each time is slow to get
        while start < end:
            count = read_at(self._file, buffer[: end - start], start, self._lock)
            if not count:
                return
            yield buffer[:count]
            start += count

    def intact(self, number: int) -> bool:
        """Whether the block's bytes still have the CRC-32 that the journal says."""
        crc = 0
        for data in self.read(number):
            crc = zlib.crc32(data, crc)
        return crc == self._crc.get(number)

    def sync(self) -> None:
        """Wait until everything written is on the disk itself."""
        try:
            getattr(os, "fdatasync", os.fsync)(self._file)
        except OSError as reason:
            raise self._failure(reason) from reason

    def publish(self, target: Path) -> None:
        """The file is whole: make it `target`, in one step, and drop the journal."""
        self.sync()
        self.close()
        try:
            self.path.replace(target)
        except OSError as reason:
            if reason.errno != errno.EXDEV:
                raise CannotWrite(target.parent, reason.strerror or str(reason)) from reason
            self._carry_over(target)
        self.journal_path.unlink(missing_ok=True)
        shutil.rmtree(scratch_of(self._base), ignore_errors=True)

    def _carry_over(self, target: Path) -> None:
        """`target` is on another disk: copy under another name first, so that it still appears in one step."""
        near = target.with_name(f"{target.name}.arriving")
        free = shutil.disk_usage(target.parent).free
        if free < self.identity.size:
            raise DiskFull(target.parent, self.identity.size, free)
        try:
            shutil.copyfile(self.path, near)
            with near.open("r+b") as copy:
                os.fsync(copy.fileno())
            near.replace(target)
        except OSError as reason:
            near.unlink(missing_ok=True)
            raise self._failure(reason) from reason
        self.path.unlink()

    def discard(self) -> None:
        """Throw everything away."""
        self.close()
        remove(self._base)

    def close(self) -> None:
        """Let go of the files; what is there stays."""
        with contextlib.suppress(OSError):
            self._journal.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def part_of(base: Path) -> Path:
    """Where the bytes are collected."""
    return base.with_name(base.name + ".part")


def journal_of(base: Path) -> Path:
    """Where it is noted which blocks are there."""
    return base.with_name(base.name + ".part.journal")


def scratch_of(base: Path) -> Path:
    """A folder for what a place needs on the way, for example the wheels that a file is cut in."""
    return base.with_name(base.name + ".wheels")


def lock_of(base: Path, locks: Path) -> Path:
    """The lock that whoever fetches this file holds."""
    return locks / f"{base.name[-60:]}-{zlib.crc32(os.fsencode(base)):08x}.lock"


def remove(base: Path) -> None:
    """Throw away a file on its way, with everything that belongs to it."""
    part_of(base).unlink(missing_ok=True)
    journal_of(base).unlink(missing_ok=True)
    shutil.rmtree(scratch_of(base), ignore_errors=True)


def read_journal(path: Path) -> tuple[Identity, int, dict[int, int]] | None:
    """
    What a journal says: the file, the size of a block, and the CRC-32 of each finished block.

    None where there is no journal or its first line is damaged. A torn or garbled line counts as not written, since
    the blocks it stands for are simply fetched again.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        first = json.loads(lines[0])
        identity = Identity(str(first["name"]), int(first["size"]), first["sha256"], first["etag"], str(first["model"]))
        block = int(first["block"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if block <= 0 or identity.size < 0:
        return None
    blocks: dict[int, int] = {}
    for line in lines[1:-1]:  # what follows the last line break was cut off while being written
        number, _, crc = line.partition(" ")
        if number.isdigit() and crc.removeprefix("-").isdigit():
            if int(crc) < 0:
                blocks.pop(int(number), None)
            else:
                blocks[int(number)] = int(crc)
    return identity, block, blocks


def write_journal(base: Path, identity: Identity, block: int, blocks: dict[int, int]) -> None:
    """Describe a partial file that came about otherwise, for example a damaged file of which most blocks are good."""
    lines = [json.dumps({**identity._asdict(), "block": block}), *(f"{number} {crc}" for number, crc in blocks.items())]
    journal_of(base).write_text("\n".join(lines) + "\n")
