"""
Compare qwenlocal's commands with llama.cpp's programs: start-up, time to the first token, decode and download speed.

    benchmarks/rival.sh                                    build llama-completion and llama-bench, once
    .venv/bin/python benchmarks/end_to_end.py              print a table; --json FILE saves the numbers

Runs are interleaved, A B A B …, since the speed of a shared machine drifts; the result is the median of the ratios pair
by pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from comparison import (
    COLUMNS,
    LLAMA_CPP,
    QWENLOCAL,
    interleave,
    llama_bench,
    median_ratio,
    run_python,
    table_header,
    table_row,
)

QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Comparison:
    """Medians of both sides, and the median of their ratios pair by pair; `theirs` may be a limit."""

    what: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    target: str
    runs: int

    def __str__(self) -> str:
        ours, theirs = f"{self.ours:.3f} {self.unit}", f"{self.theirs:.3f} {self.unit}"
        return table_row(self.what, ours, theirs, f"{self.ratio:.3f}", self.target, self.runs)


def compare(
    what: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float], target: str, runs: int
) -> Comparison:
    pairs = interleave(ours, theirs, runs)
    medians = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Comparison(what, unit, *medians, median_ratio(pairs), target, runs)


# --- start-up


def compare_start_up(runs: int) -> list[Comparison]:
    python = [sys.executable, "-c", "import typer"]
    return [
        compare(
            f"qwenlocal {command} (against Python with its argument parser)",
            "s",
            lambda command=command: run_seconds([QWENLOCAL, command]),
            lambda: run_seconds(python),
            "<= 0.150 s",
            runs,
        )
        for command in ("--help", "list")
    ]


def run_seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - started


# --- time to the first token


def compare_first_token(model: Path, threads: int, runs: int) -> Comparison:
    ours = [QWENLOCAL, "run", str(model), QUESTION, "--temp", "0", "-n", "8", "-t", str(threads)]
    theirs = [str(LLAMA_CPP / "llama-completion"), "-m", str(model), "-p", QUESTION, "--temp", "0", "-n", "8"]
    theirs += ["-t", str(threads), "-st", "--no-display-prompt", "--simple-io"]
    what = "command to first token (against llama-completion)"
    return compare(what, "s", lambda: first_output_seconds(ours), lambda: first_output_seconds(theirs), "<= 1.15", runs)


def first_output_seconds(command: list[str]) -> float:
    """
    Return the time from starting the process to the first character of the answer on its standard output.

    Raises
    ------
    RuntimeError: there is no output.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as child:
        assert child.stdout
        while True:
            byte = child.stdout.read(1)
            if not byte:
                raise RuntimeError(f"No output: {' '.join(command)}")
            if byte.strip():
                break
        seconds = time.perf_counter() - started
        child.stdout.read()
    return seconds


# --- decode


def compare_decode(model: Path, threads: int, runs: int) -> Comparison:
    def ours() -> float:
        # 128 tokens from an empty context, as in tg128, but sampled, detokenized and printed
        command = [QWENLOCAL, "run", str(model), "--raw", "Once upon a time", "-n", "129", "--seed", "1"]
        command += ["--stats", "-t", str(threads)]
        statistics_line = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stderr
        match = re.search(r"answer ([\d,]+) tokens, ([\d.]+) tokens/s", statistics_line)
        assert match, statistics_line
        assert match[1] == "129", f"the answer ended early: {statistics_line}"
        return float(match[2])

    what = "decode, 128 tokens (against llama-bench tg128)"
    return compare(what, "tokens/s", ours, lambda: llama_bench(model, threads, answer=128), ">= 0.97", runs)


# --- download


def measure_download(runs: int, size: int = 1_000_000_000, rate: float = 250e6) -> Comparison:
    """Compare the speed of a download from a loopback server with the server's limit, `rate` bytes per second."""
    with rate_limited_server(size, rate) as (url, digest):
        measure_fetch(url, size, digest)  # does not count: on a virtual machine, the first access to memory is slow
        results = [measure_fetch(url, size, digest) for _ in range(runs)]
    speed, cpu_share = (statistics.median(values) for values in zip(*results, strict=True))
    what = f"download at {rate / 1e6:.0f} MB/s, hashed ({cpu_share:.2f} of one core)"
    return Comparison(what, "MB/s", speed / 1e6, rate / 1e6, speed / rate, ">= 0.95, <= 1 core", runs)


