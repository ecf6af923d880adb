"""A KV cache and the computation that fills it: `Context.decode` runs the model over new tokens."""

from __future__ import annotations

import ctypes
import functools
import math
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenlocal.engine.llama import Model, defer_interrupt, load_library
from qwenlocal.engine.threads import ThreadAdapter
from qwenlocal.errors import BadWeights, ContextNotCreated, GpuOutOfMemory, QwenlocalError
from qwenlocal.ggml import tensor_type

if TYPE_CHECKING:
    import numpy

_NO_SLOT, ABORTED = 1, 2  # llama.h: return values of llama_decode
_ROPE_KINDS = {"linear": 1, "yarn": 2}  # llama.h: enum llama_rope_scaling_type
MAX_OUTPUTS = 32  # rows of logits; llama.cpp's default is one per token of a batch (0.3 GB for Qwen)


EvaluationCallback = Callable[[int, bool, object], bool]
"""
Gets the address of each tensor that is to be computed, and True: returns True to see it. Then gets it computed, and
False: returns False to skip the rest of the graph (ggml-backend.h: ggml_backend_sched_eval_callback).
"""


class AbortFlag:
    """
    A flag that stops a running `Context.decode` within milliseconds, from any thread.

    llama.cpp calls its abort callback many times per token. Here, the callback is libc's `strlen` over a buffer: ""
    means continue, "x" means abort. So no Python code runs, and the GIL is not needed.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)

    def set(self) -> None:
        """Abort the computation."""
        self._buffer[0] = b"x"

    def clear(self) -> None:
        """Reset the flag."""
        self._buffer[0] = b"\0"

    def __bool__(self) -> bool:
        return self._buffer[0] != b"\0"

    def watch(self, c: Any, context: Any) -> None:
        """Stop the computations of `context`, which must not compute once this object is gone."""
        c.llama_set_abort_callback(
            context, ctypes.cast(_strlen(), c.ggml_abort_callback), ctypes.addressof(self._buffer)
        )


class Aborted(Exception):
    """`Context.decode` was stopped by the abort flag; part of the batch may be in the KV cache."""


class CacheFull(Exception):
    """The KV cache has no room for the batch; none of its tokens were added."""


@dataclass(frozen=True)
class RopeScaling:
    """
    A RoPE scaling of type "linear" or "yarn", which extends the context of `original` tokens by `factor`.

    llama.h: rope_scaling_type, rope_freq_scale = 1 / factor, yarn_orig_ctx. RopeScaling("yarn", 2.0, 32768) extends
    32,768 tokens to 65,536. Its repr is part of the keys of `prompt_cache`: renaming a field invalidates saved files.
    """

    kind: str
    factor: float
    original: int


@dataclass(frozen=True)
class ContextOptions:
    """
    Parameters of a context.

    Up to `n_batch` tokens are passed to llama.cpp at once, `n_ubatch` of them computed at once, for at most `n_seq_max`
    sequences. `threads` 0 is llama.cpp's default. `key_type` and `value_type` are ggml's names of the KV cache's types
    ("f16", "q8_0", "q4_0"); value types other than f16 need flash attention. `flash_attention` None is llama.cpp's
    choice. `max_outputs` is the number of rows of logits to make room for; 0 is enough to generate text.
    """

    n_ctx: int
    threads: int = 0
    batch_threads: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq_max: int = 1
    key_type: str = "f16"
    value_type: str = "f16"
    flash_attention: bool | None = None
    rope: RopeScaling | None = None
    max_outputs: int = 0

    @property
    def n_outputs(self) -> int:
        """The number of rows of logits that one call of `Context.decode` can return; llama.cpp aborts at more."""
        return max(MAX_OUTPUTS, self.n_seq_max, self.max_outputs)


def pad_n_ctx(n_ctx: int) -> int:
    """Round up to llama.cpp's granularity of 256 tokens; it would limit batches to a smaller number."""
    return -(-n_ctx // 256) * 256


def context_parameters(c: Any, options: ContextOptions) -> Any:
    """Convert `options` to llama.h's struct llama_context_params."""
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = pad_n_ctx(options.n_ctx), options.n_batch, options.n_ubatch
    params.n_seq_max, params.kv_unified = options.n_seq_max, True
    params.n_outputs_max = options.n_outputs
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

    Sequences are numbered from 0; each has its own tokens at positions 0, 1, 2, …. `is_computing` while `decode` runs.
    """

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        abort: AbortFlag | None = None,
        thread_adapter: ThreadAdapter | None = None,
        evaluation: EvaluationCallback | None = None,
    ) -> None:
        """
        Create the context. Pass the `abort` flag of another context to stop both at once.

        Without `thread_adapter`, it always computes with `options.threads`. `evaluation` sees the computation.

        Raises
        ------
        ContextNotCreated: llama.cpp cannot create it, usually for lack of memory.
        """
        self.model, self.options, self.thread_adapter = model, options, thread_adapter
        self.is_computing = False
        self._lib = load_library()
        self._c = c = self._lib.c
        self.abort = AbortFlag() if abort is None else abort  # not `or`: an unset flag is false
        params = context_parameters(c, options)
        self._evaluation = c.ggml_backend_sched_eval_callback(evaluation) if evaluation else None  # llama.cpp keeps it
        if self._evaluation:
            params.cb_eval = self._evaluation
        self._lib.log.clear()
        self._context = None
        try:
            with defer_interrupt():
                self._context = c.llama_init_from_model(model.handle, params)
        except KeyboardInterrupt:
            c.llama_free(self._context)
            raise
        if not self._context:
            raise ContextNotCreated(options.n_ctx, self._lib.first_error() or "no reason given")
        self.apply_adapters()
        self.abort.watch(c, self._context)
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(options.n_batch, 0, 1)

    def apply_adapters(self) -> None:
        """Compute with the model's adapters from now on; what is in the KV cache was computed with those before."""
        adapters = self.model.adapters
        handles = (self._c.llama_adapter_lora_p_ctypes * len(adapters))(*(handle for handle, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        self._c.llama_set_adapters_lora(self._context, handles, len(adapters), scales)

    @property
    def n_ctx(self) -> int:
        """The capacity of the KV cache in tokens (llama.cpp rounds up to 256)."""
        return int(self._c.llama_n_ctx(self._context))

    @property
    def n_batch(self) -> int:
        """The most tokens per `decode`; llama.cpp aborts the process if it gets more."""
        return int(self._c.llama_n_batch(self._context))

    @property
    def handle(self) -> Any:
        """The C pointer, for samplers."""
        return self._context

    def decode(self, batch: Sequence[tuple[int, Sequence[int]]], *, all_logits: Collection[int] = ()) -> list[int]:
        """
        Run the model over new tokens of one or more sequences, at most `n_batch` tokens in total.

        `batch` is a list of (sequence, ids); the ids are appended to the sequence. Returns one row of logits per
        sequence (for `Context.logits` and samplers): the one after its last token, or for the sequences in `all_logits`
        the one after its first token, followed by the others. `decode([(0, [9, 8]), (1, [7])])` returns `[1, 2]`: rows
        are positions in the batch.

        Raises
        ------
        Aborted: `abort` was set; `length` returns how much of the batch was added.
        CacheFull: the KV cache has no room.
        """
        rows: list[int] = []
        position = 0
        c_batch = self._batch
        token, pos, count, seq, logits = c_batch.token, c_batch.pos, c_batch.n_seq_id, c_batch.seq_id, c_batch.logits
        for sequence, ids in batch:
            start = self.length(sequence)
            has_all = sequence in all_logits
            rows.append(position if has_all else position + len(ids) - 1)
            for offset, id in enumerate(ids):
                token[position] = id
                pos[position] = start + offset
                count[position] = 1
                seq[position][0] = sequence
                logits[position] = has_all
                position += 1
            logits[position - 1] = True
        c_batch.n_tokens = position
        self._run()
        return rows

    def _run(self) -> None:
        if self.thread_adapter:
            self.set_threads(self.thread_adapter.update())
        self.is_computing = True
        code = self._c.llama_decode(self._context, self._batch)
        self.is_computing = False
        if code == 0:
            return
        if code == ABORTED:
            raise Aborted
        if code == _NO_SLOT:
            raise CacheFull
        if "failed to allocate" in (reason := self._lib.first_error()):  # the processor's memory is checked before
            raise GpuOutOfMemory(reason)
        raise QwenlocalError(
            f"llama.cpp failed to decode (code {code}): {reason or 'no reason given'}",
            hint="This is a bug in qwenlocal or llama.cpp. To see llama.cpp's log, set QWENLOCAL_LLAMA_LOG=1.",
        )

    @property
    def threads(self) -> int:
        """The number of threads that decode single tokens."""
        return int(self._c.llama_n_threads(self._context))

    def set_threads(self, count: int) -> None:
        """Set the number of threads."""
        self._c.llama_set_n_threads(self._context, count, count)

    def length(self, sequence: int) -> int:
        """Return the number of tokens in the sequence; 0 if the context is closed."""
        if not self._context:  # an abandoned generator may be finalized after that
            return 0
        return int(self._c.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def truncate(self, sequence: int, length: int) -> int:
        """
        Remove the tokens from position `length` on, and return the new length.

        That is `length`, or 0 for recurrent models, which can only clear the whole sequence.
        """
        if self._c.llama_memory_seq_rm(self._memory, sequence, length, -1):
            return length
        self._c.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return 0

    def copy(self, source: int, target: int) -> None:
        """Replace `target` with the tokens of `source`; both share the same cells of the cache."""
        self._c.llama_memory_seq_rm(self._memory, target, -1, -1)
        self._c.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def state_size(self, sequence: int) -> int:
        """Return the number of bytes that `get_state` would return."""
        return int(self._c.llama_state_seq_get_size(self._context, sequence))

    def get_state(self, sequence: int) -> Any:
        """Return the keys and values of the sequence as a C array of bytes, for `set_state`."""
        size = self.state_size(sequence)
        data = (ctypes.c_uint8 * size)()
        if self._c.llama_state_seq_get_data(self._context, data, size, sequence) != size:
            raise QwenlocalError("llama.cpp cannot export the KV cache.", hint="The chat is not affected.")
        return data

    def set_state(self, sequence: int, data: Any) -> bool:
        """Replace the sequence with a state from `get_state`; return False if llama.cpp rejects it."""
        self.truncate(sequence, 0)
        if self._c.llama_state_seq_set_data(self._context, data, len(data), sequence):
            return True
        self.truncate(sequence, 0)
        return False

    def logits(self, row: int) -> Any:
        """Return the logits of a row as a C array of `n_vocab` floats."""
        return self._c.llama_get_logits_ith(self._context, row)

    def logit_rows(self, count: int) -> numpy.ndarray:
        """
        Return all `count` rows of logits of the last `decode`, in the order of its batch.

        The array, of shape (count, n_vocab), is a view of llama.cpp's buffer, which the next `decode` overwrites.
        """
        import numpy

        return numpy.ctypeslib.as_array(self._c.llama_get_logits(self._context), (count, len(self.model.tokenizer)))

    def check_logits(self, row: int) -> None:
        """
        Check the logits of a row; one NaN weight makes all of them NaN, so the first one is enough.

        Raises
        ------
        BadWeights: the logits are NaN.
        """
        if math.isnan(self.logits(row)[0]):
            if any(scale for _, scale in self.model.adapters):
                reason = "the model computes NaN with its adapters"
                raise BadWeights(self.model.path, reason, hint="Use smaller scales: --adapter ADAPTER:0.5")
            raise BadWeights(
                self.model.path,
                "the model computes NaN; its weights or metadata are damaged",
                hint=f"To find the damage: qwenlocal inspect {shlex.quote(str(self.model.path))}. "
                "To repair a download: qwenlocal verify NAME",
            )

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            self._c.llama_batch_free(self._batch)
            self._c.llama_free(self._context)
            self._context = None


@functools.cache
def _strlen() -> Any:
    """Load the C library's `strlen`, see `AbortFlag`."""
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    return libc.strlen
