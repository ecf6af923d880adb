"""
Compare the conversion of a checkpoint with llama.cpp's two steps: convert_hf_to_gguf.py, then llama-quantize.

    benchmarks/rival.sh                                   build llama-quantize, once
    make test-reference                                   create build/reference, a Python with torch and transformers
    .venv/bin/python benchmarks/conversion.py             a checkpoint of Qwen1.5-0.5B's shape; about ten minutes
    .venv/bin/python benchmarks/conversion.py --large     Qwen1.5-7B's shape (15 GB) and a mixture of experts

The checkpoints have random weights and Qwen's vocabulary, and are kept in build/shapes. Runs are interleaved; the first
one of each side does not count. Memory is the peak resident set of any process of a side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from comparison import COLUMNS, LLAMA_CPP, QWENLOCAL, ROOT, interleave, median_ratio, table_header, table_row

sys.path.insert(0, str(ROOT / "tests"))

from from_gguf import tokenizer_files
from oracle import data_of
from random_checkpoint import write_random_checkpoint

from qwenlocal import ggml
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type

LLAMA_CPP_SOURCE = next(ROOT.glob("build/llama_cpp_python-*/vendor/llama.cpp"))
FOLDER = ROOT / "build" / "shapes"
_BUFFER = 8 << 20  # bytes per read or write of the disk limits
_SAMPLE_SECONDS = 0.5  # per quantizer


@dataclass(frozen=True)
class Run:
    """Wall time, and the peak resident set in bytes."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Comparison:
    """A row of the table."""

    what: str
    ours: str
    theirs: str
    ratio: float
    target: str
    runs: int

    def __str__(self) -> str:
        return table_row(self.what, self.ours, self.theirs, f"{self.ratio:.3f}", self.target, self.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--reference", type=Path, default=ROOT / "build" / "reference" / "bin" / "python")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    options = parser.parse_args()
    tokenizer = tokenizer_files(LLAMA_CPP_SOURCE / "models" / "ggml-vocab-qwen2.gguf", sizes=(151643, 151646))
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.large:
        runs = min(3, options.runs)
        results = [*compare_with_limits("7b", "q8_0", tokenizer, runs)]
        results += compare_with_limits("moe", "q4_k_m", tokenizer, runs)
    else:
        small, medium = (write_random_checkpoint(FOLDER / shape, shape, tokenizer) for shape in ("0.5b", "1.8b"))
        results = compare_with_llama_cpp(small, options.reference, options.runs)
        results += [compare_threads(small, "0.5B", options.runs), compare_threads(medium, "1.8B", options.runs)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {time.strftime('%d %B %Y')}\n")
    print(table_header(*COLUMNS))
    for result in results:
        print(result)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


# --- runs


def run_commands(*commands: Sequence[str | Path]) -> Run:
    """Run commands one after the other, without their output."""
    started, memory = time.perf_counter(), 0
    for command in commands:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            memory = max(memory, peak_memory(process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}")
    return Run(time.perf_counter() - started, memory)


def peak_memory(pid: int) -> int:
    """
    Return the peak resident set of a running process in bytes; 0 if it has ended.

    ru_maxrss would include the size of this process, from which the other one was forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def convert(source: Path, kind: str, target: Path, *options: str) -> Run:
    target.unlink(missing_ok=True)
    return run_commands([QWENLOCAL, "convert", source, "-o", target, "--type", kind, *options])


def convert_with_llama_cpp(source: Path, kind: str, target: Path, python: Path, threads: int) -> Run:
    intermediate = target.with_suffix(".bf16.gguf")
    for file in (target, intermediate):
        file.unlink(missing_ok=True)
    return run_commands(
        [python, LLAMA_CPP_SOURCE / "convert_hf_to_gguf.py", source, "--outtype", "bf16", "--outfile", intermediate],
        [LLAMA_CPP / "llama-quantize", intermediate, target, kind, str(threads)],
    )


# --- small checkpoints: against llama.cpp, and one thread against two


def compare_with_llama_cpp(source: Path, python: Path, runs: int) -> list[Comparison]:
    threads = os.cpu_count() or 1
    results = []
    for kind in ("q4_k_m", "q8_0"):
        ours, theirs = FOLDER / f"ours-{kind}.gguf", FOLDER / f"theirs-{kind}.gguf"
        pairs = interleave(
            lambda kind=kind, target=ours: convert(source, kind, target),
            lambda kind=kind, target=theirs: convert_with_llama_cpp(source, kind, target, python, threads),
            runs,
        )
        results.append(summarize(f"0.5B bf16 to {kind}, wall and memory", pairs, "<= 0.4"))
        check_equal(source, kind, theirs)
    return results


def compare_threads(source: Path, shape: str, runs: int) -> Comparison:
    pairs = interleave(
        lambda: convert(source, "q4_k_m", FOLDER / "two.gguf", "-t", "2"),
        lambda: convert(source, "q4_k_m", FOLDER / "one.gguf", "-t", "1"),
        runs,
    )
    return summarize(f"{shape} to q4_k_m, two threads against one", pairs, "<= 0.556 (1.8 x)")


def summarize(what: str, pairs: list[tuple[Run, Run]], target: str) -> Comparison:
    sides = [
        f"{statistics.median(run.seconds for run in side):.1f} s, {max(run.memory for run in side) / 1e6:.0f} MB"
        for side in zip(*pairs, strict=True)
    ]
    return Comparison(what, *sides, median_ratio((a.seconds, b.seconds) for a, b in pairs), target, len(pairs))


def check_equal(source: Path, kind: str, theirs: Path) -> None:
    """
    Check that a conversion with llama.cpp's types, which keep the tied head, has llama.cpp's bytes.

    Raises
    ------
    SystemExit: the files differ.
    """
    ours = FOLDER / f"like-{kind}.gguf"
    convert(source, kind, ours, "--like", "llama.cpp")
    if data_of(ours) != data_of(theirs):
        raise SystemExit(f"{ours} and {theirs} differ")
    ours.unlink()


# --- large checkpoints: against the limits of disk and processor


def compare_with_limits(shape: str, kind: str, tokenizer: dict[str, dict[str, object]], runs: int) -> list[Comparison]:
    """Compare the time with the longer of copying and quantizing alone, and the memory with its limit."""
    source, target = write_random_checkpoint(FOLDER / shape, shape, tokenizer), FOLDER / f"{shape}-{kind}.gguf"
    plan = plan_conversion(Checkpoint.open(source), [(target, file_type(kind))])
    read_bytes, write_bytes = plan.job.read_bytes, plan.files[0].size
    weights, results = source / "model.safetensors", []
    limits: dict[str, list[float]] = {
        "copying or ggml's quantizers": [],
        "copying or our own quantizers": [],
        "reading, then writing": [],
    }
    for number in range(runs):
        ggml_seconds, own_seconds = (
            estimate_seconds(plan, ggml.quantize_with_ggml),
            estimate_seconds(plan, ggml.quantize),
        )
        flush_disk(weights, target)
        reading = read_seconds(weights)
        flush_disk(weights, target)
        writing = write_seconds(target, write_bytes)
        sides: dict[str, Callable[[], Run]] = {  # one right after the other: the disk's speed changes by the minute
            "copying": lambda: Run(copy_seconds(weights, target, write_bytes), 0),
            "ours": lambda: convert(source, kind, target),
        }
        measured = {}
        for side in sorted(sides, reverse=bool(number % 2)):
            flush_disk(weights, target)
            measured[side] = sides[side]()
        copying = measured["copying"].seconds
        results.append(measured["ours"])
        limits["copying or ggml's quantizers"].append(max(copying, ggml_seconds))
        limits["copying or our own quantizers"].append(max(copying, own_seconds))
        limits["reading, then writing"].append(reading + writing)
        print(
            f"{shape}: copying {copying:.1f} s, reading {reading:.1f} s, writing {writing:.1f} s, quantizing "
            f"{ggml_seconds:.1f} s with ggml's quantizers, {own_seconds:.1f} s with our own, converting "
            f"{results[-1].seconds:.1f} s",
            file=sys.stderr,
        )
    target.unlink(missing_ok=True)
    what = f"{shape}-shaped, {read_bytes / 1e9:.1f} GB bf16 to {kind} ({write_bytes / 1e9:.1f} GB), cold cache"
    return [
        *(compare_with_limit(f"{what}, against {name}", results, seconds) for name, seconds in limits.items()),
        compare_memory(shape, results),
    ]


def compare_with_limit(what: str, results: Sequence[Run], limits: Sequence[float]) -> Comparison:
    pairs = [(run.seconds, limit) for run, limit in zip(results, limits, strict=True)]
    ours, limit = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Comparison(what, f"{ours:.1f} s", f"{limit:.1f} s", median_ratio(pairs), "<= 1.25", len(pairs))


def compare_memory(shape: str, results: Sequence[Run]) -> Comparison:
    python = run_commands([sys.executable, "-c", "import numpy, time; time.sleep(0.2)"]).memory
    above = max(run.memory for run in results) - python
    what, ours = f"{shape}-shaped: memory above Python with numpy", f"{above / 1e6:.0f} MB"
    return Comparison(what, ours, "300 MB", above / 300e6, "<= 1", len(results))


def copy_seconds(source: Path, target: Path, size: int) -> float:
    """Read all of `source` and write `size` bytes of it, until they are on the disk."""
    started, remaining = time.perf_counter(), size
    buffer = bytearray(_BUFFER)
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
            writer.write(memoryview(buffer)[: min(count, remaining)])
            remaining -= min(count, remaining)
        os.fdatasync(writer.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def read_seconds(source: Path) -> float:
    started, buffer = time.perf_counter(), bytearray(_BUFFER)
    with source.open("rb", buffering=0) as reader:
        while reader.readinto(buffer):
            pass
    return time.perf_counter() - started


def write_seconds(target: Path, size: int) -> float:
    """Write `size` bytes, until they are on the disk."""
    started, remaining, data = time.perf_counter(), size, os.urandom(_BUFFER)
    with target.open("wb", buffering=0) as writer:
        while remaining:
            remaining -= writer.write(memoryview(data)[: min(len(data), remaining)])
        os.fdatasync(writer.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


Quantize = Callable[[ggml.TensorType, int, int, int, int], None]


def estimate_seconds(plan: ConversionPlan, quantize: Quantize) -> float:
    """Estimate from samples how long all cores take to quantize the values of the plan from the cache."""
    values: dict[str, int] = {}
    for rows in plan.job.ranges:
        for target in rows.targets:
            if target.type != rows.type:
                values[target.type.name] = values.get(target.type.name, 0) + rows.row_count * rows.columns
    return sum(count / values_per_second(name, quantize) for name, count in values.items())


def values_per_second(name: str, quantize: Quantize, rows: int = 128, columns: int = 4096) -> float:
    """Quantize on all cores for half a second; each core's sample and result stay in its cache."""
    kind, cores = ggml.tensor_type(name), os.cpu_count() or 1
    random = numpy.random.default_rng(0)
    samples = [random.standard_t(5, (rows, columns)).astype(numpy.float32) for _ in range(cores)]
    results = [numpy.empty(rows * kind.row_bytes(columns), numpy.uint8) for _ in range(cores)]

    def work(core: int) -> None:
        while time.perf_counter() < started + _SAMPLE_SECONDS:
            quantize(kind, samples[core].ctypes.data, results[core].ctypes.data, rows, columns)
            rounds[core] += 1

    rounds = [0] * cores
    threads = [threading.Thread(target=work, args=(core,)) for core in range(cores)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows * columns * sum(rounds) / (time.perf_counter() - started)


def flush_disk(source: Path, target: Path) -> None:
    """
    Delete `target`, wait until the disk is idle, and drop `source` from the page cache.

    Deleting eight gigabytes keeps the disk busy for seconds, which would count for the next run.
    """
    target.unlink(missing_ok=True)
    os.sync()
    time.sleep(2)
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
