"""
Compare `qwenlocal imatrix` with llama-imatrix: the wall time of both commands on the same file and text.

    benchmarks/rival.sh                                      build llama-imatrix, once
    .venv/bin/python benchmarks/imatrix.py MODEL.gguf        about three minutes

llama-imatrix also computes the perplexity unless told otherwise; here it does not (--no-ppl). Runs are interleaved.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from comparison import COLUMNS, LLAMA_CPP, QWENLOCAL, interleave, median_ratio, table_header, table_row

from qwenlocal.measure.importance import CALIBRATION_TEXT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    threads, chunks = str(os.cpu_count() or 1), str(options.chunks)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        shared = ["--chunks", chunks, "-t", threads]
        model, text = options.model, CALIBRATION_TEXT
        pairs = interleave(
            lambda: run(QWENLOCAL, "imatrix", model, "--text", text, "-o", ours, "--force", *shared),
            lambda: run(LLAMA_CPP / "llama-imatrix", "-m", model, "-f", text, "-o", theirs, "--no-ppl", *shared),
            options.runs,
        )
    print(f"{platform.machine()}, {threads} threads, {time.strftime('%d %B %Y')}\n")
    print(table_header(*COLUMNS))
    medians = [f"{statistics.median(side):.1f} s" for side in zip(*pairs, strict=True)]
    title = f"imatrix of {options.model.stem}, {chunks} chunks of 512 tokens"
    print(table_row(title, *medians, f"{median_ratio(pairs):.3f}", "<= 1.25", len(pairs)))


def run(*command: str | Path) -> float:
    begin = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
