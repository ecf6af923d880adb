"""
Perplexity of a model on a text, by the definition of llama-perplexity (tools/perplexity/perplexity.cpp).

The text is cut into windows of `n_ctx` tokens. Each window starts with an empty context; the tokens of its second half
are predicted from all tokens before them. If the tokenizer adds a beginning-of-text token, it replaces the first token
of every window. Perplexity is the exponential of the mean negative log-likelihood (NLL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadPlan, LoadRequest, plan_load
from qwenlocal.engine.memory import ModelDims
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import NotEnoughMemory, TextTooShort
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    import numpy

    from qwenlocal.weights.gguf_reader import MetadataValue

DEFAULT_WINDOW = 512  # tokens
MIN_WINDOW = 8
BATCH = 512  # tokens per call of llama.cpp
ROWS = BATCH // 2  # rows of logits per call: 155 MB for Qwen's 151,936 tokens


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


def estimate_mean(values: numpy.ndarray) -> Estimate:
    """`estimate_mean(numpy.array([1.0, 3.0]))` is (2.0, 1.0): the deviation divided by the root of n - 1."""
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(max(1, len(values) - 1)))


def estimate_perplexity(nll: numpy.ndarray) -> Estimate:
    """Return the perplexity of the NLLs of many tokens."""
    mean, error = estimate_mean(nll)
    perplexity = math.exp(min(mean, 700.0))  # beyond, floats overflow; 700 nats are a damaged model
    return Estimate(perplexity, perplexity * error)


# --- the text


def split_windows(
    tokenizer: Tokenizer, text: str, n_ctx: int, limit: int | None = None, *, special: bool = False
) -> list[list[int]]:
    """
    Tokenize `text` like llama-perplexity, and cut it into windows of `n_ctx` tokens, at most `limit`.

    With `special`, spellings like `<|im_end|>` become control tokens.

    Raises
    ------
    TextTooShort: it has less than two windows.
    """
    ids = tokenizer.tokenize(text, special=special, add_bos=tokenizer.adds_bos)
    if len(ids) < 2 * n_ctx:
        raise TextTooShort(len(ids), 2 * n_ctx)
    windows = [ids[start : start + n_ctx] for start in range(0, len(ids) - n_ctx + 1, n_ctx)][:limit]
    if tokenizer.adds_bos:
        for window in windows:
            window[0] = ids[0]
    return windows


def count_scored(n_ctx: int) -> int:
    """Return the number of tokens that are predicted in a window: 255 of 512."""
    return n_ctx - n_ctx // 2 - 1


# --- evaluation


class ScoredRows(NamedTuple):
    """
    Logits of shape (rows, vocabulary), a view that is valid until the next step, and the token that follows each row.

    `windows` is the number of windows that are complete with these rows.
    """

    logits: numpy.ndarray
    targets: Sequence[int]
    windows: int


class WindowReader:
    """Runs a model over windows of `n_ctx` tokens; short ones are evaluated several at a time."""

    def __init__(self, model: Model, options: ContextOptions, n_ctx: int, abort: AbortFlag) -> None:
        """
        Create a context, with the threads and the layout of the KV cache of `options`.

        Raises
        ------
        ContextNotCreated: llama.cpp cannot create it.
        """
        self._n_ctx = n_ctx
        self._context = Context(model, window_options(options, n_ctx), abort)

    def read(self, windows: Sequence[Sequence[int]]) -> Iterator[ScoredRows]:
        """
        Yield the logits of all scored tokens, at most `ROWS` at a time.

        Raises
        ------
        Aborted: the abort flag was set. BadWeights: the model computes NaN.
        """
        step = self._context.options.n_seq_max
        for start in range(0, len(windows), step):
            yield from self._read_group(windows[start : start + step])

    def _read_group(self, group: Sequence[Sequence[int]]) -> Iterator[ScoredRows]:
        context, first, last = self._context, self._n_ctx // 2, self._n_ctx - 1
        for sequence in range(context.options.n_seq_max):
            context.truncate(sequence, 0)
        for start in range(0, first, BATCH):
            context.decode([(number, ids[start : min(first, start + BATCH)]) for number, ids in enumerate(group)])
        for start in range(first, last, ROWS):  # the prediction after the last token has no target
            end = min(last, start + ROWS)
            batch = [(number, ids[start:end]) for number, ids in enumerate(group)]
            rows = context.decode(batch, all_logits=range(len(group)))
            context.check_logits(rows[0])
            targets = [token for ids in group for token in ids[start + 1 : end + 1]]
            yield ScoredRows(context.logit_rows(len(targets)), targets, len(group) if end == last else 0)

    def close(self) -> None:
        """Free the context."""
        self._context.close()


def window_options(options: ContextOptions, n_ctx: int) -> ContextOptions:
    """Return the options of a context that holds one window, or as many as fit into a batch."""
    count = max(1, BATCH // n_ctx)
    return replace(options, n_ctx=count * n_ctx, n_batch=BATCH, n_seq_max=count, max_outputs=ROWS)


def plan_reading(
    name: str, metadata: Mapping[str, MetadataValue], weights: int, available: int, request: LoadRequest
) -> LoadPlan:
    """
    Plan how to load a model, like `plan_load`, for a measurement.

    Raises
    ------
    NotEnoughMemory: it does not fit into `available` bytes.
    """
    try:
        return plan_load(name, ModelDims.from_metadata(metadata), weights, available, request)
    except NotEnoughMemory as error:
        error.hint = tr("Close other programs, or use a smaller file.")  # nothing here has --force
        raise


# --- log-probabilities


class RowScratch(NamedTuple):
    """Three buffers of one thread, each as long as the vocabulary."""

    base: numpy.ndarray
    model: numpy.ndarray
    work: numpy.ndarray


class RowWorkers:
    """
    Threads that reduce rows of logits to numbers; numpy computes without the interpreter's lock.

    A row of Qwen's logits (608 kB) and its buffers stay in the processor's cache from step to step.
    """

    def __init__(self, threads: int, n_vocab: int) -> None:
        import numpy

        self.n_vocab = n_vocab
        self._pool = ThreadPoolExecutor(threads)
        buffers = numpy.empty((threads, 3, n_vocab), numpy.float32)
        self._scratch = [RowScratch(*buffers[number]) for number in range(threads)]

    def run(self, reduce: Callable[[int, RowScratch], object], rows: int) -> None:
        """Call `reduce(row, scratch)` for every row, in several threads."""

        def work(number: int) -> None:
            for row in range(number, rows, len(self._scratch)):
                reduce(row, self._scratch[number])

        list(self._pool.map(work, range(len(self._scratch))))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def log_softmax(logits: numpy.ndarray, out: numpy.ndarray, work: numpy.ndarray) -> None:
    """Write the log-probabilities of a row of logits to `out`; `work` is a buffer of the same length."""
    import numpy

    numpy.subtract(logits, logits.max(), out=out)
    numpy.exp(out, out=work)
    numpy.subtract(out, numpy.float32(math.log(work.sum())), out=out)


def score_rows(rows: ScoredRows, workers: RowWorkers) -> numpy.ndarray:
    """Return the NLL of each target, in nats."""
    import numpy

    nll = numpy.empty(len(rows.targets))

    def score(row: int, scratch: RowScratch) -> None:
        log_softmax(rows.logits[row], scratch.model, scratch.work)
        nll[row] = -scratch.model[rows.targets[row]]

    workers.run(score, len(nll))
    return nll
