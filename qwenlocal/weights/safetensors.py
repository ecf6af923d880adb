"""
Headers of safetensors files: tensors and where their data is.

Format (huggingface/safetensors, README, "Format"): the length of the header as u64, little-endian; that many bytes of
JSON, `{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {…}}`; then the data, which
the offsets, relative to its start, cover without gaps and overlaps. Files may be malicious: every number in the header
is checked against the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qwenlocal.errors import BadCheckpoint
from qwenlocal.fileio import describe_pointer
from qwenlocal.weights.json_files import describe_json_error, find_duplicate, is_integer

MAX_HEADER_SIZE = 100_000_000  # the limit of the format's own library

_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: its shape with the slowest dimension first, as in PyTorch, and where in `file` its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


class RawHeader(NamedTuple):
    """The header of a file of `size` bytes, as JSON `text`; the rest of the file may not be downloaded yet."""

    path: Path
    size: int
    text: bytes


def read_tensors(path: Path) -> list[StoredTensor]:
    """
    List the tensors of a safetensors file by offset.

    Raises
    ------
    BadCheckpoint: the file cannot be read or is incomplete, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        if not (path.is_file() or path.is_dir()):  # opening a pipe would wait for a writer
            raise BadCheckpoint(path, "it is not a regular file")
        with path.open("rb") as file:
            return parse_header(read_raw_header(path, size, lambda start, end: _read(file, start, end)))
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def read_raw_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> RawHeader:
    """
    Read the header of a file of `size` bytes at `path`; `read(start, end)` returns its bytes, from disk or network.

    Raises
    ------
    BadCheckpoint: the file does not start with a header, or the header is longer than the file.
    """
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > size - 8:
        raise BadCheckpoint(path, _describe_short_file(read(0, min(64, size)), size, length))
    if length > MAX_HEADER_SIZE:
        raise BadCheckpoint(path, f"its header would have {length:,} bytes; the limit is {MAX_HEADER_SIZE:,}")
    return RawHeader(path, size, read(8, 8 + length))


def parse_header(header: RawHeader) -> list[StoredTensor]:
    """
    List the tensors that a header describes, by offset.

    Raises
    ------
    BadCheckpoint: the header is damaged or contradicts the file's size.
    """
    path, start = header.path, 8 + len(header.text)
    entries = _parse_entries(path, header.text)
    tensors = [_parse_tensor(path, name, entry, start) for name, entry in entries if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    _check_coverage(path, tensors, start, header.size)
    return tensors


def _describe_short_file(begin: bytes, size: int, length: int) -> str:
    if pointer := describe_pointer(begin):
        return pointer
    if size == 0:
        return "the file is empty"
    return f"it is not a safetensors file, or incomplete: a header of {length:,} bytes in a file of {size:,}"


def _parse_entries(path: Path, text: bytes) -> list[tuple[str, Any]]:
    """Return the entries of the header; duplicate names are an error."""
    if not text.startswith(b"{"):
        raise BadCheckpoint(path, "its header is not a JSON object; it is damaged, or not a safetensors file")
    try:
        entries = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as reason:
        raise BadCheckpoint(path, f"its header is not valid JSON ({describe_json_error(reason)})") from reason
    if (duplicate := find_duplicate(name for name, _ in entries)) is not None:
        raise BadCheckpoint(path, f"its header names “{duplicate}” twice")
    return list(entries)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, with duplicates."""


def _parse_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, _Pairs):
        raise BadCheckpoint(path, f"the header's entry “{name}” is not a description of a tensor")
    fields = dict(entry)
    if len(fields) < len(entry):
        raise BadCheckpoint(path, f"the header's entry “{name}” has a duplicate field")
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(span, list):
        raise BadCheckpoint(path, f"the header's description of “{name}” is incomplete")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise BadCheckpoint(path, f"the header's description of “{name}” has impossible numbers")
    width = _WIDTHS.get(dtype)
    if width is None:
        raise BadCheckpoint(path, f"“{name}” has the type {dtype}, which the format does not have")
    begin, end = span
    size = math.prod(shape) * width
    if end - begin != size:
        raise BadCheckpoint(
            path, f"“{name}” is {dtype} {list(shape)}, which takes {size:,} bytes, but its offsets span {end - begin:,}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, start + begin, size)


def _are_sizes(values: list[Any]) -> bool:
    """Return True for a JSON list, not an object, of integers that can be sizes."""
    return (
        type(values) is list
        and len(values) <= 16
        and all(is_integer(number) and 0 <= number < 1 << 62 for number in values)
    )


def _check_coverage(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Check that the tensors follow each other without gaps and overlaps up to the end of the file."""
    end = start
    for tensor in tensors:
        if tensor.offset < end:
            raise BadCheckpoint(path, f"“{tensor.name}” overlaps the tensor before it")
        if tensor.offset + tensor.size > size:
            raise BadCheckpoint(
                path,
                f"“{tensor.name}” would end at byte {tensor.offset + tensor.size:,}, but the file has {size:,}; it is "
                "incomplete, or its header is wrong",
            )
        if tensor.offset > end:
            raise BadCheckpoint(path, f"{tensor.offset - end:,} bytes before “{tensor.name}” belong to no tensor")
        end += tensor.size
    if end < size:
        raise BadCheckpoint(path, f"{size - end:,} bytes at its end belong to no tensor")
