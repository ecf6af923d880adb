"""
A mix of types that loses less than llama.cpp's in the same number of bytes, chosen by measured errors.

K-quants need rows that are a multiple of 256 columns. If rows are not (5,504 in Qwen1.5-1.8B, 13,696 in 14B, 1,408 in
the MoE), llama.cpp takes the next larger type: Q5_0 instead of Q4_K, Q8_0 instead of Q6_K. The bytes that this costs
are better spent on other matrices.

For every matrix of the layers and every type it can have, some rows are quantized, and the error of the products with
typical inputs is computed: the squares of the differences, weighted with the importance of each column (1 without an
importance matrix), relative to the weighted squares of the rows. Starting with the smallest types, the matrix whose
next type reduces this error most per byte gets it, until the bytes of llama.cpp's mix are spent.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal import ggml
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.file_types import QuantOverrides
from qwenlocal.weights.gguf_writer import TensorSpec
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.quant_mix import ENDS, TypeChoice, is_quantizable
from qwenlocal.weights.row_source import RowSource, SourceTensor
from qwenlocal.weights.source_files import SourceFiles

if TYPE_CHECKING:
    import numpy

# Types for which most processors have fast kernels, by size. The second ones are for rows of any multiple of 32.
_CANDIDATES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
_CANDIDATES_32 = ("iq4_nl", "q5_0", "q8_0")
_SAMPLE_ROWS = 48  # per matrix, in runs of 8
_RUN = 8
_MAX_EXPERTS = 4  # of which rows are sampled


@dataclass(frozen=True)
class MixComparison:
    """The bytes and the summed relative errors of llama.cpp's mix and of ours, over the matrices of the layers."""

    usual_size: int
    usual_loss: float
    size: int
    loss: float


class _Option(NamedTuple):
    """A type of a matrix: its bytes, and its relative squared error."""

    type: TensorType
    size: int
    loss: float


@dataclass
class _Matrix:
    """A matrix, the types on its convex hull by size, and the number of the chosen one."""

    index: int
    options: Sequence[_Option]
    chosen: int = 0

    @property
    def option(self) -> _Option:
        return self.options[self.chosen]

    @property
    def gain(self) -> float:
        """The error that the next type saves, per byte."""
        if self.chosen + 1 == len(self.options):
            return 0.0
        following = self.options[self.chosen + 1]
        return (self.option.loss - following.loss) / (following.size - self.option.size)


def choose_best_types(
    tensors: Sequence[SourceTensor],
    usual: Sequence[TypeChoice],
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None,
    threads: int,
) -> tuple[list[TypeChoice], MixComparison]:
    """
    Return types that take at most the bytes of the `usual` choices, with a smaller error; those if there are none.

    Embeddings, output matrix, everything that is not quantized, and types that the user chose stay as they are.

    Raises
    ------
    BadWeights: a source cannot be read.
    """
    indices = [index for index, tensor in enumerate(tensors) if _is_open(tensor, usual[index], overrides)]
    with SourceFiles(file for index in indices for rows in tensors[index].rows for file in rows.files) as reader:
        sampler = _Sampler(reader, imatrix)
        with ThreadPoolExecutor(threads) as pool:
            measured = list(pool.map(lambda index: sampler.measure(tensors[index], usual[index].type), indices))
    baseline = [next(option for option in options if option.type == usual[index].type)
                for index, options in zip(indices, measured, strict=True)]  # fmt: skip
    budget, usual_loss = sum(option.size for option in baseline), sum(option.loss for option in baseline)
    matrices = [_Matrix(index, _hull(options)) for index, options in zip(indices, measured, strict=True)]
    _spend(matrices, budget)
    loss = sum(matrix.option.loss for matrix in matrices)
    if loss >= usual_loss:
        return list(usual), MixComparison(budget, usual_loss, budget, usual_loss)
    choices = list(usual)
    for matrix in matrices:
        if matrix.option.type != usual[matrix.index].type:
            choices[matrix.index] = TypeChoice(matrix.option.type, "best mix")
    return choices, MixComparison(budget, usual_loss, sum(matrix.option.size for matrix in matrices), loss)


