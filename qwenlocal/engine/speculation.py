"""
Speculative decoding by prompt lookup, and the cost model that sets the length of every draft.

Answers that edit code, quote a text or fill in a form repeat earlier text. The tokens that followed the same n-gram
before are a guess at the next ones, and the model checks them all at once (prompt lookup decoding: A. Saxena, 2023;
llama.cpp: examples/lookup).

Checking k drafted tokens decodes k + 1 tokens in one batch. If the first i of them are all accepted with probability
s(i), that yields 1 + s(1) + … + s(k) tokens for the time t(k + 1). The length of a draft maximizes tokens per second;
if plain decoding is as fast, there is no draft (with s(i) = p^i: Leviathan, Kalman, Matias: Fast Inference from
Transformers via Speculative Decoding, 2023, equation 1). In a form, a few tokens repeat before the text differs: s(i)
drops at once, which a single p cannot express.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from qwenlocal.engine.prefix_cache import common_prefix

# t(k) / t(1) of Q4_0 on two cores, updated by measurements. Only these k are used: llama.cpp multiplies four rows at
# once, so 3 tokens take longer than 4, and 9 hardly less than 12.
DEFAULT_COSTS = {1: 1.0, 2: 1.7, 4: 2.2, 8: 3.7, 12: 4.5, 16: 4.5, 20: 6.3, 24: 7.0, 28: 7.6, 32: 7.8}
_LENGTHS = (12, 6, 3)  # n-gram sizes, the most reliable first
_LONG = 24  # matching tokens that mean text is being copied
MAX_DRAFT = 31  # with the token before it, as many rows of logits as a context keeps
_MIN_GAIN = 1.08  # below this, a draft is not worth the risk that the estimates are off
_MEMORY = 12.0  # approximate number of checks in an average
_WATCHED = 12  # tokens of an unchecked guess that are compared with the answer
_EXPECTED = dict(zip((_LONG, *_LENGTHS), (0.97, 0.9, 0.7, 0.4), strict=True))  # initial acceptance of a drafted token
_EXPECTED_TWICE = 0.8  # minimum for a continuation seen twice
_WEIGHT = 4.0  # checks that the initial value counts for
_LEARN = 0.2  # weight of a new time in the average


class Drafter(Protocol):
    """Drafts for one sequence."""

    def begin(self, ids: Sequence[int]) -> None:
        """Start an answer to `ids`."""

    def propose(self, limit: int) -> Sequence[int]:
        """Return at most `limit` tokens to check after the last one; none if plain decoding is faster."""

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """
        Learn from new `tokens`: those accepted of `checked` drafted ones, and one more.

        Decoding the drafted tokens with the one before them took `seconds`; None if it was not timed.
        """


class CostCurve:
    """
    The time to decode k tokens in one batch relative to one token; updated by measurements.

    `CostCurve().known[4]` is 2.2 until a batch of four was timed.
    """

    def __init__(self, known: Mapping[int, float] = DEFAULT_COSTS) -> None:
        self.known = dict(sorted(known.items()))  # t(k) / t(1) by k
        self.one: float | None = None  # seconds for one token; None before any was timed

    def observe(self, count: int, seconds: float) -> None:
        """Add a measurement: decoding `count` tokens took `seconds`."""
        if count == 1:
            self.one = seconds if self.one is None else self.one + _LEARN * (seconds - self.one)
        elif self.one and count in self.known:
            measured = max(1.0, min(count * 1.5, seconds / self.one))
            self.known[count] += _LEARN * (measured - self.known[count])

    def best_draft_length(
        self, expected: Iterable[float], *, drafting: float = 0.0, extra: float = 0.0, min_gain: float
    ) -> int:
        """
        Return the length of the draft with the most tokens per second; 0 if plain decoding is nearly as fast.

        Checking a draft of 0, 1, 2, … tokens yields `expected` tokens. Drafting a token takes `drafting`, every token
        of the answer `extra`; both are relative to plain decoding, like `min_gain`, the lowest speed worth a draft.
        """
        best, best_gain = 0, min_gain
        for count, tokens in enumerate(expected):
            if count + 1 in self.known:
                gain = 1 / ((self.known[count + 1] + count * drafting) / tokens + extra)
                if gain > best_gain:
                    best, best_gain = count, gain
        return best


class Guess(NamedTuple):
    """
    Tokens that followed an n-gram of `matched` tokens (3, 6, 12, or 24 for longer ones), once or `twice`.

    A continuation common to the last two occurrences is more reliable than one, and ends where they differ: in a form,
    at the end of the part that every entry shares (counting continuations: SuffixDecoding, Oliaro et al., 2024).
    """

    tokens: Sequence[int]
    matched: int
    twice: bool


_NO_GUESS = Guess((), 0, False)


class NgramIndex:
    """
    An index of all n-grams of 3, 6 and 12 tokens, with the positions after their last two occurrences.

    After `extend([5, 6, 7, 8, 9, 5, 6, 7])`, `guess(3)` is ([8, 9, 5], 3, False): 5, 6, 7 was followed by 8, 9, 5 once.
    After another `extend([8, 1, 5, 6, 7])` it is ([8], 3, True). Adding a token and guessing take constant time.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []  # all tokens added so far
        self._after: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {length: {} for length in _LENGTHS}

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            position = len(self.ids)
            for length, after in self._after.items():
                if position >= length:
                    ngram = tuple(self.ids[position - length : position])
                    after[ngram] = position, after.get(ngram, (0, 0))[0]
            self.ids.append(token)

    def guess(self, limit: int) -> Guess:
        """Return at most `limit` tokens that may follow; `_NO_GUESS` if the last ones are new."""
        for length, after in self._after.items():
            positions = after.get(tuple(self.ids[-length:]))
            if positions is not None:
                return self._from(*positions, length, limit)
        return _NO_GUESS

    def _from(self, position: int, before: int, length: int, limit: int) -> Guess:
        """Return the tokens after `position` that agree with those after `before` (0: there is only one occurrence)."""
        tokens, matched = self.ids[position : position + limit], length
        if length == _LENGTHS[0] and self.ids[max(0, position - _LONG) : position] == self.ids[-_LONG:]:
            matched = _LONG
        if not before:
            return Guess(tokens, matched, False)
        common = common_prefix(tokens, self.ids[before : before + limit])
        return Guess(tokens[:common], matched, True) if common else _NO_GUESS


