"""A model without a file: llama.cpp takes the header of one, and asks for every tensor's numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenlocal.engine.llama import Model
from qwenlocal.ggml import GgufHeader, TensorInMemory

Fill = Callable[[TensorInMemory], None]


class ModelInMemory(Model):
    """
    A model whose weights come from `fill`, called once for each tensor.

    llama.cpp also asks for tensors that the header does not list, with type float32: the head of a tied model, scales,
    biases (llama-model-loader.cpp: create_tensor). All weights are copied, and not repacked for the processor, so this
    is for comparing, not for daily use.
    """

    def __init__(self, header: Path, fill: Fill) -> None:
        """
        Raises
        ------
        BadWeights: llama.cpp refuses the header. Whatever `fill` raises.
        """
        params = self._begin(header)
        failures: list[BaseException] = []

        def set_tensor_data(handle: Any, _user_data: object) -> None:
            if failures:
                return
            try:
                fill(TensorInMemory.at(handle))
            except BaseException as failure:  # it must not pass through C
                failures.append(failure)

        said = GgufHeader(header)
        try:
            callback = self._c.llama_model_set_tensor_data_t(set_tensor_data)
            self._model = self._c.llama_model_init_from_user(said.handle, callback, ctypes.c_void_p(0), params)
        finally:
            said.close()
        if failures:
            self.close()
            raise failures[0]
        self._finish()
