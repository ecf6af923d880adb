"""
The Kullback–Leibler divergence of a model from a base, as `llama-perplexity --kl-divergence` defines it.

For every scored token, it compares the probabilities that both models give to the whole vocabulary. As there, tokens to
which the base gives less than e⁻¹⁶ (1.1e-7) are left out of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from qwenlocal.measure.perplexity import (
    Estimate,
    RowScratch,
    RowWorkers,
    ScoredRows,
    estimate_mean,
    estimate_perplexity,
    log_softmax,
)

if TYPE_CHECKING:
    import numpy

_MIN_LOG_PROB = -16.0  # perplexity.cpp, log_softmax: also the range of stored log-probabilities
_STEPS = 65_535
_QUANTILES = {"median": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "99.9%": 0.999, "maximum": 1.0}


class BaseRows(Protocol):
    """The predictions of a base, row by row."""

    def write_log_probs(self, row: int, scratch: RowScratch) -> None:
        """Write the log-probabilities of a row to `scratch.base`."""


class LogitRows:
    """Predictions that are in memory, as logits."""

    def __init__(self, logits: numpy.ndarray) -> None:
        self._logits = logits

    def write_log_probs(self, row: int, scratch: RowScratch) -> None:
        """Compute them from the logits."""
        log_softmax(self._logits[row], scratch.base, scratch.work)


class StoredRows:
    """Predictions from a `LogProbFile`."""

    def __init__(self, heads: numpy.ndarray, steps: numpy.ndarray) -> None:
        self._heads, self._steps = heads, steps

    def write_log_probs(self, row: int, scratch: RowScratch) -> None:
        """Expand the stored steps."""
        import numpy

        head = self._heads[row]
        numpy.multiply(self._steps[row], head["scale"], out=scratch.base)
        numpy.add(scratch.base, head["minimum"], out=scratch.base)
        scratch.base[head["target"]] = head["log_prob"]


class LogProbFile:
    """
    Log-probabilities of a base in a file, two bytes each, written once and then read in the same order.

    As in llama-perplexity's files, the range of a row, at most 16 nats below its most likely token, is divided into
    65,535 steps: they are exact to 0.00012 nats. Those of the text's own tokens are kept as they are. 100 windows of
    512 tokens take 7.7 GB for Qwen's vocabulary.
    """

    _HEAD = (("scale", "f4"), ("minimum", "f4"), ("target", "i4"), ("log_prob", "f4"))

    def __init__(self, file: BinaryIO, n_vocab: int) -> None:
        self._file, self._n_vocab = file, n_vocab
        self._counts: list[int] = []  # rows per call of `write`

    @staticmethod
    def size(n_vocab: int, rows: int) -> int:
        """Return the bytes that `rows` rows take."""
        return rows * (2 * n_vocab + 16)

    def write(self, rows: ScoredRows, workers: RowWorkers) -> numpy.ndarray:
        """Append the log-probabilities of rows of logits; return the NLL of each target."""
        import numpy

        heads = numpy.empty(len(rows.targets), list(self._HEAD))
        steps = numpy.empty(rows.logits.shape, numpy.uint16)

        def store(row: int, scratch: RowScratch) -> None:
            values, target = scratch.base, rows.targets[row]
            log_softmax(rows.logits[row], values, scratch.work)
            top, log_prob = values.max(), values[target]
            minimum = max(values.min(), top + numpy.float32(_MIN_LOG_PROB))
            scale = (top - minimum) / numpy.float32(_STEPS)
            heads[row] = scale, minimum, target, log_prob
            numpy.subtract(values, minimum, out=values)
            if scale:
                numpy.multiply(values, 1 / scale, out=values)
            numpy.clip(values, 0, _STEPS, out=values)
            numpy.rint(values, out=values)
            steps[row] = values

        workers.run(store, len(heads))
        self._file.write(heads.tobytes())
        self._file.write(steps.data)
        self._counts.append(len(heads))
        return -heads["log_prob"].astype(numpy.float64)

    def read_rows(self) -> Iterator[StoredRows]:
        """Yield the rows of each call of `write`."""
        import numpy

        head = numpy.dtype(list(self._HEAD))
        self._file.seek(0)
        for count in self._counts:
            heads = numpy.frombuffer(self._file.read(head.itemsize * count), head)
            steps = numpy.frombuffer(self._file.read(2 * count * self._n_vocab), numpy.uint16)
            yield StoredRows(heads, steps.reshape(count, -1))


# --- comparison


class RowComparison(NamedTuple):
    """Per row: NLL of the target by the model and by the base, KL divergence, and equality of the likeliest tokens."""

    nll: numpy.ndarray
    base_nll: numpy.ndarray
    kl: numpy.ndarray
    same_top: numpy.ndarray


def compare_rows(base: BaseRows, rows: ScoredRows, workers: RowWorkers) -> RowComparison:
    """Compare the logits of a model with the predictions of the base for the same rows."""
    import numpy

    count = len(rows.targets)
    result = RowComparison(numpy.empty(count), numpy.empty(count), numpy.empty(count), numpy.empty(count))
    threshold = numpy.float32(math.exp(_MIN_LOG_PROB))

    def compare(row: int, scratch: RowScratch) -> None:
        base_log, model_log, probs = scratch
        log_softmax(rows.logits[row], model_log, probs)
        base.write_log_probs(row, scratch)
        target = rows.targets[row]
        result.nll[row], result.base_nll[row] = -model_log[target], -base_log[target]
        result.same_top[row] = base_log.argmax() == model_log.argmax()
        numpy.exp(base_log, out=probs)
        numpy.multiply(probs, probs > threshold, out=probs)
        numpy.subtract(base_log, model_log, out=model_log)
        result.kl[row] = numpy.dot(probs, model_log)

    workers.run(compare, count)
    return result


@dataclass(frozen=True)
class Divergence:
    """
    The difference of a model from a base, with the names that llama-perplexity prints.

    `log_ratio` is ln(PPL / PPL of the base). `kl` is in nats; `kl_quantiles` are by name ("median", "99%", "maximum").
    `same_top` is the share (0 to 1) of tokens for which both predict the same. `rms_delta_p` is the root of the mean
    squared change of the probability of the text's own tokens.
    """

    base_perplexity: Estimate
    log_ratio: Estimate
    kl: Estimate
    kl_quantiles: Mapping[str, float]
    same_top: Estimate
    rms_delta_p: Estimate


def summarize_comparisons(comparisons: Sequence[RowComparison]) -> Divergence:
    """Compute the statistics of all rows that were compared."""
    import numpy

    rows = RowComparison(*map(numpy.concatenate, zip(*comparisons, strict=True)))
    squares = estimate_mean((numpy.exp(-rows.nll) - numpy.exp(-rows.base_nll)) ** 2)
    rms = math.sqrt(squares.value)
    quantiles = numpy.quantile(rows.kl, list(_QUANTILES.values()))
    return Divergence(
        estimate_perplexity(rows.base_nll),
        estimate_mean(rows.nll - rows.base_nll),
        estimate_mean(rows.kl),
        dict(zip(_QUANTILES, map(float, quantiles), strict=True)),
        estimate_mean(rows.same_top),
        Estimate(rms, 0.5 * squares.error / rms if rms else 0.0),
    )
