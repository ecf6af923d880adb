"""What decides a model's memory and speed, as the front of its file states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwenlocal.ggml import tensor_type
from qwenlocal.weights.header import Value

_USUAL_CONTEXT = 8192  # where a file does not say what it was trained for


@dataclass(frozen=True)
class Shape:
    """
    Layers, heads that keep keys and values, their width, context trained for, and the widths between the layers.

    `Shape(24, 16, 64, 32768, 1024, 2816, 16)` is Qwen1.5-0.5B's. `vocabulary` is Qwen's largest unless known.
    """

    layers: int
    kv_heads: int
    head_width: int
    n_ctx_train: int
    embedding: int = 0
    feed_forward: int = 0
    heads: int = 0
    vocabulary: int = 152_064

    @classmethod
    def of(cls, metadata: Mapping[str, Value]) -> Shape | None:
        """The shape that a file's keys state; None where they do not, for example with a head count per layer."""
        architecture = metadata.get("general.architecture")
        try:
            layers, embedding, heads = (
                int(metadata[f"{architecture}.{key}"])  # type: ignore[arg-type]
                for key in ("block_count", "embedding_length", "attention.head_count")
            )

            def number(key: str, default: int) -> int:
                return int(metadata.get(f"{architecture}.{key}", default))  # type: ignore[arg-type]

            return cls(
                layers,
                number("attention.head_count_kv", heads),
                number("attention.key_length", embedding // heads),
                max(0, number("context_length", 0)) or _USUAL_CONTEXT,
                embedding,
                number("feed_forward_length", 4 * embedding),
                heads,
            )
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
            return None

    def kv_bytes(self, n_ctx: int, keys: str = "f16", values: str = "f16") -> int:
        """
        Bytes of keys and values for `n_ctx` tokens: n_ctx x layers x kv_heads x head_width numbers of each.

        Qwen1.5-0.5B (24 layers, 16 heads of 64) with 2,048 tokens in f16: 192 MiB; keys in q8_0: 147 MiB.
        """
        columns = self.kv_heads * self.head_width
        return n_ctx * self.layers * sum(_row_bytes(kind, columns) for kind in (keys, values))


def _row_bytes(kind: str, columns: int) -> int:
    found = tensor_type(kind)
    return -(-columns // found.block) * found.width
