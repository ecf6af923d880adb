"""
Which settings are quickest for a model on this machine, found by trying them for some twenty seconds.

What is tried goes round and round, since a machine's speed drifts; what counts is each one's median. Fewer threads win
where more are not clearly quicker: they leave the machine to its owner.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.speculation import USUAL_COSTS
from qwenlocal.engine.tuned import Tuned
from qwenlocal.measure.bench import decode_speed, fill, prefill_speed

T = TypeVar("T")
_DEPTH, _PIECE = 512, 8  # where decoding is measured, and tokens for a sample of it
_CLEARLY = 1.03  # times as quick
_TOGETHER = (128, 512)

Report = Callable[[str], object]


def thread_counts(cores: int, processors: int) -> list[int]:
    """What to try on `cores` real cores with `processors` threads: for 4 and 8, [2, 3, 4, 8]."""
    return sorted({count for count in (cores // 2, cores - 1, cores, processors) if count >= 1})


def quickest(
    candidates: Sequence[T], speed: Callable[[T], float], seconds: float, clock: Callable[[], float] = time.monotonic
) -> T:
    """The first of `candidates` that none of the others is clearly quicker than, tried in turn for `seconds`."""
    if len(candidates) == 1:
        return candidates[0]
    samples: list[list[float]] = [[] for _ in candidates]
    end = clock() + seconds
    while not samples[-1] or clock() < end:
        for candidate, found in zip(candidates, samples, strict=True):
            found.append(speed(candidate))
    medians = [statistics.median(found) for found in samples]
    return next(c for c, m in zip(candidates, medians, strict=True) if m * _CLEARLY >= max(medians))


def tune(path: Path, threads: Sequence[int], *, seconds: float = 20.0, report: Report = lambda what: None) -> Tuned:
    """
    Measure the model in `path`, with each of `threads`.

    Raises
    ------
    BadWeights, NoContext: it cannot be loaded.
    """
    model = Model(path)
    contexts: dict[tuple[bool, int], Context] = {}
    try:
        report("threads")
        context = contexts[False, _TOGETHER[0]] = _context(model, threads[-1], flash=False, together=_TOGETHER[0])
        fill(context, _DEPTH)

        def with_threads(count: int) -> float:
            context.set_threads(count)
            return decode_speed(context, _PIECE)

        best = quickest(threads, with_threads, seconds / 4)
        report("flash attention")
        for key in ((False, _TOGETHER[0]), (True, _TOGETHER[0])):
            if key not in contexts:
                contexts[key] = _context(model, best, flash=key[0], together=key[1])
            contexts[key].set_threads(best)
            fill(contexts[key], _DEPTH)
        flash = quickest([False, True], lambda on: decode_speed(contexts[on, _TOGETHER[0]], _PIECE), seconds / 4)
        report("several tokens at once")
        costs = _costs(contexts[flash, _TOGETHER[0]])
        report("reading")
        contexts[flash, _TOGETHER[1]] = _context(model, best, flash=flash, together=_TOGETHER[1])
        together = quickest(_TOGETHER, lambda size: prefill_speed(contexts[flash, size], _DEPTH), seconds / 4)
        return Tuned(best, flash, together, costs)
    finally:
        for opened in contexts.values():
            opened.close()
        model.close()


def _context(model: Model, threads: int, *, flash: bool, together: int) -> Context:
    options = ContextOptions(
        2 * _DEPTH, threads=threads, batch_threads=threads, flash_attention=flash, n_ubatch=together
    )
    return Context(model, options)


def _costs(context: Context, rounds: int = 3) -> dict[int, float]:
    """Seconds for 1, 2, 4, … tokens at once, relative to one; the least of some rounds."""
    depth, least = context.length(0), dict.fromkeys(USUAL_COSTS, float("inf"))
    for count in _repeated(USUAL_COSTS, rounds):
        started = time.perf_counter()
        context.decode([(0, [count] * count)], all_logits=True)
        least[count] = min(least[count], time.perf_counter() - started)
        context.truncate(0, depth)
    return {count: round(max(1.0, taken / least[1]), 3) for count, taken in least.items()}


def _repeated(counts: Iterable[int], rounds: int) -> Iterable[int]:
    return (count for _ in range(rounds) for count in counts)
