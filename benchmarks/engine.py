"""
Reading and decoding beside llama-bench of the same source, in turn, A B A B …; medians of the ratios pair by pair.

    benchmarks/rival.sh                                       builds llama-bench, once
    .venv/bin/python benchmarks/engine.py equal MODEL.gguf    equal settings, depths 0 and 4,096
    .venv/bin/python benchmarks/engine.py chosen MODEL.gguf   our settings against llama.cpp's defaults, 4,096 and 8,192

A run is a process of its own on both sides. `equal`: the same threads, flash attention off, 512 tokens at once.
`--svg FILE` draws the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from picture import bars

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "build" / "rival" / "bin" / "llama-bench"

_OURS = """
import json, sys
from pathlib import Path
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure.bench import decode_speed, fill_cache, prefill_speed
path, depth, prompt, answer, threads, together = Path(sys.argv[1]), *map(int, sys.argv[2:])
options = ContextOptions(depth + prompt + answer + 64, threads=threads, batch_threads=threads, n_ubatch=together,
                         flash_attention=False)
context = Context(Model(path), options)
fill_cache(context, 64)
decode_speed(context, 8)
if prompt:
    print(json.dumps(prefill_speed(context, prompt)))
else:
    fill_cache(context, depth)
    print(json.dumps(decode_speed(context, answer)))
"""


@dataclass(frozen=True)
class Test:
    """Either reading `prompt` tokens or decoding `answer` behind `depth`."""

    depth: int
    prompt: int
    answer: int

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.answer}"
        return f"{what} @ d{self.depth}" if self.depth else what


def ours(model: Path, test: Test, threads: int, together: int) -> float:
    numbers = [str(n) for n in (test.depth, test.prompt, test.answer, threads, together)]
    command = [sys.executable, "-c", _OURS, str(model), *numbers]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def theirs(model: Path, test: Test, threads: int, *more: str) -> float:
    command = [str(BENCH), "-m", str(model), "-p", str(test.prompt), "-n", str(0 if test.prompt else test.answer)]
    command += ["-d", str(test.depth), "-t", str(threads), "-r", "1", "-o", "json", *more]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", choices=["equal", "chosen"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--depths", default="")
    parser.add_argument("--svg", type=Path)
    asked = parser.parse_args()
    equal = asked.settings == "equal"
    depths = [int(d) for d in (asked.depths or ("0,4096" if equal else "4096,8192")).split(",")]
    tests = [Test(0, 512, 0)] if equal else []
    tests += [Test(depth, 0, 64 if depth else 128) for depth in depths]
    more = ("-fa", "0", "-ub", "512") if equal else ()
    title = f"{asked.model.name}, {asked.threads} threads, {time.strftime('%d %B %Y')}, {asked.settings} settings"
    print(f"{title}\n")
    rows: list[tuple[str, list[float]]] = []
    print("| test | ours | llama-bench | ratio (median of pairs) | wanted | runs |\n|---|---|---|---|---|---|")
    for test in tests:
        pairs = [
            (
                ours(asked.model, test, asked.threads, 512 if equal else 128),
                theirs(asked.model, test, asked.threads, *more),
            )
            for _ in range(asked.runs)
        ]
        ratio = statistics.median(a / b for a, b in pairs)
        wanted = ">= 0.98" if equal else ">= 1.25" if test.depth <= 4096 else ">= 1.4"
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"| {test.name} | {a:.2f} | {b:.2f} | {ratio:.3f} | {wanted} | {len(pairs)} |", flush=True)
        rows.append((test.name, [a, b]))
    if asked.svg:
        asked.svg.write_text(bars(f"tokens/s, {title}", ["qwenlocal", "llama-bench"], rows))


if __name__ == "__main__":
    main()
