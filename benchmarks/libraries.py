"""
Compare builds of llama.cpp: prefill and decode of llama-bench with the libraries of several build folders.

    cmake -S build/llama_cpp_python-*/vendor/llama.cpp -B build/clang -DCMAKE_C_COMPILER=clang …
    cmake --build build/clang --target ggml-cpu
    .venv/bin/python benchmarks/libraries.py MODEL.gguf build/rival/bin build/clang/bin

The first folder is the one to compare with. The builds take turns; the ratio is the median round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from comparison import LLAMA_CPP, table_header, table_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with libggml-cpu")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=64)
    options = parser.parse_args()
    rounds = []
    for number in range(options.runs):
        order = options.folders if number % 2 == 0 else options.folders[::-1]
        speeds = {folder: run(folder, options) for folder in order}
        rounds.append([speeds[folder] for folder in options.folders])
    print(table_header("build", "prefill", "ratio", "decode", "ratio", "runs"))
    for index, folder in enumerate(options.folders):
        cells = []
        for test in (0, 1):
            ratios = [speeds[index][test] / speeds[0][test] for speeds in rounds]
            cells.append(f"{statistics.median(speeds[index][test] for speeds in rounds):.1f}")
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(table_row(folder, *cells, options.runs))


def run(folder: Path, options: argparse.Namespace) -> list[float]:
    """Run llama-bench with the libraries in `folder`; return the tokens per second of prefill and decode."""
    command = [str(LLAMA_CPP / "llama-bench"), "-m", str(options.model), "-t", str(options.threads), "-r", "1"]
    command += ["-p", str(options.prompt), "-n", str(options.answer), "-o", "json"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder.resolve())}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(test["avg_ts"]) for test in json.loads(output)]


if __name__ == "__main__":
    main()
