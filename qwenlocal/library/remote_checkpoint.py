"""
What a checkpoint on a hub is, before its weights are fetched: its small files, and the headers of the large ones.

A safetensors file begins with the names, types and shapes of its tensors, so that a few kilobytes of a checkpoint of
gigabytes tell whether it can be converted, and what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.library.byte_source import ByteSource, RangesUnsupported
from qwenlocal.library.http import TransferError, with_retries
from qwenlocal.library.resolver import FileRequest, ResolvedCheckpoint
from qwenlocal.library.store import StoredFile
from qwenlocal.weights.safetensors import Front, read_front


@dataclass(frozen=True)
class RemoteCheckpoint:
    """
    A checkpoint of which everything but the weights is here, in `located.folder`.

    `fronts` are the headers of the weights' files, None where the hub sends whole files only. `is_ours`: nobody else
    brought files of it.
    """

    located: ResolvedCheckpoint
    documents: Sequence[StoredFile]
    weights: Sequence[FileRequest]
    fronts: Sequence[Front] | None
    is_ours: bool

    @property
    def to_fetch(self) -> int:
        """Bytes of weights that are not here."""
        return sum(wanted.artifact.size for wanted in self.weights if not wanted.target.exists())

    @property
    def folder(self) -> Path:
        """Where the files are together."""
        return self.located.folder


def read_fronts(folder: Path, weights: Sequence[FileRequest]) -> list[Front] | None:
    """
    The headers of weights that may still be on the hub; `folder` is where they will be.

    Raises
    ------
    BadCheckpoint: one is damaged.
    TransferError: the hub does not answer.
    """
    try:
        return [_front(folder, wanted) for wanted in weights]
    except RangesUnsupported:
        return None


def write_front(wanted: FileRequest, path: Path, count: int) -> None:
    """
    The first `count` bytes of a file that is not here, as `path`: a file of the whole size, empty behind them.

    Raises
    ------
    TransferError, RangesUnsupported: no place sends parts of it.
    """
    size = wanted.artifact.size
    with path.open("wb") as file:
        file.write(_read(wanted.artifact.places, 0, min(count, size)))
        file.truncate(size)


def _front(folder: Path, wanted: FileRequest) -> Front:
    path, size = folder / wanted.artifact.name, wanted.artifact.size
    if wanted.target.exists():
        with wanted.target.open("rb") as file:
            return read_front(path, size, lambda start, end: (file.seek(start), file.read(end - start))[1])
    return read_front(path, size, lambda start, end: _read(wanted.artifact.places, start, end))


def _read(places: Sequence[ByteSource], start: int, end: int) -> bytes:
    """From the first place that has it."""
    for place in places[:-1]:
        try:
            return b"".join(place.read(start, end))
        except (TransferError, RangesUnsupported):
            continue
    return with_retries(lambda: b"".join(places[-1].read(start, end)))
