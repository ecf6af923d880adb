"""Measurement of a model's quality on a text: perplexity, and the divergence from a base."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.memory import ModelDims
from qwenlocal.errors import DiskFull, OutOfRange, UsageError
from qwenlocal.formatting import brief_repr
from qwenlocal.huge_pages import collapse_buffers
from qwenlocal.i18n import tr
from qwenlocal.measure.bench import decode_speed, fill_cache, prefill_speed
from qwenlocal.measure.kl_divergence import (
    BaseRows,
    Divergence,
    LogitRows,
    LogProbFile,
    RowComparison,
    compare_rows,
    summarize_comparisons,
)
from qwenlocal.measure.perplexity import (
    MIN_WINDOW,
    ROWS,
    Estimate,
    RowWorkers,
    ScoredRows,
    WindowReader,
    count_scored,
    estimate_mean,
    estimate_perplexity,
    plan_reading,
    score_rows,
    split_windows,
    window_options,
)
from qwenlocal.weights.gguf_reader import decode_value, read_metadata, read_raw_metadata
from qwenlocal.weights.load_errors import check_file

if TYPE_CHECKING:
    import numpy

_PROMPT, _ANSWER, _WARM_UP = 128, 32, 16  # tokens of a speed test
_REPETITIONS = 3
_FLOAT_BYTES = 4
_TOKENS = "tokenizer.ggml.tokens"


class ModelFile(NamedTuple):
    """A model to measure: the name to show, its (first) file, and the bytes of its weights."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Quality:
    """
    The quality of a model on `windows` windows of a text, of which `tokens` tokens were predicted.

    `nll` is the mean negative log-likelihood in nats. `divergence` is None without a base.
    """

    windows: int
    tokens: int
    nll: Estimate
    perplexity: Estimate
    divergence: Divergence | None = None


class SpeedSample(NamedTuple):
    """Tokens per second of prefilling and decoding, in a test of a few seconds."""

    prefill: float
    decode: float


