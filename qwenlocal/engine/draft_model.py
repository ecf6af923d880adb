"""
Speculative decoding with a draft model: a smaller model proposes tokens, and the target model checks them.

Checking k drafted tokens takes t(k + 1) steps of the target model, drafting them k d, where d is the time for a drafted
token. If a share p of the drafted tokens is accepted, that yields 1 + p + … + p^k tokens (Leviathan, Kalman, Matias:
Fast Inference from Transformers via Speculative Decoding, 2023, equation 1). The draft is as long as yields the most
tokens a second; there is none if plain decoding is as fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qwenlocal.engine.context import CacheFull, Context
from qwenlocal.engine.llama import Model
from qwenlocal.engine.lookup import LONGEST_DRAFT
from qwenlocal.engine.prefix_cache import common_prefix
from qwenlocal.engine.speculation import CostCurve, Drafter
from qwenlocal.weights.kinds import PADDING

_LEAST_PROBABILITY = 0.5  # of a drafted token; what follows a wrong token is wrong as well
_LARGEST_DIFFERENCE = 128  # tokens of padding; Qwen1.5 has 151,936 up to 7B, 152,064 from 14B on

_LEAST_GAIN = 1.05  # below this, a draft is not worth the risk that the estimates are off
# Assumed at first: acceptance; time for drafting and for reading a token, relative to a step of the target model (0.5B
# beside 7B on two cores, by the speeds of either). Each counts for _WEIGHT tokens.
_USUAL_ACCEPTANCE, _USUAL_DRAFTING, _USUAL_READING = 0.9, 0.15, 0.03
_WEIGHT = 12.0
_KEPT = 0.92  # of an average, when another draft is added
_FEW = 32  # unread tokens that a draft reads in its first step, which hardly takes longer
_WINDOW = 256  # tokens that are read at most to catch up; more of the text is not worth the time
_PAYBACK = 128  # tokens of an answer within which catching up has to pay
_PROBE = 3  # tokens of a draft
_MOST_LOSS = 0.01  # of the time of plain decoding between probes


def shares_vocabulary(target: Model, draft: Model) -> bool:
    """
    Tell whether every token id means the same in both models; padding at the end may differ in length.

    Takes 0.2 s for Qwen's 151,936 tokens.
    """
    sizes = len(target.tokenizer), len(draft.tokenizer)
    if abs(sizes[0] - sizes[1]) > _LARGEST_DIFFERENCE:
        return False
    for token in range(min(sizes)):
        one, other = target.tokenizer.text_of(token), draft.tokenizer.text_of(token)
        if one != other and not (PADDING.fullmatch(one) and PADDING.fullmatch(other)):
            return False
    return True


class DraftModel:
    """
    Greedy continuation of the target model's text, in a context of its own.

    `vocabulary_size` is the target model's: no id beyond it is drafted. A token with a probability below
    `least_probability` ends a draft.
    """

    def __init__(self, context: Context, vocabulary_size: int, least_probability: float = _LEAST_PROBABILITY) -> None:
        self._context, self._least_probability = context, least_probability
        self._size = min(vocabulary_size, len(context.model.tokenizer))
        self._ids: list[int] = []  # the text
        self._start = 0  # place in the text at which the KV cache begins
        self._held: list[int] = []  # exactly what the KV cache holds
        self._agreed = 0  # tokens of it that are in the text, too

    def begin(self, ids: Sequence[int]) -> None:
        """Replace the text by `ids`."""
        self._ids = list(ids)
        self._agreed = common_prefix(self._held, self._ids[self._start :])
        if not self._agreed:  # another text
            self._start, self._agreed = 0, common_prefix(self._held, self._ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text, drafted or not."""
        self._ids.extend(tokens)
        drafted, here = self._held[self._agreed :], self._start + self._agreed
        self._agreed += common_prefix(drafted, self._ids[here : here + len(drafted)])

    @property
    def unread(self) -> int:
        """Tokens of the text that are not in the KV cache, without the last one, which a draft begins with."""
        return max(0, len(self._ids) - 1 - self._start - self._agreed)

    def catch_up(self, most: int) -> int:
        """
        Read the text up to the token before the last; only the last `most` of its tokens if more are unread.

        Returns the number of tokens that were read.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        if self.unread > most:
            self._start, self._agreed = len(self._ids) - 1 - most, 0
        count = self.unread
        self._read_text(len(self._ids) - 1)
        return count

    def draft(self, most: int) -> list[int]:
        """
        Draft at most `most` tokens; fewer if the model is not sure of the next one, or the context is full.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        drafted: list[int] = []
        row = self._read_text(len(self._ids))
        while row is not None and (token := self._most_likely(row)) is not None:
            drafted.append(token)
            row = self._read([token]) if len(drafted) < most else None
        return drafted

    def _read_text(self, end: int) -> int | None:
        """Have the KV cache hold the text up to `end`, no drafts; return as `_read` does."""
        length = max(0, min(self._agreed, len(self._ids) - 1 - self._start))  # the last token's logits are wanted
        if length < len(self._held):
            del self._held[self._context.truncate(0, length) :]
        row = self._read(self._ids[self._start + len(self._held) : end])
        self._agreed = len(self._held)
        return row

    def _read(self, tokens: Sequence[int]) -> int | None:
        """Append tokens to the KV cache; return the row of logits after them, None if there is no room."""
        row = None
        for start in range(0, len(tokens), self._context.n_batch):
            part = tokens[start : start + self._context.n_batch]
            if len(self._held) + len(part) > self._context.n_ctx:
                return None
            try:
                row = self._context.decode([(0, part)])[0]
            except CacheFull:
                return None
            finally:  # part of it may be there when it is aborted
                self._held.extend(part[: self._context.length(0) - len(self._held)])
        return row

    def _most_likely(self, row: int) -> int | None:
        """Return the most likely token after a row of logits, None if it is not likely enough."""
        import numpy

        scores = numpy.ctypeslib.as_array(self._context.logits(row), (self._size,))
        token = int(scores.argmax())
        probability = 1 / float(numpy.exp(scores - scores[token]).sum())
        return token if probability >= self._least_probability else None

    def close(self) -> None:
        """Free the memory of the context and of the model."""
        self._context.close()
        self._context.model.close()


