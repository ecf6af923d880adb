"""
Compare `qwenlocal serve` with llama-server of the same source: throughput, time to the first token, gaps.

    benchmarks/rival.sh                                      build llama-server, once
    .venv/bin/python benchmarks/server.py MODEL.gguf         1, 4, 8 and 16 clients
    .venv/bin/python benchmarks/server.py MODEL.gguf --long  one prompt of 2,000 tokens among them
    .venv/bin/python benchmarks/server.py MODEL.gguf --overhead  one stream, compared with bare decoding

Each client streams two answers of 48 tokens after a system prompt of about 400 tokens that all of them share, and that
no earlier run had. Both servers run at the same time, but only one of them computes: the runs are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from comparison import LLAMA_CPP, ROOT, table_header, table_row

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.huge_pages import collapse_buffers

CLIENTS = (1, 4, 8, 16)
ANSWER = 48
SENTENCE = "The old lighthouse keeper counted the ships that passed between the rocks and wrote them down. "


@dataclass
class Run:
    """Times of one run, in seconds: the whole run, from request to first token, and between two tokens."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


async def stream(client: httpx.AsyncClient, url: str, messages: Sequence[dict[str, str]], run: Run) -> None:
    body = {
        "model": "",
        "messages": messages,
        "stream": True,
        "max_tokens": ANSWER,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    started = last = time.monotonic()
    is_first = True
    async with client.stream("POST", url + "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if usage := chunk.get("usage"):
                run.tokens += usage["completion_tokens"]
            if not (chunk.get("choices") and chunk["choices"][0]["delta"].get("content")):
                continue
            now = time.monotonic()
            if is_first:
                run.first.append(now - started)
            else:
                run.gaps.append(now - last)
            is_first, last = False, now


async def measure(url: str, clients: int, name: str, *, has_long: bool) -> Run:
    system = f"Run {name}. " + SENTENCE * 22
    long = f"Run {name}, long. " + SENTENCE * 110
    run = Run()

    async def work(number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)  # llama-server closes some that are used again
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            for turn in range(2):
                text = long if has_long and number == 0 and turn == 0 else system
                question = f"Question {number}.{turn}: tell me about ship number {number * 7 + turn}."
                messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
                await stream(client, url, messages, run)

    started = time.monotonic()
    await asyncio.gather(*map(work, range(clients)))
    run.seconds = time.monotonic() - started
    return run


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[tuple[str, float]]:
    """Run a server; yield its address and the seconds until it answered."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
                if (
                    httpx.get(url + "/health").status_code == 200
                    and httpx.post(url + "/v1/chat/completions", json=body, timeout=60).is_success
                ):
                    break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} has ended")
            time.sleep(0.01)
        yield url, time.monotonic() - started
    finally:
        process.terminate()
        process.wait()


def decode_bare(context: Context, ids: Sequence[int]) -> float:
    """Decode as many tokens as an answer has, after a prompt; return the seconds between the first and the last one."""
    context.truncate(0, 0)
    sampler = Sampler(Sampling(temperature=0), context.model.tokenizer)
    started, pending = 0.0, list(ids)
    for number in range(ANSWER):
        row = context.decode([(0, pending)])[0]
        pending = [sampler.sample(context, row)]
        if number == 0:
            started = time.monotonic()
    sampler.close()
    return time.monotonic() - started


def stream_raw(port: int, number: int) -> float:
    """
    Stream an answer to a client that hardly computes; return the seconds between its first and last token.

    httpx would take a quarter of a millisecond per chunk from the model.
    """
    message = {"role": "user", "content": f"Overhead {number}. " + SENTENCE * 22}
    fields = {"stream": True, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"messages": [message], **fields}).encode()
    lines = "POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json"
    header = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
    first = 0.0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(header + body)
        while True:
            data = connection.recv(1 << 16)
            if not data:
                raise SystemExit("the server has closed the connection")
            if b'"finish_reason":"length"' in data:
                return time.monotonic() - first
            if not first and b'"content":"' in data.replace(b'"content":""', b""):
                first = time.monotonic()


def measure_overhead(model_file: Path, command: Sequence[str], port: int, runs: int) -> None:
    """Compare the time between tokens of one stream with that of the bare engine in this process."""
    model = Model(model_file)
    options = ContextOptions(16384, threads=2, batch_threads=2, n_ubatch=128, flash_attention=True, n_seq_max=24)
    context = Context(model, options)
    ids = model.tokenizer.tokenize(SENTENCE * 22, special=False)
    collapse_buffers()
    ratios = []
    with serving(command, port):
        for number in range(runs + 1):
            served, bare = (seconds / (ANSWER - 1) for seconds in (stream_raw(port, number), decode_bare(context, ids)))
            if number:  # the first run does not count
                ratios.append(served / bare)
                print(f"{1000 * served:.2f} ms per token, bare {1000 * bare:.2f} ms: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f} in {runs} pairs")


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=lambda text: tuple(map(int, text.split(","))), default=CLIENTS)
    parser.add_argument("--long", action="store_true", help="one prompt of 2,000 tokens among them")
    parser.add_argument("--overhead", action="store_true", help="one stream, compared with bare decoding")
    arguments = parser.parse_args()
    ports = free_ports()
    ours = [str(ROOT / ".venv/bin/qwenlocal"), "serve", str(arguments.model), "--port", str(ports[0])]
    ours += ["--parallel", "16", "-c", "16384", "-t", "2", "--no-keep-cache"]
    if arguments.overhead:
        measure_overhead(arguments.model, [*ours, "--no-lookup"], ports[0], arguments.runs)
        return
    theirs = [str(LLAMA_CPP / "llama-server"), "-m", str(arguments.model), "--port", str(ports[1])]
    theirs += ["-np", "16", "-c", "16384", "-t", "2", "--kv-unified"]
    with serving(ours, ports[0]) as (our_url, our_start), serving(theirs, ports[1]) as (their_url, their_start):
        print(f"{arguments.model.name}: start {our_start:.2f} s, llama-server {their_start:.2f} s\n")
        print(table_header("clients", "measure", "qwenlocal", "llama-server", "ratio (median of pairs)"))
        for url in (our_url, their_url):  # the first run does not count
            asyncio.run(measure(url, 1, "first", has_long=False))
        for clients in arguments.clients:
            pairs: list[tuple[Run, Run]] = []
            for number in range(arguments.runs):
                order = (our_url, their_url) if number % 2 == 0 else (their_url, our_url)
                runs = {
                    url: asyncio.run(measure(url, clients, f"{clients}-{number}", has_long=arguments.long))
                    for url in order
                }
                pairs.append((runs[our_url], runs[their_url]))
            report(clients, pairs)
            sys.stdout.flush()


def report(clients: int, pairs: Sequence[tuple[Run, Run]]) -> None:
    measures = {
        "tokens/s": lambda run: run.tokens / run.seconds,
        "first token p50, s": lambda run: percentile(run.first, 0.5),
        "first token p99, s": lambda run: percentile(run.first, 0.99),
        "longest gap, s": lambda run: max(run.gaps),
    }
    for name, of in measures.items():
        ours, theirs = ([of(run) for run in side] for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            table_row(
                clients, name, f"{statistics.median(ours):.3f}", f"{statistics.median(theirs):.3f}", f"{ratio:.3f}"
            )
        )


if __name__ == "__main__":
    main()
