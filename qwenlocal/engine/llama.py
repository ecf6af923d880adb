"""
The only door to llama.cpp: loading a model, its vocabulary, and `Context.decode`.

Everything goes through the C functions of llama.h as bound by `llama_cpp.llama_cpp`; the bindings' own high-level class
is not used. What llama.cpp logs while something fails becomes the reason in our error.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import importlib.util
import math
import os
import sys
import types
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadWeights, NoContext, QwenlocalError
from qwenlocal.weights.kinds import PADDING

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5  # ggml.h: enum ggml_log_level
_ATTR_CONTROL, _ATTR_USER_DEFINED = 1 << 3, 1 << 4  # llama.h: LLAMA_TOKEN_ATTR_CONTROL, …_USER_DEFINED
_NO_SLOT, _ABORTED = 1, 2  # llama.h: what llama_decode returns
_MOST_OUTPUTS = 32  # rows of logits kept at once; llama.cpp would reserve one per token of a batch (0.3 GB for Qwen)


@dataclass(frozen=True)
class Line:
    """One line of llama.cpp's log."""

    level: int
    text: str


class Library:
    """llama.cpp as loaded into this process: its C functions (`c`) and the tail of its log (`log`)."""

    def __init__(self, echo: Callable[[str], object] | None = None) -> None:
        self.c = _bindings()
        self.log: collections.deque[Line] = collections.deque(maxlen=400)
        self.echo = echo
        self._callback = self.c.llama_log_callback(self._receive)
        self.c.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.c.llama_backend_init()

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


def _bindings() -> Any:
    """
    `llama_cpp.llama_cpp`, without what `import llama_cpp` would bring along.

    The package's own front imports numpy, jinja2 and a disk cache for its high-level class: 0.15 s that every start
    would pay. So the one module is imported under an empty package, which is taken away again: a later
    `import llama_cpp` by somebody else finds everything as usual and shares the same C library.
    """
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise QwenlocalError("llama-cpp-python is not installed.", hint="Set everything up: make setup")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (OSError, RuntimeError, FileNotFoundError) as reason:
        raise QwenlocalError(
            f"The compiled part of llama-cpp-python cannot be loaded: {reason}", hint="Compile it again: make setup"
        ) from reason
    finally:
        del sys.modules["llama_cpp"]


