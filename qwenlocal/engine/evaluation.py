"""Sums of squares of the inputs of a model's matrices while it computes, from which importance matrices are made."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from qwenlocal import ggml
from qwenlocal.weights.imatrix import InputStatistics

if TYPE_CHECKING:
    import numpy

_MIN_ROWS = 16  # tools/imatrix/imatrix.cpp, collect_imatrix: smaller batches are ignored
_Key = tuple[int, int]


class InputCollector:
    """
    Collects statistics of the inputs of all matrices of the layers, like llama-imatrix (collect_imatrix).

    Pass `observe` to a `Context`, and call `begin` before and `end` after each `decode`. Once all matrices were seen,
    the rest of the computation is skipped: the output matrix is a quarter of the work for a 0.5B.
    """

    def __init__(self) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self.failure: BaseException | None = None  # exceptions cannot pass through llama.cpp
        self._squares: dict[_Key, numpy.ndarray] = {}  # of inputs that several matrices share, in this computation
        self._last, self._previous = "", ""
        self._seen = self._expected = 0

    def begin(self) -> None:
        """Prepare for a computation."""
        self._squares.clear()
        self._seen = 0

    def end(self) -> None:
        """
        Note which matrix was the last, after a complete computation.

        Raises
        ------
        The exception that ended it.
        """
        if self.failure:
            raise self.failure
        self._last, self._expected = self._previous, self._seen

    def observe(self, address: int, is_question: bool, _data: object) -> bool:
        """Answer and follow llama.cpp's calls (`EvaluationCallback`)."""
        try:
            tensor = _GraphTensor.from_address(address)
            if is_question:
                return self._is_wanted(tensor)
            name = tensor.sources[0].matrix_name
            self._collect(name, tensor)
            self._previous, self._seen = name, self._seen + 1
            return not (name == self._last and self._seen == self._expected)
        except BaseException as failure:
            self.failure = failure
            return False

    def _is_wanted(self, tensor: _GraphTensor) -> bool:
        if tensor.operation == _operation("MUL_MAT_ID"):
            return True
        if tensor.operation != _operation("MUL_MAT"):
            return False
        matrix, inputs = tensor.sources[:2]
        return inputs.shape[1] >= _MIN_ROWS and inputs.is_f32 and matrix.matrix_name.startswith("blk.")

    def _collect(self, name: str, tensor: _GraphTensor) -> None:
        matrix, inputs = tensor.sources[:2]
        if tensor.operation == _operation("MUL_MAT_ID"):
            experts = tensor.sources[2]
            sums, counts = self._sum_by_expert(inputs, experts, matrix.shape[2])
        else:
            sums, counts = self._sum_rows(inputs)
        if statistics := self.statistics.get(name):
            statistics.sums += sums
            statistics.counts += counts
        else:
            self.statistics[name] = InputStatistics(sums, counts)

    def _sum_rows(self, inputs: _GraphTensor) -> tuple[numpy.ndarray, numpy.ndarray]:
        import numpy

        key = (ctypes.addressof(inputs), 0)
        values = inputs.values(4).reshape(-1, inputs.shape[0])
        if key not in self._squares:
            self._squares[key] = numpy.einsum("ij,ij->j", values, values)[None]
        return self._squares[key].astype(numpy.float64), numpy.array([float(len(values))])

    def _sum_by_expert(
        self, inputs: _GraphTensor, experts: _GraphTensor, count: int
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Sum the inputs of each expert: those of a token are shared by all its experts, or there is one per expert."""
        import numpy

        chosen = experts.values(2)  # (tokens, experts per token)
        counts = numpy.bincount(chosen.ravel(), minlength=count).astype(numpy.float64)
        key = (ctypes.addressof(inputs), ctypes.addressof(experts))
        if key not in self._squares:
            values = inputs.values(3)  # (tokens, 1 or experts per token, columns)
            sums = numpy.zeros((count, inputs.shape[0]), numpy.float32)
            for expert in numpy.flatnonzero(counts):
                tokens, slots = numpy.nonzero(chosen == expert)
                rows = values[tokens, slots % values.shape[1]]
                sums[expert] = numpy.einsum("ij,ij->j", rows, rows)
            self._squares[key] = sums
        return self._squares[key].astype(numpy.float64), counts


class _GraphTensor(ctypes.Structure):
    """ggml.h: struct ggml_tensor, of the pinned llama.cpp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("operation", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("raw_name", ctypes.c_char * 64),
    ]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, the fastest dimension first."""
        return tuple(self.ne)

    @property
    def is_f32(self) -> bool:
        return bool(self.type == ggml.tensor_type("f32").number)

    @property
    def sources(self) -> list[_GraphTensor]:
        return [_GraphTensor.from_address(address) for address in self.src if address]

    @property
    def matrix_name(self) -> str:
        """The name without what the scheduler adds to copies: "CUDA0#blk.0.attn_k.weight#0"."""
        name = str(self.raw_name, errors="replace")
        return name.split("#")[1] if "#" in name else name

    def values(self, dimensions: int) -> Any:
        """Return the values of a float32 or int32 tensor, wherever it is, the slowest of `dimensions` first."""
        import numpy

        size = 4 + sum((self.ne[index] - 1) * self.nb[index] for index in range(4))
        data = ggml.read_tensor(ctypes.addressof(self), size)
        kind = numpy.float32 if self.is_f32 else numpy.int32
        shape, strides = (tuple(reversed(tuple(part)[:dimensions])) for part in (self.ne, self.nb))
        return numpy.lib.stride_tricks.as_strided(data.view(kind), shape, strides, writeable=False)


@functools.cache
def _operation(name: str) -> int:
    return ggml.operation_number(name)