class _Average:
    """Running average of something per token; `usual` at first."""

    def __init__(self, usual: float) -> None:
        self._sum, self._tokens = usual * _WEIGHT, _WEIGHT

    def add(self, amount: float, tokens: int) -> None:
        """Add an amount for so many tokens; one that gave no token counts as well."""
        self._sum, self._tokens = self._sum * _KEPT + amount, self._tokens * _KEPT + tokens

    @property
    def value(self) -> float:
        return self._sum / max(1e-9, self._tokens)


class ModelDrafter:
    """
    Drafts by `lookup`, or by a draft model if that finds nothing. Implements `Drafter`.

    All of the draft model's time counts: for drafts, empty ones too, and for reading the text that came without it. Its
    losses are a debt, which later gains pay off. A draft model that does not pay is probed once plain decoding took a
    hundred times the debt, so that it makes answers slower by about 1 %, and less the longer that lasts.

    `costs` is the target model's curve. The unit of time is a step of the target model.
    """

    def __init__(
        self, model: DraftModel, lookup: Drafter, costs: CostCurve, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model: DraftModel | None = model
        self._lookup, self._costs, self._clock = lookup, costs, clock
        self._acceptance = _Average(_USUAL_ACCEPTANCE)
        self._drafting, self._reading = _Average(_USUAL_DRAFTING), _Average(_USUAL_READING)
        self._is_cold = True  # weights that were never read are slow
        self._proposed: list[int] = []  # by the draft model, just now
        self._spent = 0.0  # time for that
        self._debt = 0.0
        self._since = 0  # tokens of plain decoding since the last loss
        self.drafted = self.accepted = 0  # tokens of the draft model
        self.has_given_up = False

    def begin(self, ids: Sequence[int]) -> None:
        self._proposed = []
        self._lookup.begin(ids)
        if self._model:
            self._model.begin(ids)

    def propose(self, most: int) -> Sequence[int]:
        self._proposed = []
        if proposed := self._lookup.propose(most):
            return proposed
        model, step = self._model, self._costs.one
        if model is None or step is None:
            return ()
        most = min(most, LONGEST_DRAFT)
        reading = min(model.unread, _WINDOW) * self._reading.value if model.unread > _FEW else 0.0
        price = self._debt + reading
        count = self._best_length(most, price / _PAYBACK if reading else 0.0)
        if not count and self._since * _MOST_LOSS >= price:
            count = self._decodable(min(most, _PROBE))
        if count:
            self._proposed = self._draft(model, count, step)
        return self._proposed

    def _best_length(self, most: int, extra: float) -> int:
        """
        Return the length of draft that yields the most tokens a second, 0 for plain decoding.

        `extra` is time that every token takes besides.
        """
        acceptance, drafting = self._acceptance.value, self._drafting.value
        best, best_gain = 0, _LEAST_GAIN
        for count in (known - 1 for known in self._costs.known if 1 < known <= most + 1):
            tokens = sum(acceptance**place for place in range(count + 1))
            gain = 1 / ((self._costs.relative(count + 1) + count * drafting) / tokens + extra)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def _decodable(self, count: int) -> int:
        """Return the longest draft of at most `count` tokens that is quick to check: 1, 3, 7, 11, …"""
        return max((known - 1 for known in self._costs.known if known - 1 <= count), default=0)

    def _draft(self, model: DraftModel, count: int, step: float) -> list[int]:
        if self._is_cold or model.unread > _FEW:
            started = self._clock()
            read = model.catch_up(_WINDOW)
            spent = min((self._clock() - started) / step, 1.0 * read)  # the machine may have slept
            if read > _FEW and not self._is_cold:
                self._reading.add(spent, read)
            self._is_cold = False
            self._debt += spent
        started = self._clock()
        drafted = model.draft(count)
        self._spent = min((self._clock() - started) / step, 2.0 * count)
        drafted = drafted[: self._decodable(len(drafted))]
        self._drafting.add(self._spent, len(drafted))
        if not drafted:
            self._book(self._spent)
        return drafted

    def _book(self, loss: float) -> None:
        """Add a loss to the debt; a gain is a negative one."""
        self._debt = max(0.0, self._debt + loss)
        if loss > 0:
            self._since = 0

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        if self._proposed:
            accepted = common_prefix(self._proposed, tokens)
            self._acceptance.add(accepted, min(accepted + 1, len(self._proposed)))  # none behind a wrong one
            self.drafted += len(self._proposed)
            self.accepted += accepted
            self._book(self._spent + self._costs.relative(checked + 1) - len(tokens))
            self._lookup.learn(tokens, 0, None)
        else:
            self._since += len(tokens)
            self._lookup.learn(tokens, checked, None)
        if seconds is not None:
            self._costs.observe(checked + 1, seconds)
        if self._model:
            self._model.extend(tokens)
        self._proposed = []

    def give_up(self) -> bool:
        """Free the draft model's memory for good, because memory is low; return False if that was done before."""
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