def _is_open(tensor: SourceTensor, choice: TypeChoice, overrides: QuantOverrides) -> bool:
    spec = TensorSpec(tensor.name, tensor.shape, tensor.type)
    is_fixed = tensor.keep_f32 or tensor.name in ENDS or not choice.type.is_quantized
    return is_quantizable(spec) and not is_fixed and not overrides.find_tensor_type(tensor.name)


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """Return the options on the lower convex hull: each next one saves less per byte than the one before."""
    hull: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.loss)):
        if hull and hull[-1].loss <= option.loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(left: _Option, right: _Option) -> float:
    return (right.loss - left.loss) / max(1, right.size - left.size)


def _spend(matrices: Sequence[_Matrix], budget: int) -> None:
    """Give the matrices larger types, the one with the largest gain first, as long as the budget lasts."""
    left = budget - sum(matrix.option.size for matrix in matrices)
    queue = [(-matrix.gain, number) for number, matrix in enumerate(matrices) if matrix.gain > 0]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        matrix = matrices[number]
        cost = matrix.options[matrix.chosen + 1].size - matrix.option.size
        if cost > left:
            continue
        left -= cost
        matrix.chosen += 1
        if matrix.gain > 0:
            heapq.heappush(queue, (-matrix.gain, number))


@dataclass
class _Sampler:
    """Measures the errors of types on some rows of a matrix."""

    reader: SourceFiles
    imatrix: ImportanceMatrix | None

    def measure(self, tensor: SourceTensor, usual: TensorType) -> list[_Option]:
        columns = tensor.shape[0]
        names = _CANDIDATES if columns % 256 == 0 else _CANDIDATES_32
        types = list(dict.fromkeys([usual, *map(tensor_type, names)]))
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        squares, errors = 0.0, dict.fromkeys(types, 0.0)
        step = max(1, len(tensor.rows) // _MAX_EXPERTS)
        for number in range(0, len(tensor.rows), step):
            rows = tensor.rows[number]
            importance = self._importance(tensor.name, number if experts > 1 else 0, experts, columns)
            for values in self._read_samples(rows, _SAMPLE_ROWS // min(_MAX_EXPERTS, len(tensor.rows))):
                squares += float((values * values * importance).sum())
                for kind in types:
                    errors[kind] += float(((self._round(values, kind, importance) - values) ** 2 * importance).sum())
        return [
            _Option(kind, kind.row_bytes(tensor.elements), errors[kind] / squares if squares else 0.0) for kind in types
        ]

    def _importance(self, name: str, expert: int, experts: int, columns: int) -> numpy.ndarray:
        import numpy

        weights = self.imatrix.column_weights(name, expert, experts, columns) if self.imatrix else None
        return numpy.ones(columns, numpy.float32) if weights is None else weights

    def _read_samples(self, rows: RowSource, count: int) -> Iterator[numpy.ndarray]:
        """Yield `count` rows as float32, in runs of neighbors spread over the matrix."""
        import numpy

        runs = max(1, count // _RUN)
        size = min(_RUN, rows.row_count)
        for number in range(runs):
            first = (rows.row_count - size) * number // max(1, runs - 1)
            encoded = numpy.empty(size * rows.type.row_bytes(rows.columns), numpy.uint8)
            rows.read(first, encoded.data, self.reader)
            values = numpy.empty((size, rows.columns), numpy.float32)
            ggml.dequantize(rows.type, encoded.ctypes.data, values.ctypes.data, values.size)
            yield numpy.nan_to_num(values, posinf=0, neginf=0)

    def _round(self, values: numpy.ndarray, kind: TensorType, importance: numpy.ndarray) -> numpy.ndarray:
        """Quantize and dequantize."""
        import numpy

        rows, columns = values.shape
        encoded, rounded = numpy.empty(rows * kind.row_bytes(columns), numpy.uint8), numpy.empty_like(values)
        address = importance.ctypes.data if self.imatrix else 0
        ggml.quantize(kind, values.ctypes.data, encoded.ctypes.data, rows, columns, address)
        ggml.dequantize(kind, encoded.ctypes.data, rounded.ctypes.data, rounded.size)
        return rounded