class QualityMeter:
    """Collects the scores of the tokens that the model `name` predicts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.windows = self.tokens = 0
        self._nll: list[numpy.ndarray] = []
        self._comparisons: list[RowComparison] = []

    def add_scores(self, nll: numpy.ndarray, windows: int) -> None:
        """Add the scores of more tokens, with which `windows` more windows are complete."""
        self._nll.append(nll)
        self.windows += windows
        self.tokens += len(nll)

    def add_comparison(self, comparison: RowComparison, windows: int) -> None:
        """Add tokens that were compared with a base."""
        self._comparisons.append(comparison)
        self.add_scores(comparison.nll, windows)

    @property
    def perplexity(self) -> float:
        """The perplexity of the tokens so far."""
        import numpy

        return estimate_perplexity(numpy.concatenate(self._nll)).value

    def result(self) -> Quality:
        """Summarize the tokens so far; there is at least one."""
        import numpy

        nll = numpy.concatenate(self._nll)
        divergence = summarize_comparisons(self._comparisons) if self._comparisons else None
        return Quality(self.windows, len(nll), estimate_mean(nll), estimate_perplexity(nll), divergence)


# --- vocabularies


def check_vocabularies(model: ModelFile, base: ModelFile) -> None:
    """
    Check that every token id means the same in both models.

    Raises
    ------
    UsageError: it names the first difference.
    """
    ours, theirs = (read_raw_metadata(file.path).get(_TOKENS, b"") for file in (model, base))
    if ours == theirs:
        return
    left, right = (decode_value(tokens) if tokens else () for tokens in (ours, theirs))
    hint = tr("Use the same model with another type as the base.")
    if len(left) != len(right):
        message = tr(
            "{base} has another vocabulary than {model}: {right:,} tokens, not {left:,}.",
            base=base.name,
            model=model.name,
            right=len(right),
            left=len(left),
        )
        raise UsageError(message, hint=hint)
    token = next(id for id, (one, other) in enumerate(zip(left, right, strict=True)) if one != other)
    message = tr(
        "{base} has another vocabulary than {model}: token {token:,} is {right}, not {left}.",
        base=base.name,
        model=model.name,
        token=token,
        right=brief_repr(right[token]),
        left=brief_repr(left[token]),
    )
    raise UsageError(message, hint=hint)


# --- evaluation


@dataclass(frozen=True)
class QualityTest:
    """
    A test: windows of `n_ctx` tokens each, evaluated with `threads` threads until `abort` is set.

    `n_vocab` is the size of the vocabulary, `available` the number of bytes for models.
    """

    windows: Sequence[Sequence[int]]
    n_ctx: int
    n_vocab: int
    threads: int
    available: int
    abort: AbortFlag

    @property
    def tokens(self) -> int:
        """The number of tokens that are predicted in all windows."""
        return len(self.windows) * count_scored(self.n_ctx)

    def plan(self, file: ModelFile) -> WindowPlan:
        """
        Plan how to load a model for this test.

        Raises
        ------
        NotEnoughMemory: it does not fit into the memory. UsageError: it does not predict tokens.
        """
        metadata = check_file(file.path).header.metadata
        if metadata.get(f"{metadata.get('general.architecture')}.attention.causal") is False:
            raise UsageError(
                tr("{name} is an embedding model; it does not predict the next token.", name=file.name),
                hint=tr("Name a model that generates text: qwenlocal list --all"),
            )
        shape = window_options(ContextOptions(0), self.n_ctx)
        logits = 2 * ROWS * _FLOAT_BYTES * self.n_vocab  # computed in one buffer, copied to another
        request = LoadRequest(
            shape.n_ctx, "f16", rope="none", threads=self.threads, n_ubatch=ROWS, n_sequences=shape.n_seq_max
        )
        plan = plan_reading(file.name, metadata, file.size, self.available - logits, request)
        return WindowPlan(plan.options, logits + (plan.memory.total if plan.memory else file.size))

    def open(self, file: ModelFile) -> LoadedReader:
        """
        Load a model.

        Raises
        ------
        NotEnoughMemory, BadWeights, ContextNotCreated: it cannot be loaded. LoadCancelled: `abort` was set.
        """
        return LoadedReader(file, self.plan(file).options, self)

    def measure(self, file: ModelFile, meter: QualityMeter) -> Iterator[QualityMeter]:
        """
        Measure the perplexity of a model; `meter` gets the scores, and is yielded after each step.

        Raises
        ------
        Aborted, LoadCancelled: `abort` was set. Everything that `open` raises.
        """
        with contextlib.closing(self.open(file)) as model:
            yield from model.measure(meter)

    def compare(
        self, file: ModelFile, base: ModelFile, meter: QualityMeter, base_meter: QualityMeter
    ) -> Iterator[QualityMeter]:
        """
        Measure a model and its divergence from a base.

        If both do not fit into memory together, the base is evaluated first; `base_meter` gets its scores.

        Raises
        ------
        DiskFull: its log-probabilities do not fit on the disk. Everything that `measure` raises.
        """
        if self.plan(file).memory + self.plan(base).memory <= self.available:
            with contextlib.closing(self.open(base)) as reference, contextlib.closing(self.open(file)) as model:
                yield from model.compare(meter, reference)
            return
        with self.open_store() as store:
            with contextlib.closing(self.open(base)) as reference:
                yield from reference.store(base_meter, store)
            with contextlib.closing(self.open(file)) as model:
                yield from model.compare(meter, store)

    @contextlib.contextmanager
    def open_store(self) -> Iterator[LogProbFile]:
        """
        Open a temporary file for the log-probabilities of a base; it is removed after the block.

        Raises
        ------
        DiskFull: they will not fit on the disk of temporary files.
        """
        folder, window_size = Path(tempfile.gettempdir()), LogProbFile.size(self.n_vocab, count_scored(self.n_ctx))
        needed, free = window_size * len(self.windows), shutil.disk_usage(folder).free
        if needed > free:
            error = DiskFull(folder, needed, free)
            fits = max(1, free // window_size)
            error.hint = tr("Use fewer windows (--chunks {fits}), or set TMPDIR to a larger disk.", fits=fits)
            raise error
        with tempfile.TemporaryFile() as temporary:
            yield LogProbFile(temporary, self.n_vocab)


def prepare_test(
    file: ModelFile, text: str, n_ctx: int, limit: int | None, threads: int, available: int, abort: AbortFlag
) -> QualityTest:
    """
    Cut `text` into at most `limit` windows for the model's tokenizer.

    Raises
    ------
    OutOfRange: the model was trained with shorter windows. TextTooShort: there are less than two.
    """
    dims = ModelDims.from_metadata(read_metadata(file.path))
    if dims and not MIN_WINDOW <= n_ctx <= dims.n_ctx_train:
        raise OutOfRange("-c", MIN_WINDOW, dims.n_ctx_train, n_ctx)
    with contextlib.closing(Model(file.path, vocab_only=True)) as model:
        windows = split_windows(model.tokenizer, text, n_ctx, limit)
        return QualityTest(windows, n_ctx, len(model.tokenizer), threads, available, abort)


class WindowPlan(NamedTuple):
    """Options of a context, and the bytes that a model needs with it."""

    options: ContextOptions
    memory: int


class LoadedReader:
    """A model in memory that reads the windows of a test."""

    def __init__(self, file: ModelFile, options: ContextOptions, test: QualityTest) -> None:
        self._options, self._test = options, test
        self._model = Model(file.path, on_progress=lambda fraction: not test.abort)
        try:
            self._reader = WindowReader(self._model, options, test.n_ctx, test.abort)
        except BaseException:
            self._model.close()
            raise
        collapse_buffers()

    def measure(self, meter: QualityMeter) -> Iterator[QualityMeter]:
        """Measure the perplexity."""
        with self._open_workers() as workers:
            for rows in self._read():
                meter.add_scores(score_rows(rows, workers), rows.windows)
                yield meter

    def store(self, meter: QualityMeter, store: LogProbFile) -> Iterator[QualityMeter]:
        """Measure the perplexity, and keep the log-probabilities."""
        with self._open_workers() as workers:
            for rows in self._read():
                meter.add_scores(store.write(rows, workers), rows.windows)
                yield meter

    def compare(self, meter: QualityMeter, base: LoadedReader | LogProbFile) -> Iterator[QualityMeter]:
        """Measure the perplexity, and the divergence from a base."""
        predictions: Iterator[BaseRows] = base.read_rows()
        with self._open_workers() as workers:
            for rows, base_rows in zip(self._read(), predictions, strict=True):
                meter.add_comparison(compare_rows(base_rows, rows, workers), rows.windows)
                yield meter

    def read_rows(self) -> Iterator[LogitRows]:
        """Yield the predictions, as the base of another model."""
        return (LogitRows(rows.logits) for rows in self._read())

    def _read(self) -> Iterator[ScoredRows]:
        return self._reader.read(self._test.windows)

    def _open_workers(self) -> contextlib.closing[RowWorkers]:
        return contextlib.closing(RowWorkers(self._test.threads, len(self._model.tokenizer)))

    def measure_speed(self) -> SpeedSample:
        """Prefill 128 tokens and decode 32, in a context of its own; medians of three."""
        options = replace(self._options, n_ctx=_PROMPT + _ANSWER, n_seq_max=1)
        with contextlib.closing(Context(self._model, options, self._test.abort)) as context:
            fill_cache(context, _WARM_UP)
            samples = [
                SpeedSample(prefill_speed(context, _PROMPT), decode_speed(context, _ANSWER))
                for _ in range(_REPETITIONS)
            ]
        return SpeedSample(*map(statistics.median, zip(*samples, strict=True)))

    def close(self) -> None:
        """Free the memory."""
        self._reader.close()
        self._model.close()
