"""
Measure the time per token outside llama_decode: sampling with Qwen's settings, drafting, detokenizing, and Python.

    .venv/bin/python benchmarks/overhead.py MODEL.gguf [--tokens 4000]

Generates one answer of that many tokens; EOS does not end it. For every 500 tokens, prints the milliseconds per token
in llama_decode, in llama.cpp's sampler (which llama.cpp's own programs need as well), in everything else, and the ratio
of everything else to llama_decode (target: at most 1 %). Drafts that are checked together count as one call of
llama_decode; --no-lookup turns drafts off.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from comparison import table_header, table_row

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, NoSpeculation, Speculation
from qwenlocal.engine.tokenizer import IncrementalDetokenizer

_WINDOW = 500  # tokens per row
_PROMPT = "A lighthouse keeper finds a message in a bottle. This is the whole story:\n\n"


class TimedFunction:
    """A function that adds up the seconds its calls take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


class TimedContext(Context):
    """A context that adds up the seconds spent in `decode`."""

    seconds = 0.0

    def decode(self, batch: Sequence[tuple[int, Sequence[int]]], *, all_logits: Collection[int] = ()) -> list[int]:
        started = time.perf_counter()
        try:
            return super().decode(batch, all_logits=all_logits)
        finally:
            self.seconds += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--no-lookup", action="store_true")
    options = parser.parse_args()
    model, threads = Model(options.model), os.cpu_count() or 1
    context = TimedContext(
        model, ContextOptions(options.tokens + 256, threads=threads, batch_threads=threads, flash_attention=False)
    )
    speculation = NoSpeculation() if options.no_lookup else Speculation(CostCurve())
    sequence = TokenSequence(context, speculation=speculation)
    ids, detokenizer, count = model.tokenizer.tokenize(_PROMPT, special=False), IncrementalDetokenizer(), 0
    load_library().c.llama_sampler_sample = sampler = TimedFunction(load_library().c.llama_sampler_sample)
    started = time.perf_counter()
    print(f"{options.model.name}, {platform.machine()}, {threads} threads, {time.strftime('%d %B %Y')}\n")
    print(
        table_header("tokens", "llama_decode, ms", "llama.cpp's sampler, ms", "everything else, ms", "ratio", "target")
    )
    for step in sequence.generate(ids, Sampling(seed=1), limit=options.tokens + 1):
        if not isinstance(step, int):  # prefill
            started, context.seconds, sampler.seconds = time.perf_counter(), 0.0, 0.0
            continue
        detokenizer.feed(model.tokenizer.piece(step))
        count += 1
        if count % _WINDOW == 0:
            other = time.perf_counter() - started - context.seconds - sampler.seconds
            print(format_window(count, context.seconds, sampler.seconds, other))
            started, context.seconds, sampler.seconds = time.perf_counter(), 0.0, 0.0


def format_window(count: int, decoding: float, sampling: float, other: float) -> str:
    """Format the row that ends with token `count` from the seconds of its window."""
    milliseconds = 1000 / _WINDOW
    return table_row(
        count,
        f"{decoding * milliseconds:.2f}",
        f"{sampling * milliseconds:.3f}",
        f"{other * milliseconds:.3f}",
        f"{other / decoding:.4f}",
        "<= 0.01",
    )


if __name__ == "__main__":
    main()
