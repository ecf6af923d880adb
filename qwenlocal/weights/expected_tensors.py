"""The tensors that llama.cpp's loader requires (src/models/qwen2.cpp, qwen2moe.cpp), and their shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from qwenlocal.weights.gguf_reader import Header

OPTIONAL_TENSORS = re.compile(r"blk\.\d+\.attn_[qkv]\.bias|output\.bias|.*\.(scale|input_scale)|rope_freqs\.weight")


def embedding_rows(header: Header) -> int | None:
    """Return the number of rows of the embedding matrix; None if there is none."""
    return next((t.shape[1] for t in header.tensors if t.name == "token_embd.weight" and len(t.shape) == 2), None)


def expected_shapes(header: Header) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the names and shapes of all tensors; None stands for a size that the metadata lacks."""
    width, heads = header.dimension("embedding_length"), header.dimension("attention.head_count")
    kv_width = width // heads * header.dimension("attention.head_count_kv", heads) if width and heads else None
    rows = embedding_rows(header)
    yield "token_embd.weight", (width, rows)
    yield "output.weight", (width, rows)
    yield "output_norm.weight", (width,)
    for layer in range(header.dimension("block_count", 0)):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            yield f"{prefix}{name}.weight", (width,)
        for name, size in (("attn_q", width), ("attn_k", kv_width), ("attn_v", kv_width), ("attn_output", width)):
            yield f"{prefix}{name}.weight", (width, size)
        yield from _feed_forward_shapes(header, prefix, width)


def _feed_forward_shapes(header: Header, prefix: str, width: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    inner = header.dimension("feed_forward_length")
    if header.architecture == "qwen2":
        for name, shape in (("gate", (width, inner)), ("up", (width, inner)), ("down", (inner, width))):
            yield f"{prefix}ffn_{name}.weight", shape
        return
    count, expert_width = header.dimension("expert_count"), header.dimension("expert_feed_forward_length")
    shared = header.dimension("expert_shared_feed_forward_length", inner)
    yield f"{prefix}ffn_gate_inp.weight", (width, count)
    yield f"{prefix}ffn_gate_inp_shexp.weight", (width,)
    for name in ("gate", "up"):
        yield f"{prefix}ffn_{name}_exps.weight", (width, expert_width, count)
        yield f"{prefix}ffn_{name}_shexp.weight", (width, shared)
    yield f"{prefix}ffn_down_exps.weight", (expert_width, width, count)
    yield f"{prefix}ffn_down_shexp.weight", (shared, width)
