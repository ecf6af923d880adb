"""
Compare the time and the results of `qwenlocal quality` with llama-perplexity of the same source.

    benchmarks/rival.sh                                                     build llama-perplexity, once
    .venv/bin/python benchmarks/quality.py MODEL.gguf                       perplexity
    .venv/bin/python benchmarks/quality.py MODEL.gguf --base F16.gguf       KL divergence as well

Both read the same text with the same threads, in processes of their own. Runs are interleaved; the result is the median
of the ratios pair by pair. The KL divergence takes llama-perplexity two runs: one of the base, which writes its
log-probabilities to a file of 77 MB per window, and one of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison import COLUMNS, LLAMA_CPP, QWENLOCAL, ROOT, interleave, median_ratio, table_header, table_row

_TEXT = ROOT / "qwenlocal" / "measure" / "calibration.txt"
_ATTEMPTS = 5  # one run of ten exits before llama-perplexity's log is written


@dataclass(frozen=True)
class QualityTask:
    """Options of both programs."""

    model: Path
    base: Path | None
    text: Path
    n_ctx: int
    chunks: int
    threads: int

    def common_options(self, text_option: str) -> list[str]:
        sizes = ("-c", self.n_ctx, "--chunks", self.chunks, "-t", self.threads)
        return [text_option, str(self.text), *map(str, sizes)]


@dataclass(frozen=True)
class TimedRun:
    """Seconds of a run, and the number that it prints: a perplexity or a KL divergence."""

    seconds: float
    result: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--base", type=Path, help="also measure the divergence from this model")
    parser.add_argument("--text", type=Path, default=_TEXT)
    parser.add_argument("-c", type=int, default=512, dest="n_ctx", help="tokens per window")
    parser.add_argument("--chunks", type=int, default=20, help="windows")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    task = QualityTask(options.model, options.base, options.text, options.n_ctx, options.chunks, options.threads)
    print(f"{options.model.name}, {options.threads} threads, {options.chunks} windows, {time.strftime('%d %B %Y')}\n")
    print(table_header(*COLUMNS))
    report("perplexity", measure_perplexity, llama_perplexity, task, options.runs)
    if options.base:
        report("KL divergence", measure_divergence, llama_divergence, task, options.runs)


def report(
    name: str,
    ours: Callable[[QualityTask], TimedRun],
    theirs: Callable[[QualityTask], TimedRun],
    task: QualityTask,
    runs: int,
) -> None:
    pairs = interleave(lambda: ours(task), lambda: theirs(task), runs, warm_up=False)
    ratio = median_ratio((mine.seconds, other.seconds) for mine, other in pairs)
    cells = (describe([pair[side] for pair in pairs]) for side in (0, 1))
    print(table_row(name, *cells, f"{ratio:.3f}", "<= 1.25", runs), flush=True)


def describe(runs: Sequence[TimedRun]) -> str:
    return f"{statistics.median(run.seconds for run in runs):.1f} s ({runs[0].result:.5g})"


def measure_perplexity(task: QualityTask, *options: str, key: str = "perplexity") -> TimedRun:
    command = [QWENLOCAL, "quality", str(task.model), *task.common_options("--text"), "--json", *options]
    started = time.perf_counter()
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return TimedRun(time.perf_counter() - started, json.loads(output)[key])


def measure_divergence(task: QualityTask) -> TimedRun:
    return measure_perplexity(task, "--base", str(task.base), key="kl")


def llama_perplexity(task: QualityTask) -> TimedRun:
    return run_llama(task, task.model, r"Final estimate: PPL = ([\d.]+)")


def llama_divergence(task: QualityTask) -> TimedRun:
    with tempfile.TemporaryDirectory() as folder:
        stored = ("--kl-divergence-base", str(Path(folder) / "base.kld"))
        base = run_llama(task, task.base or task.model, r"per pass - ()", *stored)
        run = run_llama(task, task.model, r"Mean +KLD: +([\d.]+)", *stored, "--kl-divergence")
    return TimedRun(base.seconds + run.seconds, run.result)


def run_llama(task: QualityTask, model: Path, pattern: str, *options: str) -> TimedRun:
    command = [str(LLAMA_CPP / "llama-perplexity"), "-m", str(model), *task.common_options("-f"), *options]
    for _ in range(_ATTEMPTS):
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        if match := re.search(pattern, result.stdout + result.stderr):
            return TimedRun(seconds, float(match[1] or 0))
    raise RuntimeError(f"llama-perplexity does not print {pattern}")


if __name__ == "__main__":
    main()
