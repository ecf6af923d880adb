"""
Checkpoints on a hub before their weights are downloaded: the small files, and the headers of the large ones.

A safetensors file starts with the names, types and shapes of its tensors, so a few kilobytes of a multi-gigabyte
checkpoint tell if it can be converted, and what the result will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.library.byte_source import ByteSource, RangesUnsupported
from qwenlocal.library.http import TransferError, with_retries
from qwenlocal.library.resolver import FileRequest, ResolvedModel
from qwenlocal.library.store import StoredFile
from qwenlocal.weights.safetensors import RawHeader, read_raw_header


@dataclass(frozen=True)
class RemoteCheckpoint:
    """
    A checkpoint whose small files are in `resolved.folder`, and whose weights may still be on the hub.

    `headers` are the headers of the weight files, None if the hub only sends whole files. `is_ours`: no other program
    downloaded files of it.
    """

    resolved: ResolvedModel
    documents: Sequence[StoredFile]
    weights: Sequence[FileRequest]
    headers: Sequence[RawHeader] | None
    is_ours: bool

    @property
    def missing_size(self) -> int:
        """Bytes of weights that are not on this disk."""
        return sum(request.artifact.size for request in self.weights if not request.target.exists())


def read_headers(folder: Path, weights: Sequence[FileRequest]) -> list[RawHeader] | None:
    """
    Read the headers of weight files on the hub or in `folder`; None if the hub only sends whole files.

    Raises
    ------
    BadCheckpoint: a header is damaged.
    TransferError: the hub does not respond.
    """
    try:
        return [_read_header(folder, request) for request in weights]
    except RangesUnsupported:
        return None


def write_prefix(request: FileRequest, path: Path, count: int) -> None:
    """
    Write the first `count` bytes of a remote file to `path`, as a sparse file of the full size.

    Raises
    ------
    TransferError, RangesUnsupported: no source sends parts of the file.
    """
    size = request.artifact.size
    with path.open("wb") as file:
        file.write(_read_range(request.artifact.sources, 0, min(count, size)))
        file.truncate(size)


def _read_header(folder: Path, request: FileRequest) -> RawHeader:
    path, size = folder / request.artifact.name, request.artifact.size
    if request.target.exists():
        with request.target.open("rb") as file:
            return read_raw_header(path, size, lambda start, end: (file.seek(start), file.read(end - start))[1])
    return read_raw_header(path, size, lambda start, end: _read_range(request.artifact.sources, start, end))


def _read_range(sources: Sequence[ByteSource], start: int, end: int) -> bytes:
    """Read from the first source that delivers."""
    for source in sources[:-1]:
        try:
            return b"".join(source.read(start, end))
        except (TransferError, RangesUnsupported):
            continue
    return with_retries(lambda: b"".join(sources[-1].read(start, end)))
