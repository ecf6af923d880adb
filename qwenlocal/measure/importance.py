"""
The measurement of importance matrices: a model reads a text, and the inputs of its matrices are squared and summed.

The text is divided into chunks of 512 tokens, which the model reads independently of each other, as in llama-imatrix
(tools/imatrix/imatrix.cpp: compute_imatrix).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.evaluation import InputCollector
from qwenlocal.engine.llama import Model
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import BadWeights, UsageError
from qwenlocal.formatting import format_quantity
from qwenlocal.weights.imatrix import InputStatistics

CHUNK_SIZE = 512  # tokens
MIN_CHUNKS = 2
_HINT = "Its weights may be damaged; check them: qwenlocal inspect MODEL"
CALIBRATION_TEXT = Path(__file__).with_name("calibration.txt")

Report = Callable[[int, int], object]
"""Gets the chunks that are read, and all of them."""


def split_text(tokenizer: Tokenizer, text: str, name: str, *, special: bool) -> list[list[int]]:
    """
    Divide a text into chunks of `CHUNK_SIZE` tokens; the rest at the end is left out.

    With `special`, spellings like `<|im_end|>` become control tokens. Chunks begin with BOS if the model requires that.

    Raises
    ------
    UsageError: the text, called `name` in the error, is too short.
    """
    adds_bos = tokenizer.adds_bos
    ids = tokenizer.tokenize(text, special=special, add_bos=adds_bos)
    if len(ids) < MIN_CHUNKS * CHUNK_SIZE:
        raise UsageError(
            f"{name} has {format_quantity(len(ids), 'token')}; {MIN_CHUNKS * CHUNK_SIZE:,} are needed at least.",
            hint="Use a longer text, or leave out --text for the text that comes with qwenlocal.",
        )
    chunks = [ids[start : start + CHUNK_SIZE] for start in range(0, len(ids) - CHUNK_SIZE + 1, CHUNK_SIZE)]
    return [[ids[0], *chunk[1:]] for chunk in chunks] if adds_bos else chunks


def measure_importance(
    model: Model, chunks: Sequence[Sequence[int]], threads: int, report: Report = lambda done, total: None
) -> Mapping[str, InputStatistics]:
    """
    Return the statistics of all matrices of the layers, by name.

    Raises
    ------
    BadWeights: an input is NaN or infinite.
    ContextNotCreated: there is not enough memory.
    """
    import numpy

    options = ContextOptions(
        CHUNK_SIZE, threads=threads, n_batch=CHUNK_SIZE, n_ubatch=CHUNK_SIZE, max_outputs=CHUNK_SIZE
    )
    collector = InputCollector()
    with contextlib.closing(Context(model, options, evaluation=collector.observe)) as context:
        for number, ids in enumerate(chunks):
            report(number, len(chunks))
            collector.begin()
            context.truncate(0, 0)
            context.decode([(0, ids)], all_logits=(0,))
    collector.begin()
    report(len(chunks), len(chunks))
    for name, statistics in collector.statistics.items():
        if not numpy.isfinite(statistics.sums).all():
            raise BadWeights(
                "the model", f"the inputs of “{name}” are NaN or infinite", hint="Check it: qwenlocal inspect"
            )
    return collector.statistics
