"""
The only door to llama.cpp: the library itself, and loading a model. Behind it: `vocabulary`, `context`, `sampling`.

Everything goes through the C functions of llama.h as bound by `llama_cpp.llama_cpp`; the bindings' own high-level class
is not used. What llama.cpp logs while something fails becomes the reason in our error.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.engine.interrupts import held
from qwenlocal.engine.vocabulary import Vocabulary
from qwenlocal.errors import BadWeights, QwenlocalError
from qwenlocal.ggml import on_giving_up

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5  # ggml.h: enum ggml_log_level


@dataclass(frozen=True)
class Line:
    """One line of llama.cpp's log."""

    level: int
    text: str


class Library:
    """
    llama.cpp as loaded into this process: its C functions (`c`) and the tail of its log (`log`).

    Where llama.cpp gives up in the middle of its work (a device is gone), it calls `last_words` with its reason, in a
    thread of its own; what was computed until then is lost, and the process with it.
    """

    def __init__(self, echo: Callable[[str], object] | None = None) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # where llama.cpp gives up, no debugger writes pages
        self.last_words: Callable[[str], object] = lambda reason: None
        self.c = bindings()
        self.log: collections.deque[Line] = collections.deque(maxlen=400)
        self.echo = echo
        self._callback = self.c.llama_log_callback(self._receive)
        self.c.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.c.llama_backend_init()
        self._giving_up = on_giving_up(lambda reason: self.last_words(reason))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", errors="replace")
        if self.echo:
            self.echo(line)
        if level == _LOG_CONTINUED and self.log:
            last = self.log[-1]
            self.log[-1] = Line(last.level, last.text + line)
        else:
            self.log.append(Line(level, line))

    def complaint(self) -> str:
        """The first error that llama.cpp logged since `log` was cleared, without the function's name before it."""
        errors = [line.text.strip() for line in self.log if line.level == _LOG_ERROR and line.text.strip()]
        if not errors:
            return ""
        first = errors[0]
        name, colon, rest = first.partition(": ")
        return rest if colon and " " not in name else first

    @property
    def system_info(self) -> str:
        """What the library was compiled to use, as llama.cpp says it: "AVX2 = 1 | F16C = 1 | …"."""
        text: bytes = self.c.llama_print_system_info()
        return text.decode()


@functools.cache
def library() -> Library:
    """llama.cpp keeps its log and its devices once for the process, so there is one `Library`."""
    return Library(echo=sys.stderr.write if os.environ.get("QWENLOCAL_LLAMA_LOG") else None)


def bindings(module: str = "llama_cpp") -> Any:
    """
    A module of llama-cpp-python, without what `import llama_cpp` would bring along.

    The package's own front imports numpy, jinja2 and a disk cache for its high-level class: 0.15 s that every start
    would pay. So the one module is imported under an empty package, which is taken away again: a later
    `import llama_cpp` by somebody else finds everything as usual and shares the same C library.
    """
    if "llama_cpp" in sys.modules:
        return importlib.import_module(f"llama_cpp.{module}")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise QwenlocalError("llama-cpp-python is not installed.", hint="Set everything up: make setup")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module(f"llama_cpp.{module}")
    except (OSError, RuntimeError, FileNotFoundError) as reason:
        raise QwenlocalError(
            f"The compiled part of llama-cpp-python cannot be loaded: {reason}", hint="Compile it again: make setup"
        ) from reason
    finally:
        del sys.modules["llama_cpp"]


class LoadStopped(Exception):
    """`on_progress` ended loading."""


