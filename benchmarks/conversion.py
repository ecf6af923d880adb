"""
Converting a checkpoint, side by side with llama.cpp's own two steps: convert_hf_to_gguf.py, then llama-quantize.

    benchmarks/rival.sh                               builds llama-quantize, once
    make test-reference                               makes build/reference, a Python with torch and transformers
    .venv/bin/python benchmarks/conversion.py         a checkpoint of Qwen1.5-0.5B's shape; about ten minutes
    .venv/bin/python benchmarks/conversion.py --large and of the 7B's (15 GB) and a mixture's: time and memory

The checkpoints have random weights and Qwen's vocabulary, and are kept in build/shapes. Both sides are measured in
turn, A B A B …; the first run of each does not count. Memory is the largest resident set of any process of a side.
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
from dataclasses import dataclass
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from from_gguf import tokenizer_files  # noqa: E402
from oracle import data_of  # noqa: E402
from shapes import write_shape  # noqa: E402

from qwenlocal import ggml  # noqa: E402
from qwenlocal.weights.checkpoint import Checkpoint  # noqa: E402
from qwenlocal.weights.conversion_plan import ConversionPlan  # noqa: E402
from qwenlocal.weights.convert import plan_conversion  # noqa: E402
from qwenlocal.weights.quant_mix import file_type  # noqa: E402

SOURCE = next(ROOT.glob("build/llama_cpp_python-*/vendor/llama.cpp"))
QUANTIZE = ROOT / "build" / "rival" / "bin" / "llama-quantize"
PROGRAM = ROOT / ".venv" / "bin" / "qwenlocal"
FOLDER = ROOT / "build" / "shapes"


@dataclass(frozen=True)
class Run:
    """Seconds on the clock, and the largest resident set in bytes."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    theirs: str
    ratio: float
    wanted: str
    runs: int

    def __str__(self) -> str:
        return f"| {self.what} | {self.ours} | {self.theirs} | {self.ratio:.3f} | {self.wanted} | {self.runs} |"


def run(*commands: Sequence[str | Path]) -> Run:
    """Commands one after the other; what they print is thrown away."""
    begin, memory = time.perf_counter(), 0
    for command in commands:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            memory = max(memory, peak_of(process.pid))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed with {process.returncode}")
    return Run(time.perf_counter() - begin, memory)


def peak_of(pid: int) -> int:
    """
    The largest resident set so far. Asked of the kernel while it runs: what it reports at the end (ru_maxrss) begins
    with this process's own size, from which the other one was forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def ours(source: Path, kind: str, target: Path, *more: str) -> Run:
    target.unlink(missing_ok=True)
    return run([PROGRAM, "convert", source, "-o", target, "--type", kind, *more])


def theirs(source: Path, kind: str, target: Path, python: Path, threads: int) -> Run:
    between = target.with_suffix(".bf16.gguf")
    for file in (target, between):
        file.unlink(missing_ok=True)
    return run(
        [python, SOURCE / "convert_hf_to_gguf.py", source, "--outtype", "bf16", "--outfile", between],
        [QUANTIZE, between, target, kind, str(threads)],
    )


def in_turn(one: Callable[[], Run], other: Callable[[], Run], runs: int) -> list[tuple[Run, Run]]:
    one()
    other()
    return [(one(), other()) for _ in range(runs)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def row(what: str, pairs: list[tuple[Run, Run]], wanted: str) -> Row:
    sides = [
        f"{median([run.seconds for run in side]):.1f} s, {max(run.memory for run in side) / 1e6:.0f} MB"
        for side in zip(*pairs, strict=True)
    ]
    return Row(what, *sides, median([a.seconds / b.seconds for a, b in pairs]), wanted, len(pairs))


# --- a 0.5B


def side_by_side(source: Path, python: Path, runs: int) -> list[Row]:
    threads = os.cpu_count() or 1
    rows = []
    for kind in ("q4_k_m", "q8_0"):
        mine, other = FOLDER / f"ours-{kind}.gguf", FOLDER / f"theirs-{kind}.gguf"
        pairs = in_turn(
            lambda kind=kind, mine=mine: ours(source, kind, mine),
            lambda kind=kind, other=other: theirs(source, kind, other, python, threads),
            runs,
        )
        rows.append(row(f"0.5B bf16 to {kind}, wall and memory", pairs, "<= 0.4"))
        check_equal(source, kind, other)
    return rows


def threads_against_one(source: Path, shape: str, runs: int) -> Row:
    single = in_turn(
        lambda: ours(source, "q4_k_m", FOLDER / "two.gguf", "-t", "2"),
        lambda: ours(source, "q4_k_m", FOLDER / "one.gguf", "-t", "1"),
        runs,
    )
    return row(f"{shape} to q4_k_m, two threads against one", single, "<= 0.556 (1.8 x)")


def check_equal(source: Path, kind: str, other: Path) -> None:
    """The very bytes of llama.cpp's two steps, with the tied head kept as they keep it."""
    like = FOLDER / f"like-{kind}.gguf"
    ours(source, kind, like, "--like", "llama.cpp")
    if data_of(like) != data_of(other):
        raise SystemExit(f"{like} and {other} differ")
    like.unlink()


