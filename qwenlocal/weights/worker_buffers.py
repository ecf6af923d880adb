"""The conversion of one chunk of rows at a time, in buffers that belong to one thread."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal import ggml
from qwenlocal.errors import BadWeights, NonFiniteWeights
from qwenlocal.ggml import TensorType
from qwenlocal.weights.write_job import RowChunk, RowTarget, WriteJob, buffer_sizes

if TYPE_CHECKING:
    import numpy

_SAFE_MAGNITUDE = 16384.0  # values below this fit into every type


class _FloatBits(NamedTuple):
    """
    The bits of a float type without the sign.

    `width` is its size in bytes; from `non_finite` on a value is infinite or NaN; `large` is `_SAFE_MAGNITUDE`.
    """

    width: int
    non_finite: int
    large: int

    def max_magnitude(self, data: numpy.ndarray) -> int:
        """Return the bits of the largest magnitude: the maximum as signed integers, or as unsigned ones."""
        if not data.size:
            return 0
        negative, positive = (int(data.view(f"{kind}{self.width}").max()) for kind in "ui")
        return max(negative & ((1 << (8 * self.width - 1)) - 1), positive)


_FLOAT_BITS = {
    "f32": _FloatBits(4, 0x7F800000, 0x46800000),
    "bf16": _FloatBits(2, 0x7F80, 0x4680),
    "f16": _FloatBits(2, 0x7C00, 0x7400),
}


class WorkerBuffers:
    """
    A thread's own buffers for one chunk: as read, as float32, and as written.

    Call `source`, fill it, then `load`, then `convert` once per target. `zeroed` counts the values of the chunk that
    were NaN or infinite.
    """

    def __init__(self, job: WriteJob, *, allow_nan: bool) -> None:
        import numpy

        read, values, written = buffer_sizes(job)
        self._numpy = numpy
        self._read, self._written = numpy.empty(read, numpy.uint8), numpy.empty(written, numpy.uint8)
        self._floats = numpy.empty(values, numpy.float32)
        self._allow_nan, self.zeroed = allow_nan, 0
        self._has_large = False  # the chunk has values that may be too large for a type

    def source(self, size: int) -> memoryview:
        """Return the buffer into which the `size` bytes of the chunk are to be read."""
        return memoryview(self._read.data)[:size]

    def load(self, chunk: RowChunk) -> None:
        """
        Check the bytes that were read, and dequantize them if a target needs float32.

        Raises
        ------
        NonFiniteWeights: a value is NaN or infinite (not with `allow_nan`).
        """
        rows, count = chunk.range, chunk.row_count * chunk.range.columns
        self.zeroed = 0
        if all(_is_fast(rows.type, target) for target in rows.targets):
            return  # `convert` takes the values as read, and checks them at the same time
        data, floats = self._read[: chunk.source_size], self._floats[:count]
        is_float = rows.type.name in _FLOAT_BITS
        if is_float:
            self._check(chunk, data, rows.type.name)
        if any(target.type != rows.type for target in rows.targets):
            ggml.dequantize(rows.type, data.ctypes.data, floats.ctypes.data, count)
            if not is_float:
                self._check(chunk, floats, "f32")

    def _check(self, chunk: RowChunk, data: numpy.ndarray, kind: str) -> None:
        bits = _FLOAT_BITS[kind]
        largest = bits.max_magnitude(data)
        self._has_large = largest >= bits.large
        if largest < bits.non_finite:
            return
        values = data.view(f"u{bits.width}")
        is_wrong = (values & bits.non_finite) == bits.non_finite
        if not self._allow_nan:
            row = chunk.first + int(self._numpy.flatnonzero(is_wrong)[0]) // chunk.range.columns
            raise NonFiniteWeights(chunk.range.source.file, chunk.range.name, row)
        self.zeroed = int(is_wrong.sum())
        values[is_wrong] = 0

    def convert(self, chunk: RowChunk, target: RowTarget) -> memoryview:
        """
        Return the chunk in the type of `target`, valid until the next call.

        Raises
        ------
        NonFiniteWeights: a value is NaN or infinite (not with `allow_nan`).
        BadWeights: a value is too large for the type.
        """
        rows, size = chunk.range, chunk.target_size(target)
        if target.type == rows.type:
            return memoryview(self._read.data)[:size]
        result = self._written[:size]
        if _is_fast(rows.type, target):
            self._quantize_as_read(chunk, target, result)
        else:
            weights = target.imatrix.ctypes.data if target.imatrix is not None else 0
            address = result.ctypes.data
            ggml.quantize(target.type, self._floats.ctypes.data, address, chunk.row_count, rows.columns, weights)
        if not self._is_finite(target.type, result, chunk.row_count * rows.columns):
            raise BadWeights(
                rows.source.file,
                f"“{rows.name}” has weights that are too large for {target.type.name}",
                hint="Use bf16 or f32, which have the range of the original.",
            )
        return memoryview(result.data)

    def _quantize_as_read(self, chunk: RowChunk, target: RowTarget, result: numpy.ndarray) -> None:
        largest = self._quantize_fast(chunk, target, result)
        if largest == math.inf:
            self._check(chunk, self._read[: chunk.source_size], chunk.range.type.name)
            largest = self._quantize_fast(chunk, target, result)
        self._has_large = largest is None or largest >= _SAFE_MAGNITUDE

    def _quantize_fast(self, chunk: RowChunk, target: RowTarget, result: numpy.ndarray) -> float | None:
        rows, columns = chunk.row_count, chunk.range.columns
        source, into, address = chunk.range.type, target.type, result.ctypes.data
        if target.imatrix is None or ggml.ignores_imatrix(into):
            return ggml.quantize_fast(source, self._read.ctypes.data, into, address, rows * columns)
        weights = target.imatrix.ctypes.data
        return ggml.quantize_fast_weighted(source, self._read.ctypes.data, into, address, rows, columns, weights)

    def _is_finite(self, kind: TensorType, result: numpy.ndarray, count: int) -> bool:
        """Check the result. ggml's own check is fast but prints its findings, so it gets only safe values."""
        if bits := _FLOAT_BITS.get(kind.name):
            return bits.max_magnitude(result) < bits.non_finite
        if not self._has_large:
            return ggml.has_finite_scales(kind, result.ctypes.data, result.size)
        values = self._numpy.empty(count, self._numpy.float32)
        ggml.dequantize(kind, result.ctypes.data, values.ctypes.data, count)
        return bool(self._numpy.isfinite(values).all())


def _is_fast(source: TensorType, target: RowTarget) -> bool:
    """Return True if our own quantizers (tools/quantizers.cpp) take the values as they are read."""
    is_weighted = target.imatrix is not None and not ggml.ignores_imatrix(target.type)
    return ggml.can_quantize_fast(source, target.type, weighted=is_weighted)