class AbortFlag:
    """
    Stops a running `Context.decode` from another thread within milliseconds.

    llama.cpp asks its abort callback many times per token. Here that callback is libc's `strlen` over a buffer of our
    own: "" means go on, "x" means stop, and Python (with its lock) is never asked.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)

    def set(self) -> None:
        """Stop; may be called from any thread."""
        self._buffer[0] = b"x"

    def clear(self) -> None:
        """Forget an earlier `set`."""
        self._buffer[0] = b"\0"

    def __bool__(self) -> bool:
        return self._buffer[0] != b"\0"

    @property
    def address(self) -> int:
        """Where the buffer lies."""
        return ctypes.addressof(self._buffer)


class Aborted(Exception):
    """`Context.decode` was stopped through the abort flag; part of the batch may be in the KV cache."""


class NoRoom(Exception):
    """The KV cache has no place for the batch; nothing of it was kept."""


class Vocabulary:
    """Text to token ids and back, as the model's file defines it."""

    def __init__(self, lib: Library, model: Any, pre_tokenizer: str) -> None:
        self._c = lib.c
        self._vocab = lib.c.llama_model_get_vocab(model)
        # Qwen's tokenizer.json begins with Unicode normalisation form C; llama.cpp does not do it.
        self._normalise = pre_tokenizer == "qwen2"
        self._piece = ctypes.create_string_buffer(256)
        self.hides_padding = self._has_reachable_padding()

    def __len__(self) -> int:
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        """
        The ids of `text`; with `special`, spellings like `<|im_end|>` become the control tokens they name.

        Lone surrogates (bytes of a terminal that are not UTF-8) become question marks.
        """
        if self._normalise:
            text = unicodedata.normalize("NFC", text)
        if self.hides_padding and PADDING.search(text):
            return self._around_padding(text, special=special, add_bos=add_bos)
        return self._ids(text, special=special, add_bos=add_bos)

    def _has_reachable_padding(self) -> bool:
        """
        Whether ids without a token are marked so that typing their names gives them, as converters once did.

        They stand at the end of the vocabulary, so looking at the last one is enough.
        """
        last = len(self) - 1
        reachable = self._c.llama_vocab_get_attr(self._vocab, last) & _ATTR_USER_DEFINED
        return bool(reachable and PADDING.fullmatch(self.text_of(last)))

    def _around_padding(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """
        Ids of `text` in which "[PAD5]" is text: it is cut before its last bracket, and the parts are tokenised apart.

        With Qwen's expression, where a digit is a word of its own, these are the ids of the whole.
        """
        ids: list[int] = []
        parts = PADDING.sub(lambda match: f"{match[0][:-1]}\0]", text.replace("\0", "")).split("\0")
        for number, part in enumerate(parts):
            ids += self._ids(part, special=special, add_bos=add_bos and number == 0)
        return ids

    def _ids(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), ids, room, add_bos, special)
        if count < 0:
            ids = (ctypes.c_int32 * -count)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, -count, add_bos, special)
        return ids[:count]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for; a control token gives none unless `special`. Often not whole UTF-8."""
        size = self._c.llama_token_to_piece(self._vocab, token, self._piece, len(self._piece), 0, special)
        if size < 0:
            self._piece = ctypes.create_string_buffer(-size)
            size = self._c.llama_token_to_piece(self._vocab, token, self._piece, len(self._piece), 0, special)
        return self._piece.raw[:size]

    def is_end(self, token: int) -> bool:
        """Whether the model ends its turn or its text with `token`."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether `token` is markup that people must not be able to type."""
        return bool(self._c.llama_vocab_get_attr(self._vocab, token) & _ATTR_CONTROL)

    def text_of(self, token: int) -> str:
        """The spelling of a token in the vocabulary, "" for -1 (no such token)."""
        return self._c.llama_vocab_get_text(self._vocab, token).decode() if token >= 0 else ""

    @property
    def bos(self) -> str:
        """The spelling of the token that begins a text, "" where the model has none."""
        return self.text_of(self._c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """The spelling of the token that ends a text, "" where the model has none."""
        return self.text_of(self._c.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether plain text starts with a begin token (not for Qwen)."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))


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
        Aborted: `on_progress` returned False.
        """
        params = self._begin(path)
        params.n_gpu_layers, params.vocab_only = gpu_layers, vocabulary_only
        kept = _overrides(self._c, overrides)
        params.kv_overrides = kept
        stopped = False

        def progress(fraction: float, _user_data: object) -> bool:
            nonlocal stopped
            stopped = stopped or (on_progress is not None and not on_progress(fraction))
            return not stopped

        params.progress_callback = self._c.llama_progress_callback(progress)
        self._model = self._c.llama_model_load_from_file(os.fsencode(path), params)
        if stopped:
            self.close()
            raise Aborted
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
        self.vocabulary = Vocabulary(self._lib, self._model, self.metadata("tokenizer.ggml.pre"))

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


@dataclass(frozen=True)
class ContextOptions:
    """How a context is laid out. `threads` 0 leaves the number to llama.cpp."""

    n_ctx: int
    threads: int = 0
    batch_threads: int = 0
    n_batch: int = 512
    sequences: int = 1


class Context:
    """
    A KV cache of `options.n_ctx` tokens over a model, for one or more sequences.

    A sequence is a number from 0; each holds its own tokens at positions 0, 1, 2, ….
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        """
        Raises
        ------
        NoContext: llama.cpp cannot make it, mostly for want of memory.
        """
        self.model, self.options = model, options
        self._lib = library()
        self._c = c = self._lib.c
        self.abort = AbortFlag()
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, min(options.n_batch, 512)
        params.n_seq_max, params.kv_unified = options.sequences, True
        params.n_outputs_max = max(_MOST_OUTPUTS, options.sequences)
        if options.threads:
            params.n_threads = options.threads
            params.n_threads_batch = options.batch_threads or options.threads
        params.no_perf = True
        params.abort_callback = ctypes.cast(_strlen(), type(params.abort_callback))
        params.abort_callback_data = self.abort.address
        self._lib.log.clear()
        self._context = c.llama_init_from_model(model.handle, params)
        if not self._context:
            raise NoContext(options.n_ctx, self._lib.complaint() or "it gave no reason")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(options.n_batch, 0, 1)

    @property
    def n_ctx(self) -> int:
        """Tokens the KV cache holds (llama.cpp rounds up to 256)."""
        return int(self._c.llama_n_ctx(self._context))

    @property
    def handle(self) -> Any:
        """The C pointer, for samplers."""
        return self._context

    def decode(self, batch: Sequence[tuple[int, Sequence[int]]], *, all_logits: bool = False) -> list[int]:
        """
        Run the model over new tokens of one or more sequences, at most `n_batch` tokens altogether.

        `batch` is a list of (sequence, ids); the ids continue what the sequence holds. Returns, for each, the row of
        logits after its last token (for `Context.logits` and samplers); with `all_logits`, the row after its first
        token, the others following. `decode([(0, [9, 8]), (1, [7])])` returns `[1, 2]`: rows are batch positions.

        Raises
        ------
        Aborted: `abort` was set. `length` tells what the cache holds.
        NoRoom: the KV cache is full.
        """
        rows: list[int] = []
        position = 0
        token, pos, count, seq, logits = (
            self._batch.token,
            self._batch.pos,
            self._batch.n_seq_id,
            self._batch.seq_id,
            self._batch.logits,
        )
        for sequence, ids in batch:
            start = self.length(sequence)
            rows.append(position if all_logits else position + len(ids) - 1)
            for offset, id in enumerate(ids):
                token[position] = id
                pos[position] = start + offset
                count[position] = 1
                seq[position][0] = sequence
                logits[position] = all_logits
                position += 1
            logits[position - 1] = True
        self._batch.n_tokens = position
        self._run()
        return rows

    def _run(self) -> None:
        code = self._c.llama_decode(self._context, self._batch)
        if code == 0:
            return
        if code == _ABORTED:
            raise Aborted
        if code == _NO_SLOT:
            raise NoRoom
        raise QwenlocalError(
            f"llama.cpp failed while computing (code {code}): {self._lib.complaint() or 'it gave no reason'}",
            hint="This is a bug of ours or of llama.cpp; QWENLOCAL_LLAMA_LOG=1 shows its log.",
        )

    def length(self, sequence: int) -> int:
        """How many tokens the sequence holds."""
        return int(self._c.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def truncate(self, sequence: int, length: int) -> int:
        """
        Forget what the sequence holds from position `length` on; returns what it holds then.

        That is `length`, or 0 for models whose memory cannot be cut (recurrent ones): those forget everything.
        """
        if self._c.llama_memory_seq_rm(self._memory, sequence, length, -1):
            return length
        self._c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return 0

    def logits(self, row: int) -> Any:
        """The model's raw scores for the next token, as a C array of as many floats as there are tokens."""
        return self._c.llama_get_logits_ith(self._context, row)

    def is_broken(self, row: int) -> bool:
        """Whether the scores of a row are NaN: one such weight makes all of them so, so the first one tells."""
        return math.isnan(self.logits(row)[0])

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._c.llama_batch_free(self._batch)
            self._c.llama_free(self._context)
            self._context = None


@functools.cache
def _strlen() -> Any:
    """The C library's `strlen`, see `AbortFlag`."""
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return libc.strlen
