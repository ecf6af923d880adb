"""
Measure the throughput of batching: 16 prompts, with 1, 2, 4, 8 and 16 of them in parallel.

    .venv/bin/python benchmarks/batch.py MODEL.gguf

Runs are interleaved; the speedup is the median of the ratios to one prompt at a time, run by run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from comparison import median_ratio, table_header, table_row

from qwenlocal.chat.chat_template import CHATML, ChatTemplate, encode_messages
from qwenlocal.engine.batching import BatchGenerator, BatchRequest
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling

PARALLEL = (1, 2, 4, 8, 16)
MAX_TOKENS = 64
COUNTRIES = (
    *("France", "Spain", "Italy", "Greece", "Norway", "Chile", "Peru", "Kenya"),
    *("Japan", "China", "India", "Brazil", "Canada", "Mexico", "Egypt", "Ghana"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model = Model(options.model)
    requests = build_requests(model)
    speeds: dict[int, list[float]] = {parallel: [] for parallel in PARALLEL}
    measure_speed(model, requests[:2], 1)
    for _ in range(options.runs):
        for parallel in PARALLEL:
            speeds[parallel].append(measure_speed(model, requests, parallel))
    print(f"{options.model.name}, {os.cpu_count()} cores, {time.strftime('%d %B %Y')}, {len(requests)} prompts\n")
    print(table_header("parallel", "tokens/s", "speedup"))
    for parallel in PARALLEL:
        speedup = median_ratio(zip(speeds[parallel], speeds[1], strict=True))
        print(table_row(parallel, f"{statistics.median(speeds[parallel]):.1f}", f"{speedup:.2f}"))


def build_requests(model: Model) -> list[BatchRequest]:
    template, sampling = ChatTemplate(CHATML), Sampling(temperature=0)
    requests = []
    for number, country in enumerate(COUNTRIES):
        question = f"Name the capital of {country} and say three sentences about it."
        ids = encode_messages(template, [{"role": "user", "content": question}], model.tokenizer)
        requests.append(BatchRequest(number, ids, sampling, MAX_TOKENS))
    return requests


def measure_speed(model: Model, requests: list[BatchRequest], parallel: int) -> float:
    """Return the tokens per second of all answers together."""
    threads = os.cpu_count() or 1
    options = ContextOptions(
        4096, threads=threads, batch_threads=threads, n_ubatch=128, n_seq_max=parallel + 1, flash_attention=False
    )
    context = Context(model, options)
    started = time.perf_counter()
    tokens = sum(len(result.ids) for result in BatchGenerator(context).generate(requests, model.tokenizer.is_end))
    seconds = time.perf_counter() - started
    context.close()
    return tokens / seconds


if __name__ == "__main__":
    main()
