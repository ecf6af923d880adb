"""
The only access to llama.cpp: its library and log, and loading models. `tokenizer` and `context` use it.

Everything goes through the C functions of llama.h as bound by `llama_cpp.llama_cpp`; the bindings' high-level `Llama`
class is not used. If a call fails, the error quotes what llama.cpp logged.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal.crash_handlers import set_crash_handler
from qwenlocal.devices import Device, device_array, find_vulkan_drivers, list_devices, load_backend_modules
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import BadWeights, QwenlocalError
from qwenlocal.ggml import InMemoryTensor, open_gguf_header

FillTensor = Callable[[InMemoryTensor], None]

_LOG_ERROR, _LOG_CONTINUED = 4, 5  # ggml.h: enum ggml_log_level


class LogLine(NamedTuple):
    """A line of llama.cpp's log."""

    level: int
    text: str


class LlamaLibrary:
    """
    llama.cpp in this process: its C functions (`c`) and the end of its log (`log`).

    If llama.cpp is about to end the process (a device is gone), it calls `on_abort` with the reason, in a thread of its
    own; all that the process computed is lost.
    """

    def __init__(self, echo: Callable[[str], object] | None = None) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # on abort, ggml would start a debugger and print pages
        self.on_abort: Callable[[str], object] = lambda reason: None
        self.c = import_bindings()
        self.log: collections.deque[LogLine] = collections.deque(maxlen=400)
        self.echo = echo
        self._drivers: dict[str, str] = {}
        self._log_callback = self.c.llama_log_callback(self._receive)
        self.c.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        self.c.llama_backend_init()
        self._crash_handler = set_crash_handler(lambda reason: self.on_abort(reason))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        if self.echo:
            self.echo(line)
        if level == _LOG_CONTINUED and self.log:
            level, before = self.log.pop()
            line = before + line
        self.log.append(LogLine(level, line))

    def first_error(self) -> str:
        """Return the first error logged since `log` was cleared, without the function's name; "" if there is none."""
        texts = (text.strip() for level, text in self.log if level == _LOG_ERROR)
        error = next(filter(None, texts), "")
        name, colon, rest = error.partition(": ")
        return rest if colon and " " not in name else error

    def list_devices(self) -> list[Device]:
        """List the devices; the backends of GPUs are loaded when this is first called."""
        load_backend_modules()
        devices = list_devices()
        self._drivers |= find_vulkan_drivers(line.text for line in self.log)
        return [replace(device, driver=self._drivers.get(device.name, "")) for device in devices]

    @property
    def system_info(self) -> str:
        """The features that llama.cpp was compiled with, in its own format: "AVX2 = 1 | F16C = 1 | …"."""
        text: bytes = self.c.llama_print_system_info()
        return text.decode()


@functools.cache
def load_library() -> LlamaLibrary:
    """Load llama.cpp, once per process: its log and its devices are global."""
    return LlamaLibrary(echo=sys.stderr.write if os.environ.get("QWENLOCAL_LLAMA_LOG") else None)


def import_bindings() -> Any:
    """
    Import the low-level module of llama-cpp-python without its `__init__`.

    `import llama_cpp` also imports numpy, jinja2 and a disk cache for its high-level class, 0.15 s at every start. So
    the module is imported under an empty package, which is removed afterwards: a later `import llama_cpp` elsewhere
    works as usual and shares the same C library.
    """
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise QwenlocalError("llama-cpp-python is not installed.", hint="Install everything: make setup")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (OSError, RuntimeError, FileNotFoundError) as reason:
        raise QwenlocalError(
            f"Cannot load the compiled library of llama-cpp-python: {reason}", hint="Compile it again: make setup"
        ) from reason
    finally:
        del sys.modules["llama_cpp"]


