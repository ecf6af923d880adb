"""
The measurement of importance matrices: a model reads a text, and the inputs of its matrices are squared and summed.

The text is divided into chunks of 512 tokens, which the model reads independently of each other, as in llama-imatrix
(tools/imatrix/imatrix.cpp: compute_imatrix).
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.evaluation import InputCollector
from qwenlocal.engine.llama import Model
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import BadWeights, TextTooShort, UsageError
from qwenlocal.formatting import format_quantity
from qwenlocal.measure.perplexity import split_windows

CHUNK_SIZE = 512  # tokens
CALIBRATION_TEXT = Path(__file__).with_name("calibration.txt")


def split_text(tokenizer: Tokenizer, text: str, name: str, *, special: bool) -> list[list[int]]:
    """
    Divide a text into chunks of `CHUNK_SIZE` tokens, as `split_windows` does.

    Raises
    ------
    UsageError: the text, called `name` in the error, is too short.
    """
    try:
        return split_windows(tokenizer, text, CHUNK_SIZE, special=special)
    except TextTooShort as short:
        raise UsageError(
            f"{name} has {format_quantity(short.tokens, 'token')}; at least {short.needed:,} are needed.",
            hint="Use a longer text, or leave out --text for the text that comes with qwenlocal.",
        ) from short


def measure_importance(
    model: Model, chunks: Sequence[Sequence[int]], threads: int, collector: InputCollector, abort: AbortFlag
) -> Iterator[int]:
    """
    Let the model read chunks, and yield the number of those read after each; `collector` gets the statistics.

    Raises
    ------
    Aborted: `abort` was set.
    BadWeights: an input is NaN or infinite.
    ContextNotCreated: there is not enough memory.
    """
    options = ContextOptions(
        CHUNK_SIZE, threads=threads, n_batch=CHUNK_SIZE, n_ubatch=CHUNK_SIZE, max_outputs=CHUNK_SIZE
    )
    with contextlib.closing(Context(model, options, abort, evaluation=collector.observe)) as context:
        for number, ids in enumerate(chunks, 1):
            collector.begin()
            context.truncate(0, 0)
            context.decode([(0, ids)], all_logits=(0,))
            collector.end()
            _check_inputs(model, collector)
            yield number


def _check_inputs(model: Model, collector: InputCollector) -> None:
    import numpy

    for name, statistics in collector.statistics.items():
        if not numpy.isfinite(statistics.sums).all():
            raise BadWeights(
                model.path,
                f"the inputs of “{name}” are NaN or infinite",
                hint=f"To find the damage: qwenlocal inspect {shlex.quote(str(model.path))}",
            )
