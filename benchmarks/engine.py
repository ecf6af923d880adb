"""
Compare prefill and decode speed with llama-bench of the same source.

    benchmarks/rival.sh                                       build llama-bench, once
    .venv/bin/python benchmarks/engine.py equal MODEL.gguf    equal settings, depths 0 and 4,096
    .venv/bin/python benchmarks/engine.py chosen MODEL.gguf   our settings against llama.cpp's defaults, 4,096 and 8,192

Runs are interleaved, each in a process of its own; the result is the median of the ratios pair by pair. `equal`: the
same threads, flash attention off and micro-batches of 512 tokens on both sides. `--svg FILE` draws the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bar_chart import draw_bar_chart
from comparison import interleave, llama_bench, median_ratio, run_python, table_header, table_row

_OURS = """
import json, sys
from pathlib import Path
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.huge_pages import collapse_buffers
from qwenlocal.measure.bench import decode_speed, fill_cache, prefill_speed
path, depth, prompt, answer, threads, n_ubatch = Path(sys.argv[1]), *map(int, sys.argv[2:])
options = ContextOptions(depth + prompt + answer + 64, threads=threads, batch_threads=threads, n_ubatch=n_ubatch,
                         flash_attention=False)
context = Context(Model(path), options)
collapse_buffers()
fill_cache(context, 64)
decode_speed(context, 8)
if prompt:
    prefill_speed(context, prompt)  # llama-bench warms up as well
    print(json.dumps(prefill_speed(context, prompt)))
else:
    fill_cache(context, depth)
    print(json.dumps(decode_speed(context, answer)))
"""


@dataclass(frozen=True)
class BenchTest:
    """Prefilling `prompt` tokens, or decoding `answer` tokens behind `depth` tokens of context."""

    prompt: int = 0
    answer: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's name of the test."""
        test = f"pp{self.prompt}" if self.prompt else f"tg{self.answer}"
        return f"{test} @ d{self.depth}" if self.depth else test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", choices=["equal", "chosen"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--depths", default="", help="tokens of context, separated by commas")
    parser.add_argument("--svg", type=Path, help="draw the table to this file")
    options = parser.parse_args()
    equal = options.settings == "equal"
    title = f"{options.model.name}, {options.threads} threads, {time.strftime('%d %B %Y')}, {options.settings} settings"
    print(f"{title}\n")
    print(table_header("test", "qwenlocal", "llama-bench", "ratio (median of pairs)", "target", "runs"))
    rows: list[tuple[str, list[float]]] = []
    for test in select_tests(options.depths, equal):
        pairs = compare(options.model, test, options.threads, options.runs, equal)
        target = ">= 0.98" if equal else ">= 1.25" if test.depth <= 4096 else ">= 1.4"
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = f"{median_ratio(pairs):.3f}"
        print(table_row(test.name, f"{ours:.2f}", f"{theirs:.2f}", ratio, target, len(pairs)), flush=True)
        rows.append((test.name, [ours, theirs]))
    if options.svg:
        options.svg.write_text(draw_bar_chart(f"tokens/s, {title}", ["qwenlocal", "llama-bench"], rows))


def select_tests(depths: str, equal: bool) -> list[BenchTest]:
    depths = depths or ("0,4096" if equal else "4096,8192")
    tests = [BenchTest(prompt=512)] if equal else []
    return tests + [BenchTest(answer=64 if depth else 128, depth=depth) for depth in map(int, depths.split(","))]


def compare(model: Path, test: BenchTest, threads: int, runs: int, equal: bool) -> list[tuple[float, float]]:
    n_ubatch, options = (512, ("-fa", "0", "-ub", "512")) if equal else (128, ())
    return interleave(
        lambda: float(run_python(_OURS, model, test.depth, test.prompt, test.answer, threads, n_ubatch)),
        lambda: llama_bench(model, threads, *options, prompt=test.prompt, answer=test.answer, depth=test.depth),
        runs,
        warm_up=False,
    )


if __name__ == "__main__":
    main()
