"""
Headers of model files on a hub, read before the files are downloaded.

A safetensors file starts with the names, types and shapes of its tensors, so a few kilobytes of a multi-gigabyte
checkpoint tell if it can be converted, and what the result will be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from qwenlocal.library.byte_source import ByteSource, RangesUnsupported
from qwenlocal.library.http import TransferError, with_retries
from qwenlocal.library.resolver import FileRequest
from qwenlocal.weights.safetensors import RawHeader, read_raw_header


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
    """Read from the first source that delivers; after a failure, continue from the last byte."""
    data = bytearray()

    def read_rest(source: ByteSource) -> None:
        for chunk in source.read(start + len(data), end):
            data.extend(chunk)

    for source in sources[:-1]:
        with contextlib.suppress(TransferError, RangesUnsupported):
            read_rest(source)
            return bytes(data)
    while True:
        before = len(data)
        try:
            with_retries(lambda: read_rest(sources[-1]))
            return bytes(data)
        except TransferError as error:
            if not error.retryable or len(data) == before:
                raise
