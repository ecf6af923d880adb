"""The difference between the logits of two models on the same text."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
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
    ids = reference.tokenizer.tokenize(SAMPLE, special=False)
    ids = [token for token in ids if token < len(model.tokenizer)]
    expected, actual = (contextlib.closing(_logits(side, ids, threads)) for side in (reference, model))
    with expected as expected_logits, actual as actual_logits:  # Ctrl-C closes contexts before their models
        return _divergence(zip(expected_logits, actual_logits, strict=True), len(ids), report)


def _divergence(pairs: Iterable[tuple[Any, Any]], total: int, report: Report) -> LogitsError:
    import numpy

    squares = variance = divergence = 0.0
    agreeing = count = 0
    for expected, actual in pairs:
        report("comparing logits", count, total)
        width = min(expected.shape[1], actual.shape[1])
        p, q = expected[:, :width].astype(numpy.float64), actual[:, :width].astype(numpy.float64)
        squares += float(((p - q) ** 2).sum())
        variance += float(((p - p.mean(axis=1, keepdims=True)) ** 2).sum())
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        divergence += float((numpy.exp(log_p) * (log_p - log_q)).sum())
        agreeing += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        count += len(p)
    return LogitsError(count, squares / variance, divergence / count, agreeing / count)


def _log_softmax(logits: Any) -> Any:
    import numpy

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))


def _logits(model: Model, ids: Sequence[int], threads: int) -> Generator[Any, None, None]:
    """Yield the logits after each token as arrays of shape (tokens, vocabulary), `_BATCH` tokens at a time."""
    import numpy

    size = len(model.tokenizer)
    options = ContextOptions(len(ids) + _BATCH, threads=threads, n_batch=_BATCH)
    with contextlib.closing(Context(model, options)) as context:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            (first,) = context.decode([(0, batch)], all_logits=(0,))
            rows = [numpy.ctypeslib.as_array(context.logits(first + n), (size,)).copy() for n in range(len(batch))]
            yield numpy.stack(rows)