@contextlib.contextmanager
def defer_interrupt() -> Iterator[Callable[[], bool]]:
    """
    Defer Ctrl-C while llama.cpp runs in the main thread; Python would raise it in a callback, where it is lost.

    Use as `with defer_interrupt() as is_interrupted: …`; `is_interrupted()` returns whether Ctrl-C was pressed.

    Raises
    ------
    KeyboardInterrupt: Ctrl-C was pressed; raised at the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    count = 0

    def handle(_number: int, _frame: object) -> None:
        nonlocal count
        count += 1

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
    if count:
        raise KeyboardInterrupt


class LoadCancelled(Exception):
    """Loading was cancelled by `on_progress`."""


class Model:
    """
    Weights in memory, with the tokenizer and the metadata of their file.

    `buffer_sizes` are the bytes of weights by the name of the memory that holds them: "CPU_Mapped", "Vulkan0".
    `adapters` are C pointers from `load_adapter` with their scales. New contexts use them; for an older one, call
    `Context.apply_adapters`.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        devices: Sequence[Device] = (),
        layers_by_device: Sequence[int] = (),
        kv_overrides: Mapping[str, float] = {},
        vocab_only: bool = False,
        on_progress: Callable[[float], bool] | None = None,
    ) -> None:
        """
        Load the model file `path`; of a split model, pass the first part (llama.cpp opens the others).

        `kv_overrides` replace or add numbers of the file's metadata: {"qwen2.rope.freq_base": 1e6}. With `vocab_only`,
        no weights are loaded, and the file needs none. `gpu_layers` are divided among `devices` as `layers_by_device`
        says, or else by free memory; without `devices`, no GPU is used. `on_progress` gets a fraction between 0 and 1
        and returns False to cancel.

        Raises
        ------
        BadWeights: llama.cpp rejects the file; the error quotes its reason.
        LoadCancelled: `on_progress` returned False.
        """
        params = self._default_params(path)
        params.n_gpu_layers, params.vocab_only = gpu_layers, vocab_only
        overrides = _override_array(self._c, kv_overrides)  # must outlive the call
        params.kv_overrides = overrides
        handles = device_array(devices)  # as must these
        shares = (ctypes.c_float * 64)(*layers_by_device)
        params.devices = ctypes.addressof(handles)
        if layers_by_device:
            params.tensor_split = ctypes.cast(shares, type(params.tensor_split))
        is_cancelled = False
        try:
            with defer_interrupt() as is_interrupted:

                def progress(fraction: float, _user_data: object) -> bool:
                    nonlocal is_cancelled
                    is_cancelled = is_cancelled or (on_progress is not None and not on_progress(fraction))
                    return not (is_cancelled or is_interrupted())

                params.progress_callback = self._c.llama_progress_callback(progress)
                self._model = self._c.llama_model_load_from_file(os.fsencode(path), params)
        except KeyboardInterrupt:
            self.close()
            raise
        if is_cancelled:
            self.close()
            raise LoadCancelled
        self._finish_loading()

    def _default_params(self, path: Path) -> Any:
        """Return llama.cpp's default parameters, and clear its log."""
        self.path = path
        self.adapters: Sequence[tuple[Any, float]] = ()
        self._lib = load_library()
        self._c = self._lib.c
        self._lib.log.clear()
        return self._c.llama_model_default_params()

    def _finish_loading(self) -> None:
        if not self._model:
            raise _load_error(self.path, self._lib.first_error())
        if not self._c.llama_vocab_type(self._c.llama_model_get_vocab(self._model)):  # llama.cpp would abort later
            self.close()
            raise BadWeights(self.path, "the file has no vocabulary", hint="This model cannot be used for text.")
        self.buffer_sizes = _read_buffer_sizes(self._lib.log)
        self.tokenizer = Tokenizer(self._c, self._model, self.path, self.metadata)

    def metadata(self, key: str) -> str:
        """Return the value of `key` in the file's metadata as text; "" if it is missing."""
        size = self._c.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return ""
        buffer = ctypes.create_string_buffer(size + 1)
        self._c.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", errors="replace")

    @property
    def n_ctx_train(self) -> int:
        """The context, in tokens, that the model was trained with."""
        return int(self._c.llama_model_n_ctx_train(self._model))

    @property
    def description(self) -> str:
        """A description by llama.cpp, for example "qwen2 1B Q4_K - Medium"; it rounds sizes its own way."""
        buffer = ctypes.create_string_buffer(128)
        self._c.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode()

    @property
    def can_truncate(self) -> bool:
        """True if the end of a sequence can be removed; recurrent models can only clear a whole sequence."""
        c, model = self._c, self._model
        return not (c.llama_model_is_recurrent(model) or c.llama_model_is_hybrid(model))

    @property
    def handle(self) -> Any:
        """The C pointer, for `Context`."""
        return self._model

    def load_adapter(self, path: Path) -> Any:
        """
        Load the LoRA adapter in the GGUF file `path`, for `adapters`; it is freed with the model.

        Call this before a context is created, which reserves memory for it.

        Raises
        ------
        BadWeights: llama.cpp rejects the file; the error quotes its reason.
        """
        self._lib.log.clear()
        handle = self._c.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not handle:
            reason = self._lib.first_error().removeprefix("failed to apply lora adapter: ") or "no reason given"
            hint = "The adapter may be for another model, or damaged. Convert or download it again."
            raise BadWeights(path, f"llama.cpp cannot load the adapter: {reason}", hint=hint)
        return handle

    def close(self) -> None:
        """Free the memory. Close the model's contexts first."""
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None


