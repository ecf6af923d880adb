"""The comparison of packed weights, by their definition, with what ggml reads from the file written from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal import ggml
from qwenlocal.errors import BadWeights
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.row_source import FileRows, SourceReader
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.write_job import RowChunk, RowRange, RowTarget

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class PackedProof:
    """
    The number of packed weights compared, and the largest difference between any two, absolute and in steps.

    A step is the scale of a weight's group: the distance between neighboring codes. `is_exact`: the types of all
    tensors hold the weights without rounding, so the difference must be 0. `earlier` are weights that an interrupted
    attempt compared, and whose difference is not known any more.
    """

    weights: int
    difference: float
    steps: float
    is_exact: bool
    earlier: int = 0

    def add(self, largest: _Largest, *, is_exact: bool) -> PackedProof:
        """Return the proof for the weights of one more chunk."""
        return PackedProof(
            self.weights + largest.weights,
            max(self.difference, largest.difference),
            max(self.steps, largest.steps),
            self.is_exact and is_exact,
        )


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


class StreamedProofs:
    """
    Proofs that are made while files are written from packed weights that are not kept; for several threads.

    `compare` is the function `inspect` of `write_workers.run_job`.
    """

    def __init__(self, plan: ConversionPlan) -> None:
        self._plan, self._lock = plan, threading.Lock()
        self._proofs: dict[int, PackedProof] = {}

    def compare(self, chunk: RowChunk, target: RowTarget, data: memoryview, reader: SourceReader) -> None:
        """
        Compare a chunk that is about to be written with the packed weights it was made from.

        Raises
        ------
        BadWeights: a weight differs, although its type can hold it.
        """
        import numpy

        packed = chunk.range.source
        if not isinstance(packed, PackedRows) or not _is_as_packed(chunk.range, target):
            return
        largest = _compare_rows(packed, chunk.first, numpy.frombuffer(data, numpy.uint8), reader)
        if packed.is_exact and largest.difference:
            raise unequal_weights(self._plan.files[target.output].path, largest.difference)
        with self._lock:
            before = self._proofs.get(target.output, PackedProof(0, 0.0, 0.0, True))
            self._proofs[target.output] = before.add(largest, is_exact=packed.is_exact)

    def results(self) -> Mapping[Path, PackedProof]:
        """
        Return the proof of each file with packed weights, once it is complete.

        An interrupted attempt compared its chunks, too, before it recorded them.
        """
        results = {}
        for number, file in enumerate(self._plan.files):
            pairs = _find_pairs(self._plan, number)
            total = sum(pair.packed.row_count * pair.packed.columns for pair in pairs)
            if all(pair.packed.is_exact for pair in pairs):  # a difference would have been an error
                proof = PackedProof(total, 0.0, 0.0, is_exact=True)
            else:
                proof = self._proofs.get(number, PackedProof(0, 0.0, 0.0, is_exact=False))
                proof = replace(proof, earlier=total - proof.weights)
            if pairs:
                results[file.path] = proof
        return results


def unequal_weights(path: Path, difference: float) -> BadWeights:
    """Build the error for weights that must be equal to the checkpoint's and are not."""
    return BadWeights(
        path,
        f"its weights differ from the checkpoint's by up to {difference:.3g}, but must be equal",
        hint="The disk or the memory may be faulty. Delete the file, and convert again.",
    )


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
    total, done = sum(pair.written.read_size for pair in pairs), 0
    proof = PackedProof(0, 0.0, 0.0, all(pair.packed.is_exact for pair in pairs))
    files = {file for pair in pairs for file in (*pair.packed.files, *pair.written.files)}
    with SourceFiles(files) as reader, ThreadPoolExecutor(threads) as pool:
        chunks = ((pair, first) for pair in pairs for first in range(0, pair.packed.row_count, pair.packed.chunk_rows))
        for largest in pool.map(lambda chunk: _compare_pair(chunk[0], chunk[1], reader), chunks):
            done, proof = done + largest.size, proof.add(largest, is_exact=proof.is_exact)
            report(done, total)
    return proof


def _find_pairs(plan: ConversionPlan, output: int) -> list[_Pair]:
    path = plan.job.outputs[output].path
    return [
        _Pair(rows.source, FileRows(path, target.offset, rows.row_count, rows.columns, target.type))
        for rows in plan.job.ranges
        for target in rows.targets
        if target.output == output
        if isinstance(rows.source, PackedRows) and _is_as_packed(rows, target)
    ]


def _is_as_packed(rows: RowRange, target: RowTarget) -> bool:
    """Return True if packed rows are not quantized again."""
    return target.type == rows.type and rows.type.is_quantized


def _compare_pair(pair: _Pair, first: int, reader: SourceReader) -> _Largest:
    import numpy

    packed, count = pair.packed, min(pair.packed.chunk_rows, pair.packed.row_count - first)
    encoded = numpy.empty(count * packed.type.row_bytes(packed.columns), numpy.uint8)
    pair.written.read(first, encoded.data, reader)
    return _compare_rows(packed, first, encoded, reader)


def _compare_rows(packed: PackedRows, first: int, encoded: numpy.ndarray, reader: SourceReader) -> _Largest:
    """Compare rows in the type of `packed`, from `first` on, with the packed weights by their definition."""
    import numpy

    count = encoded.size // packed.type.row_bytes(packed.columns)
    expected = numpy.empty((count, packed.columns), numpy.float32)
    packed.represent(ggml.tensor_type("f32")).read(first, expected.data.cast("B"), reader)
    values = numpy.empty_like(expected)
    ggml.dequantize(packed.type, encoded.ctypes.data, values.ctypes.data, values.size)
    if (values == expected).all():
        return _Largest(encoded.size, values.size, 0.0, 0.0)
    values -= expected
    scales = packed.matrix.load_scales(first, count, reader).T.astype(numpy.float32)
    steps = abs(values) / scales[:, packed.matrix.column_groups(reader)]
    return _Largest(encoded.size, values.size, float(abs(values).max()), float(steps.max()))
