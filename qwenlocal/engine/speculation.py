"""
How much to guess: as much as pays, by what checking costs on this machine and how often guesses were right.

Checking k drafted tokens decodes k + 1 tokens at once. If the first i of them are all right with probability s(i), that
gives 1 + s(1) + … + s(k) tokens for the time t(k + 1); the draft is as long as makes the most tokens a second, and
there is none where that is not more than plain decoding gives (with s(i) = p^i: Leviathan, Kalman, Matias: Fast
Inference from Transformers via Speculative Decoding, 2023, equation 1). A form that is filled in repeats a few tokens,
then differs: its s(i) breaks off, which one p for all would not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from qwenlocal.engine.lookup import AGREED, LONGEST_DRAFT, NOTHING, Guess, NgramIndex
from qwenlocal.engine.prefix import common_prefix

# t(k) / t(1) of Q4_0 on two cores, where arithmetic is the limit early; measured again while it works. Only these k are
# decoded: llama.cpp multiplies four rows at once, so that 3 take longer than 4, and 9 than 12 hardly less.
USUAL_COSTS = {1: 1.0, 2: 1.8, 4: 2.3, 8: 3.8, 12: 5.0, 16: 6.0, 20: 7.4, 24: 8.8, 28: 10.2, 32: 11.4}
_LEAST_GAIN = 1.08  # below this, a draft is not worth the risk that the estimates are off
_MEMORY = 12.0  # checks that an average goes back, about
_LOOKED_AT = 12  # tokens of a draft that was not checked, after which it is known how right it was
_EXPECTED = dict(zip(AGREED, (0.97, 0.9, 0.7, 0.4), strict=True))  # how often a drafted token is right, at first
_EXPECTED_TWICE = 0.8  # at least, where it came twice
_WEIGHT = 4.0  # of that expectation, in checks
_LEARN = 0.2  # of a new time in the average


class Drafts(Protocol):
    """Guesses at what comes next in one sequence."""

    def begin(self, ids: Sequence[int]) -> None:
        """An answer to `ids` begins."""
        ...

    def propose(self, most: int) -> Sequence[int]:
        """At most `most` tokens worth checking behind the last one; none where plain decoding is quicker."""
        ...

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """
        `tokens` came, where `checked` drafted ones had been decoded with the one before; it took `seconds`, if known.
        """
        ...


class CostCurve:
    """
    What decoding k tokens at once takes, relative to one; learnt from what was timed.

    `CostCurve().relative(4)` is 2.3, until decoding four tokens was timed.
    """

    def __init__(self, relative: Mapping[int, float] = USUAL_COSTS) -> None:
        self._relative = dict(sorted(relative.items()))
        self._one: float | None = None

    @property
    def known(self) -> Mapping[int, float]:
        """t(k) / t(1) by k, to be remembered."""
        return self._relative

    @property
    def one(self) -> float | None:
        """Seconds for one token; None before any was timed."""
        return self._one

    def relative(self, count: int) -> float:
        """t(count) / t(1), for a count that is in `known`."""
        return self._relative[count]

    def observe(self, count: int, seconds: float) -> None:
        """`count` tokens took `seconds`."""
        if count == 1:
            self._one = seconds if self._one is None else self._one + _LEARN * (seconds - self._one)
        elif self._one and count in self._relative:
            before = self._relative[count]
            now = max(1.0, min(count * 1.5, seconds / self._one))
            self._relative[count] = before + _LEARN * (now - before)


class Survival:
    """How often the first 1, 2, 3, … tokens of a draft were all right, of late."""

    def __init__(self, expected: float) -> None:
        self._share = [expected**place for place in range(1, LONGEST_DRAFT + 1)]
        self._seen = [_WEIGHT] * LONGEST_DRAFT

    def expected_tokens(self, most: int) -> Iterator[float]:
        """For drafts of 1, 2, … tokens: how many tokens checking one gives, with the one that always comes."""
        total = 1.0
        for share in self._share[:most]:
            total += share
            yield total

    def add(self, right: int, checked: int) -> None:
        """`right` tokens of a draft of `checked` were right; a wrong one makes all behind it wrong."""
        for place in range(LONGEST_DRAFT if right < checked else checked):
            self._seen[place] = min(self._seen[place] + 1, _MEMORY)
            self._share[place] += ((place < right) - self._share[place]) / self._seen[place]


class Speculation:
    """Drafts of what followed the same tokens before. Fulfils `Drafts`."""

    def __init__(self, costs: CostCurve) -> None:
        self.costs = costs
        self._index = NgramIndex()
        self._survival = {
            (agreed, twice): Survival(max(expected, _EXPECTED_TWICE) if twice else expected)
            for agreed, expected in _EXPECTED.items()
            for twice in (False, True)
        }
        self._found = NOTHING  # what was looked up
        self._watched, self._right = NOTHING, 0  # a guess that was not checked, and how much of it came so far
        self.drafted = self.accepted = 0

    def begin(self, ids: Sequence[int]) -> None:
        """What is known of `ids` already is not looked at again."""
        known = self._index.ids
        if len(known) > len(ids) or list(known) != list(ids[: len(known)]):
            self._index = NgramIndex()
        self._index.extend(ids[len(self._index.ids) :])
        self._found = self._watched = NOTHING

    def propose(self, most: int) -> Sequence[int]:
        self._found = found = self._index.guess(min(most, LONGEST_DRAFT))
        return found.tokens[: self._best_length(found)] if found.tokens else ()

    def _best_length(self, found: Guess) -> int:
        best, best_gain = 0, _LEAST_GAIN
        for count, expected in enumerate(self._of(found).expected_tokens(len(found.tokens)), start=1):
            if count + 1 not in self.costs.known:
                continue
            gain = expected / self.costs.relative(count + 1)
            if gain > best_gain:
                best, best_gain = count, gain
        return best

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        """What was looked up and not checked is compared with what comes all the same: it costs nothing."""
        found = self._found
        if checked:
            right = common_prefix(found.tokens[:checked], tokens)
            self._of(found).add(right, checked)
            self.drafted += checked
            self.accepted += right
        elif found.tokens and not self._watched.tokens:
            self._watched, self._right = found._replace(tokens=found.tokens[:_LOOKED_AT]), 0
        for token in tokens:
            self._watch(token)
        if seconds is not None:
            self.costs.observe(checked + 1, seconds)
        self._found = NOTHING
        self._index.extend(tokens)

    def _of(self, guess: Guess) -> Survival:
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
    """Plain decoding: nothing is drafted, nothing learnt. Fulfils `Drafts`."""

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, most: int) -> Sequence[int]:
        return ()

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        pass
