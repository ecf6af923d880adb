"""
How fast a model is here: what llama-bench measures, as it defines it, and what people feel beside that.

pp512: 512 random tokens read into an empty cache; tg128: 128 tokens decoded one by one, without sampling and text
(llama.cpp, tools/llama-bench/llama-bench.cpp: test_prompt, test_gen). Each is measured `repetitions` times after one
run that does not count; what is given is the mean and the standard deviation, and every sample.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.text import TextStream

PROMPT, ANSWER = 512, 128
DEPTHS = (0, 512, 4096)
_ENERGY = Path("/sys/class/powercap")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Speed:
    """Tokens a second, a sample for each repetition."""

    samples: Sequence[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Their standard deviation; 0 for a single one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


@dataclass(frozen=True)
class Result:
    """
    Everything measured of one model. `speeds` by name: "pp512", "tg128", "tg128 @ d4096", "end to end".

    Times in seconds: loading, and from the question to the first token with a cold and a warm cache of the file
    (`first_cold` None where the system does not let a file be forgotten). `memory` in bytes, `joules` a token; None
    where the machine does not tell.
    """

    speeds: Mapping[str, Speed]
    load: float
    first_cold: float | None
    first_warm: float
    memory: int | None
    joules: float | None
    options: ContextOptions = field(default_factory=lambda: ContextOptions(0))


Report = Callable[[str], object]


def measure(
    path: Path,
    options: ContextOptions,
    *,
    repetitions: int = 5,
    depths: Sequence[int] = DEPTHS,
    report: Report = lambda what: None,
) -> Result:
    """
    Measure the model in `path` with `options`, whose context is made as large as the deepest measurement needs.

    Raises
    ------
    BadWeights, NoContext: it cannot be loaded.
    """
    deepest = max((*depths, PROMPT))
    options = replace(options, n_ctx=deepest + ANSWER + 8)
    report("loading, cold")
    first_cold = _first_token(path, options) if forget(path) else None
    report("loading, warm")
    first_warm = _first_token(path, options)
    _forget_peak()
    started = time.perf_counter()
    model = Model(path)
    load = time.perf_counter() - started
    context = Context(model, options)
    try:
        speeds = {"pp512": _repeated(lambda: prefill_speed(context, PROMPT), repetitions, report, "pp512")}
        context.truncate(0, 0)
        with _energy() as used:
            speeds["tg128"] = _repeated(lambda: decode_speed(context, ANSWER), repetitions, report, "tg128")
        for depth in sorted(depth for depth in depths if depth):
            name = f"tg128 @ d{depth}"
            report(f"reading {depth:,} tokens")
            fill(context, depth)
            speeds[name] = _repeated(lambda: decode_speed(context, ANSWER), repetitions, report, name)
        speeds["end to end"] = _repeated(lambda: answer_speed(context), repetitions, report, "end to end")
    finally:
        context.close()
        model.close()
    joules = used[0] / (ANSWER * (repetitions + 1)) if used else None
    return Result(speeds, load, first_cold, first_warm, memory_peak(), joules, options)


def _repeated(once: Callable[[], float], repetitions: int, report: Report, name: str) -> Speed:
    """After one run that does not count."""
    report(name)
    once()
    return Speed([once() for _ in range(max(1, repetitions))])


def prefill_speed(context: Context, tokens: int) -> float:
    """Tokens a second of reading `tokens` random ones into an empty cache."""
    context.truncate(0, 0)
    started = time.perf_counter()
    fill(context, tokens)
    return tokens / (time.perf_counter() - started)


def decode_speed(context: Context, tokens: int) -> float:
    """Tokens a second of decoding `tokens`, one by one, behind what the cache holds, which it holds again then."""
    depth, ids = context.length(0), _random_ids(context, tokens)
    started = time.perf_counter()
    for token in ids:
        context.decode([(0, (token,))])
    seconds = time.perf_counter() - started
    context.truncate(0, depth)
    return tokens / seconds


def fill(context: Context, tokens: int) -> None:
    """Read random tokens until the cache holds `tokens`."""
    missing = tokens - context.length(0)
    if missing < 0:
        context.truncate(0, 0)
        missing = tokens
    ids = _random_ids(context, missing)
    for at in range(0, missing, context.n_batch):
        context.decode([(0, ids[at : at + context.n_batch])])


def answer_speed(context: Context) -> float:
    """Tokens a second as people get them: sampled with Qwen's settings, and turned into text."""
    context.truncate(0, 0)
    vocabulary, text = context.model.vocabulary, TextStream()
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


def _first_token(path: Path, options: ContextOptions) -> float:
    """From nothing to the first token of an answer to a short question."""
    started = time.perf_counter()
    model = Model(path)
    context = Context(model, options)
    try:
        ids = model.vocabulary.tokenize("What is the capital of France?", special=False) or [0]
        steps = TokenSequence(context).generate(ids, Sampling(temperature=0), limit=1)
        next(step for step in steps if isinstance(step, int))
        return time.perf_counter() - started
    finally:
        context.close()
        model.close()


def _random_ids(context: Context, count: int) -> list[int]:
    most = len(context.model.vocabulary)
    return random.Random(count).choices(range(most), k=count)


# --- the machine


def forget(path: Path) -> bool:
    """Take a file out of the system's cache, as far as nobody has it mapped; False where that cannot be asked for."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _forget_peak() -> None:
    """Let the peak of memory begin anew, where Linux allows it (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak() -> int | None:
    """The largest resident set of this process so far, in bytes."""
    try:
        lines = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
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


@contextmanager
def _energy(folder: Path = _ENERGY) -> Iterator[list[float]]:
    """Joules that the processor's packages used meanwhile (Linux, RAPL), as the only element; empty where unknown."""
    counters = sorted(folder.glob("intel-rapl:[0-9]/energy_uj"))
    used: list[float] = []
    before = _microjoules(counters)
    yield used
    after = _microjoules(counters)
    if before and after and len(before) == len(after) and all(b >= a for a, b in zip(before, after, strict=True)):
        used.append(sum(b - a for a, b in zip(before, after, strict=True)) / 1e6)


def _microjoules(counters: Sequence[Path]) -> list[int]:
    try:
        return [int(counter.read_text()) for counter in counters]
    except (OSError, ValueError):
        return []
