"""
What a token costs outside llama_decode: sampling with Qwen's settings, guessing ahead, text, Python itself.

    .venv/bin/python benchmarks/own_work.py MODEL.gguf [--tokens 4000]

One answer of that many tokens, whatever the model thinks of its end. A line for each 500 of them: milliseconds a token
in llama_decode, outside of it, and their ratio (1 % at most is wanted). Guesses that are checked together count as one
call of llama_decode; they are off with --no-lookup.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, NoSpeculation, Speculation
from qwenlocal.engine.text import TextStream

_WINDOW = 500
_PROMPT = "A lighthouse keeper finds a message in a bottle. This is the whole story:\n\n"


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
    ids, text, count = model.vocabulary.tokenize(_PROMPT, special=False), TextStream(), 0
    begin, context.seconds = time.perf_counter(), 0.0
    print(f"{asked.model.name}, {platform.machine()}, {threads} threads, {time.strftime('%d %B %Y')}\n")
    print("| tokens | in llama_decode, ms | outside, ms | ratio | wanted |\n|---|---|---|---|---|")
    for step in sequence.generate(ids, Sampling(seed=1), limit=asked.tokens + 1):
        if not isinstance(step, int):  # the prompt is being read
            begin, context.seconds = time.perf_counter(), 0.0
            continue
        text.feed(model.vocabulary.piece(step))
        count += 1
        if count % _WINDOW == 0:
            inside = context.seconds
            outside = time.perf_counter() - begin - inside
            each = 1000 / _WINDOW
            print(f"| {count} | {inside * each:.2f} | {outside * each:.3f} | {outside / inside:.4f} | <= 0.01 |")
            begin, context.seconds = time.perf_counter(), 0.0


if __name__ == "__main__":
    main()
