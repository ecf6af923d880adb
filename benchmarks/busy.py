"""
Measure prefill and decode while other processes compute, with different numbers of threads and ways to wait.

    .venv/bin/python benchmarks/busy.py MODEL.gguf --runs 3

*Busy*: one other process computes all the time. *Two*: two of the same program at the same time; the slower one counts.
GNU OpenMP's threads wait for each other by spinning for a while (GOMP_SPINCOUNT) or not at all (OMP_WAIT_POLICY).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from comparison import LLAMA_CPP, ROOT, table_header, table_row

_OURS = """
import json, sys, time
from pathlib import Path
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.threads import ThreadAdapter
from qwenlocal.machine import this_machine
from qwenlocal.measure.bench import decode_speed, prefill_speed
path, threads, adapts = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
adapter = ThreadAdapter(threads, this_machine().cpu_times) if adapts else None
options = ContextOptions(1024, threads=threads, batch_threads=threads, n_ubatch=128, flash_attention=False)
context = Context(Model(path), options, thread_adapter=adapter)
prefill_speed(context, 256)
prefill = prefill_speed(context, 256)
context.truncate(0, 0)
started, tokens = time.perf_counter(), 0
while time.perf_counter() - started < 4:
    decode_speed(context, 16)
    tokens += 16
print(json.dumps([prefill, tokens / (time.perf_counter() - started)]))
"""

Speeds = tuple[float, float]


@dataclass(frozen=True)
class Program:
    """A program to measure: llama-bench, or ours with a number of threads that is fixed or adapts."""

    name: str
    threads: int
    adapts: bool | None = None  # None: llama-bench
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, model: Path) -> subprocess.Popen[str]:
        if self.adapts is None:
            command = [str(LLAMA_CPP / "llama-bench"), "-m", str(model), "-p", "256", "-n", "96", "-r", "1"]
            command += ["-t", str(self.threads), "-o", "json"]
        else:
            command = [sys.executable, "-c", _OURS, str(model), str(self.threads), str(self.adapts)]
        environment = {**os.environ, **self.variables}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT
        )

    def read(self, process: subprocess.Popen[str]) -> Speeds:
        output = json.loads(process.communicate()[0])
        prefill, decode = output if self.adapts is not None else (test["avg_ts"] for test in output)
        return prefill, decode

    def run(self, model: Path) -> Speeds:
        return self.read(self.start(model))

    def run_two(self, model: Path) -> Speeds:
        """Run two at the same time; return the speeds of the slower one."""
        return min(map(self.read, [self.start(model), self.start(model)]), key=lambda speeds: speeds[1])


@contextmanager
def busy_core() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    model, threads = options.model.resolve(), options.threads
    programs = [
        Program("llama-bench", threads),
        Program("fixed", threads, False),
        Program("fixed, GOMP_SPINCOUNT=2000", threads, False, {"GOMP_SPINCOUNT": "2000"}),
        Program("fixed, GOMP_SPINCOUNT=200", threads, False, {"GOMP_SPINCOUNT": "200"}),
        Program("fixed, OMP_WAIT_POLICY=passive", threads, False, {"OMP_WAIT_POLICY": "passive"}),
        Program("one thread", 1, False),
        Program("adapting", threads, True),
    ]
    print(f"{model.name}, at most {threads} threads, {time.strftime('%d %B %Y')}, tokens/s: prefill, decode\n")
    print(table_header("machine", "program", "prefill", "decode", "runs"))
    measure("idle", programs, lambda program: program.run(model), options.runs)
    with busy_core():
        measure("one busy core", programs, lambda program: program.run(model), options.runs)
    measure("two", [programs[0], programs[1], programs[-1]], lambda program: program.run_two(model), 1)


def measure(machine: str, programs: list[Program], run: Callable[[Program], Speeds], runs: int) -> None:
    results: dict[str, list[Speeds]] = {program.name: [] for program in programs}
    for _ in range(runs):
        for program in programs:
            results[program.name].append(run(program))
    for name, speeds in results.items():
        prefill, decode = (f"{statistics.median(side):.1f}" for side in zip(*speeds, strict=True))
        print(table_row(machine, name, prefill, decode, runs), flush=True)


if __name__ == "__main__":
    main()
