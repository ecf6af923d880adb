"""
Side by side with llama.cpp's own programs on one machine, in one run: start-up, first token, decode, download.

    benchmarks/rival.sh                                    builds llama-completion and llama-bench, once
    .venv/bin/python benchmarks/against_llama_cpp.py       prints a table (and --json FILE keeps the numbers)

Every pair is measured in turn, A B A B …, since the speed of a shared machine drifts; what counts is the median of the
ratios pair by pair.
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

ROOT = Path(__file__).resolve().parent.parent
RIVAL = ROOT / "build" / "rival" / "bin"
PROGRAM = str(ROOT / ".venv" / "bin" / "qwenlocal")
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Row:
    """One comparison: medians of ours and theirs, and of their ratio pair by pair (`theirs` None: a limit instead)."""

    what: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float
    wanted: str
    runs: int


def pairs(ours: Callable[[], float], theirs: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """Measured in turn, after one run of each that does not count."""
    ours()
    theirs()
    results = [(ours(), theirs()) for _ in range(runs)]
    return [a for a, _ in results], [b for _, b in results]


def row(what: str, unit: str, a: list[float], b: list[float], wanted: str) -> Row:
    ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
    return Row(what, unit, statistics.median(a), statistics.median(b), ratio, wanted, len(a))


# --- start-up


def start_up(environment: dict[str, str], runs: int) -> list[Row]:
    rows = []
    for command in ("--help", "list"):

        def run(command: str = command) -> float:
            return seconds([PROGRAM, command], environment)

        def python() -> float:
            return seconds([str(ROOT / ".venv/bin/python"), "-c", "import typer"], environment)

        ours, bare = pairs(run, python, runs)
        rows.append(
            row(f"qwenlocal {command} (against Python with its argument parser)", "s", ours, bare, "<= 0.150 s")
        )
    return rows


def seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - started


# --- from the command to the first token


def first_token(model: Path, threads: int, environment: dict[str, str], runs: int) -> Row:
    ours = [PROGRAM, "run", str(model), QUESTION, "--temp", "0", "-n", "8", "-t", str(threads)]
    theirs = [str(RIVAL / "llama-completion"), "-m", str(model), "-p", QUESTION, "--temp", "0", "-n", "8"]
    theirs += ["-t", str(threads), "-st", "--no-display-prompt", "--simple-io"]
    a, b = pairs(lambda: until_output(ours, environment), lambda: until_output(theirs, environment), runs)
    return row("command to first token (against llama-completion)", "s", a, b, "<= 1.15")


def until_output(command: list[str], environment: dict[str, str]) -> float:
    """From starting the process to the first letter of the answer on its standard output."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as child:
        assert child.stdout
        while True:
            byte = child.stdout.read(1)
            if not byte:
                raise RuntimeError(f"{command[0]} said nothing")
            if byte.strip():
                break
        taken = time.perf_counter() - started
        child.stdout.read()
    return taken


# --- decode


def decode(model: Path, threads: int, environment: dict[str, str], runs: int) -> Row:
    def ours() -> float:
        # the same 128 tokens from an empty context, but sampled, turned into text and written
        command = [PROGRAM, "run", str(model), "--raw", "Once upon a time", "-n", "129", "--seed", "1"]
        command += ["--stats", "-t", str(threads)]
        text = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stderr
        found = re.search(r"answer ([\d,]+) tokens, ([\d.]+) tokens/s", text)
        assert found, text
        assert found[1] == "129", f"the answer ended early: {text}"
        return float(found[2])

    def theirs() -> float:
        command = [str(RIVAL / "llama-bench"), "-m", str(model), "-p", "0", "-n", "128", "-t", str(threads), "-r", "1"]
        output = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=True).stdout
        return float(json.loads(output)[0]["avg_ts"])

    a, b = pairs(ours, theirs, runs)
    return row("decode, 128 tokens (against llama-bench tg128)", "tokens/s", a, b, ">= 0.97")


# --- download


def download(runs: int, size: int = 1_000_000_000, rate: float = 250e6) -> Row:
    """From a loopback server in a process of its own, limited to `rate`; ratio: speed against the limit."""
    speeds, shares = [], []
    with limited_server(size, rate) as (url, digest):
        fetch_once(url, size, digest)  # does not count: a virtual machine's memory is slow the first time it is touched
        for _ in range(runs):
            speed, share = fetch_once(url, size, digest)
            speeds.append(speed)
            shares.append(share)
    speed = statistics.median(speeds)
    what = f"download at {rate / 1e6:.0f} MB/s, hashed ({statistics.median(shares):.2f} of one core)"
    return Row(what, "MB/s", speed / 1e6, rate / 1e6, speed / rate, ">= 0.95, <= 1 core", runs)


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
    artifact = Artifact("x", size, digest, [HttpSource("x", client, [UrlSegment(url, 0, size)])])
    started, used = time.perf_counter(), time.process_time()
    download_artifact(artifact, Path(folder) / "x", client=client, locks=Path(folder) / "locks")
    taken = time.perf_counter() - started
    print(json.dumps([size / taken, (time.process_time() - used) / taken]))
"""


def fetch_once(url: str, size: int, digest: str) -> tuple[float, float]:
    command = [str(ROOT / ".venv/bin/python"), "-c", _FETCH, url, str(size), digest]
    speed, share = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return speed, share


@contextmanager
def limited_server(size: int, rate: float) -> Iterator[tuple[str, str]]:
    command = [sys.executable, __file__, "--serve", str(size), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url, digest = server.stdout.readline().split()
        try:
            yield url, digest
        finally:
            server.kill()


def serve(size: int, rate: float) -> None:
    """Send one file in ranges with sendfile, all connections together at `rate` bytes a second."""
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


# --- the whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a GGUF file; without it, the starter")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["start", "first", "decode", "download"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), float(options.serve[1]))
        return
    model = options.model or starter()
    environment = dict(os.environ)
    parts: dict[str, Callable[[], list[Row]]] = {
        "start": lambda: start_up(environment, options.runs * 3),
        "first": lambda: [first_token(model, options.threads, environment, options.runs)],
        "decode": lambda: [decode(model, options.threads, environment, options.runs)],
        "download": lambda: [download(max(3, options.runs // 2))],
    }
    print(f"{processor()}, {os.cpu_count()} cores, {memory():.0f} GB, {platform.system()}, {model.name}\n")
    print("| what | ours | theirs | ratio (median of pairs) | wanted | runs |\n|---|---|---|---|---|---|")
    rows: list[Row] = []
    for name, measure in parts.items():
        for found in measure() if options.only in (None, name) else []:
            rows.append(found)
            print(table_row(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


def table_row(r: Row) -> str:
    theirs = f"{r.theirs:.3f} {r.unit}" if r.theirs is not None else ""
    return f"| {r.what} | {r.ours:.3f} {r.unit} | {theirs} | {r.ratio:.3f} | {r.wanted} | {r.runs} |"


def starter() -> Path:
    listed = subprocess.run([PROGRAM, "list", "--json"], capture_output=True, text=True, check=True).stdout
    found = [entry["path"] for entry in json.loads(listed) if entry["name"] == "starter"]
    if not found:
        sys.exit("The starter is not here: qwenlocal pull starter")
    return Path(found[0])


def processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
