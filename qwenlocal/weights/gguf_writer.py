"""
Encoding of GGUF headers: metadata and tensor descriptions as bytes, with the offset of every tensor.

Format: ggml/docs/gguf.md, version 3, little-endian. A value is kept as the bytes that follow its key in the file (the
number of its type, then the value), so that values of another file can be copied unchanged.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwenlocal.ggml import TensorType
from qwenlocal.weights.gguf_reader import DEFAULT_ALIGNMENT, MAGIC, EncodedValue

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_VERSION = 3


class TensorSpec(NamedTuple):
    """A tensor of a GGUF file; its shape is in ggml's order, fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.type.row_bytes(math.prod(self.shape))


@dataclass(frozen=True)
class FileLayout:
    """The header of a file, the offset of each tensor (bytes from the start of the file), and the size of the file."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def u32(value: int) -> EncodedValue:
    """`u32(1)` is 04 00 00 00 01 00 00 00."""
    return struct.pack("<II", _U32, value)


def i32(value: int) -> EncodedValue:
    """Encode a signed integer."""
    return struct.pack("<Ii", _I32, value)


def f32(value: float) -> EncodedValue:
    """Encode a 4-byte float: 1e-6 reads back as 9.999999974752427e-07."""
    return struct.pack("<If", _F32, value)


def boolean(value: bool) -> EncodedValue:
    """Encode True or False as one byte."""
    return struct.pack("<I?", _BOOL, value)


def string(value: str) -> EncodedValue:
    """Encode text as UTF-8, preceded by its length."""
    return struct.pack("<I", _STRING) + _text(value)


def strings(values: Sequence[str]) -> EncodedValue:
    """Encode an array of strings."""
    data = [value.encode("utf-8", errors="replace") for value in values]
    chunks = [b""] * (2 * len(data))
    chunks[::2], chunks[1::2] = [_length(len(text)) for text in data], data
    return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(chunks)


def i32s(values: Sequence[int]) -> EncodedValue:
    """Encode an array of signed integers."""
    return struct.pack(f"<IIQ{len(values)}i", _ARRAY, _I32, len(values), *values)


def f32s(values: Sequence[float]) -> EncodedValue:
    """Encode an array of 4-byte floats."""
    return struct.pack(f"<IIQ{len(values)}f", _ARRAY, _F32, len(values), *values)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", errors="replace")
    return _length(len(data)) + data


@functools.lru_cache(maxsize=1024)  # the 300,000 strings of a vocabulary have few different lengths
def _length(count: int) -> bytes:
    return count.to_bytes(8, "little")


def make_layout(metadata: Mapping[str, EncodedValue], tensors: Sequence[TensorSpec]) -> FileLayout:
    """
    Lay out a file with this metadata and these tensors, in this order.

    One tensor of 8 float32 after a header of 100 bytes: it starts at byte 128 (a multiple of 32), the file has 160.
    """
    chunks = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        chunks += [_text(key), value]
    relative_offsets, end = list[int](), 0
    for tensor in tensors:
        relative_offsets.append(end)
        chunks.append(_tensor_info(tensor, end))
        end += _align(tensor.size)
    header = b"".join(chunks)
    header += bytes(_align(len(header)) - len(header))
    offsets = {tensor.name: len(header) + offset for tensor, offset in zip(tensors, relative_offsets, strict=True)}
    return FileLayout(header, offsets, len(header) + end)


def _tensor_info(tensor: TensorSpec, offset: int) -> bytes:
    count = len(tensor.shape)
    return _text(tensor.name) + struct.pack(f"<I{count}QIQ", count, *tensor.shape, tensor.type.number, offset)


def _align(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
