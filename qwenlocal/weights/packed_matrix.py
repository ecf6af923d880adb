"""
Matrices of weights that GPTQ or AWQ packed, and how their codes, scales and zero points are stored.

A code q has 4 or 8 bits. Each group of columns (usually 128) of each row has a scale s and a zero point z, and the
weight is s·(q − z). With K columns, N rows and G groups:

    GPTQ      qweight (K/8, N), qzeros (G, N/8), scales (G, N), g_idx (K): codes follow each other from the lowest bits
              on; 8-bit codes are four per word. AutoGPTQ stores z − 1 and adds it modulo 2^bits (AutoGPTQ 0.7,
              qlinear_cuda_old.py); the format "gptq_v2" stores z.
    AWQ gemm  qweight (K, N/8), qzeros (G, N/8), scales (G, N): the codes of rows 0, 2, 4, 6, 1, 3, 5, 7 in a word
              (AutoAWQ 0.2, gemm.py: WQLinear_GEMM.from_linear).
    AWQ gemv  qweight (N, K/8), qzeros (N, ≥ G/8), scales (N, ≥ G): in order, padded at the end (gemv.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlocal.errors import BadCheckpoint
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.row_source import SourceReader
from qwenlocal.weights.safetensors import StoredTensor

if TYPE_CHECKING:
    import numpy

BLOCK = 32  # columns per block of Q4_0, Q4_1, Q5_0 and Q8_0
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the rows of a word's codes, from the lowest bits on


@dataclass(frozen=True)
class PackedMatrix:
    """
    The tensors of one packed matrix of `rows` x `columns` weights.

    `layout` is "gptq", "gemm" or "gemv"; `zero_offset` is added to stored zero points, modulo 2^bits. `groups` is the
    tensor with the group of each column, None if they are in order. `is_symmetric`: all zero points are 2^(bits − 1).
    `has_half_scales`: float16 holds all scales exactly.
    """

    layout: str
    bits: int
    group_size: int
    rows: int
    columns: int
    weight: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor
    groups: StoredTensor | None = None
    zero_offset: int = 0
    is_symmetric: bool = False
    has_half_scales: bool = True

    @property
    def group_count(self) -> int:
        """Groups per row; the last one may be shorter."""
        return -(-self.columns // self.group_size)

    def __str__(self) -> str:
        """Return how the weights are stored: "GPTQ int4, group 128"."""
        method = "GPTQ" if self.layout == "gptq" else "AWQ"
        groups = f"group {self.group_size}" if self.group_count > 1 else "one group per row"
        return f"{method} int{self.bits}, {groups}{', desc_act' if self.groups else ''}"

    @property
    def obstacle(self) -> str:
        """The reason that no quantized type of ggml holds the weights without rounding; "" if one does."""
        if self.groups is not None:
            return "columns in activation order (desc_act)"
        if self.columns % BLOCK:
            return f"rows of {self.columns:,} columns"
        if self.group_size % BLOCK and self.group_count > 1:
            return f"groups of {self.group_size} columns"
        if not self.has_half_scales:
            return "scales that float16 cannot hold"
        if self.bits == 8 and not self.is_symmetric:
            return "8-bit codes with zero points"
        return ""

    @property
    def exact_types(self) -> tuple[TensorType, ...]:
        """The types that hold the weights without rounding, the smallest first; always f32."""
        names = () if self.obstacle else ("q8_0",) if self.bits == 8 else ("q4_0", "q5_0")
        if self.bits == 4 and not self.is_symmetric:
            names = names[1:]
        return tuple(map(tensor_type, (*names, "f32")))

    @property
    def near_types(self) -> tuple[TensorType, ...]:
        """The types that hold the same codes and scales, but rounded zero points."""
        return () if self.obstacle or self.bits == 8 or self.is_symmetric else (tensor_type("q4_1"),)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors that are read."""
        return tuple(tensor for tensor in (self.weight, self.scales, self.zeros, self.groups) if tensor)

    # --- parts of the tensors, for `count` rows from `first` on

    def words(self, first: int, count: int, reader: SourceReader) -> numpy.ndarray:
        """Return the codes as uint32 of shape (columns / codes per word, count), the first in the lowest bits."""
        words = self.stored_words(first, count, reader)
        if self.layout == "gemm":
            words = _transpose_codes(words)[:, first % 8 : first % 8 + count]
        return words

    def stored_words(self, first: int, count: int, reader: SourceReader) -> numpy.ndarray:
        """Return the codes as they are stored, like `words`; in the gemm layout of shape (columns, count / 8)."""
        data = _load(self.weight, reader)
        if self.layout == "gptq":
            words: numpy.ndarray = data.reshape(-1, self.rows)[:, first : first + count]
        elif self.layout == "gemv":
            words = data.reshape(self.rows, -1)[first : first + count].T
        else:
            words = data.reshape(self.columns, -1)[:, first // 8 : -(-(first + count) // 8)]
        return words

    def load_codes(self, first: int, count: int, reader: SourceReader) -> numpy.ndarray:
        """Return the codes as uint8 of shape (count, columns)."""
        import numpy

        if self.layout == "gemm":
            words = numpy.ascontiguousarray(self.stored_words(first, count, reader).T)
            in_order = numpy.empty((len(words), 8, self.columns), numpy.uint8)
            for position, row in enumerate(_AWQ_ORDER):
                in_order[:, row] = (words >> numpy.uint32(4 * position)) & numpy.uint32(15)
            codes = in_order.reshape(-1, self.columns)[first % 8 : first % 8 + count]
        else:
            codes = split_codes(self.stored_words(first, count, reader).T, self.bits)
        result: numpy.ndarray = codes.reshape(count, self.columns)
        return result

    def load_scales(self, first: int, count: int, reader: SourceReader) -> numpy.ndarray:
        """Return the scales as float16 or float32, of shape (groups, count)."""
        stored = _load(self.scales, reader)
        if self.layout == "gemv":
            bits = stored.reshape(self.rows, -1)[first : first + count, : self.group_count].T
        else:
            bits = stored.reshape(self.group_count, self.rows)[:, first : first + count]
        return _as_floats(bits, self.scales.dtype)

    def zero_points(self, first: int, count: int, reader: SourceReader) -> numpy.ndarray:
        """Return the zero points as int32 of shape (groups, count)."""
        import numpy

        words, per_word = _load(self.zeros, reader), 32 // self.bits
        if self.layout == "gemv":
            padded = split_codes(words.reshape(self.rows, -1)[first : first + count], self.bits)
            zeros: numpy.ndarray = padded.reshape(count, -1)[:, : self.group_count].T
        else:
            begin, end = first // per_word, -(-(first + count) // per_word)
            codes = split_codes(words.reshape(self.group_count, -1)[:, begin:end], self.bits)
            if self.layout == "gemm":
                codes = codes[:, :, numpy.argsort(_AWQ_ORDER)]
            skipped = first - begin * per_word
            zeros = codes.reshape(self.group_count, -1)[:, skipped : skipped + count]
        result: numpy.ndarray = (zeros.astype(numpy.int32) + self.zero_offset) & ((1 << self.bits) - 1)
        return result

    def column_groups(self, reader: SourceReader) -> numpy.ndarray:
        """Return the group of each column."""
        import numpy

        if self.groups is None:
            return numpy.arange(self.columns) // self.group_size
        return _load(self.groups, reader).view(numpy.int32)

    # --- facts about the values, for planning

    def examine(self, reader: SourceReader, *, has_order: bool) -> PackedMatrix:
        """
        Return the matrix with the facts that its tensors show; `has_order`: config.json says that columns are shuffled.

        Raises
        ------
        BadCheckpoint: `groups` names a group that does not exist, a scale is NaN or infinite, or the zero points are
            those of the other version of GPTQ.
        """
        import numpy

        scales, zeros = self.load_scales(0, self.rows, reader), self.zero_points(0, self.rows, reader)
        if not numpy.isfinite(scales).all():
            raise _damaged(self.scales, "has scales that are NaN or infinite")
        middle = 1 << (self.bits - 1)
        if self.is_symmetric and any((zeros == other).all() for other in (middle - 1, middle + 1)):
            raise BadCheckpoint(
                self.zeros.file,
                f"“{self.zeros.name}” has zero points of {zeros.flat[0]} instead of {middle}, although “sym” is true",
                hint="GPTQ probably packed it as the other version: set “checkpoint_format” to "
                f"“{'gptq_v2' if self.zero_offset else 'gptq'}” in config.json or quantize_config.json.",
            )
        return replace(
            self,
            groups=self.groups if self._needs_groups(reader, has_order=has_order) else None,
            is_symmetric=bool((zeros == middle).all()),
            has_half_scales=self.scales.dtype == "F16" or _fit_half(scales),
        )

    def _needs_groups(self, reader: SourceReader, *, has_order: bool) -> bool:
        """Return False if `groups` are in order, or unused: all zeros."""
        import numpy

        if self.groups is None:
            return False
        order = self.column_groups(reader)
        if order.min() < 0 or order.max() >= self.group_count:
            raise _damaged(self.groups, f"has groups that “{self.scales.name}” does not have")
        is_unused = not has_order and not order.any()
        return not is_unused and bool((order != numpy.arange(self.columns) // self.group_size).any())


def _damaged(tensor: StoredTensor, problem: str) -> BadCheckpoint:
    return BadCheckpoint(tensor.file, f"“{tensor.name}” {problem}", hint="It is damaged. Download it again.")


def _load(tensor: StoredTensor, reader: SourceReader) -> numpy.ndarray:
    """Return a tensor as unsigned integers of its width."""
    width = tensor.size // max(1, math.prod(tensor.shape))
    values: numpy.ndarray = reader.load(tensor.file, tensor.offset, tensor.size).view(f"<u{width}")
    return values


def split_codes(words: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Split uint32 words into uint8 codes, along a new axis: `split_codes([0x21], 4)` is [[1, 2, 0, 0, 0, 0, 0, 0]]."""
    import numpy

    octets = numpy.ascontiguousarray(words, "<u4").view(numpy.uint8)
    if bits == 4:
        pairs = octets.astype("<u2")  # 0x21 becomes 0x0201
        pairs |= pairs << numpy.uint16(4)
        pairs &= numpy.uint16(0x0F0F)
        octets = pairs.view(numpy.uint8)
    return octets.reshape(*words.shape, 32 // bits)


def _transpose_codes(words: numpy.ndarray) -> numpy.ndarray:
    """
    Turn AWQ's words, each with a column of eight rows, into words with eight columns of a row: (K, n/8) to (K/8, n).

    The 4-bit codes of eight words are a matrix of 8 x 8, transposed in three steps (Warren, Hacker's Delight, 7-3).
    """
    import numpy

    columns, groups = words.shape
    codes = numpy.array(words, order="C").reshape(-1, 8, groups)  # a copy, which is changed
    for step, shift, mask in ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F)):
        pairs = codes.reshape(columns // 8, 4 // step, 2, step, groups)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        swapped = ((low >> numpy.uint32(shift)) ^ high) & numpy.uint32(mask)
        high ^= swapped
        low ^= swapped << numpy.uint32(shift)
    result = numpy.empty((columns // 8, groups, 8), numpy.uint32)
    for position, row in enumerate(_AWQ_ORDER):
        result[:, :, row] = codes[:, position]
    return result.reshape(columns // 8, groups * 8)


def _as_floats(bits: numpy.ndarray, dtype: str) -> numpy.ndarray:
    import numpy

    if dtype == "BF16":
        bits = bits.astype(numpy.uint32) << numpy.uint32(16)
        dtype = "F32"
    return numpy.ascontiguousarray(bits).view(numpy.float16 if dtype == "F16" else numpy.float32)


def _fit_half(values: numpy.ndarray) -> bool:
    """Return True if float16 holds all values exactly; never for NaN."""
    import numpy

    with numpy.errstate(over="ignore"):
        return bool((values.astype(numpy.float16) == values).all())
