"""Bindings for libggml: tensor types, and the functions that quantize rows."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.ggml_library import GgufParams, base_library, find_kernel, load_library

if TYPE_CHECKING:
    import numpy

Address = int

_TYPE_COUNT = 43  # ggml.h: GGML_TYPE_COUNT of the pinned llama.cpp
_MAX_OPERATIONS = 64  # matrix products come early in ggml.h's enum ggml_op
_BUFFER_OFFSET = 8  # of `buffer` in ggml.h's struct ggml_tensor
_INFINITY_BITS = 0x7F800000  # float32: these bits and higher ones are infinity or NaN


class TensorType(NamedTuple):
    """
    A data type of ggml's tensors: a block of `block_size` numbers takes `type_size` bytes.

    `tensor_type("q4_k")` is TensorType(12, "q4_k", 256, 144): 4.5 bits per number. GGUF files store `number`.
    """

    number: int
    name: str
    block_size: int
    type_size: int

    @property
    def is_quantized(self) -> bool:
        """True if the values of a block share scales; False for f32, f16 and bf16."""
        return self.block_size > 1

    def row_bytes(self, columns: int) -> int:
        """Compute the bytes of a row; `columns` must be a multiple of `block_size`."""
        return columns // self.block_size * self.type_size


@functools.cache
def tensor_types() -> Mapping[str, TensorType]:
    """Return all types of this ggml by lowercase name."""
    types: dict[str, TensorType] = {}
    for number in range(_TYPE_COUNT):
        traits = base_library().ggml_get_type_traits(number).contents
        if traits.type_name and traits.type_size and traits.blck_size:  # removed types have empty entries
            name = traits.type_name.decode().lower()
            types[name] = TensorType(number, name, traits.blck_size, traits.type_size)
    return types


def tensor_type(name: str) -> TensorType:
    """Look up a type by name, for example "f32" or "q4_k". Raises KeyError if ggml has no such type."""
    return tensor_types()[name]


def tensor_type_by_number(number: int) -> TensorType | None:
    """Look up a type by its number in GGUF files; None if this ggml has no such type."""
    return next((kind for kind in tensor_types().values() if kind.number == number), None)


def requires_imatrix(kind: TensorType) -> bool:
    """Return whether ggml needs an importance matrix to quantize to `kind`."""
    return bool(base_library().ggml_quantize_requires_imatrix(kind.number))


def can_dequantize(kind: TensorType) -> bool:
    """Return whether `dequantize` supports `kind`: floats, and all quantized types that files can store."""
    return kind.name == "f32" or bool(base_library().ggml_get_type_traits(kind.number).contents.to_float)


def dequantize(kind: TensorType, source: Address, target: Address, count: int) -> None:
    """
    Convert `count` numbers of type `kind` at `source` to float32 at `target`. Releases the GIL.

    Raises
    ------
    ValueError: ggml cannot dequantize `kind`.
    """
    if kind.name == "f32":
        ctypes.memmove(target, source, count * 4)
    else:
        traits = base_library().ggml_get_type_traits(kind.number).contents
        if not traits.to_float:
            raise ValueError(f"ggml cannot dequantize {kind.name}")
        traits.to_float(source, target, count)


def quantize(kind: TensorType, source: Address, target: Address, rows: int, columns: int, imatrix: Address = 0) -> None:
    """
    Quantize `rows` x `columns` float32 numbers at `source` to `kind` at `target`, which must be large enough.

    Splitting rows over several calls gives the same bytes as one call (ggml.c: ggml_quantize_chunk). `imatrix` is the
    address of `columns` float32 weights, 0 for none. Releases the GIL.
    """
    f32 = tensor_type("f32")
    if imatrix and not ignores_imatrix(kind):
        largest = quantize_fast_weighted(f32, source, kind, target, rows, columns, imatrix)
    else:
        largest = quantize_fast(f32, source, kind, target, rows * columns)
    if largest is None:
        quantize_with_ggml(kind, source, target, rows, columns, imatrix)


def ignores_imatrix(kind: TensorType) -> bool:
    """Return whether ggml ignores the importance matrix when it quantizes to `kind`."""
    return kind.name == "q8_0"


def quantize_fast(kind: TensorType, source: Address, into: TensorType, target: Address, count: int) -> float | None:
    """
    Write the same bytes as ggml, two to seven times as fast, with tools/quantizers.cpp.

    Returns the largest magnitude among the numbers; infinity if one is not finite, and then the output is invalid.
    Returns None and writes nothing if `kind` is not f32, f16 or bf16, if `into` is not q4_k, q5_k, q6_k or q8_0, or if
    libggml was compiled without this code (a prebuilt wheel, or a compiler other than GCC and clang).
    """
    quantize_blocks = find_kernel("qwenlocal_quantize_blocks")
    return _magnitude(quantize_blocks(kind.number, source, into.number, target, count) if quantize_blocks else -1)


def quantize_fast_weighted(
    kind: TensorType, source: Address, into: TensorType, target: Address, rows: int, columns: int, imatrix: Address
) -> float | None:
    """Quantize like `quantize_fast`, with the importance of each column; `into` must be one of q2_k to q6_k."""
    quantize_rows = find_kernel("qwenlocal_quantize_weighted")
    if not quantize_rows:
        return None
    return _magnitude(quantize_rows(kind.number, source, into.number, target, rows, columns, imatrix))


def _magnitude(bits: int) -> float | None:
    """Return the magnitude with the bits of a float32, infinity if it is not finite; None for -1."""
    if bits < 0:
        return None
    return float(struct.unpack("<f", struct.pack("<I", bits))[0]) if bits < _INFINITY_BITS else math.inf


def can_quantize_fast(kind: TensorType, into: TensorType, *, weighted: bool = False) -> bool:
    """Return whether `quantize_fast`, or `quantize_fast_weighted`, supports `kind` to `into`."""
    if weighted:
        return quantize_fast_weighted(kind, 0, into, 0, 0, 1, 0) is not None
    return quantize_fast(kind, 0, into, 0, 0) is not None


def quantize_with_ggml(
    kind: TensorType, source: Address, target: Address, rows: int, columns: int, imatrix: Address = 0
) -> None:
    """Quantize like `quantize`, always with ggml's own code."""
    base_library().ggml_quantize_chunk(kind.number, source, target, 0, rows, columns, imatrix or None)


