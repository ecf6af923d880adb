"""
Does it fit, and with how much context.

The weights are mapped into memory, the KV cache is allocated whole: `n_ctx` tokens, each a key and a value in every
layer. What is known of the model comes from the front of its file; nothing is loaded to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwenlocal.errors import NotEnoughMemory
from qwenlocal.weights.header import Value

OURSELVES = 220 << 20  # Python, the libraries, and llama.cpp's working memory for 512 tokens
_F16 = 2
USUAL_CONTEXT = 8192
LEAST_CONTEXT = 2048


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory: layers, heads that keep keys and values, their width, context trained for."""

    layers: int
    kv_heads: int
    head_width: int
    n_ctx_train: int

    @classmethod
    def of(cls, metadata: Mapping[str, Value]) -> Shape | None:
        """The shape that a file's keys state; None where they do not, for example with a head count per layer."""
        architecture = metadata.get("general.architecture")
        try:
            layers, embedding, heads = (
                int(metadata[f"{architecture}.{key}"])  # type: ignore[arg-type]
                for key in ("block_count", "embedding_length", "attention.head_count")
            )
            kv_heads = int(metadata.get(f"{architecture}.attention.head_count_kv", heads))  # type: ignore[arg-type]
            width = int(metadata.get(f"{architecture}.attention.key_length", embedding // heads))  # type: ignore[arg-type]
            context = int(metadata.get(f"{architecture}.context_length", USUAL_CONTEXT))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        return cls(layers, kv_heads, width, context)

    def kv_bytes(self, n_ctx: int) -> int:
        """
        Bytes of keys and values for `n_ctx` tokens in f16: 2 x n_ctx x layers x kv_heads x head_width x 2.

        Qwen1.5-0.5B (24 layers, 16 heads of 64) with 2,048 tokens: 192 MiB.
        """
        return 2 * n_ctx * self.layers * self.kv_heads * self.head_width * _F16


def choose_context(what: str, shape: Shape | None, weights: int, available: int, wanted: int | None = None) -> int:
    """
    How many tokens of context to load `what` with.

    `wanted` is what the user asked for; otherwise 8,192, or what the model was trained for if that is less, halved
    until it fits.

    Raises
    ------
    NotEnoughMemory: not even the least fits, or not what was asked for.
    """
    if shape is None:
        return wanted or 4096
    room = available - weights - OURSELVES
    if wanted:
        if shape.kv_bytes(wanted) > room:
            fitting = max(0, room) // max(1, shape.kv_bytes(1)) // 256 * 256
            hint = f"At most -c {fitting} fits." if fitting >= 512 else "Close other programs, or take a smaller model."
            raise NotEnoughMemory(
                f"{what} with a context of {wanted:,} tokens",
                weights + shape.kv_bytes(wanted) + OURSELVES,
                available,
                hint=hint,
            )
        return wanted
    n_ctx = min(USUAL_CONTEXT, shape.n_ctx_train)
    while shape.kv_bytes(n_ctx) > room and n_ctx > LEAST_CONTEXT:
        n_ctx //= 2
    if shape.kv_bytes(n_ctx) > room:
        raise NotEnoughMemory(
            what,
            weights + shape.kv_bytes(n_ctx) + OURSELVES,
            available,
            hint="Close other programs, or take a smaller model (qwenlocal list --all). -c 512 needs the least.",
        )
    return n_ctx
