"""The difference between the logits of two models on the same text."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure.kl_divergence import LogitRows, RowComparison, compare_rows, summarize_comparisons
from qwenlocal.measure.perplexity import RowWorkers, ScoredRows
from qwenlocal.measure.reference import Report

_BATCH = 32  # tokens whose logits are in memory at once

# Text of many kinds and languages, to touch all corners of the vocabulary.
SAMPLE = """The old lighthouse keeper wrote down the weather every evening: wind from the north-west, 7 knots, 1013 hPa.
def quicksort(items):
    if len(items) < 2:
        return items
    pivot, *rest = items
    return quicksort([x for x in rest if x < pivot]) + [pivot] + quicksort([x for x in rest if x >= pivot])
北京的秋天很美，天空又高又蓝。Les élèves étudient l'après-midi. Der Zug fährt um 18:45 Uhr ab.
Сегодня хорошая погода. 東京の天気は晴れです。 오늘은 날씨가 좋아요. الطقس جميل اليوم. हिन्दी में लिखो।
| name | price |\n|------|-------|\n| tea  | 3.50 € |\n🙂👍🏽 "Why?" — she asked…
"""


@dataclass(frozen=True)
class LogitsError:
    """
    The difference between two models' predictions of the next token, over `tokens` positions.

    `nmse` is the mean squared difference divided by the reference's variance, `kl` the mean Kullback–Leibler divergence
    in nats, `agreement` the share of positions (0 to 1) at which both predict the same token.
    """

    tokens: int
    nmse: float
    kl: float
    agreement: float


def compare_logits(reference: Model, model: Model, threads: int, report: Report) -> LogitsError:
    """Evaluate `SAMPLE` with both models."""
    width = min(len(reference.tokenizer), len(model.tokenizer))
    ids = [token for token in reference.tokenizer.tokenize(SAMPLE, special=False) if token < width]
    expected, actual = (contextlib.closing(_logits(side, ids, threads)) for side in (reference, model))
    with (  # Ctrl-C closes contexts before their models
        contextlib.closing(RowWorkers(threads, width)) as workers,
        expected as expected_logits,
        actual as actual_logits,
    ):
        return _compare(zip(expected_logits, actual_logits, strict=True), len(ids), workers, report)


def _compare(pairs: Iterable[tuple[Any, Any]], total: int, workers: RowWorkers, report: Report) -> LogitsError:
    import numpy

    squares = variance = 0.0
    comparisons: list[RowComparison] = []
    for number, (expected, actual) in enumerate(pairs):
        report("comparing logits", number * _BATCH, total)
        p, q = (logits[:, : workers.n_vocab] for logits in (expected, actual))
        comparisons.append(compare_rows(LogitRows(p), ScoredRows(q, [0] * len(q), 0), workers))
        p, q = p.astype(numpy.float64), q.astype(numpy.float64)
        squares += float(((p - q) ** 2).sum())
        variance += float(((p - p.mean(axis=1, keepdims=True)) ** 2).sum())
    divergence = summarize_comparisons(comparisons)
    return LogitsError(total, squares / variance, divergence.kl.value, divergence.same_top.value)


def _logits(model: Model, ids: Sequence[int], threads: int) -> Generator[Any, None, None]:
    """Yield the logits after each token, views of shape (tokens, vocabulary), `_BATCH` tokens at a time."""
    options = ContextOptions(len(ids) + _BATCH, threads=threads, n_batch=_BATCH)
    with contextlib.closing(Context(model, options)) as context:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            context.decode([(0, batch)], all_logits=(0,))
            yield context.logit_rows(len(batch))