def has_finite_scales(kind: TensorType, data: Address, size: int) -> bool:
    """Return whether all scales in `size` bytes of quantized data are finite."""
    return bool(base_library().ggml_validate_row_data(kind.number, data, size))


class InMemoryTensor(NamedTuple):
    """A tensor that llama.cpp allocated for its caller to fill; `size` in bytes."""

    handle: Address
    name: str
    type: TensorType
    size: int

    @classmethod
    def from_pointer(cls, handle: Address) -> InMemoryTensor:
        """Read a `struct ggml_tensor *`; the type is its first field (ggml.h)."""
        number = ctypes.c_int.from_address(handle).value
        kind = tensor_type_by_number(number)
        if kind is None:
            raise ValueError(f"unknown tensor type {number}")
        return cls(handle, base_library().ggml_get_name(handle).decode(), kind, base_library().ggml_nbytes(handle))

    def write(self, data: Address, offset: int, size: int) -> None:
        """Copy `size` bytes at `data` to byte `offset` of the tensor, on whatever device it is."""
        base_library().ggml_backend_tensor_set(self.handle, data, offset, size)


def operation_number(name: str) -> int:
    """Look up an operation of a graph (ggml.h: enum ggml_op) by name: "MUL_MAT"."""
    numbers = iter(range(_MAX_OPERATIONS))
    return next(number for number in numbers if base_library().ggml_op_name(number).decode() == name)


