"""
Speculative decoding with a draft model: a smaller model proposes tokens, and the target model checks them.

Checking k drafted tokens takes the time t(k + 1), drafting them k·d. If a share p of the drafted tokens is accepted,
that yields 1 + p + … + p^k tokens (Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative
Decoding, 2023, equation 1). The length of a draft maximizes tokens per second; if plain decoding is as fast, there is
no draft.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from qwenlocal.engine.context import CacheFull, Context
from qwenlocal.engine.llama import Model
from qwenlocal.engine.prefix_cache import common_prefix
from qwenlocal.engine.speculation import MAX_DRAFT, CostCurve, Drafter
from qwenlocal.weights.gguf_reader import PADDING

_MIN_PROBABILITY = 0.5  # of a drafted token; tokens after a wrong one are wrong, too
_MAX_PADDING_DIFFERENCE = 128  # tokens of padding; Qwen1.5 has 151,936 up to 7B, 152,064 from 14B on

_MIN_GAIN = 1.05  # below this, a draft is not worth the risk that the estimates are off
# Estimates before anything is measured: acceptance, and the time to draft and to read a token relative to a step of the
# target model (0.5B for 7B on two cores). Each counts like _WEIGHT measured tokens.
_INITIAL_ACCEPTANCE, _INITIAL_DRAFTING, _INITIAL_READING = 0.9, 0.15, 0.03
_WEIGHT = 12.0
_DECAY = 0.92  # weight of earlier drafts when one is added to an average
_SMALL_BATCH = 32  # unread tokens that add little time to the first step of a draft
_WINDOW = 256  # tokens that the draft model reads at most to catch up
_PAYBACK = 128  # tokens within which catching up must pay off
_PROBE = 3  # drafted tokens
_MAX_LOSS = 0.01  # share of the time of plain decoding that probes may cost


def shares_vocabulary(target: Model, draft: Model) -> bool:
    """
    Return True if every token id means the same in both models; padding at the end may differ in length.

    Takes 0.2 s for Qwen's 151,936 tokens.
    """
    sizes = len(target.tokenizer), len(draft.tokenizer)
    if abs(sizes[0] - sizes[1]) > _MAX_PADDING_DIFFERENCE:
        return False
    for token in range(min(sizes)):
        left, right = target.tokenizer.text_of(token), draft.tokenizer.text_of(token)
        if left != right and not (PADDING.fullmatch(left) and PADDING.fullmatch(right)):
            return False
    return True


class DraftModel:
    """
    Greedy continuation of the target model's text, in a context of its own.

    `vocabulary_size` is the target model's: no id beyond it is drafted. A token with a probability below
    `min_probability` ends a draft.
    """

    def __init__(self, context: Context, vocabulary_size: int, min_probability: float = _MIN_PROBABILITY) -> None:
        self._context, self._min_probability = context, min_probability
        self._size = min(vocabulary_size, len(context.model.tokenizer))
        self._ids: list[int] = []  # the text
        self._start = 0  # position in the text where the KV cache starts
        self._cached: list[int] = []  # tokens in the KV cache
        self._shared = 0  # cached tokens that match the text

    def begin(self, ids: Sequence[int]) -> None:
        """Replace the text by `ids`."""
        self._ids = list(ids)
        self._shared = common_prefix(self._cached, self._ids[self._start :])
        if not self._shared:  # another text
            self._start, self._shared = 0, common_prefix(self._cached, self._ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text, drafted or not."""
        self._ids.extend(tokens)
        drafted, here = self._cached[self._shared :], self._start + self._shared
        self._shared += common_prefix(drafted, self._ids[here : here + len(drafted)])

    @property
    def unread(self) -> int:
        """Tokens of the text that are not in the KV cache, without the last one, which a draft begins with."""
        return max(0, len(self._ids) - 1 - self._start - self._shared)

    def catch_up(self, limit: int) -> int:
        """
        Read the text up to the token before the last; only the last `limit` of its tokens if more are unread.

        Returns the number of tokens that were read.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        if self.unread > limit:
            self._start, self._shared = len(self._ids) - 1 - limit, 0
        count = self.unread
        self._read_text(len(self._ids) - 1)
        return count

    def draft(self, limit: int) -> list[int]:
        """
        Draft at most `limit` tokens; fewer if the model is not sure of the next one, or the context is full.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        drafted: list[int] = []
        row = self._read_text(len(self._ids))
        while row is not None and (token := self._most_likely(row)) is not None:
            drafted.append(token)
            row = self._read([token]) if len(drafted) < limit else None
        return drafted

    def _read_text(self, end: int) -> int | None:
        """Replace drafts in the KV cache by the text up to `end`; returns the row of logits as `_read` does."""
        length = max(0, min(self._shared, len(self._ids) - 1 - self._start))  # the last one gives the logits
        if length < len(self._cached):
            del self._cached[self._context.truncate(0, length) :]
        row = self._read(self._ids[self._start + len(self._cached) : end])
        self._shared = len(self._cached)
        return row

    def _read(self, tokens: Sequence[int]) -> int | None:
        """Append tokens to the KV cache; returns the row of logits after them, None if the context is full."""
        row = None
        for start in range(0, len(tokens), self._context.n_batch):
            part = tokens[start : start + self._context.n_batch]
            if len(self._cached) + len(part) > self._context.n_ctx:
                return None
            try:
                row = self._context.decode([(0, part)])[0]
            except CacheFull:
                return None
            finally:  # after an abort, some of the tokens may be cached
                self._cached.extend(part[: self._context.length(0) - len(self._cached)])
        return row

    def _most_likely(self, row: int) -> int | None:
        """Return the most likely token after a row of logits, None if it is not likely enough."""
        import numpy

        scores = numpy.ctypeslib.as_array(self._context.logits(row), (self._size,))
        token = int(scores.argmax())
        probability = 1 / float(numpy.exp(scores - scores[token]).sum())
        return token if probability >= self._min_probability else None

    def close(self) -> None:
        """Free the memory of the context and of the model."""
        self._context.close()
        self._context.model.close()


