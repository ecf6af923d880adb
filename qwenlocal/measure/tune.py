"""
Search for the fastest settings of a model on this machine: threads, flash attention, micro-batch size.

Candidates take turns, because a machine's speed drifts, and are compared by their medians. More threads must be clearly
faster than fewer, which leave the machine to its owner.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.speculation import DEFAULT_COSTS
from qwenlocal.engine.tuned_settings import TunedSettings
from qwenlocal.measure.bench import Report, decode_speed, fill_cache, prefill_speed

T = TypeVar("T")
_DEPTH, _SAMPLE = 512, 8  # cached tokens while decoding is measured, and tokens per sample
_MARGIN = 1.03  # a candidate this much faster wins over an earlier one
_UBATCH_SIZES = (128, 512)


def thread_counts(cores: int, processors: int) -> list[int]:
    """Return the thread counts to try: for 4 cores with 8 hardware threads, [2, 3, 4, 8]."""
    return sorted({count for count in (cores // 2, cores - 1, cores, processors) if count >= 1})


def find_fastest(
    candidates: Sequence[T], speed: Callable[[T], float], seconds: float, clock: Callable[[], float] = time.monotonic
) -> T:
    """Measure `candidates` in turn for `seconds`; returns the first one that no other clearly beats."""
    if len(candidates) == 1:
        return candidates[0]
    samples: list[list[float]] = [[] for _ in candidates]
    end = clock() + seconds
    while not samples[-1] or clock() < end:
        for candidate, speeds in zip(candidates, samples, strict=True):
            speeds.append(speed(candidate))
    medians = [statistics.median(speeds) for speeds in samples]
    return next(c for c, m in zip(candidates, medians, strict=True) if m * _MARGIN >= max(medians))


def tune(
    path: Path, threads: Sequence[int], *, seconds: float = 20.0, report: Report = lambda step: None
) -> TunedSettings:
    """
    Find the fastest settings for the model in `path`, with one of `threads` threads.

    Raises
    ------
    BadWeights, ContextNotCreated: the model cannot be loaded.
    """
    small, large = _UBATCH_SIZES
    contexts: dict[tuple[bool, int], Context] = {}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(contextlib.closing(Model(path)))

        def open_context(*, flash: bool, n_ubatch: int, count: int) -> Context:
            if (flash, n_ubatch) not in contexts:
                options = ContextOptions(
                    2 * _DEPTH, threads=count, batch_threads=count, flash_attention=flash, n_ubatch=n_ubatch
                )
                contexts[flash, n_ubatch] = stack.enter_context(contextlib.closing(Context(model, options)))
            contexts[flash, n_ubatch].set_threads(count)
            return contexts[flash, n_ubatch]

        report("threads")
        context = open_context(flash=False, n_ubatch=small, count=threads[-1])
        fill_cache(context, _DEPTH)

        def speed_with_threads(count: int) -> float:
            context.set_threads(count)
            return decode_speed(context, _SAMPLE)

        count = find_fastest(threads, speed_with_threads, seconds / 4)
        report("flash attention")
        for flash in (False, True):
            fill_cache(open_context(flash=flash, n_ubatch=small, count=count), _DEPTH)
        flash = find_fastest([False, True], lambda on: decode_speed(contexts[on, small], _SAMPLE), seconds / 4)
        report("decoding several tokens at once")
        costs = _batch_costs(contexts[flash, small])
        report("micro-batch size")
        open_context(flash=flash, n_ubatch=large, count=count)
        n_ubatch = find_fastest(_UBATCH_SIZES, lambda size: prefill_speed(contexts[flash, size], _DEPTH), seconds / 4)
        return TunedSettings(count, flash, n_ubatch, costs)


def _batch_costs(context: Context, rounds: int = 3) -> dict[int, float]:
    """Measure the time to decode 1, 2, 4, … tokens in one batch relative to one token; the minimum of `rounds`."""
    depth, seconds = context.length(0), dict.fromkeys(DEFAULT_COSTS, float("inf"))
    for count in [*DEFAULT_COSTS] * rounds:
        started = time.perf_counter()
        context.decode([(0, [count] * count)], all_logits=(0,))
        seconds[count] = min(seconds[count], time.perf_counter() - started)
        context.truncate(0, depth)
    return {count: round(max(1.0, taken / seconds[1]), 3) for count, taken in seconds.items()}
