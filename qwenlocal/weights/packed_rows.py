"""
Rows of a packed matrix as blocks of ggml's types, without rounding.

ggml divides a row into blocks of 32 columns, each with a float16 scale d, which becomes the scale s of its group:

    Q4_0  d·(c − 8), 0 ≤ c ≤ 15     4-bit codes q with the zero point z = 8: c = q
    Q5_0  d·(c − 16), 0 ≤ c ≤ 31    4-bit codes with any z from 0 to 15: c = q − z + 16
    Q8_0  d·c, −128 ≤ c ≤ 127       8-bit codes with z = 128: c = q − 128
    Q4_1  d·c + m, 0 ≤ c ≤ 15       4-bit codes with any z: c = q, m = −s·z, which float16 rounds

For example, q = 11, z = 8 and s = 0.5 are c = 11 and d = 0.5 in Q4_0; both are 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal import ggml
from qwenlocal.ggml import TensorType
from qwenlocal.weights.packed_matrix import BLOCK, PackedMatrix
from qwenlocal.weights.row_source import CHUNK_SIZE, RowSource, SourceReader

if TYPE_CHECKING:
    import numpy

_MIN_ROWS = 128  # per chunk: fewer do not fill cache lines
_EACH_BYTE = 0x0101010101010101


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packed matrix, in one of its exact or near types."""

    matrix: PackedMatrix
    type: TensorType

    @property
    def file(self) -> Path:
        """The file with the codes."""
        return self.matrix.weight.file

    @property
    def offset(self) -> int:
        """The offset of the codes."""
        return self.matrix.weight.offset

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return self.matrix.rows

    @property
    def columns(self) -> int:
        """Values per row."""
        return self.matrix.columns

    @property
    def chunk_rows(self) -> int:
        """About `CHUNK_SIZE` values; a multiple of the codes per word."""
        least = _MIN_ROWS if self.type.is_quantized else 8
        return min(self.row_count, max(least, CHUNK_SIZE // self.columns // 8 * 8))

    @property
    def shared_size(self) -> int:
        """Bytes of the packed matrix."""
        return self.read_size

    @property
    def read_size(self) -> int:
        """Bytes of the packed matrix."""
        return sum(tensor.size for tensor in self.matrix.tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with its tensors."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.matrix.tensors))

    @property
    def is_exact(self) -> bool:
        """True if the type holds the weights without rounding."""
        return self.type in self.matrix.exact_types

    def represent(self, kind: TensorType) -> PackedRows:
        """Return the rows in the type `kind` if it holds their codes and scales, otherwise unchanged."""
        return replace(self, type=kind) if kind in (*self.matrix.exact_types, *self.matrix.near_types) else self

    def read(self, first: int, buffer: memoryview, reader: SourceReader) -> None:
        """
        Store the rows from `first` on, as many as fill `buffer`.

        In a quantized type, float16 must hold all scales, as `PackedMatrix.examine` checks.
        """
        import numpy

        count = len(buffer) // self.type.row_bytes(self.columns)
        matrix = self.matrix
        if self.type.name == "f32":
            _store_floats(matrix, first, count, buffer, reader)
            return
        scales = self._per_block(matrix.load_scales(first, count, reader).astype(numpy.float16))
        has_zeros = self.type.name in ("q5_0", "q4_1")
        zeros = self._per_block(matrix.zero_points(first, count, reader).astype("u1")) if has_zeros else None
        if (first % 8 == count % 8 == 0) or matrix.layout != "gemm":
            stored, is_gemm = matrix.stored_words(first, count, reader), matrix.layout == "gemm"
            if ggml.pack_rows(self.type, stored, scales, zeros, buffer, is_gemm=is_gemm):
                return
        _STORE[self.type.name](matrix.words(first, count, reader), scales, zeros, buffer)

    def _per_block(self, values: numpy.ndarray) -> numpy.ndarray:
        """Repeat values per group, of shape (groups, rows), for each of the blocks of a row."""
        repeats = -(-self.matrix.group_size // BLOCK)
        return values.repeat(repeats, axis=0)[: self.columns // BLOCK]

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""
        matrix = self.matrix
        parts = [f"{tensor.file} {fingerprints[tensor.file]} {tensor.offset}" for tensor in matrix.tensors]
        layout = (
            f"{matrix.layout} {matrix.bits} {matrix.group_size} {matrix.zero_offset} {matrix.rows} {matrix.columns}"
        )
        return f"{' '.join(parts)} {layout} {self.type.name}"


def _store_floats(matrix: PackedMatrix, first: int, count: int, buffer: memoryview, reader: SourceReader) -> None:
    """Store s·(q − z), by the definition."""
    import numpy

    result = numpy.frombuffer(buffer, numpy.float32).reshape(count, matrix.columns)
    result[:] = matrix.load_codes(first, count, reader)
    scales = matrix.load_scales(first, count, reader).T.astype(numpy.float32)
    zeros = matrix.zero_points(first, count, reader).T.astype(numpy.float32)
    if matrix.groups is None and matrix.columns % matrix.group_size == 0:
        grouped = result.reshape(count, matrix.group_count, -1)
        grouped -= zeros[:, :, None]
        grouped *= scales[:, :, None]
    else:
        groups = matrix.column_groups(reader)
        result -= zeros[:, groups]
        result *= scales[:, groups]


# --- blocks, in numpy (tools/packed_rows.cpp does the same faster): `words` are of shape (columns / codes per word,
# rows), scales and zero points of shape (blocks, rows)


def _store_q4_0(words: numpy.ndarray, scales: numpy.ndarray, _zeros: object, buffer: memoryview) -> None:
    blocks = _blocks(buffer, words.shape[1], [("scale", "<f2"), ("codes", "<u8", (2,))])
    _store_codes([_spread(words[quarter::4]) for quarter in range(4)], blocks["codes"])
    blocks["scale"] = scales.T


def _store_q4_1(words: numpy.ndarray, scales: numpy.ndarray, zeros: numpy.ndarray, buffer: memoryview) -> None:
    import numpy

    blocks = _blocks(buffer, words.shape[1], [("scale", "<f2"), ("minimum", "<f2"), ("codes", "<u8", (2,))])
    _store_codes([_spread(words[quarter::4]) for quarter in range(4)], blocks["codes"])
    blocks["scale"] = scales.T
    blocks["minimum"] = -(scales.astype(numpy.float32) * zeros).T


def _store_q5_0(words: numpy.ndarray, scales: numpy.ndarray, zeros: numpy.ndarray, buffer: memoryview) -> None:
    import numpy

    blocks = _blocks(buffer, words.shape[1], [("scale", "<f2"), ("fifth_bits", "<u4"), ("codes", "<u8", (2,))])
    offsets = (16 - zeros.astype(numpy.int8)).astype(numpy.uint64) * numpy.uint64(_EACH_BYTE)
    fifth_bits, quarters = numpy.zeros(offsets.shape, numpy.uint32), []
    for quarter in range(4):
        codes = _spread(words[quarter::4])
        codes += offsets  # at most 31 per byte: no carry
        fifth_bits |= _gather_fifth_bits(codes) << numpy.uint32(8 * quarter)
        codes &= numpy.uint64(0x0F * _EACH_BYTE)
        quarters.append(codes)
    _store_codes(quarters, blocks["codes"])
    blocks["fifth_bits"] = fifth_bits.T
    blocks["scale"] = scales.T


def _store_q8_0(words: numpy.ndarray, scales: numpy.ndarray, _zeros: object, buffer: memoryview) -> None:
    import numpy

    blocks = _blocks(buffer, words.shape[1], [("scale", "<f2"), ("codes", "<u4", (8,))])
    signed = words ^ numpy.uint32(0x80808080)  # minus 128, in each byte
    blocks["codes"][:] = signed.reshape(-1, 8, words.shape[1]).transpose(2, 0, 1)
    blocks["scale"] = scales.T


_STORE: Mapping[str, Callable[..., None]] = {
    "q4_0": _store_q4_0,
    "q4_1": _store_q4_1,
    "q5_0": _store_q5_0,
    "q8_0": _store_q8_0,
}


def _blocks(buffer: memoryview, rows: int, fields: Sequence[tuple[object, ...]]) -> numpy.ndarray:
    import numpy

    return numpy.frombuffer(buffer, numpy.dtype(list(fields))).reshape(rows, -1)


def _store_codes(quarters: Sequence[numpy.ndarray], codes: numpy.ndarray) -> None:
    """Store 4-bit codes, given as the bytes of uint64, eight columns each: column j and j + 16 share a byte."""
    import numpy

    for half in range(2):
        codes[:, :, half] = (quarters[half] | (quarters[half + 2] << numpy.uint64(4))).T


def _spread(words: numpy.ndarray) -> numpy.ndarray:
    """Put the eight codes of each word into the bytes of a uint64: 0x76543210 becomes 0x0706050403020100."""
    import numpy

    wide = words.astype(numpy.uint64)
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        wide |= wide << numpy.uint64(shift)
        wide &= numpy.uint64(mask)
    return wide


def _gather_fifth_bits(codes: numpy.ndarray) -> numpy.ndarray:
    """Collect bit 4 of each byte, that of byte 0 in bit 0: the product moves byte j to bit j of the highest byte."""
    import numpy

    bits: numpy.ndarray = (codes >> numpy.uint64(4)) & numpy.uint64(_EACH_BYTE)
    gathered: numpy.ndarray = (bits * numpy.uint64(0x0102040810204080)) >> numpy.uint64(56)
    return gathered.astype(numpy.uint32)


def unify_types(sources: Sequence[RowSource]) -> list[RowSource]:
    """
    Return the matrices of all experts in one type.

    Four-bit experts are Q5_0 if one of them has zero points that Q4_0 does not allow.
    """
    packed = [rows.matrix.exact_types for rows in sources if isinstance(rows, PackedRows)]
    if not packed:
        return list(sources)
    common = next(kind for kind in packed[0] if all(kind in types for types in packed))
    return [rows.represent(common) for rows in sources]
