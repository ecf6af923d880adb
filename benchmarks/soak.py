"""
Load a server for a long time with clients that connect and disconnect, and check that nothing leaks.

    .venv/bin/python benchmarks/soak.py MODEL.gguf --minutes 60

Eight clients ask for answers of random length about random texts; a third of them leave before the end, during the
prompt or the answer. Afterwards the memory of the server and of the model's process may have grown by at most 2 % since
the first tenth of the time, no file or connection may be left open, and a greedy answer must be what it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import time
from pathlib import Path

import httpx
import psutil
from comparison import QWENLOCAL
from server import free_ports

CLIENTS = 8
WORDS = ("river", "stone", "cloud", "lamp", "seven")
# Not from the cache: a prompt that is computed in other parts is rounded differently, which can change a greedy answer.
QUESTION = {
    "messages": [{"role": "user", "content": "Name the planets."}],
    "temperature": 0,
    "max_tokens": 40,
    "cache_prompt": False,
}
MAX_GROWTH = 1.02


async def run_client(url: str, random_numbers: random.Random, end: float) -> tuple[int, int]:
    """Ask until the time is over; return the number of complete and of abandoned answers."""
    complete = abandoned = 0
    async with httpx.AsyncClient(timeout=300) as client:
        while time.monotonic() < end:
            words = " ".join(random_numbers.choices(WORDS, k=random_numbers.randint(1, 400)))
            body = {
                "messages": [{"role": "user", "content": words}],
                "max_tokens": random_numbers.randint(1, 120),
                "stream": True,
                "seed": 1,
            }
            patience = random_numbers.uniform(0, 2) if random_numbers.random() < 0.33 else 300
            try:
                async with asyncio.timeout(patience):
                    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                        response.raise_for_status()
                        lines = [line async for line in response.aiter_lines() if line]
                if lines[-1] != "data: [DONE]":
                    raise SystemExit(f"an answer broke off: {lines[-1]}")
                complete += 1
            except TimeoutError:
                abandoned += 1
    return complete, abandoned


def measure(processes: list[psutil.Process]) -> tuple[int, int]:
    """Return the bytes of memory and the number of open files of the processes."""
    return sum(p.memory_info().rss for p in processes), sum(p.num_fds() for p in processes)


async def soak(url: str, processes: list[psutil.Process], seconds: float, seed: int) -> None:
    answer = (await ask(url))["choices"][0]["message"]["content"]
    end = time.monotonic() + seconds
    clients = [
        asyncio.create_task(run_client(url, random.Random(seed * CLIENTS + number), end)) for number in range(CLIENTS)
    ]
    await asyncio.sleep(seconds / 10)
    before, _ = measure(processes)
    print(f"{seconds / 600:5.1f} min: {before / 1e6:.0f} MB", flush=True)
    while time.monotonic() < end:
        await asyncio.sleep(min(60.0, seconds / 10))
        print(f"{(seconds - end + time.monotonic()) / 60:5.1f} min: {measure(processes)[0] / 1e6:.0f} MB", flush=True)
    counts = await asyncio.gather(*clients)
    complete, abandoned = (sum(numbers) for numbers in zip(*counts, strict=True))
    await asyncio.sleep(1)
    after, files = measure(processes)
    growth = after / before
    print(f"{complete} complete and {abandoned} abandoned answers, memory {growth:.3f}, {files} files open")
    if growth > MAX_GROWTH:
        raise SystemExit("memory has grown")
    if (await ask(url))["choices"][0]["message"]["content"] != answer:
        raise SystemExit("the greedy answer has changed")
    metrics = httpx.get(f"{url}/metrics").text
    print("\n".join(line for line in metrics.splitlines() if "running" in line or "waiting" in line))


async def ask(url: str) -> dict:  # type: ignore[type-arg]
    async with httpx.AsyncClient(timeout=300) as client:
        response = await client.post(f"{url}/v1/chat/completions", json=QUESTION)
        response.raise_for_status()
        return dict(response.json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    port = free_ports()[0]
    command = [QWENLOCAL, "serve", str(arguments.model), "--port", str(port), "-c", "8192", "--no-keep-cache"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/health").raise_for_status()
                break
            time.sleep(0.05)
        asyncio.run(ask(url))
        server = psutil.Process(process.pid)
        asyncio.run(soak(url, [server, *server.children(recursive=True)], arguments.minutes * 60, arguments.seed))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
