"""
Drafts by a small model, and a trial of whether they pay.

Drafting k tokens takes k times what the small model needs for one; checking them takes t(k + 1). With s(i) for how
often the first i were all right, that is 1 + s(1) + … + s(k) tokens for t(k + 1) + k d, d being the small model's time
over the large one's (Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, 2023).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qwenlocal.engine.lookup import LONGEST_DRAFT
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.engine.speculation import CostCurve, Drafts, Survival
from qwenlocal.i18n import tr

_LEAST_GAIN = 1.05
_EXPECTED = 0.9  # how often a drafted token that the small model is sure of is right, at first
_USUAL_SHARE = 0.15  # of the large model's time for a token, before any was timed
_LEARN = 0.2
_TRY_AGAIN = 48  # tokens without a draft, after which a short one is tried
_TURN = 24  # tokens with drafts, and as many without, while it is tried
_TRIAL = 10.0  # seconds


class SmallModel(Protocol):
    """What is asked of a small model: `DraftModel`."""

    def begin(self, ids: Sequence[int]) -> None: ...
    def extend(self, tokens: Sequence[int]) -> None: ...
    def catch_up(self) -> None: ...
    def draft(self, most: int) -> list[int]: ...
    def close(self) -> None: ...


class ModelDrafts:
    """
    What `before` (what is looked up in the text) proposes; where that is nothing, a small model's guess.

    Fulfils `Drafts`. `costs` is the large model's curve.
    """

    def __init__(
        self, small: SmallModel, before: Drafts, costs: CostCurve, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._small, self._before, self._costs, self._clock = small, before, costs, clock
        self._survival = Survival(_EXPECTED)
        self._each: float | None = None  # seconds that a drafted token takes
        self._cold = True  # the first draft takes longer than any other
        self._proposed: list[int] = []  # by the small model, just now
        self._without = 0  # tokens since its last draft
        self.drafted = self.accepted = 0

    def begin(self, ids: Sequence[int]) -> None:
        self._proposed = []
        self._before.begin(ids)
        self._small.begin(ids)

    def propose(self, most: int) -> Sequence[int]:
        self._proposed = []
        if found := self._before.propose(most):
            return found
        count = self._best_length(min(most, LONGEST_DRAFT))
        if count:
            started = self._clock()
            drafted = self._small.draft(count)
            if drafted:
                self._time((self._clock() - started) / len(drafted))
            self._proposed = drafted[: self._decodable(len(drafted))]
        return self._proposed

    def _best_length(self, most: int) -> int:
        """How many tokens to draft for the most tokens a second; 0 where plain decoding gives more."""
        one = self._costs.one
        if one is None:
            return 0
        share = self._each / one if self._each is not None else _USUAL_SHARE
        best, best_gain = 0, _LEAST_GAIN
        for count, expected in enumerate(self._survival.expected_tokens(most), start=1):
            if count + 1 not in self._costs.known:
                continue
            gain = expected / (self._costs.relative(count + 1) + count * share)
            if gain > best_gain:
                best, best_gain = count, gain
        if not best and self._without >= _TRY_AGAIN:
            return self._decodable(min(most, 3))
        return best

    def _decodable(self, count: int) -> int:
        """The longest draft of at most `count` tokens that is quick to check: with the one before it, 2, 4, 8, 12, …"""
        return max((known - 1 for known in self._costs.known if known - 1 <= count), default=0)

    def _time(self, seconds: float) -> None:
        if self._cold:
            self._cold = False
            return
        self._each = seconds if self._each is None else self._each + _LEARN * (seconds - self._each)

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        if self._proposed:
            right = common_prefix(self._proposed, tokens)
            self._survival.add(right, len(self._proposed))
            self.drafted += len(self._proposed)
            self.accepted += right
            self._without = 0
            self._before.learn(tokens, 0, None)
        else:
            self._without += len(tokens)
            self._before.learn(tokens, checked, None)
        if seconds is not None:
            self._costs.observe(checked + 1, seconds)
        self._small.extend(tokens)
        self._proposed = []


class Trial:
    """
    Drafts by a small model and none in turn, for ten seconds of answering; then whatever was quicker.

    Fulfils `Drafts`. Where drafts lose, the small model is closed. `verdict` says what came out, "" before that.
    """

    def __init__(
        self,
        small: SmallModel,
        without: Drafts,
        costs: CostCurve,
        seconds: float = _TRIAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._small, self._without, self._seconds, self._clock = small, without, seconds, clock
        self._drafts: ModelDrafts | None = ModelDrafts(small, without, costs, clock)
        self._taken = {True: 0.0, False: 0.0}  # seconds with drafts, and without
        self._came = {True: 0, False: 0}  # tokens
        self._drafting, self._left = False, _TURN
        self._proposing = 0.0  # seconds that the last proposal took
        self.verdict = ""

    def begin(self, ids: Sequence[int]) -> None:
        (self._drafts or self._without).begin(ids)
        if self._drafts and (self._drafting or self.verdict):
            self._small.catch_up()

    def propose(self, most: int) -> Sequence[int]:
        if self._drafts is None:
            return self._without.propose(most)
        if self.verdict:
            return self._drafts.propose(most)
        if self._left <= 0:
            self._take_turns()
        started = self._clock()
        proposed = (self._drafts if self._drafting else self._without).propose(most)
        self._proposing = self._clock() - started
        return proposed

    def _take_turns(self) -> None:
        if not self._drafting:
            self._small.catch_up()  # what was said without it costs nothing where it always drafts
        self._drafting, self._left = not self._drafting, _TURN

    def learn(self, tokens: Sequence[int], checked: int, seconds: float | None) -> None:
        if self._drafts is None:
            self._without.learn(tokens, checked, seconds)
            return
        if seconds is not None and not self.verdict:
            self._taken[self._drafting] += self._proposing + seconds
            self._came[self._drafting] += len(tokens)
            self._left -= len(tokens)
        self._drafts.learn(tokens, checked, seconds)
        if not self.verdict and sum(self._taken.values()) >= self._seconds and all(self._came.values()):
            self._decide()

    def _decide(self) -> None:
        speeds = {drafting: self._came[drafting] / max(1e-9, self._taken[drafting]) for drafting in (True, False)}
        ratio = speeds[True] / max(1e-9, speeds[False])
        how = tr("{drafting:.1f} tokens/s with it, {plain:.1f} without", drafting=speeds[True], plain=speeds[False])
        if ratio > _LEAST_GAIN:
            self.verdict = tr("The draft model stays: {how}.", how=how)
            return
        self.verdict = tr("The draft model is put away, it does not pay here: {how}.", how=how)
        self._drafts = None
        self._small.close()

    def give_up(self) -> bool:
        """Memory is short: close the small model; tells whether there was one."""
        if self._drafts is None:
            return False
        self.verdict = tr("The draft model is put away: memory is short.")
        self.close()
        return True

    def close(self) -> None:
        """Give the small model's memory back."""
        if self._drafts is not None:
            self._drafts = None
            self._small.close()
