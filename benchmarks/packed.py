"""
Compare the conversion of packed checkpoints (GPTQ, AWQ) with copying the same files.

    .venv/bin/python benchmarks/packed.py             Qwen1.5-1.8B's shape
    .venv/bin/python benchmarks/packed.py --shape 7b  Qwen1.5-7B's shape (5.9 to 9.2 GB each)

The checkpoints have random codes, and are kept in build/shapes. A copy is `cp`, followed by `sync -d`; a conversion
includes that. Files are in the page cache. Runs are interleaved; the first one of each side does not count. The time to
compare all weights with the checkpoint, which follows a conversion, is shown separately.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from comparison import QWENLOCAL, ROOT, interleave, table_header, table_row

sys.path.insert(0, str(ROOT / "tests"))

from conversion import FOLDER, LLAMA_CPP_SOURCE, peak_memory
from from_gguf import tokenizer_files
from random_packed import write_packed_checkpoint

LAYOUTS = (("gptq", 4, "GPTQ-Int4 to Q4_0"), ("gptq", 8, "GPTQ-Int8 to Q8_0"), ("gemm", 4, "AWQ to Q5_0"))


class Conversion(NamedTuple):
    """Seconds of writing, of the whole command, and the peak resident set in bytes."""

    writing: float
    command: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.8b")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    tokenizer = tokenizer_files(LLAMA_CPP_SOURCE / "models" / "ggml-vocab-qwen2.gguf", sizes=(151643, 151646))
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%d %B %Y')}\n")
    print(table_header("what", "writing", "copying", "copying / writing", "target", "command", "memory", "runs"))
    for layout, bits, title in LAYOUTS:
        folder = write_packed_checkpoint(
            FOLDER / f"{options.shape}-{layout}{bits}", options.shape, layout, bits, tokenizer
        )
        pairs = interleave(lambda folder=folder: convert(folder), lambda folder=folder: copy(folder), options.runs)
        ours, theirs = zip(*pairs, strict=True)
        ratio = statistics.median(copied / converted.writing for converted, copied in pairs)
        size = (folder / "model.safetensors").stat().st_size
        print(table_row(
            f"{options.shape} {title} ({size / 1e9:.2f} GB)",
            f"{statistics.median(run.writing for run in ours):.2f} s",
            f"{statistics.median(theirs):.2f} s",
            f"{ratio:.2f}",
            ">= 0.8",
            f"{statistics.median(run.command for run in ours):.1f} s",
            f"{max(run.memory for run in ours) / 1e6:.0f} MB",
            len(pairs),
        ))  # fmt: skip


def convert(folder: Path) -> Conversion:
    target = FOLDER / "packed.gguf"
    target.unlink(missing_ok=True)
    begin, memory = time.perf_counter(), 0
    process = subprocess.Popen(
        [QWENLOCAL, "convert", folder, "-o", target, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        memory = max(memory, peak_memory(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    assert process.stdout
    facts = json.loads(process.stdout.read())
    if process.returncode or facts["files"][0]["largest_difference"] != 0:
        raise SystemExit(f"the conversion of {folder} failed or is not exact")
    return Conversion(facts["seconds"], seconds, memory)


def copy(folder: Path) -> float:
    target = FOLDER / "packed.copy"
    target.unlink(missing_ok=True)
    begin = time.perf_counter()
    subprocess.run(["cp", folder / "model.safetensors", target], check=True)
    subprocess.run(["sync", "-d", target], check=True)
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


if __name__ == "__main__":
    main()
