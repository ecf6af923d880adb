"""Our own attention kernel in libggml-cpu: its results equal the definition."""

from __future__ import annotations

import ctypes
import math

import numpy
import pytest
from ggml_graph import Graph
from numpy.typing import NDArray

from qwenlocal import ggml

F32, F16 = 0, 1  # ggml.h: enum ggml_type


def attend(
    queries: NDArray[numpy.float32],
    keys: NDArray[numpy.float16],
    values: NDArray[numpy.float16],
    mask: NDArray[numpy.float16],
    threads: int,
) -> NDArray[numpy.float32]:
    """Let ggml compute attention of queries [token, head, size] to [cell, head, size], with a mask [token, cell]."""
    size = queries.shape[2]
    with Graph() as graph:
        q, k, v = (
            graph.permute(graph.tensor(kind, array), 0, 2, 1, 3)
            for kind, array in ((F32, queries), (F16, keys), (F16, values))
        )
        scale, none = ctypes.c_float(1 / math.sqrt(size)), ctypes.c_float(0)
        result = graph.call("ggml_flash_attn_ext", q, k, v, graph.tensor(F16, mask), scale, none, none)
        return graph.compute(result, queries.shape, threads)


def expected(queries, keys, values, mask):  # type: ignore[no-untyped-def]
    group = queries.shape[1] // keys.shape[1]
    keys, values = (array.astype(numpy.float64).repeat(group, axis=1) for array in (keys, values))
    scores = numpy.einsum("thd,chd->htc", queries.astype(numpy.float64), keys) / math.sqrt(queries.shape[2])
    scores = scores + mask.astype(numpy.float64)
    weights = numpy.exp(scores - scores.max(axis=2, keepdims=True))
    return numpy.einsum("htc,chd->thd", weights / weights.sum(axis=2, keepdims=True), values)


def causal_mask(tokens: int, cells: int) -> NDArray[numpy.float16]:
    """Return a mask for the last `tokens` of `cells` tokens."""
    places = numpy.arange(cells) - (cells - tokens)
    return numpy.where(places[None] <= numpy.arange(tokens)[:, None], 0, -numpy.inf).astype(numpy.float16)


def random_mask(tokens: int, cells: int) -> NDArray[numpy.float16]:
    """Return a mask as of many sequences: every token sees some cells, most of them in common with no other."""
    random = numpy.random.default_rng(3)
    mask = numpy.where(random.random((tokens, cells)) < 0.2, 0, -numpy.inf)
    mask[:, -1] = 0
    mask[:, 64:192] = -numpy.inf  # seen by nobody
    return mask.astype(numpy.float16)


def graded_mask(tokens: int, cells: int) -> NDArray[numpy.float16]:
    return numpy.random.default_rng(4).standard_normal((tokens, cells)).astype(numpy.float16)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("create_mask", [causal_mask, random_mask, graded_mask])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 33, 130])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 4, 64), (14, 2, 64), (3, 3, 128), (12, 1, 128), (2, 2, 32)]
)
def test_attention_equals_its_definition(heads, kv_heads, size, tokens, create_mask, threads):
    random, cells = numpy.random.default_rng(tokens), 320
    queries = random.standard_normal((tokens, heads, size), numpy.float32)
    keys, values = (random.standard_normal((cells, kv_heads, size), numpy.float32).astype(numpy.float16) for _ in "kv")
    mask = create_mask(tokens, cells)
    result = attend(queries, keys, values, mask, threads)
    tolerance = 1e-5 if ggml.has_attention_kernel(size) else 5e-3
    assert numpy.allclose(result, expected(queries, keys, values, mask), rtol=tolerance, atol=tolerance)


def test_huge_scores_do_not_overflow():
    random = numpy.random.default_rng(1)
    keys = (300 * random.standard_normal((128, 1, 64))).astype(numpy.float16)
    queries = (300 * random.standard_normal((20, 1, 64))).astype(numpy.float32)
    values = random.standard_normal((128, 1, 64)).astype(numpy.float16)
    mask = causal_mask(20, 128)
    assert numpy.allclose(attend(queries, keys, values, mask, 2), expected(queries, keys, values, mask), atol=2e-2)
