"""
The header of a safetensors file: which tensors it holds and where they lie.

Layout (huggingface/safetensors, README, "Format"): the header's length as u64, little-endian; that many bytes of JSON,
`{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {…}}`; then the data, which the
offsets, counted from its beginning, cover without gaps and overlaps. Files come from strangers: nothing in the
header is believed before it was compared with the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qwenlocal.errors import BadCheckpoint

LONGEST_HEADER = 100_000_000  # what the format's own library allows

_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shape in the usual order (slowest first), and its bytes' place in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Front(NamedTuple):
    """A file of `size` bytes in a checkpoint, of which only the header may be here yet: its JSON, `text`."""

    path: Path
    size: int
    text: bytes


def read_tensors(path: Path) -> list[StoredTensor]:
    """
    Every tensor of a safetensors file, in the order in which they lie there.

    Raises
    ------
    BadCheckpoint: the file is cut off, or its header is damaged or contradicts the file.
    """
    try:
        size = path.stat().st_size
        if not (path.is_file() or path.is_dir()):  # opening a pipe waits for somebody who writes to it
            raise BadCheckpoint(path, "it is not a regular file")
        with path.open("rb") as file:
            return tensors_of(read_front(path, size, lambda start, end: _read(file, start, end)))
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def read_front(path: Path, size: int, read: Callable[[int, int], bytes]) -> Front:
    """
    The header of a file of `size` bytes that is, or will be, at `path`; `read(start, end)` gives bytes of it.

    Raises
    ------
    BadCheckpoint: the file begins with no header, or with one that is longer than the file.
    """
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > size - 8:
        raise BadCheckpoint(path, _too_short(read(0, min(64, size)), size, length))
    if length > LONGEST_HEADER:
        raise BadCheckpoint(path, f"its header would be {length:,} bytes long; {LONGEST_HEADER:,} are allowed")
    return Front(path, size, read(8, 8 + length))


def tensors_of(front: Front) -> list[StoredTensor]:
    """
    `read_tensors`, of a file whose header is known.

    Raises
    ------
    BadCheckpoint: the header is damaged or contradicts the file's size.
    """
    path, data = front.path, 8 + len(front.text)
    tensors = [_tensor(path, name, entry, data) for name, entry in _entries(path, front.text) if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    _check_cover(path, tensors, data, front.size)
    return tensors


def _too_short(begin: bytes, size: int, length: int) -> str:
    if begin.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the file itself; fetch it with: git lfs pull"
    if size == 0:
        return "the file is empty"
    return f"it is not a safetensors file, or cut off: a header of {length:,} bytes in a file of {size:,}"


def _entries(path: Path, text: bytes) -> list[tuple[str, Any]]:
    """The header's entries; a name that comes twice is not taken for one."""
    if not text.startswith(b"{"):
        raise BadCheckpoint(path, "its header is no JSON object; it is damaged, or no safetensors file")
    try:
        entries = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as reason:
        raise BadCheckpoint(path, f"its header is not readable JSON ({json_fault(reason)})") from reason
    if (twice := first_twice(name for name, _ in entries)) is not None:
        raise BadCheckpoint(path, f"its header names “{twice}” twice")
    return list(entries)


def first_twice(names: Iterable[str]) -> str | None:
    """The first of `names` that has come before; None where all differ."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def json_fault(reason: Exception) -> str:
    """Why JSON cannot be read, in words of its own where Python's are about Python."""
    if isinstance(reason, RecursionError):
        return "too many brackets within brackets"
    return "a number of thousands of digits" if "int_max_str_digits" in str(reason) else str(reason)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands there, duplicates and all."""


def _tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if not isinstance(entry, _Pairs):
        raise BadCheckpoint(path, f"the header's entry “{name}” is not a description of a tensor")
    fields = dict(entry)
    if len(fields) < len(entry):
        raise BadCheckpoint(path, f"the header's entry “{name}” says something twice")
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(span, list):
        raise BadCheckpoint(path, f"the header does not say what “{name}” is")
    if not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
        raise BadCheckpoint(path, f"the header describes “{name}” with impossible numbers")
    width = _WIDTHS.get(dtype)
    if width is None:
        raise BadCheckpoint(path, f"“{name}” is of type {dtype}, which the format does not know")
    begin, end = span
    needed = math.prod(shape) * width
    if end - begin != needed:
        raise BadCheckpoint(
            path, f"“{name}” is {dtype} {list(shape)}, {needed:,} bytes, but its place has {end - begin:,}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data + begin, needed)


def _are_counts(values: list[Any]) -> bool:
    """A JSON list, no object, of whole numbers that could be sizes."""
    return (
        type(values) is list
        and len(values) <= 16
        and all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 62 for number in values)
    )


def _check_cover(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    """The tensors follow each other without gaps and overlaps, to the very end of the file."""
    at = data
    for tensor in tensors:
        if tensor.offset < at:
            raise BadCheckpoint(path, f"“{tensor.name}” overlaps the tensor before it")
        if tensor.offset + tensor.size > size:
            raise BadCheckpoint(
                path,
                f"“{tensor.name}” would end at byte {tensor.offset + tensor.size:,}, but the file has {size:,}; it is "
                "cut off, or its header lies",
            )
        if tensor.offset > at:
            raise BadCheckpoint(path, f"{tensor.offset - at:,} bytes before “{tensor.name}” belong to no tensor")
        at += tensor.size
    if at < size:
        raise BadCheckpoint(path, f"{size - at:,} bytes at its end belong to no tensor")
