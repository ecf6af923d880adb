"""
Benchmarks of a model: llama-bench's tests, load time, time to first token, end-to-end speed and memory.

pp512 evaluates 512 random tokens in an empty cache; tg128 decodes 128 tokens one by one, without sampling or
detokenizing (llama.cpp, tools/llama-bench/llama-bench.cpp: test_prompt, test_gen). Each test is repeated after a run
that does not count, a short one in quick benchmarks.
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
from qwenlocal.huge_pages import collapse_buffers
from qwenlocal.measure.limits import MachineLimits, TokenWork, measure_limits, token_work
from qwenlocal.weights.gguf_reader import Header

PROMPT, ANSWER = 512, 128
_END_TO_END = "end to end"
_TRIAL_PROMPT, _TRIAL_ANSWER, _MIN_SIZE = 32, 4, 16  # tokens

Report = Callable[[str], object]


@dataclass(frozen=True)
class BenchPlan:
    """
    The tests to run: `repetitions` of each, and decoding at `depths` tokens of context.

    With `seconds`, each test evaluates or decodes fewer tokens than usual if it would take longer. Without, the time to
    the first token is measured with the file out of the page cache as well.
    """

    repetitions: int
    depths: Sequence[int] = ()
    seconds: float | None = None

    @property
    def max_tokens(self) -> int:
        """The context that the tests need."""
        return max((*self.depths, PROMPT)) + ANSWER + 8


FULL_PLAN = BenchPlan(5, (512, 4096))
QUICK_PLAN = BenchPlan(2, seconds=10)


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
    The measurements of one model. `speeds` are by test: "pp512", "tg128", "end to end", "tg128 @ d4096".

    `load` and the times to the first token, with the file out of the page cache (`first_cold`) and in it
    (`first_warm`), are in seconds, `memory` in bytes, `joules` per token; None if not measured.
    """

    speeds: Mapping[str, Speed]
    load: float
    first_cold: float | None
    first_warm: float
    memory: int | None
    joules: float | None
    options: ContextOptions
    limits: MachineLimits
    work: TokenWork

    @property
    def prefill(self) -> float:
        """Tokens per second of prefilling."""
        return next(speed.mean for test, speed in self.speeds.items() if test.startswith("pp"))

    @property
    def decode(self) -> float:
        """Tokens per second of decoding in an empty context."""
        return next(speed.mean for test, speed in self.speeds.items() if test.startswith("tg"))

    @property
    def bandwidth_share(self) -> float:
        """The share of the memory bandwidth that decoding uses: 307 MB x 38 tokens/s of 18.4 GB/s is 0.63."""
        return self.decode * self.work.bytes / self.limits.bandwidth

    @property
    def operations_share(self) -> float | None:
        """The share of the processor's peak that prefilling uses; None if the peak is unknown."""
        return self.limits.operations and self.prefill * self.work.operations / self.limits.operations

    @property
    def text_seconds(self) -> float:
        """Seconds per token that an answer takes in addition to decoding: sampling and detokenizing."""
        return max(0.0, 1 / self.speeds[_END_TO_END].mean - 1 / self.decode)


def run_benchmarks(
    path: Path, header: Header, options: ContextOptions, plan: BenchPlan, report: Report = lambda step: None
) -> BenchResult:
    """
    Benchmark the model in `path` with `options`; the context is as long as the deepest test needs.

    Raises
    ------
    BadWeights, ContextNotCreated: the model cannot be loaded.
    """
    options = replace(options, n_ctx=plan.max_tokens)
    speeds: dict[str, Speed] = {}

    def measure(name: str, speed: Callable[[], float]) -> None:
        report(name)
        if plan.seconds is None:
            speed()
        speeds[name] = Speed([speed() for _ in range(plan.repetitions)])

    first_cold = None
    if plan.seconds is None:
        report("loading, cold")
        first_cold = _time_to_first_token(path, options) if drop_from_page_cache(path) else None
    report("loading, warm")
    first_warm = _time_to_first_token(path, options)
    _reset_peak_memory()
    started = time.perf_counter()
    model = Model(path)
    load = time.perf_counter() - started
    with contextlib.closing(model), contextlib.closing(Context(model, options)) as context:
        collapse_buffers()
        prompt = _choose_size(PROMPT, prefill_speed(context, _TRIAL_PROMPT), plan)
        measure(f"pp{prompt}", lambda: prefill_speed(context, prompt))
        context.truncate(0, 0)
        answer = _choose_size(ANSWER, decode_speed(context, _TRIAL_ANSWER), plan)
        with measure_energy() as joules:
            measure(f"tg{answer}", lambda: decode_speed(context, answer))
        measure(_END_TO_END, lambda: answer_speed(context, answer))
        for depth in sorted(depth for depth in plan.depths if depth):
            report(f"evaluating {depth:,} tokens")
            fill_cache(context, depth)
            measure(f"tg{answer} @ d{depth}", lambda: decode_speed(context, answer))
    memory = peak_memory()
    report("the limits of this machine")
    limits = measure_limits(options.threads)
    per_token = joules[0] / (answer * (plan.repetitions + (plan.seconds is None))) if joules else None
    return BenchResult(speeds, load, first_cold, first_warm, memory, per_token, options, limits, token_work(header))


def _choose_size(size: int, speed: float, plan: BenchPlan) -> int:
    """Halve `size` tokens until all repetitions at `speed` tokens per second take no longer than planned."""
    while plan.seconds is not None and size > _MIN_SIZE and size * plan.repetitions > speed * plan.seconds:
        size //= 2
    return size


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


def answer_speed(context: Context, tokens: int) -> float:
    """Measure an answer end to end, sampled with Qwen's settings and detokenized; returns tokens per second."""
    context.truncate(0, 0)
    vocabulary, text = context.model.tokenizer, IncrementalDetokenizer()
    ids = vocabulary.tokenize("Once upon a time", special=False) or [0]
    first = last = time.perf_counter()
    count = 0
    for step in TokenSequence(context).generate(ids, Sampling(seed=1), limit=tokens):
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
