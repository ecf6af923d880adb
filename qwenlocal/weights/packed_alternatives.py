"""The types that a packed checkpoint (GPTQ, AWQ) can be written in, compared by size and error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from qwenlocal import ggml
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.row_source import SourceReader
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.write_job import RowRange, RowTarget

_SAMPLED_MATRICES, _SAMPLE_ROWS = 12, 64
_NEAR_TYPES = ("q8_0", "q6_k")  # for weights that no quantized type holds as they are packed


class PackedAlternative(NamedTuple):
    """
    A type for the packed weights: the size of the whole file in bytes, and the error of the weights.

    `error` is the root mean square of the differences relative to that of the weights, measured on some rows: 0 if the
    type holds them without rounding; None if the weights are not on this disk. `is_requantized`: the type does not hold
    the packed codes.
    """

    type: TensorType
    size: int
    error: float | None
    is_requantized: bool


def list_packed_alternatives(plan: ConversionPlan) -> list[PackedAlternative]:
    """
    Compare the first file of a plan with what it would be in near types, the type that the plan has first.

    Returns nothing if there is no near type, or if the packed weights have several types.

    Raises
    ------
    BadWeights: the weights cannot be read.
    """
    packed = [(rows, target) for rows, target in _packed_targets(plan) if target.output == 0]
    if len({target.type for _, target in packed}) != 1:
        return []
    chosen = packed[0][1].type
    types = list(dict.fromkeys([chosen, *_other_types(packed, chosen)]))
    if len(types) == 1:
        return []
    size = plan.files[0].size - sum(target.type.row_bytes(_elements(rows)) for rows, target in packed)
    fitting = [kind for kind in types if all(rows.columns % kind.block_size == 0 for rows, _ in packed)]
    errors = _measure_errors([rows for rows, _ in packed], fitting)
    sources = [rows.source for rows, _ in packed]
    return [
        PackedAlternative(
            kind,
            size + sum(kind.row_bytes(_elements(rows)) for rows, _ in packed),
            errors[kind],
            any(source.represent(kind).type != kind for source in sources),
        )
        for kind in fitting
    ]


def _packed_targets(plan: ConversionPlan) -> Iterator[tuple[RowRange, RowTarget]]:
    for rows in plan.job.ranges:
        if isinstance(rows.source, PackedRows):
            for target in rows.targets:
                yield rows, target


def _other_types(packed: list[tuple[RowRange, RowTarget]], chosen: TensorType) -> Iterator[TensorType]:
    matrices = [rows.source.matrix for rows, _ in packed if isinstance(rows.source, PackedRows)]
    if chosen.is_quantized and any(matrix.obstacle for matrix in matrices):
        yield from map(tensor_type, _NEAR_TYPES)
    elif chosen.is_quantized:
        for matrix in matrices:
            yield from matrix.near_types
            yield matrix.exact_types[0]


def _elements(rows: RowRange) -> int:
    return rows.row_count * rows.columns


def _measure_errors(ranges: list[RowRange], types: list[TensorType]) -> dict[TensorType, float | None]:
    step = max(1, len(ranges) // _SAMPLED_MATRICES)
    sampled = [rows.source for rows in ranges[::step] if isinstance(rows.source, PackedRows)]
    files = {file for source in sampled for file in source.files}
    if not all(os.path.exists(file) for file in files):
        return dict.fromkeys(types)
    with SourceFiles(files) as reader:
        return {kind: _measure_error(sampled, kind, reader) for kind in types}


def _measure_error(sampled: list[PackedRows], kind: TensorType, reader: SourceReader) -> float:
    import numpy

    squares = differences = 0.0
    for source in sampled:
        count = min(_SAMPLE_ROWS, source.row_count)
        true = numpy.empty(count * source.columns, numpy.float32)
        source.represent(tensor_type("f32")).read(0, true.data.cast("B"), reader)
        encoded = numpy.empty(count * kind.row_bytes(source.columns), numpy.uint8)
        as_kind = source.represent(kind)
        if as_kind.type == kind:
            as_kind.read(0, encoded.data, reader)
        else:
            ggml.quantize(kind, true.ctypes.data, encoded.ctypes.data, count, source.columns)
        values = numpy.empty_like(true)
        ggml.dequantize(kind, encoded.ctypes.data, values.ctypes.data, values.size)
        squares += float((true * true).sum(dtype=numpy.float64))
        differences += float(((values - true) ** 2).sum(dtype=numpy.float64))
    return math.sqrt(differences / squares) if squares else 0.0
