"""A KV cache over a model: `Context.decode` runs the model over new tokens of one or more sequences."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenlocal.engine.interrupts import held
from qwenlocal.engine.llama import Model, library
from qwenlocal.errors import NoContext, QwenlocalError
from qwenlocal.ggml import tensor_type

_NO_SLOT, _ABORTED = 1, 2  # llama.h: what llama_decode returns
_ROPE_KINDS = {"linear": 1, "yarn": 2}  # llama.h: enum llama_rope_scaling_type
MOST_OUTPUTS = 32  # rows of logits kept at once; llama.cpp would reserve one per token of a batch (0.3 GB for Qwen)


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


@dataclass(frozen=True)
class RopeScaling:
    """
    How positions beyond those that a model was trained with are squeezed into them: "linear" or "yarn", by `factor`.

    llama.h: rope_scaling_type, rope_freq_scale = 1 / factor, yarn_orig_ctx. RopeScaling("yarn", 2.0, 32768) makes
    65,536 tokens of 32,768.
    """

    kind: str
    factor: float
    original: int


@dataclass(frozen=True)
class ContextOptions:
    """
    How a context is laid out. `threads` 0 leaves the number to llama.cpp.

    `n_batch` tokens can be given at once, `n_ubatch` of them are computed together. `key_type` and `value_type` are
    ggml's names for how keys and values are kept ("f16", "q8_0", "q4_0"); values other than f16 need flash attention.
    `flash_attention` None is llama.cpp's own choice.
    """

    n_ctx: int
    threads: int = 0
    batch_threads: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    sequences: int = 1
    key_type: str = "f16"
    value_type: str = "f16"
    flash_attention: bool | None = None
    rope: RopeScaling | None = None


def rounded_up(n_ctx: int) -> int:
    """llama.cpp makes contexts of whole 256 tokens, but takes a smaller number for the most that a batch can have."""
    return -(-n_ctx // 256) * 256


def _parameters(c: Any, options: ContextOptions) -> Any:
    """`options` as llama.h's struct llama_context_params."""
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = rounded_up(options.n_ctx), options.n_batch, options.n_ubatch
    params.n_seq_max, params.kv_unified = options.sequences, True
    params.n_outputs_max = max(MOST_OUTPUTS, options.sequences)
    if options.threads:
        params.n_threads = options.threads
        params.n_threads_batch = options.batch_threads or options.threads
    params.type_k, params.type_v = (tensor_type(name).number for name in (options.key_type, options.value_type))
    if options.flash_attention is not None:
        params.flash_attn_type = int(options.flash_attention)
    if rope := options.rope:
        params.rope_scaling_type = _ROPE_KINDS[rope.kind]
        params.rope_freq_scale, params.yarn_orig_ctx = 1 / rope.factor, rope.original
    params.no_perf = True
    return params


class Context:
    """
    A KV cache of `options.n_ctx` tokens over a model, for one or more sequences.

    A sequence is a number from 0; each holds its own tokens at positions 0, 1, 2, ….
    """

    def __init__(self, model: Model, options: ContextOptions, abort: AbortFlag | None = None) -> None:
        """
        With `abort`, a flag of another context's, one stop ends both.

        Raises
        ------
        NoContext: llama.cpp cannot make it, mostly for want of memory.
        """
        self.model, self.options = model, options
        self._lib = library()
        self._c = c = self._lib.c
        self.abort = AbortFlag() if abort is None else abort  # a flag that is not set is false
        params = _parameters(c, options)
        params.abort_callback = ctypes.cast(_strlen(), type(params.abort_callback))
        params.abort_callback_data = self.abort.address
        self._lib.log.clear()
        self._context = None
        try:
            with held():
                self._context = c.llama_init_from_model(model.handle, params)
        except KeyboardInterrupt:
            c.llama_free(self._context)
            raise
        if not self._context:
            raise NoContext(options.n_ctx, self._lib.complaint() or "it gave no reason")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(options.n_batch, 0, 1)

    @property
    def n_ctx(self) -> int:
        """Tokens the KV cache holds (llama.cpp rounds up to 256)."""
        return int(self._c.llama_n_ctx(self._context))

    @property
    def n_batch(self) -> int:
        """Tokens that can be given at once; llama.cpp ends the process where it is given more."""
        return int(self._c.llama_n_batch(self._context))

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

    def set_threads(self, count: int) -> None:
        """Compute with so many threads from now on."""
        self._c.llama_set_n_threads(self._context, count, count)

    def length(self, sequence: int) -> int:
        """How many tokens the sequence holds; 0 once the context is closed."""
        if not self._context:  # an answer that nobody heard to its end may be cleared away after that
            return 0
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

    def copy(self, source: int, target: int) -> None:
        """Have `target` hold what `source` holds, in the same cells of the cache; what it held before is forgotten."""
        self._c.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._c.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def state(self, sequence: int) -> Any:
        """What the sequence holds, as a C array of bytes: keys and values of every layer, for `restore`."""
        size = self._c.llama_state_seq_get_size(self._context, sequence)
        data = (ctypes.c_uint8 * size)()
        if self._c.llama_state_seq_get_data(self._context, data, size, sequence) != size:
            raise QwenlocalError("llama.cpp does not give the state of the cache away.", hint="Nothing is lost by it.")
        return data

    def restore(self, sequence: int, data: Any) -> bool:
        """Put what `state` gave in place of what the sequence holds; False where llama.cpp does not take it."""
        self.truncate(sequence, 0)
        if self._c.llama_state_seq_set_data(self._context, data, len(data), sequence):
            return True
        self.truncate(sequence, 0)
        return False

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
