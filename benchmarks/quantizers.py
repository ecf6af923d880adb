"""
Compare the quantizers of tools/quantizers.cpp with ggml's: million weights per second in one thread.

    .venv/bin/python benchmarks/quantizers.py

The weights are random bf16 (Student's t, as trained weights are distributed), in rows of 5,632, the width of
Qwen1.5-1.8B's feed-forward layers with two more blocks. Each figure is the median of interleaved rounds. Both sides
write the same bytes, which is checked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy

from qwenlocal import ggml

ROWS, COLUMNS, ROUNDS = 256, 5632, 7
TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")


def main() -> None:
    """Print a table."""
    random = numpy.random.default_rng(1)
    weights = (random.standard_t(5, ROWS * COLUMNS) * 0.02).astype(numpy.float32)
    stored = (weights.view(numpy.uint32) >> 16).astype(numpy.uint16)
    weights = (stored.astype(numpy.uint32) << 16).view(numpy.float32)
    importance = numpy.exp(random.standard_normal(COLUMNS)).astype(numpy.float32)
    print("| type | ours | ggml | ours with a matrix | ggml with a matrix |\n|---|---|---|---|---|")
    for name in TYPES:
        pairs = (compare(name, stored, weights, None), compare(name, stored, weights, importance))
        cells = [f"{speed:.0f}" if speed else "–" for pair in pairs for speed in pair]
        print(f"| {name.upper()} | {' | '.join(cells)} |", flush=True)


def compare(
    name: str, stored: numpy.ndarray, weights: numpy.ndarray, importance: numpy.ndarray | None
) -> tuple[float, float]:
    """Return the speeds of our quantizer and of ggml's; zeros if we have none for this type."""
    kind, source = ggml.tensor_type(name), ggml.tensor_type("bf16")
    if not ggml.can_quantize_fast(source, kind, weighted=importance is not None):
        return 0.0, 0.0
    ours, theirs = (numpy.empty(kind.row_bytes(weights.size), numpy.uint8) for _ in range(2))
    matrix = 0 if importance is None else importance.ctypes.data

    def quantize() -> None:
        if importance is None:
            ggml.quantize_fast(source, stored.ctypes.data, kind, ours.ctypes.data, weights.size)
        else:
            ggml.quantize_fast_weighted(
                source, stored.ctypes.data, kind, ours.ctypes.data, ROWS, COLUMNS, importance.ctypes.data
            )

    def quantize_with_ggml() -> None:
        ggml.quantize_with_ggml(kind, weights.ctypes.data, theirs.ctypes.data, ROWS, COLUMNS, matrix)

    rounds = [(measure(quantize), measure(quantize_with_ggml)) for _ in range(ROUNDS)]
    assert (ours == theirs).all(), name
    mine, rival = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return weights.size / mine / 1e6, weights.size / rival / 1e6


def measure(function: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
