"""
Writing a GGUF header: values and tensor descriptions to bytes, with the place of every tensor known beforehand.

Layout: ggml/docs/gguf.md, version 3, little-endian. A value is kept as the bytes that stand in the file after its key
(its type's number, then itself), so what another file says can be carried over untouched.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwenlocal.ggml import TensorType
from qwenlocal.weights.header import DEFAULT_ALIGNMENT, MAGIC, SCALARS

Encoded = bytes  # a value's type and the value itself

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_VERSION = 3


class Described(NamedTuple):
    """A tensor to be: its shape in ggml's order, fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size(self) -> int:
        """Bytes of its data."""
        columns, *rows = self.shape
        total = self.type.row_bytes(columns)
        for count in rows:
            total *= count
        return total


@dataclass(frozen=True)
class Layout:
    """A file to be: its header, where each tensor begins in it (bytes from the file's start), and its whole size."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def u32(value: int) -> Encoded:
    """`u32(1)` is 04 00 00 00 01 00 00 00."""
    return struct.pack("<II", _U32, value)


def i32(value: int) -> Encoded:
    """A whole number that may be negative."""
    return struct.pack("<Ii", _I32, value)


def f32(value: float) -> Encoded:
    """A float of four bytes: 1e-6 reads back as 9.999999974752427e-07."""
    return struct.pack("<If", _F32, value)


def boolean(value: bool) -> Encoded:
    """True or False, one byte."""
    return struct.pack("<I?", _BOOL, value)


def string(value: str) -> Encoded:
    """Text as UTF-8, its length before it."""
    return struct.pack("<I", _STRING) + _text(value)


def strings(values: Sequence[str]) -> Encoded:
    """A list of texts."""
    data = [value.encode("utf-8", errors="replace") for value in values]
    parts = [b""] * (2 * len(data))
    parts[::2], parts[1::2] = [_length(len(text)) for text in data], data
    return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(parts)


def i32s(values: Sequence[int]) -> Encoded:
    """A list of whole numbers."""
    return struct.pack(f"<IIQ{len(values)}i", _ARRAY, _I32, len(values), *values)


def f32s(values: Sequence[float]) -> Encoded:
    """A list of floats."""
    return struct.pack(f"<IIQ{len(values)}f", _ARRAY, _F32, len(values), *values)


def decode(encoded: Encoded) -> Any:
    """The value: `decode(u32(7))` is 7, `decode(strings(["a"]))` is ["a"]."""
    (kind,) = struct.unpack_from("<I", encoded)
    if kind == _STRING:
        return encoded[12:].decode("utf-8", errors="replace")
    if kind != _ARRAY:
        return struct.unpack_from(SCALARS[kind], encoded, 4)[0]
    element, count = struct.unpack_from("<IQ", encoded, 4)
    if element != _STRING:
        return list(struct.unpack_from(f"<{count}{SCALARS[element][1:]}", encoded, 16))
    found, at = [], 16
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", encoded, at)
        found.append(encoded[at + 8 : at + 8 + size].decode("utf-8", errors="replace"))
        at += 8 + size
    return found


def _text(value: str) -> bytes:
    data = value.encode("utf-8", errors="replace")
    return _length(len(data)) + data


@functools.lru_cache(maxsize=1024)  # a vocabulary has 300,000 texts of a few lengths
def _length(count: int) -> bytes:
    return count.to_bytes(8, "little")


def lay_out(metadata: Mapping[str, Encoded], tensors: Sequence[Described]) -> Layout:
    """
    The header of a file with these values and tensors, in this order, and where everything goes.

    One tensor of 8 float32 after a header of 100 bytes: it begins at byte 128 (a multiple of 32), the file has 160.
    """
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), value]
    relative, at = list[int](), 0
    for tensor in tensors:
        relative.append(at)
        parts.append(_description(tensor, at))
        at += _aligned(tensor.size)
    header = b"".join(parts)
    header += bytes(_aligned(len(header)) - len(header))
    offsets = {tensor.name: len(header) + offset for tensor, offset in zip(tensors, relative, strict=True)}
    return Layout(header, offsets, len(header) + at)


def _description(tensor: Described, offset: int) -> bytes:
    count = len(tensor.shape)
    return _text(tensor.name) + struct.pack(f"<I{count}QIQ", count, *tensor.shape, tensor.type.number, offset)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
