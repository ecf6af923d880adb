"""
Measure the gain of huge pages on Linux, for the mapped file and for llama.cpp's buffers.

    .venv/bin/python benchmarks/huge_pages.py MODEL.gguf --runs 8

*File*: llama-bench decodes with two copies of the model, one in small pages of the page cache and one in huge pages.
*Buffers*: one process decodes before and after its buffers move to huge pages.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from comparison import interleave, llama_bench, median_ratio, run_python, table_header, table_row

from qwenlocal.huge_pages import read_ahead

_BUFFERS = """
import json, statistics, sys, time
from pathlib import Path
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.huge_pages import collapse_buffers, measure_huge_pages
from qwenlocal.measure.bench import decode_speed
threads = int(sys.argv[2])
options = ContextOptions(8192, threads=threads, batch_threads=threads, n_ubatch=128, flash_attention=False)
context = Context(Model(Path(sys.argv[1])), options)
decode_speed(context, 32)
before = statistics.median(decode_speed(context, 64) for _ in range(5))
small, started = measure_huge_pages(), time.perf_counter()
collapse_buffers()
seconds, huge = time.perf_counter() - started, measure_huge_pages()
after = statistics.median(decode_speed(context, 64) for _ in range(5))
print(json.dumps([after, before, huge.huge - small.huge, seconds]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="folder for the copies, on XFS, or ext4 since Linux 6.16")
    options = parser.parse_args()
    print(f"{options.model.name}, {options.threads} threads, {time.strftime('%d %B %Y')}, tokens/s\n")
    print(table_header("what", "huge pages", "small pages", "ratio (median of pairs)", "runs"))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        huge, small = (copy_in_small_pages(options.model, Path(folder) / name) for name in ("huge", "small"))
        drop_from_page_cache(huge)
        read_ahead(huge)
        pairs = interleave(
            lambda: llama_bench(huge, options.threads, answer=128),
            lambda: llama_bench(small, options.threads, answer=128),
            options.runs,
        )
        show("file", pairs)
    results = [run_python(_BUFFERS, options.model, options.threads) for _ in range(options.runs)]
    show("buffers", [(after, before) for after, before, _, _ in results])
    moved, seconds = (statistics.median(result[index] for result in results) for index in (2, 3))
    print(f"\nMoving {moved / 1e6:.0f} MB of buffers took {seconds:.2f} s.")


def copy_in_small_pages(source: Path, target: Path) -> Path:
    """Copy a file with small writes, which the page cache keeps in small pages."""
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        while data := reader.read(1 << 16):
            writer.write(data)
        os.fsync(writer.fileno())
    return target


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(what: str, pairs: list[tuple[float, float]]) -> None:
    huge, small = (f"{statistics.median(side):.1f}" for side in zip(*pairs, strict=True))
    ratios = [ours / theirs for ours, theirs in pairs]
    spread = f"{median_ratio(pairs):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(table_row(what, huge, small, spread, len(pairs)), flush=True)


if __name__ == "__main__":
    main()
