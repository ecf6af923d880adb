"""
Memory of a model: its dimensions, an estimate of what loading it needs, and a check while it answers.

The weights are mapped into memory. llama.cpp copies those that it repacks for the processor's vector units, and the
kernel can drop their pages of the file, so each weight counts once. The KV cache is allocated and zeroed in full. The
compute buffer holds the activations of one ubatch; without flash attention, the attention scores of every head for
every token in the context dominate it (llama.cpp, src/llama-graph.cpp: build_attn_mha).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwenlocal.engine.context import MAX_OUTPUTS, ContextOptions, pad_n_ctx
from qwenlocal.errors import LowMemory
from qwenlocal.ggml import tensor_type
from qwenlocal.machine import Memory
from qwenlocal.weights.gguf_reader import MetadataValue

# Bytes for Python, the libraries, and llama.cpp's tables of Qwen's 151,936 tokens; measured: benchmarks/README.md.
PROCESS_OVERHEAD = 150 << 20
_CHECK_INTERVAL = 1.0  # seconds; a check takes a millisecond beside a computing model
_DEFAULT_N_CTX_TRAIN = 8192  # if the file does not state it
_FLOAT_BYTES = 4
_MIN_AVAILABLE = 128 << 20  # bytes; below this, the kernel's OOM killer is near
_MAX_PRESSURE = 0.4  # share of the last ten seconds; above this, a machine hardly responds to input


@dataclass(frozen=True)
class ModelDims:
    """
    Dimensions of a model that decide its memory use.

    `ModelDims(24, 16, 64, 32768, 1024, 2816, 16)` is Qwen1.5-0.5B. Names are llama.cpp's; 0 is unknown. `n_vocab`
    defaults to the largest of the Qwen models.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_ctx_train: int
    n_embd: int = 0
    n_ff: int = 0
    n_heads: int = 0
    n_vocab: int = 152_064

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, MetadataValue]) -> ModelDims | None:
        """Read the dimensions from a file's metadata; None if it lacks them or gives one head count per layer."""
        architecture = metadata.get("general.architecture")

        def number(key: str, default: int | None = None) -> int:
            return int(metadata.get(f"{architecture}.{key}", default))  # type: ignore[arg-type]

        try:
            n_layers, n_embd, n_heads = map(number, ("block_count", "embedding_length", "attention.head_count"))
            return cls(
                n_layers,
                number("attention.head_count_kv", n_heads),
                number("attention.key_length", n_embd // n_heads),
                max(0, number("context_length", 0)) or _DEFAULT_N_CTX_TRAIN,
                n_embd,
                number("feed_forward_length", 4 * n_embd),
                n_heads,
            )
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            return None

    def kv_cache_bytes(self, n_ctx: int, key_type: str = "f16", value_type: str = "f16") -> int:
        """
        Compute the size of a KV cache: n_ctx * n_layers * n_kv_heads * head_dim numbers for keys, as many for values.

        Qwen1.5-0.5B (24 layers, 16 heads of 64) with 2,048 tokens in f16: 192 MiB; with q8_0 keys: 147 MiB.
        """
        kinds, columns = (tensor_type(key_type), tensor_type(value_type)), self.n_kv_heads * self.head_dim
        return n_ctx * self.n_layers * sum(-(-columns // kind.block_size) * kind.type_size for kind in kinds)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a loaded model needs, by purpose."""

    weights: int
    kv_cache: int
    compute: int
    overhead: int = PROCESS_OVERHEAD

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.kv_cache + self.compute + self.overhead


def estimate_memory(dims: ModelDims, weights: int, options: ContextOptions) -> MemoryEstimate:
    """
    Estimate the memory of a model with `weights` bytes of weights in a context with `options`.

    Qwen1.5-0.5B as Q4_0 (286 MiB) with 4,096 tokens, n_ubatch 128, without flash attention: 384 MiB of KV cache, 56 MiB
    of compute buffers.
    """
    n_ctx = pad_n_ctx(options.n_ctx)
    kv_cache = dims.kv_cache_bytes(n_ctx, options.key_type, options.value_type)
    return MemoryEstimate(weights, kv_cache, _compute_bytes(dims, n_ctx, options))


def _compute_bytes(dims: ModelDims, n_ctx: int, options: ContextOptions) -> int:
    """Take the largest set of activations that are alive at once: attention, feed-forward, or output."""
    n_ubatch, n_embd = options.n_ubatch, dims.n_embd or dims.n_kv_heads * dims.head_dim
    n_ff = dims.n_ff or 4 * n_embd
    mask = 2 if options.flash_attention else _FLOAT_BYTES  # bytes per token of context
    scores = 0 if options.flash_attention else (dims.n_heads or dims.n_kv_heads) * _FLOAT_BYTES
    attention = n_ubatch * (n_ctx * (mask + scores) + 7 * n_embd * _FLOAT_BYTES)
    feed_forward = n_ubatch * (n_ctx * mask + (2 * n_ff + 7 * n_embd) * _FLOAT_BYTES)
    output = MAX_OUTPUTS * dims.n_vocab * _FLOAT_BYTES
    return max(attention, feed_forward, output) + output  # the logits are copied to a buffer for the samplers


class MemoryCheck:
    """
    Ends an answer before the kernel's OOM killer acts. Call it after every step; it checks at most once per second.

    Calls raise `LowMemory` if memory is nearly used up, and there is nothing optional to free.
    """

    def __init__(
        self,
        read_memory: Callable[[], Memory],
        read_pressure: Callable[[], float] = lambda: 0.0,
        free_memory: Callable[[], bool] = lambda: False,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        `read_memory` returns the memory of the machine. `read_pressure` returns the share (0 to 1) of the last ten
        seconds in which everything waited for memory. `free_memory` releases something optional and returns whether it
        did.
        """
        self._read_memory, self._read_pressure, self._free_memory = read_memory, read_pressure, free_memory
        self._clock, self._next = clock, clock()

    def __call__(self) -> None:
        if (now := self._clock()) < self._next:
            return
        self._next = now + _CHECK_INTERVAL
        memory, pressure = self._read_memory(), self._read_pressure()
        is_low = memory.available < min(_MIN_AVAILABLE, memory.total // 16)
        if (is_low or pressure > _MAX_PRESSURE) and not self._free_memory():
            raise LowMemory(memory.available, 0.0 if is_low else pressure)
