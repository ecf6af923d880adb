"""
Speculative decoding by prompt lookup, and the cost model that sets the length of every draft.

Checking k drafted tokens decodes k + 1 tokens at once. If the first i of them are all accepted with probability s(i),
that yields 1 + s(1) + … + s(k) tokens for the time t(k + 1). The draft is as long as yields the most tokens a second;
there is none if plain decoding is as fast (with s(i) = p^i: Leviathan, Kalman, Matias: Fast Inference from Transformers
via Speculative Decoding, 2023, equation 1). A form that is filled in repeats a few tokens, then differs: its s(i)
breaks off, which a single p cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from qwenlocal.engine.lookup import AGREED, LONGEST_DRAFT, NOTHING, Guess, NgramIndex
from qwenlocal.engine.prefix_cache import common_prefix

# t(k) / t(1) of Q4_0 on two cores, where arithmetic is the limit early; updated by measurements. Only these k are
# decoded: llama.cpp multiplies four rows at once, so that 3 take longer than 4, and 9 hardly less than 12.
USUAL_COSTS = {1: 1.0, 2: 1.8, 4: 2.3, 8: 3.8, 12: 5.0, 16: 6.0, 20: 7.4, 24: 8.8, 28: 10.2, 32: 11.4}
_LEAST_GAIN = 1.08  # below this, a draft is not worth the risk that the estimates are off
_MEMORY = 12.0  # checks in an average, about
_LOOKED_AT = 12  # tokens of an unchecked draft that are compared with the answer
_EXPECTED = dict(zip(AGREED, (0.97, 0.9, 0.7, 0.4), strict=True))  # acceptance of a drafted token, at first
_EXPECTED_TWICE = 0.8  # at least, if it came twice
_WEIGHT = 4.0  # of that expectation, in checks
_LEARN = 0.2  # weight of a new time in the average


class Drafter(Protocol):
    """Drafts for one sequence."""

    def begin(self, ids: Sequence[int]) -> None:
        """Begin an answer to `ids`."""
        ...

    def propose(self, most: int) -> Sequence[int]:
        """Return at most `most` tokens to check after the last one; none if plain decoding is faster."""
        ...

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """
        Take note of new `tokens`, the accepted ones of `checked` drafted tokens and one more.

        Decoding the drafted ones with the one before them took `seconds`, None if that was not timed.
        """
        ...


class CostCurve:
    """
    Time for decoding k tokens at once, relative to one; updated by measurements.

    `CostCurve().relative(4)` is 2.3, until decoding four tokens was timed.
    """

    def __init__(self, relative: Mapping[int, float] = USUAL_COSTS) -> None:
        self._relative = dict(sorted(relative.items()))
        self._one: float | None = None

    @property
    def known(self) -> Mapping[int, float]:
        """t(k) / t(1) by k."""
        return self._relative

    @property
    def one(self) -> float | None:
        """Seconds for one token; None before any was timed."""
        return self._one

    def relative(self, count: int) -> float:
        """Return t(count) / t(1), for a count that is in `known`."""
        return self._relative[count]

    def observe(self, count: int, seconds: float) -> None:
        """Add a measurement: decoding `count` tokens took `seconds`."""
        if count == 1:
            self._one = seconds if self._one is None else self._one + _LEARN * (seconds - self._one)
        elif self._one and count in self._relative:
            before = self._relative[count]
            now = max(1.0, min(count * 1.5, seconds / self._one))
            self._relative[count] = before + _LEARN * (now - before)


class Acceptance:
    """Share of recent drafts whose first 1, 2, 3, … tokens were all accepted."""

    def __init__(self, expected: float) -> None:
        self._share = [expected**place for place in range(1, LONGEST_DRAFT + 1)]
        self._seen = [_WEIGHT] * LONGEST_DRAFT

    def expected_tokens(self, most: int) -> Iterator[float]:
        """Yield, for drafts of 1, 2, … tokens, the tokens that a check yields, with the one that always comes."""
        total = 1.0
        for share in self._share[:most]:
            total += share
            yield total

    def add(self, accepted: int, checked: int) -> None:
        """Add a draft of `checked` tokens with `accepted` ones; a rejected token rejects all that follow it."""
        for place in range(LONGEST_DRAFT if accepted < checked else checked):
            self._seen[place] = min(self._seen[place] + 1, _MEMORY)
            self._share[place] += ((place < accepted) - self._share[place]) / self._seen[place]


class Speculation:
    """Drafts by prompt lookup: the tokens that followed the same tokens before. Implements `Drafter`."""

    def __init__(self, costs: CostCurve) -> None:
        self.costs = costs
        self._index = NgramIndex()
        self._survival = {
            (agreed, twice): Acceptance(max(expected, _EXPECTED_TWICE) if twice else expected)
            for agreed, expected in _EXPECTED.items()
            for twice in (False, True)
        }
        self._guess = NOTHING
        self._watched, self._right = NOTHING, 0  # a guess that was not checked, and its tokens that came so far
        self.drafted = self.accepted = 0

    def begin(self, ids: Sequence[int]) -> None:
        """Begin an answer to `ids`; only those that are new are indexed."""
        known = self._index.ids
        if len(known) > len(ids) or list(known) != list(ids[: len(known)]):
            self._index = NgramIndex()
        self._index.extend(ids[len(self._index.ids) :])
        self._guess = self._watched = NOTHING

    def propose(self, most: int) -> Sequence[int]:
        self._guess = guess = self._index.guess(min(most, LONGEST_DRAFT))
        return guess.tokens[: self._best_length(guess)] if guess.tokens else ()

    def _best_length(self, guess: Guess) -> int:
        best, best_gain = 0, _LEAST_GAIN
        for count, expected in enumerate(self._of(guess).expected_tokens(len(guess.tokens)), start=1):
            if count + 1 not in self.costs.known:
                continue
            gain = expected / self.costs.relative(count + 1)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """Take note of new tokens; a guess that was not checked is compared with them as well, which costs nothing."""
        guess = self._guess
        if checked:
            accepted = common_prefix(guess.tokens[:checked], tokens)
            self._of(guess).add(accepted, checked)
            self.drafted += checked
            self.accepted += accepted
        elif guess.tokens and not self._watched.tokens:
            self._watched, self._right = guess._replace(tokens=guess.tokens[:_LOOKED_AT]), 0
        for token in tokens:
            self._watch(token)
        if seconds is not None:
            self.costs.observe(checked + 1, seconds)
        self._guess = NOTHING
        self._index.extend(tokens)

    def _of(self, guess: Guess) -> Acceptance:
        return self._survival[guess.agreed, guess.twice]

    def _watch(self, token: int) -> None:
        watched = self._watched
        if not watched.tokens:
            return
        as_guessed = watched.tokens[self._right] == token
        self._right += as_guessed
        if not as_guessed or self._right == len(watched.tokens):
            self._of(watched).add(self._right, self._right + (not as_guessed))
            self._watched = NOTHING


class NoSpeculation:
    """Plain decoding: drafts nothing and learns nothing. Implements `Drafter`."""

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, most: int) -> Sequence[int]:
        return ()

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        pass
