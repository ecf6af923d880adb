"""Data types of a download: the file and its sources, the policy, and the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.library.byte_source import ByteSource
from qwenlocal.library.partial_file import BLOCK_SIZE, FileIdentity
from qwenlocal.progress import TaskProgress


@dataclass(frozen=True)
class Section:
    """Bytes `start` to `end` of a file, and their SHA-256."""

    start: int
    end: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """
    A file to download: its name, size and digest, and its sources in order of preference.

    `sha256` is the digest of the whole file, None if none is published; a file published in pieces has the digests of
    the pieces in `sections`.
    """

    name: str
    size: int
    sha256: str | None
    sources: Sequence[ByteSource]
    sections: Sequence[Section] = ()
    etag: str | None = None
    model: str = ""

    @property
    def identity(self) -> FileIdentity:
        """The identity under which a partial download is resumed."""
        digest = self.sha256 or "+".join(section.sha256 for section in self.sections) or None
        return FileIdentity(self.name, self.size, digest, self.etag, self.model)


@dataclass(frozen=True)
class DownloadedFile:
    """A complete file: its digest, and the CRC-32 of each block of `DownloadPolicy.block_size` bytes."""

    path: Path
    sha256: str
    checksums: Sequence[int]


@dataclass(frozen=True)
class DownloadPolicy:
    """Parallel connections, seconds until a download is given up, and bytes per block."""

    connections: int = 4
    patience: float = 120.0  # since the last successful transfer
    first_patience: float = 4.0  # if no source was reachable at all
    block_size: int = BLOCK_SIZE


ReportProgress = Callable[[TaskProgress], None]
