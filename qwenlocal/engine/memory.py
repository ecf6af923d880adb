"""
How much memory a model takes while it works, before anything of it is loaded.

The weights are mapped into memory; those that llama.cpp repacks for the processor's vector units are copied, and their
pages of the file can be dropped, so each weight counts once. The KV cache is allocated and zeroed whole. The compute
buffer holds what is between the layers for the tokens that are computed together; without flash attention that is
every head's score of every token in the context above all (llama.cpp, src/llama-graph.cpp: build_attn_mha).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenlocal.engine.context import MOST_OUTPUTS, ContextOptions, rounded_up
from qwenlocal.engine.shape import Shape

# Python, the libraries, and llama.cpp's tables of Qwen's 151,936 tokens; measured, see benchmarks/README.md.
OURSELVES = 150 << 20
_FLOAT = 4


@dataclass(frozen=True)
class Need:
    """Bytes, by what they are for."""

    weights: int
    kv: int
    compute: int
    ourselves: int = OURSELVES

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute + self.ourselves


def memory_needed(shape: Shape, weights: int, options: ContextOptions) -> Need:
    """
    What a model of `shape` with `weights` bytes of them needs in such a context.

    Qwen1.5-0.5B as Q4_0 (286 MiB) with 4,096 tokens, without flash attention, 128 tokens computed together: 384 MiB of
    keys and values, 56 MiB for computing.
    """
    n_ctx = rounded_up(options.n_ctx)
    kv = shape.kv_bytes(n_ctx, options.key_type, options.value_type)
    return Need(weights, kv, _compute_bytes(shape, n_ctx, options))


def _compute_bytes(shape: Shape, n_ctx: int, options: ContextOptions) -> int:
    """The largest of what lives at the same time in attention, in the feed-forward part, and at the head."""
    together, width = options.n_ubatch, shape.embedding or shape.kv_heads * shape.head_width
    inner = shape.feed_forward or 4 * width
    mask = 2 if options.flash_attention else _FLOAT  # bytes for each token in the context
    scores = 0 if options.flash_attention else (shape.heads or shape.kv_heads) * _FLOAT
    attention = together * (n_ctx * (mask + scores) + 7 * width * _FLOAT)
    between = together * (n_ctx * mask + (2 * inner + 7 * width) * _FLOAT)
    rows = MOST_OUTPUTS * shape.vocabulary * _FLOAT
    return max(attention, between, rows) + rows  # the rows are copied to where samplers read them