class InMemoryModel(Model):
    """
    A model without a file: `fill` is called once per tensor to write its weights.

    llama.cpp also asks for tensors that the header does not list, with type float32: the output matrix of a model with
    tied embeddings, scales, biases (llama-model-loader.cpp: create_tensor). All weights are copied and not repacked for
    the processor, so this is for comparing models, not for daily use.
    """

    def __init__(self, header: Path, fill: FillTensor) -> None:
        """
        Build the model that the GGUF file `header` describes; that file needs no weights.

        Raises
        ------
        BadWeights: llama.cpp rejects the header.
        Exception: whatever `fill` raises.
        """
        params = self._default_params(header)
        failures: list[BaseException] = []

        def set_tensor_data(handle: Any, _user_data: object) -> None:
            if failures:
                return
            try:
                fill(InMemoryTensor.from_pointer(handle))
            except BaseException as failure:  # it must not pass through C
                failures.append(failure)

        with open_gguf_header(header) as gguf:
            callback = self._c.llama_model_set_tensor_data_t(set_tensor_data)
            self._model = self._c.llama_model_init_from_user(gguf, callback, ctypes.c_void_p(0), params)
        if failures:
            self.close()
            raise failures[0]
        self._finish_loading()


def _read_buffer_sizes(log: Iterable[LogLine]) -> dict[str, int]:
    """Read the lines that llama-model.cpp logs: "load_tensors:      Vulkan0 model buffer size =    86.74 MiB"."""
    found = (re.search(r"(\S+) model buffer size = *([\d.]+) MiB", line.text) for line in log)
    return {match[1]: round(float(match[2]) * 2**20) for match in found if match}


def _override_array(c: Any, numbers: Mapping[str, float]) -> Any:
    """Build an array of llama.h's struct llama_model_kv_override, ended by an empty key; None for no overrides."""
    if not numbers:
        return None
    overrides = (c.llama_model_kv_override * (len(numbers) + 1))()
    for override, (key, number) in zip(overrides, numbers.items(), strict=False):
        override.key = key.encode()
        if isinstance(number, float):
            override.tag, override.value.val_f64 = c.LLAMA_KV_OVERRIDE_TYPE_FLOAT, number
        else:
            override.tag, override.value.val_i64 = c.LLAMA_KV_OVERRIDE_TYPE_INT, number
    return overrides


def _load_error(path: Path, reason: str) -> QwenlocalError:
    if "unknown model architecture" in reason:
        hint = "The file needs a newer llama.cpp than the built-in one. For Qwen models that run: qwenlocal list --all"
        return BadWeights(path, f"llama.cpp does not support its architecture ({reason})", hint=hint)
    return BadWeights(path, f"llama.cpp cannot load it: {reason or 'no reason given'}")
