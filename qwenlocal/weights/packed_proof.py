"""The comparison of packed weights, by their definition, with what ggml reads from the file written from them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from qwenlocal import ggml
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.row_source import FileRows, SourceReader
from qwenlocal.weights.source_files import SourceFiles


@dataclass(frozen=True)
class PackedProof:
    """
    The number of packed weights compared, and the largest difference between any two, absolute and in steps.

    A step is the scale of a weight's group: the distance between neighboring codes. `is_exact`: the types of all
    tensors hold the weights without rounding, so the difference must be 0.
    """

    weights: int
    difference: float
    steps: float
    is_exact: bool


class _Pair(NamedTuple):
    """Packed rows, and the rows written from them in the same type."""

    packed: PackedRows
    written: FileRows


class _Largest(NamedTuple):
    """The bytes and weights of a chunk, and their largest difference, absolute and in steps."""

    size: int
    weights: int
    difference: float
    steps: float


def compare_packed_weights(
    plan: ConversionPlan, output: int, threads: int, report: Callable[[int, int], object] = lambda done, total: None
) -> PackedProof | None:
    """
    Compare the file number `output` of a plan, once it is written, with the packed weights it was made from.

    Weights that had to be quantized again are left out; None if there are no others. `report` gets the bytes of the
    file that are compared, and those to compare.

    Raises
    ------
    BadWeights: a file cannot be read.
    """
    pairs = _find_pairs(plan, output)
    if not pairs:
        return None
    total, done, weights, difference, steps = sum(pair.written.read_size for pair in pairs), 0, 0, 0.0, 0.0
    files = {file for pair in pairs for file in (*pair.packed.files, *pair.written.files)}
    with SourceFiles(files) as reader, ThreadPoolExecutor(threads) as pool:
        chunks = ((pair, first) for pair in pairs for first in range(0, pair.packed.row_count, pair.packed.chunk_rows))
        for largest in pool.map(lambda chunk: _compare_chunk(chunk[0], chunk[1], reader), chunks):
            done, weights = done + largest.size, weights + largest.weights
            difference, steps = max(difference, largest.difference), max(steps, largest.steps)
            report(done, total)
    return PackedProof(weights, difference, steps, all(pair.packed.is_exact for pair in pairs))


def _find_pairs(plan: ConversionPlan, output: int) -> list[_Pair]:
    path = plan.job.outputs[output].path
    return [
        _Pair(rows.source, FileRows(path, target.offset, rows.row_count, rows.columns, target.type))
        for rows in plan.job.ranges
        for target in rows.targets
        if target.output == output
        if isinstance(rows.source, PackedRows) and target.type == rows.type and rows.type.is_quantized
    ]


def _compare_chunk(pair: _Pair, first: int, reader: SourceReader) -> _Largest:
    import numpy

    packed, count = pair.packed, min(pair.packed.chunk_rows, pair.packed.row_count - first)
    expected = numpy.empty((count, packed.columns), numpy.float32)
    packed.represent(ggml.tensor_type("f32")).read(first, expected.data.cast("B"), reader)
    encoded, values = (
        numpy.empty(count * packed.type.row_bytes(packed.columns), numpy.uint8),
        numpy.empty_like(expected),
    )
    pair.written.read(first, encoded.data, reader)
    ggml.dequantize(packed.type, encoded.ctypes.data, values.ctypes.data, values.size)
    if (values == expected).all():
        return _Largest(encoded.size, values.size, 0.0, 0.0)
    values -= expected
    scales = packed.matrix.load_scales(first, count, reader).T.astype(numpy.float32)
    steps = abs(values) / scales[:, packed.matrix.column_groups(reader)]
    return _Largest(encoded.size, values.size, float(abs(values).max()), float(steps.max()))