# --- large ones


def large(shape: str, kind: str, tokenizer: dict[str, dict[str, object]], runs: int) -> list[Row]:
    """Time against the larger of copying and quantizing alone, with ggml's quantizers and with our own, and memory."""
    source, target = write_shape(FOLDER / shape, shape, tokenizer), FOLDER / f"{shape}-{kind}.gguf"
    plan = plan_conversion(Checkpoint.open(source), [(target, file_type(kind))])
    read, write = plan.job.read_bytes, plan.files[0].size
    weights, found = source / "model.safetensors", []
    limits: dict[str, list[float]] = {"copying or ggml's quantizers": [], "copying or our own quantizers": []}
    limits["reading, then writing"] = []
    for number in range(runs):
        theirs, own = quantize_seconds(plan, ggml.quantize_with_ggml), quantize_seconds(plan, ggml.quantize)
        start_afresh(weights, target)
        reading = read_seconds(weights)
        start_afresh(weights, target)
        writing = write_seconds(target, write)
        sides: dict[str, Callable[[], Run]] = {  # one right after the other: the disk's speed changes by the minute
            "copying": lambda: Run(copy_seconds(weights, target, write), 0),
            "ours": lambda: ours(source, kind, target),
        }
        measured = {}
        for side in sorted(sides, reverse=bool(number % 2)):
            start_afresh(weights, target)
            measured[side] = sides[side]()
        copying = measured["copying"].seconds
        found.append(measured["ours"])
        limits["copying or ggml's quantizers"].append(max(copying, theirs))
        limits["copying or our own quantizers"].append(max(copying, own))
        limits["reading, then writing"].append(reading + writing)
        print(
            f"{shape}: copying {copying:.1f} s, reading {reading:.1f} s, writing {writing:.1f} s, quantizing "
            f"{theirs:.1f} s with ggml's, {own:.1f} s with our own quantizers, all of it {found[-1].seconds:.1f} s",
            file=sys.stderr,
        )
    bare = run([sys.executable, "-c", "import numpy, time; time.sleep(0.2)"]).memory
    above = max(run.memory for run in found) - bare
    target.unlink(missing_ok=True)
    what = f"{shape}-shaped, {read / 1e9:.1f} GB bf16 to {kind} ({write / 1e9:.1f} GB), off the disk"
    return [
        *(limit_row(f"{what}, against {whose}", found, limit) for whose, limit in limits.items()),
        Row(f"{shape}-shaped: memory above Python with numpy", f"{above / 1e6:.0f} MB", "300 MB", above / 300e6,
            "<= 1", runs),
    ]  # fmt: skip


def limit_row(what: str, found: Sequence[Run], limits: Sequence[float]) -> Row:
    ratio = median([run.seconds / limit for run, limit in zip(found, limits, strict=True)])
    seconds = median([run.seconds for run in found])
    return Row(what, f"{seconds:.1f} s", f"{median(limits):.1f} s", ratio, "<= 1.25", len(found))


