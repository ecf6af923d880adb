"""
Benchmarks of a model: llama-bench's tests, load time, time to first token, end-to-end speed and memory.

pp512 evaluates 512 random tokens in an empty cache; tg128 decodes 128 tokens one by one, without sampling or
detokenizing (llama.cpp, tools/llama-bench/llama-bench.cpp: test_prompt, test_gen). Each test runs `repetitions` times
after one warm-up run.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.tokenizer import IncrementalDetokenizer

PROMPT, ANSWER = 512, 128
DEPTHS = (0, 512, 4096)

Report = Callable[[str], object]


@dataclass(frozen=True)
class Speed:
    """Tokens per second, one sample per repetition."""

    samples: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean of the samples."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Standard deviation of the samples; 0 for a single one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


@dataclass(frozen=True)
class BenchResult:
    """
    The measurements of one model. `speeds` are by test: "pp512", "tg128", "tg128 @ d4096", "end to end".

    `load` and the times to the first token, with the file out of the page cache (`first_cold`) and in it
    (`first_warm`), are in seconds, `memory` in bytes, `joules` per token; None if the system cannot tell.
    """

    speeds: Mapping[str, Speed]
    load: float
    first_cold: float | None
    first_warm: float
    memory: int | None
    joules: float | None
    options: ContextOptions


def run_benchmarks(
    path: Path,
    options: ContextOptions,
    *,
    repetitions: int = 5,
    depths: Sequence[int] = DEPTHS,
    report: Report = lambda step: None,
) -> BenchResult:
    """
    Benchmark the model in `path` with `options`; the context is as long as the deepest test needs.

    Raises
    ------
    BadWeights, ContextNotCreated: the model cannot be loaded.
    """
    speeds: dict[str, Speed] = {}

    def measure(name: str, speed: Callable[[], float]) -> None:
        """Call `speed` once to warm up, then `repetitions` times."""
        report(name)
        speed()
        speeds[name] = Speed([speed() for _ in range(max(1, repetitions))])

    options = replace(options, n_ctx=max((*depths, PROMPT)) + ANSWER + 8)
    report("loading, cold")
    first_cold = _time_to_first_token(path, options) if drop_from_page_cache(path) else None
    report("loading, warm")
    first_warm = _time_to_first_token(path, options)
    _reset_peak_memory()
    started = time.perf_counter()
    model = Model(path)
    load = time.perf_counter() - started
    with contextlib.closing(model), contextlib.closing(Context(model, options)) as context:
        measure("pp512", lambda: prefill_speed(context, PROMPT))
        context.truncate(0, 0)
        with measure_energy() as joules:
            measure("tg128", lambda: decode_speed(context, ANSWER))
        for depth in sorted(depth for depth in depths if depth):
            report(f"evaluating {depth:,} tokens")
            fill_cache(context, depth)
            measure(f"tg128 @ d{depth}", lambda: decode_speed(context, ANSWER))
        measure("end to end", lambda: answer_speed(context))
    per_token = joules[0] / (ANSWER * (repetitions + 1)) if joules else None
    return BenchResult(speeds, load, first_cold, first_warm, peak_memory(), per_token, options)


def prefill_speed(context: Context, tokens: int) -> float:
    """Evaluate `tokens` random tokens in an empty cache; returns tokens per second."""
    context.truncate(0, 0)
    started = time.perf_counter()
    fill_cache(context, tokens)
    return tokens / (time.perf_counter() - started)


def decode_speed(context: Context, tokens: int) -> float:
    """Decode `tokens` tokens one by one after the cached ones, then remove them; returns tokens per second."""
    depth, ids = context.length(0), _random_ids(context, tokens)
    started = time.perf_counter()
    for token in ids:
        context.decode([(0, (token,))])
    seconds = time.perf_counter() - started
    context.truncate(0, depth)
    return tokens / seconds


def fill_cache(context: Context, tokens: int) -> None:
    """Evaluate random tokens until the cache holds `tokens`."""
    missing = tokens - context.length(0)
    if missing < 0:
        context.truncate(0, 0)
        missing = tokens
    ids = _random_ids(context, missing)
    for start in range(0, missing, context.n_batch):
        context.decode([(0, ids[start : start + context.n_batch])])


def answer_speed(context: Context) -> float:
    """Measure an answer end to end, sampled with Qwen's settings and detokenized; returns tokens per second."""
    context.truncate(0, 0)
    vocabulary, text = context.model.tokenizer, IncrementalDetokenizer()
    ids = vocabulary.tokenize("Once upon a time", special=False) or [0]
    first = last = time.perf_counter()
    count = 0
    for step in TokenSequence(context).generate(ids, Sampling(seed=1), limit=ANSWER):
        if isinstance(step, int):
            text.feed(vocabulary.piece(step))
            last = time.perf_counter()
            first = first if count else last
            count += 1
    return (count - 1) / (last - first)


def _time_to_first_token(path: Path, options: ContextOptions) -> float:
    """Load the model and answer a short question; returns seconds until the first token."""
    started = time.perf_counter()
    with contextlib.closing(Model(path)) as model, contextlib.closing(Context(model, options)) as context:
        ids = model.tokenizer.tokenize("What is the capital of France?", special=False) or [0]
        steps = TokenSequence(context).generate(ids, Sampling(temperature=0), limit=1)
        next(step for step in steps if isinstance(step, int))
        return time.perf_counter() - started


def _random_ids(context: Context, count: int) -> list[int]:
    size = len(context.model.tokenizer)
    return random.Random(count).choices(range(size), k=count)


# --- system


def drop_from_page_cache(path: Path) -> bool:
    """Drop a file from the page cache unless a process has it mapped; False if the system has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _reset_peak_memory() -> None:
    """Reset the peak resident set size on Linux (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Return the peak resident set size of this process in bytes."""
    try:
        lines = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        return None


@contextlib.contextmanager
def measure_energy(folder: Path = Path("/sys/class/powercap")) -> Iterator[list[float]]:
    """Measure the energy used by the processor (Linux, RAPL): a list that gets the joules, or stays empty."""
    counters = sorted(folder.glob("intel-rapl:[0-9]/energy_uj"))
    joules: list[float] = []
    before = _microjoules(counters)
    yield joules
    after = _microjoules(counters)
    if before and after and len(before) == len(after) and all(b >= a for a, b in zip(before, after, strict=True)):
        joules.append(sum(b - a for a, b in zip(before, after, strict=True)) / 1e6)


def _microjoules(counters: Sequence[Path]) -> list[int]:
    try:
        return [int(counter.read_text()) for counter in counters]
    except (OSError, ValueError):
        return []