_FETCH = """
import json, sys, tempfile, time
from pathlib import Path
from qwenlocal.library.artifact import Artifact
from qwenlocal.library.byte_source import HttpSource, UrlSegment
from qwenlocal.library.download import download_artifact
from qwenlocal.library.http import HttpClient
url, size, digest = sys.argv[1], int(sys.argv[2]), sys.argv[3]
client = HttpClient()
with tempfile.TemporaryDirectory() as folder:
    artifact = Artifact("x", size, digest, [HttpSource("x", client, [UrlSegment(url, size)])])
    started, used = time.perf_counter(), time.process_time()
    download_artifact(artifact, Path(folder) / "x", locks=Path(folder) / "locks")
    taken = time.perf_counter() - started
    print(json.dumps([size / taken, (time.process_time() - used) / taken]))
"""


def measure_fetch(url: str, size: int, digest: str) -> tuple[float, float]:
    """Return the bytes per second of one download, and the share of one core that it used."""
    speed, cpu_share = run_python(_FETCH, url, size, digest)
    return speed, cpu_share


@contextmanager
def rate_limited_server(size: int, rate: float) -> Iterator[tuple[str, str]]:
    """Start a server in another process; yield the URL and the SHA-256 digest of its file."""
    command = [sys.executable, __file__, "--serve", str(size), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url, digest = server.stdout.readline().split()
        try:
            yield url, digest
        finally:
            server.kill()


def serve(size: int, rate: float) -> None:
    """Serve ranges of one random file with sendfile; all connections together get `rate` bytes per second."""
    with tempfile.TemporaryFile() as file:
        digest = hashlib.sha256()
        for _ in range(size // 1_000_000):
            data = os.urandom(1_000_000)
            digest.update(data)
            file.write(data)
        file.flush()
        lock, due = threading.Lock(), [time.monotonic()]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
                self.send_header("Content-Length", str(last - first + 1))
                self.end_headers()
                self.wfile.flush()
                while first <= last:
                    count = min(1 << 20, last - first + 1)
                    with lock:
                        now = time.monotonic()
                        due[0] = max(due[0], now - 0.5) + count / rate
                        wait = due[0] - now
                    if wait > 0:
                        time.sleep(wait)
                    sent = 0
                    while sent < count:
                        sent += os.sendfile(self.connection.fileno(), file.fileno(), first + sent, count - sent)
                    first += count

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        print(f"http://127.0.0.1:{server.server_address[1]}/x {digest.hexdigest()}", flush=True)
        server.serve_forever()


# --- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; default: the starter")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--only", choices=["start", "first", "decode", "download"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), float(options.serve[1]))
        return
    model = options.model or find_starter()
    benchmarks: dict[str, Callable[[], list[Comparison]]] = {
        "start": lambda: compare_start_up(options.runs * 3),
        "first": lambda: [compare_first_token(model, options.threads, options.runs)],
        "decode": lambda: [compare_decode(model, options.threads, options.runs)],
        "download": lambda: [measure_download(max(3, options.runs // 2))],
    }
    print(f"{cpu_name()}, {os.cpu_count()} cores, {memory_gb():.0f} GB, {platform.system()}, {model.name}\n")
    print(table_header(*COLUMNS))
    results: list[Comparison] = []
    for name, run in benchmarks.items():
        if options.only in (None, name):
            for result in run():
                results.append(result)
                print(result, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


def find_starter() -> Path:
    output = subprocess.run([QWENLOCAL, "list", "--json"], capture_output=True, text=True, check=True).stdout
    paths = [entry["path"] for entry in json.loads(output) if entry["name"] == "starter"]
    if not paths:
        sys.exit("The starter is not installed. Run: qwenlocal pull starter")
    return Path(paths[0])


def cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.processor()


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
