"""Single operations of ggml on arrays, computed by the processor's backend."""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

import numpy
from numpy.typing import NDArray

from qwenlocal.ggml_library import load_library

_MEMORY = 64 * 2**20  # bytes


class _InitParameters(ctypes.Structure):
    """ggml.h: struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Graph:
    """A graph of ggml with the memory of its tensors. Their dimensions are in ggml's order: the innermost first."""

    def __init__(self) -> None:
        self._base, self._cpu = load_library("ggml-base"), load_library("ggml-cpu")
        self._base.ggml_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._base.ggml_init(_InitParameters(_MEMORY, None, False)))

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.ggml_free(self._context)

    def call(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function of ggml.h that returns a tensor."""
        function = getattr(self._base, name)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(self._context, *arguments))

    def tensor(self, type_number: int, array: NDArray[Any], shape: tuple[int, ...] | None = None) -> ctypes.c_void_p:
        """Create a tensor with the bytes of an array; `shape` in values, if the array holds packed blocks."""
        dimensions = [*reversed(shape or array.shape), 1, 1, 1][:4]
        tensor = self.call("ggml_new_tensor_4d", type_number, *map(ctypes.c_int64, dimensions))
        ctypes.memmove(self._data(tensor), numpy.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def permute(self, tensor: ctypes.c_void_p, *axes: int) -> ctypes.c_void_p:
        """Move axis i to `axes[i]`."""
        return self.call("ggml_permute", tensor, *axes)

    def compute(self, tensor: ctypes.c_void_p, shape: tuple[int, ...], threads: int) -> NDArray[numpy.float32]:
        """Compute a tensor of float32 values."""
        graph = self.call("ggml_new_graph")
        self._base.ggml_build_forward_expand(graph, tensor)
        status = self._cpu.ggml_graph_compute_with_ctx(self._context, graph, threads)
        if status:
            raise RuntimeError(f"ggml cannot compute the graph: status {status}")
        result = numpy.empty(shape, numpy.float32)
        ctypes.memmove(result.ctypes.data, self._data(tensor), result.nbytes)
        return result

    def _data(self, tensor: ctypes.c_void_p) -> int:
        self._base.ggml_get_data.restype = ctypes.c_void_p
        return int(self._base.ggml_get_data(tensor))