def copy_seconds(source: Path, target: Path, write: int) -> float:
    """Reading all of `source` off the disk and writing `write` bytes of it, 8 MiB at a time, until they are there."""
    begin, left = time.perf_counter(), write
    buffer = bytearray(8 << 20)
    with source.open("rb", buffering=0) as here, target.open("wb", buffering=0) as there:
        while count := here.readinto(buffer):
            there.write(memoryview(buffer)[: min(count, left)])
            left -= min(count, left)
        os.fdatasync(there.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


def read_seconds(source: Path) -> float:
    """Reading all of `source` off the disk, 8 MiB at a time, and doing nothing else."""
    begin, buffer = time.perf_counter(), bytearray(8 << 20)
    with source.open("rb", buffering=0) as here:
        while here.readinto(buffer):
            pass
    return time.perf_counter() - begin


def write_seconds(target: Path, write: int) -> float:
    """Writing `write` bytes to the disk, 8 MiB at a time, until they are there, and doing nothing else."""
    begin, left, data = time.perf_counter(), write, os.urandom(8 << 20)
    with target.open("wb", buffering=0) as there:
        while left:
            left -= there.write(memoryview(data)[: min(len(data), left)])
        os.fdatasync(there.fileno())
    seconds = time.perf_counter() - begin
    target.unlink()
    return seconds


Quantize = Callable[[ggml.TensorType, int, int, int, int], None]


def quantize_seconds(plan: ConversionPlan, quantize: Quantize) -> float:
    """Quantizing as many numbers of each type as the plan has, out of the cache, on all cores; from a sample."""
    work: dict[str, int] = {}
    for strip in plan.job.strips:
        for target in strip.targets:
            if target.type != strip.type:
                work[target.type.name] = work.get(target.type.name, 0) + strip.rows * strip.columns
    return sum(count / numbers_per_second(name, quantize) for name, count in work.items())


def numbers_per_second(name: str, quantize: Quantize, rows: int = 128, columns: int = 4096) -> float:
    """All cores at once for half a second, each with a sample and a result of its own that stay in its cache."""
    kind, cores = ggml.tensor_type(name), os.cpu_count() or 1
    random = numpy.random.default_rng(0)
    samples = [random.standard_t(5, (rows, columns)).astype(numpy.float32) for _ in range(cores)]
    results = [numpy.empty(rows * kind.row_bytes(columns), numpy.uint8) for _ in range(cores)]

    def work(core: int) -> None:
        while time.perf_counter() < begin + 0.5:
            quantize(kind, samples[core].ctypes.data, results[core].ctypes.data, rows, columns)
            rounds[core] += 1

    rounds = [0] * cores
    threads = [threading.Thread(target=work, args=(core,)) for core in range(cores)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows * columns * sum(rounds) / (time.perf_counter() - begin)


def start_afresh(source: Path, target: Path) -> None:
    """
    Without `target`, with `source` out of the kernel's cache and a disk that has nothing left to do.

    Eight gigabytes that were deleted just before keep it busy for seconds, which whoever comes next would pay for.
    """
    target.unlink(missing_ok=True)
    os.sync()
    time.sleep(2)
    with source.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--reference", type=Path, default=ROOT / "build" / "reference" / "bin" / "python")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    tokenizer = tokenizer_files(SOURCE / "models" / "ggml-vocab-qwen2.gguf", sizes=(151643, 151646))
    FOLDER.mkdir(parents=True, exist_ok=True)
    if asked.large:
        rows = [
            *large("7b", "q8_0", tokenizer, min(3, asked.runs)),
            *large("moe", "q4_k_m", tokenizer, min(3, asked.runs)),
        ]
    else:
        small, middle = (write_shape(FOLDER / shape, shape, tokenizer) for shape in ("0.5b", "1.8b"))
        rows = side_by_side(small, asked.reference, asked.runs)
        rows += [threads_against_one(small, "0.5B", asked.runs), threads_against_one(middle, "1.8B", asked.runs)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {time.strftime('%d %B %Y')}\n")
    print("| what | ours | theirs | ratio (median of pairs) | wanted | runs |\n|---|---|---|---|---|---|")
    for line in rows:
        print(line)
    if asked.json:
        asked.json.write_text(json.dumps([vars(line) for line in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