class _RunningAverage:
    """Exponentially weighted average per token, starting at `initial`."""

    def __init__(self, initial: float) -> None:
        self._sum, self._tokens = initial * _WEIGHT, _WEIGHT

    def add(self, amount: float, tokens: int) -> None:
        """Add an amount for `tokens` tokens, which may be 0."""
        self._sum, self._tokens = self._sum * _DECAY + amount, self._tokens * _DECAY + tokens

    @property
    def value(self) -> float:
        return self._sum / max(1e-9, self._tokens)


class ModelDrafter:
    """
    Drafts from `lookup`, or from a draft model if that finds nothing. Implements `Drafter`.

    The draft model's time adds to a debt: drafts, empty ones too, and reading text that it did not draft. Accepted
    tokens pay it off. A draft model that does not pay is probed again after plain decoding for a hundred times the
    debt, so it costs about 1 % of the time, and less the longer it loses.

    `costs` is the target model's curve. Times are in steps of the target model.
    """

    def __init__(
        self, model: DraftModel, lookup: Drafter, costs: CostCurve, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model: DraftModel | None = model
        self._lookup, self._costs, self._clock = lookup, costs, clock
        self._acceptance = _RunningAverage(_INITIAL_ACCEPTANCE)
        self._drafting, self._reading = _RunningAverage(_INITIAL_DRAFTING), _RunningAverage(_INITIAL_READING)
        self._is_cold = True  # the first draft also reads the weights from disk
        self._proposed: list[int] = []  # the draft model's last draft
        self._debt = 0.0
        self._plain_tokens = 0  # decoded since the last draft
        self.drafted = self.accepted = 0  # tokens of the draft model
        self.has_given_up = False

    def begin(self, ids: Sequence[int]) -> None:
        self._proposed = []
        self._lookup.begin(ids)
        if self._model:
            self._model.begin(ids)

    def propose(self, limit: int) -> Sequence[int]:
        self._proposed = []
        if proposed := self._lookup.propose(limit):
            return proposed
        model, step = self._model, self._costs.one
        if model is None or step is None:
            return ()
        limit = min(limit, MAX_DRAFT)
        reading = min(model.unread, _WINDOW) * self._reading.value if model.unread > _SMALL_BATCH else 0.0
        price = self._debt + reading
        expected = itertools.accumulate(self._acceptance.value**place for place in range(limit + 1))
        count = self._costs.best_draft_length(
            expected, drafting=self._drafting.value, extra=price / _PAYBACK if reading else 0.0, min_gain=_MIN_GAIN
        )
        if not count and self._plain_tokens * _MAX_LOSS >= price:
            count = self._decodable(min(limit, _PROBE))
        if count:
            self._proposed = self._draft(model, count, step)
        return self._proposed

    def _decodable(self, count: int) -> int:
        """Return the largest efficient draft length up to `count`: 1, 3, 7, 11, … (see `DEFAULT_COSTS`)."""
        return max((known - 1 for known in self._costs.known if known - 1 <= count), default=0)

    def _draft(self, model: DraftModel, count: int, step: float) -> list[int]:
        if self._is_cold or model.unread > _SMALL_BATCH:
            started = self._clock()
            read = model.catch_up(_WINDOW)
            spent = min((self._clock() - started) / step, 1.0 * read)  # the machine may have been suspended
            if read > _SMALL_BATCH and not self._is_cold:
                self._reading.add(spent, read)
            self._is_cold = False
            self._debt += spent
        started = self._clock()
        drafted = model.draft(count)
        spent = min((self._clock() - started) / step, 2.0 * count)
        drafted = drafted[: self._decodable(len(drafted))]
        self._drafting.add(spent, len(drafted))
        self._debt += spent
        self._plain_tokens = 0
        return drafted

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        if self._proposed:
            accepted = common_prefix(self._proposed, tokens)
            self._acceptance.add(accepted, min(accepted + 1, len(self._proposed)))
            self.drafted += len(self._proposed)
            self.accepted += accepted
            self._debt = max(0.0, self._debt + self._costs.known[checked + 1] - len(tokens))
            self._lookup.learn(tokens, 0, None)
        else:
            self._plain_tokens += len(tokens)
            self._lookup.learn(tokens, checked, None)
        if seconds is not None:
            self._costs.observe(checked + 1, seconds)
        if self._model:
            self._model.extend(tokens)
        self._proposed = []

    def give_up(self) -> bool:
        """Unload the draft model because memory is low; returns False if it was unloaded before."""
        if self._model is None:
            return False
        self.has_given_up = True
        self.close()
        return True

    def close(self) -> None:
        """Free the draft model's memory."""
        if self._model:
            self._model.close()
            self._model = None
