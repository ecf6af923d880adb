"""
Many prompts at once against one after the other: tokens a second over all of it, in turn, A B A B ….

    .venv/bin/python benchmarks/batch.py MODEL.gguf
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from qwenlocal.chat.chat_template import CHATML, ChatTemplate, encode_messages
from qwenlocal.engine.batching import BatchGenerator, BatchRequest
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling

COUNTRIES = (
    *("France", "Spain", "Italy", "Greece", "Norway", "Chile", "Peru", "Kenya"),
    *("Japan", "China", "India", "Brazil", "Canada", "Mexico", "Egypt", "Ghana"),
)


def speed(model: Model, requests: list[BatchRequest], at_once: int) -> float:
    threads = os.cpu_count() or 1
    options = ContextOptions(
        4096, threads=threads, batch_threads=threads, n_ubatch=128, n_seq_max=at_once + 1, flash_attention=False
    )
    context = Context(model, options)
    begun = time.perf_counter()
    said = sum(len(result.ids) for result in BatchGenerator(context).generate(requests, model.tokenizer.is_end))
    taken = time.perf_counter() - begun
    context.close()
    return said / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    model, template = Model(asked.model), ChatTemplate(CHATML)
    questions = [f"Name the capital of {name} and say three sentences about it." for name in COUNTRIES]
    sampling = Sampling(temperature=0)
    requests = [
        BatchRequest(n, encode_messages(template, [{"role": "user", "content": text}], model.tokenizer), sampling, 64)
        for n, text in enumerate(questions)
    ]
    counts = (1, 2, 4, 8, 16)
    found: dict[int, list[float]] = {count: [] for count in counts}
    speed(model, requests[:2], 1)
    for _ in range(asked.runs):
        for count in counts:
            found[count].append(speed(model, requests, count))
    print(f"{asked.model.name}, {os.cpu_count()} cores, {time.strftime('%d %B %Y')}, {len(requests)} prompts\n")
    print("| at once | tokens/s | times one |\n|---|---|---|")
    for count in counts:
        ratio = statistics.median(a / b for a, b in zip(found[count], found[1], strict=True))
        print(f"| {count} | {statistics.median(found[count]):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