class Acceptance:
    """Share of recent drafts whose first 1, 2, 3, … tokens were all accepted."""

    def __init__(self, expected: float) -> None:
        self._share = [expected**place for place in range(1, MAX_DRAFT + 1)]
        self._seen = [_WEIGHT] * MAX_DRAFT

    def expected_tokens(self, limit: int) -> Iterator[float]:
        """Yield the expected tokens from checking a draft of 0, 1, 2, … tokens, including the one sampled after it."""
        return itertools.accumulate((1.0, *self._share[:limit]))

    def add(self, accepted: int, checked: int) -> None:
        """Add a draft of `checked` tokens with `accepted` ones; a rejected token rejects all that follow it."""
        for place in range(MAX_DRAFT if accepted < checked else checked):
            self._seen[place] = min(self._seen[place] + 1, _MEMORY)
            self._share[place] += ((place < accepted) - self._share[place]) / self._seen[place]


class Speculation:
    """Drafts by prompt lookup: the tokens that followed the same tokens before. Implements `Drafter`."""

    def __init__(self, costs: CostCurve) -> None:
        self.costs = costs
        self._index = NgramIndex()
        self._acceptance = {
            (matched, twice): Acceptance(max(expected, _EXPECTED_TWICE) if twice else expected)
            for matched, expected in _EXPECTED.items()
            for twice in (False, True)
        }
        self._guess = _NO_GUESS
        self._watched, self._correct = _NO_GUESS, 0  # an unchecked guess, and its correct tokens so far
        self.drafted = self.accepted = 0

    def begin(self, ids: Sequence[int]) -> None:
        """Start an answer to `ids`; only new tokens are indexed."""
        known = self._index.ids
        if known != list(ids[: len(known)]):
            self._index = NgramIndex()
        self._index.extend(ids[len(self._index.ids) :])
        self._guess = self._watched = _NO_GUESS

    def propose(self, limit: int) -> Sequence[int]:
        self._guess = guess = self._index.guess(min(limit, MAX_DRAFT))
        if not guess.tokens:
            return ()
        expected = self._acceptance_of(guess).expected_tokens(len(guess.tokens))
        return guess.tokens[: self.costs.best_draft_length(expected, min_gain=_MIN_GAIN)]

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """Learn from new tokens; a guess that was not checked is compared with them as well, at no cost."""
        guess = self._guess
        if checked:
            accepted = common_prefix(guess.tokens[:checked], tokens)
            self._acceptance_of(guess).add(accepted, checked)
            self.drafted += checked
            self.accepted += accepted
        elif guess.tokens and not self._watched.tokens:
            self._watched, self._correct = guess._replace(tokens=guess.tokens[:_WATCHED]), 0
        for token in tokens:
            self._watch(token)
        if seconds is not None:
            self.costs.observe(checked + 1, seconds)
        self._guess = _NO_GUESS
        self._index.extend(tokens)

    def _acceptance_of(self, guess: Guess) -> Acceptance:
        return self._acceptance[guess.matched, guess.twice]

    def _watch(self, token: int) -> None:
        watched = self._watched
        if not watched.tokens:
            return
        is_correct = watched.tokens[self._correct] == token
        self._correct += is_correct
        if not is_correct or self._correct == len(watched.tokens):
            self._acceptance_of(watched).add(self._correct, self._correct + (not is_correct))
            self._watched = _NO_GUESS


class NoSpeculation:
    """Plain decoding: drafts nothing and learns nothing. Implements `Drafter`."""

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, limit: int) -> Sequence[int]:
        return ()

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        pass
