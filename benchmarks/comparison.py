"""Helpers for the benchmarks: interleaved runs, medians of ratios, Markdown tables, and runs of other processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
QWENLOCAL = str(ROOT / ".venv" / "bin" / "qwenlocal")
LLAMA_CPP = ROOT / "build" / "rival" / "bin"  # llama.cpp's programs, built by benchmarks/rival.sh
COLUMNS = ("what", "qwenlocal", "llama.cpp", "ratio (median of pairs)", "target", "runs")
Result = TypeVar("Result")


def interleave(
    ours: Callable[[], Result], theirs: Callable[[], Result], runs: int, *, warm_up: bool = True
) -> list[tuple[Result, Result]]:
    """
    Run both sides in turn, A B A B …, since the speed of a shared machine drifts; return the pairs.

    With `warm_up`, one run of each side comes first and does not count.
    """
    if warm_up:
        ours()
        theirs()
    return [(ours(), theirs()) for _ in range(runs)]


def median_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the median of the ratios pair by pair: 2.0 for (2, 1), (9, 3), (4, 2)."""
    return statistics.median(ours / theirs for ours, theirs in pairs)


def table_header(*columns: str) -> str:
    return table_row(*columns) + "\n|" + "---|" * len(columns)


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def run_python(code: str, *arguments: object) -> Any:
    """Run `code` in a Python process of its own and return what it prints, parsed as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def llama_bench(model: Path, threads: int, *options: str, prompt: int = 0, answer: int = 0, depth: int = 0) -> float:
    """
    Return the tokens per second of one repetition of llama-bench.

    The test is either prefilling `prompt` tokens or decoding `answer` tokens, behind `depth` tokens of context.
    """
    command = [str(LLAMA_CPP / "llama-bench"), "-m", str(model), "-p", str(prompt), "-n", str(answer)]
    command += ["-d", str(depth), "-t", str(threads), "-r", "1", "-o", "json", *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output)[0]["avg_ts"])