def read_tensor(handle: Address, size: int) -> numpy.ndarray:
    """Return the first `size` bytes of a computed `struct ggml_tensor *` as uint8, in place if they are in memory."""
    import numpy

    buffer = ctypes.c_void_p.from_address(handle + _BUFFER_OFFSET).value
    if buffer and base_library().ggml_backend_buffer_is_host(buffer):
        address = base_library().ggml_get_data(handle)
        return numpy.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    data = numpy.empty(size, numpy.uint8)
    base_library().ggml_backend_tensor_get(handle, data.ctypes.data, 0, size)
    return data


@contextlib.contextmanager
def open_gguf_header(path: Path) -> Iterator[Address]:
    """
    Have ggml read the header of a GGUF file, which needs no weights; yields its `struct gguf_context *`.

    Raises
    ------
    ValueError: ggml cannot read it.
    """
    handle = base_library().gguf_init_from_file(os.fsencode(path), GgufParams(True, None))
    if not handle:
        raise ValueError(f"ggml cannot read {path}")
    try:
        yield handle
    finally:
        base_library().gguf_free(handle)


def read_tensor_types(path: Path) -> set[int]:
    """
    Read the numbers of the types that the tensors of a GGUF file have. Takes 20 ms for Qwen's vocabulary.

    Raises
    ------
    ValueError: ggml cannot read the file.
    """
    base = base_library()
    with open_gguf_header(path) as handle:
        return {base.gguf_get_tensor_type(handle, index) for index in range(base.gguf_get_n_tensors(handle))}


def read_tensor_sizes(path: Path) -> dict[str, int]:
    """
    Read the sizes of the tensors of a GGUF file, in bytes by name. Takes 20 ms for Qwen's vocabulary.

    Raises
    ------
    ValueError: ggml cannot read the file.
    """
    base = base_library()
    with open_gguf_header(path) as handle:
        count = base.gguf_get_n_tensors(handle)
        return {
            base.gguf_get_tensor_name(handle, index).decode(): base.gguf_get_tensor_size(handle, index)
            for index in range(count)
        }


def pack_rows(
    kind: TensorType,
    words: numpy.ndarray,
    scales: numpy.ndarray,
    zeros: numpy.ndarray | None,
    target: memoryview,
    *,
    is_gemm: bool,
) -> bool:
    """
    Store packed codes as blocks of `kind`, with tools/packed_rows.cpp; releases the GIL.

    `words` is uint32 of shape (words per row, rows), or with `is_gemm` (columns, rows / 8); `scales`, in float16, and
    `zeros` are of shape (blocks, rows). Returns False and writes nothing if libggml was compiled without this code.
    """
    import numpy

    function = find_kernel("qwenlocal_pack_rows")
    if function is None:
        return False
    blocks, rows = scales.shape
    scales = numpy.ascontiguousarray(scales)
    points = numpy.ascontiguousarray(numpy.zeros((0, rows)) if zeros is None else zeros, numpy.uint8)
    minima = scales  # only Q4_1 has them
    if kind.name == "q4_1":
        minima = (-(scales.astype(numpy.float32) * points)).astype(numpy.float16)
    strides = [stride // 4 for stride in words.strides]
    output = numpy.frombuffer(target, numpy.uint8)
    return bool(
        function(
            words.ctypes.data,
            strides[0],
            strides[1],
            is_gemm,
            rows,
            blocks * kind.block_size,
            kind.number,
            scales.ctypes.data,
            points.ctypes.data,
            minima.ctypes.data,
            output.ctypes.data,
        )
    )


def integer_operations(rounds: int) -> int:
    """
    Run `rounds` rounds of the processor's 8-bit multiply-accumulate instructions; return the number of operations.

    Returns 0 if there are none, or if libggml was compiled without tools/integer_peak.c. Releases the GIL.
    """
    function = find_kernel("qwenlocal_integer_peak")
    return int(function(rounds)) if function else 0


def has_attention_kernel(head_dim: int) -> bool:
    """Tell whether libggml-cpu has a fast kernel for flash attention (tools/attention.cpp), with heads of this size."""
    function = getattr(load_library("ggml-cpu"), "qwenlocal_has_attention", None)
    return function is not None and bool(function()) and head_dim in (64, 128)
