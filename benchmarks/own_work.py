"""
What a token costs outside llama_decode: sampling with Qwen's settings, guessing ahead, text, Python itself.

    .venv/bin/python benchmarks/own_work.py MODEL.gguf [--tokens 4000]

One answer of that many tokens, whatever the model thinks of its end. A line for each 500 of them: milliseconds a token
in llama_decode, in llama.cpp's sampler (which its own programs pay for, too), in all else, and the ratio of that to the
first (1 % at most is wanted). Guesses that are checked together count as one call of llama_decode; they are off with
--no-lookup.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.detokenizer import IncrementalDetokenizer
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, NoSpeculation, Speculation

_WINDOW = 500
_PROMPT = "A lighthouse keeper finds a message in a bottle. This is the whole story:\n\n"


class Stopwatch:
    """Adds up the seconds that calls of `function` take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin


class Watched(Context):
    """A context that adds up the seconds spent in `decode`."""

    seconds = 0.0

    def decode(self, batch: Sequence[tuple[int, Sequence[int]]], *, all_logits: bool = False) -> list[int]:
        begin = time.perf_counter()
        try:
            return super().decode(batch, all_logits=all_logits)
        finally:
            self.seconds += time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--no-lookup", action="store_true")
    asked = parser.parse_args()
    model, threads = Model(asked.model), os.cpu_count() or 1
    options = ContextOptions(asked.tokens + 256, threads=threads, batch_threads=threads, flash_attention=False)
    context = Watched(model, options)
    costs = CostCurve()
    sequence = TokenSequence(context, speculation=NoSpeculation() if asked.no_lookup else Speculation(costs))
    ids, text, count = model.tokenizer.tokenize(_PROMPT, special=False), IncrementalDetokenizer(), 0
    load_library().c.llama_sampler_sample = sampler = Stopwatch(load_library().c.llama_sampler_sample)
    begin = time.perf_counter()
    print(f"{asked.model.name}, {platform.machine()}, {threads} threads, {time.strftime('%d %B %Y')}\n")
    print("| tokens | llama_decode, ms | llama.cpp's sampler, ms | all else, ms | ratio | wanted |")
    print("|---|---|---|---|---|---|")
    for step in sequence.generate(ids, Sampling(seed=1), limit=asked.tokens + 1):
        if not isinstance(step, int):  # the prompt is being read
            begin, context.seconds, sampler.seconds = time.perf_counter(), 0.0, 0.0
            continue
        text.feed(model.tokenizer.piece(step))
        count += 1
        if count % _WINDOW == 0:
            decoding, choosing = context.seconds, sampler.seconds
            rest = time.perf_counter() - begin - decoding - choosing
            each = 1000 / _WINDOW
            times = f"{decoding * each:.2f} | {choosing * each:.3f} | {rest * each:.3f}"
            print(f"| {count} | {times} | {rest / decoding:.4f} | <= 0.01 |")
            begin, context.seconds, sampler.seconds = time.perf_counter(), 0.0, 0.0


if __name__ == "__main__":
    main()