class Model:
    """Weights in memory, and what their file says of itself."""

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        overrides: Mapping[str, float] = {},
        vocabulary_only: bool = False,
        on_progress: Callable[[float], bool] | None = None,
    ) -> None:
        """
        Load `path`; of a split file, the first part (llama.cpp opens the rest itself).

        `overrides` are numbers that go before what the file says, or does not say: {"qwen2.rope.freq_base": 1e6}.
        With `vocabulary_only` there are no weights, and there need not be any in the file. `on_progress` gets a
        fraction between 0 and 1 and returns False to stop loading.

        Raises
        ------
        BadWeights: llama.cpp refuses the file; its reason is in the error.
        LoadStopped: `on_progress` returned False.
        """
        params = self._begin(path)
        params.n_gpu_layers, params.vocab_only = gpu_layers, vocabulary_only
        kept = _overrides(self._c, overrides)
        params.kv_overrides = kept
        stopped = False
        try:
            with held() as pressed:

                def progress(fraction: float, _user_data: object) -> bool:
                    nonlocal stopped
                    stopped = stopped or (on_progress is not None and not on_progress(fraction))
                    return not (stopped or pressed())

                params.progress_callback = self._c.llama_progress_callback(progress)
                self._model = self._c.llama_model_load_from_file(os.fsencode(path), params)
        except KeyboardInterrupt:
            self.close()
            raise
        if stopped:
            self.close()
            raise LoadStopped
        self._finish()

    def _begin(self, path: Path) -> Any:
        """llama.cpp's default parameters, its log empty."""
        self.path = path
        self._lib = library()
        self._c = self._lib.c
        self._lib.log.clear()
        return self._c.llama_model_default_params()

    def _finish(self) -> None:
        if not self._model:
            raise _load_failure(self.path, self._lib.complaint())
        if not self._c.llama_vocab_type(self._c.llama_model_get_vocab(self._model)):  # llama.cpp would end the process
            self.close()
            raise BadWeights(self.path, "it has no vocabulary", hint="It cannot be talked to.")
        self.vocabulary = Vocabulary(self._c, self._model, self.metadata("tokenizer.ggml.pre"))

    def metadata(self, key: str) -> str:
        """The value of `key` in the file, as text; "" where it is missing."""
        size = self._c.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return ""
        buffer = ctypes.create_string_buffer(size + 1)
        self._c.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", errors="replace")

    @property
    def n_ctx_train(self) -> int:
        """How many tokens of context the model was trained for."""
        return int(self._c.llama_model_n_ctx_train(self._model))

    @property
    def description(self) -> str:
        """For example "qwen2 1B Q4_K - Medium" (llama.cpp rounds sizes its own way)."""
        buffer = ctypes.create_string_buffer(128)
        self._c.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode()

    @property
    def can_be_cut(self) -> bool:
        """Whether a sequence can forget its end; recurrent models can only forget everything."""
        c, model = self._c, self._model
        return not (c.llama_model_is_recurrent(model) or c.llama_model_is_hybrid(model))

    @property
    def handle(self) -> Any:
        """The C pointer, for `Context`."""
        return self._model

    def close(self) -> None:
        """Give the memory back. Contexts of this model must be closed before."""
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None


def _overrides(c: Any, numbers: Mapping[str, float]) -> Any:
    """An array of llama.h's struct llama_model_kv_override, an empty key at its end; None for none."""
    if not numbers:
        return None
    found = (c.llama_model_kv_override * (len(numbers) + 1))()
    for place, (key, number) in zip(found, numbers.items(), strict=False):
        place.key = key.encode()
        place.tag = c.LLAMA_KV_OVERRIDE_TYPE_FLOAT if isinstance(number, float) else c.LLAMA_KV_OVERRIDE_TYPE_INT
        if isinstance(number, float):
            place.value.val_f64 = number
        else:
            place.value.val_i64 = number
    return found


def _load_failure(path: Path, complaint: str) -> QwenlocalError:
    if "unknown model architecture" in complaint:
        return BadWeights(
            path,
            f"llama.cpp has no such architecture ({complaint})",
            hint="This file needs a newer llama.cpp than the one built in. Qwen models that run: qwenlocal list --all",
        )
    return BadWeights(path, f"llama.cpp cannot load it: {complaint or 'it gave no reason'}")
