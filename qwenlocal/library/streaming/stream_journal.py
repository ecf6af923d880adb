"""
The journal of a streamed conversion: how far each file has been hashed, so that the next attempt continues there.

It is `<output>.part.stream`, in the format of `qwenlocal.resumable`. Numbers of an entry, the first of which is that of
the file:

    file                              everything about the file is void
    file size                         the whole file was hashed, and is the published one
    file offset state                 the SHA-256 up to `offset`: 28 numbers of 32 bits (`resumable_hash`)
    file offset size kind digest      a part of the file that was requested on its own (kind 0), or passed in order
                                      (kind 1), and the first four numbers of 32 bits of its SHA-256
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal import resumable
from qwenlocal.weights.safetensors import StoredTensor

_STATE, _DIGEST = struct.Struct("<28I"), struct.Struct("<4I")
_VERSION = 1

PartDigest = tuple[int, ...]


class PartOfFile(NamedTuple):
    """Bytes `offset` to `offset + size` of a file."""

    path: Path
    offset: int
    size: int

    @classmethod
    def of(cls, tensor: StoredTensor) -> PartOfFile:
        """Return the bytes of a tensor."""
        return cls(tensor.file, tensor.offset, tensor.size)

    @property
    def end(self) -> int:
        """The offset of the first byte behind it."""
        return self.offset + self.size


@dataclass
class FileProgress:
    """The bytes of a file that were hashed, the state of the digest, and digests of parts, requested and passed."""

    offset: int = 0
    state: bytes | None = None
    is_verified: bool = False
    requested: dict[PartOfFile, PartDigest] = field(default_factory=dict)
    passed: dict[PartOfFile, PartDigest] = field(default_factory=dict)


class StreamJournal:
    """The journal for the output `path`, of files with these fingerprints. It has no lock."""

    def __init__(self, path: Path, fingerprints: Mapping[Path, str]) -> None:
        self.path = path.with_name(path.name + ".part.stream")
        self._files = list(fingerprints)
        names = [[file.name, fingerprints[file]] for file in self._files]
        self._identity: dict[str, Any] = {"version": _VERSION, "files": names}
        self._appender: resumable.JournalAppender | None = None
        self._forgotten: set[Path] = set()

    def read(self) -> dict[Path, FileProgress]:
        """Return the progress of an earlier attempt with the same files; none if there was no such attempt."""
        progress = {file: FileProgress() for file in self._files}
        content = resumable.read_journal(self.path)
        if content is None or content.identity != self._identity:
            return progress
        for number, *entry in content.entries:
            if 0 <= number < len(self._files):
                path = self._files[number]
                progress[path] = _apply(progress[path], path, entry)
        return progress

    def begin(self, progress: Mapping[Path, FileProgress]) -> None:
        """Write a new journal with `progress`, and open it for appending."""
        resumable.write_journal(self.path, self._identity)
        self._appender = resumable.JournalAppender(self.path)
        for path, file in progress.items():
            for part, digest in file.requested.items():
                self.add_requested(part, digest)
            for part, digest in file.passed.items():
                self.add_passed(part, digest)
            if file.is_verified:
                self.add_verified(path, file.offset)
            elif file.state is not None:
                self.add_state(path, file.offset, file.state)

    def add_state(self, path: Path, offset: int, state: bytes) -> None:
        """Record the state of a file's digest."""
        self._append(path, offset, *_STATE.unpack(state))

    def add_verified(self, path: Path, size: int) -> None:
        """Record that a file is the published one."""
        self._append(path, size)

    def add_requested(self, part: PartOfFile, digest: PartDigest) -> None:
        """Record the digest of a part that was requested on its own."""
        self._append(part.path, part.offset, part.size, 0, *digest)

    def add_passed(self, part: PartOfFile, digest: PartDigest) -> None:
        """Record the digest of a part that passed in order."""
        self._append(part.path, part.offset, part.size, 1, *digest)

    def forget(self, path: Path) -> None:
        """Record that nothing of a file counts, because its bytes were wrong, whatever is added later."""
        self._append(path)
        self._forgotten.add(path)

    def close(self) -> None:
        """Close the journal, which stays on the disk."""
        if self._appender:
            self._appender.close()
            self._appender = None

    def remove(self) -> None:
        """Delete the journal."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, path: Path, *numbers: int) -> None:
        if self._appender and path not in self._forgotten:
            self._appender.append(self._files.index(path), *numbers)


def _apply(progress: FileProgress, path: Path, entry: Sequence[int]) -> FileProgress:
    """Return the progress of a file after one more entry; an entry that cannot be is ignored."""
    if not entry:
        return FileProgress()
    if any(number < 0 for number in entry):
        return progress
    offset, *rest = entry
    if not rest:
        progress.offset, progress.is_verified = offset, True
    elif len(rest) == _STATE.size // 4:
        progress.offset, progress.is_verified = offset, False
        progress.state = b"".join(struct.pack("<I", number & 0xFFFFFFFF) for number in rest)
    elif len(rest) == 2 + _DIGEST.size // 4:
        size, kind, *digest = rest
        (progress.passed if kind else progress.requested)[PartOfFile(path, offset, size)] = tuple(digest)
    return progress


def part_digest(sha256: bytes) -> PartDigest:
    """Return the digest of a part as the journal holds it."""
    return _DIGEST.unpack(sha256[: _DIGEST.size])
