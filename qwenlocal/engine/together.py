"""
Many prompts at once in one context: each has a sequence of its own, and every step computes a token of each.

A step of k tokens takes far less than k steps of one (see `CostCurve`), as the weights are read once for all of them.
What prompts begin with in common is in the cache once.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qwenlocal.engine.context import Context, NoRoom
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.engine.sampler import Sampler
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.speculation import CostCurve
from qwenlocal.engine.text import TextStream
from qwenlocal.errors import BadWeights

_LEAST_GAIN = 1.1  # of twice as many at once, or it is not worth the memory
_BASE = 0  # the sequence that keeps what prompts begin with


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, how to choose what follows, at most how many tokens, and strings at which it ends."""

    key: int
    ids: Sequence[int]
    sampling: Sampling
    limit: int
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """
    What followed: token ids without the end token; whether the model ended it, a full context, or one of `stops`, which
    the last of the tokens completes. None of these: the limit.
    """

    key: int
    ids: Sequence[int]
    ended: bool
    is_full: bool
    has_stopped: bool = False


@dataclass
class _Slot:
    request: Request
    sampler: Sampler
    text: TextStream
    said: list[int] = field(default_factory=list)


def worth_at_once(costs: CostCurve, most: int) -> int:
    """
    How many sequences at once give the most tokens a second, of at most `most`.

    With the usual costs, t(4) = 2.3 and t(8) = 3.8, 8 at once give 2.1 tokens in the time of one, 16 give 2.7.
    """
    best, best_speed = 1, 1.0
    for count in costs.known:
        speed = count / costs.relative(count)
        if count <= most and speed >= best_speed * _LEAST_GAIN:
            best, best_speed = count, speed
    return best


class Together:
    """Answers requests in `context`, as many at once as it has sequences beside the first."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._free = list(range(context.options.sequences - 1, _BASE, -1))
        self._slots: dict[int, _Slot] = {}
        self._base: list[int] | None = None
        self._stopped = self._is_tight = False

    def stop(self) -> None:
        """End it, from any thread; what is under way is given up."""
        self._stopped = True

    def answer(self, requests: Iterable[Request], is_end: Callable[[int], bool]) -> Iterator[Result]:
        """
        Results as they are finished, in whatever order.

        A prompt that leaves no room for an answer even alone gives a result without tokens that `is_full`.

        Raises
        ------
        BadWeights: the model computes NaN.
        """
        waiting = collections.deque(requests)
        try:
            while (waiting or self._slots) and not self._stopped:
                while waiting and self._free and not self._stopped and not (self._is_tight and self._slots):
                    if not self._begin(waiting[0]):
                        break
                    waiting.popleft()
                if not self._slots:
                    if waiting and not self._stopped:
                        yield Result(waiting.popleft().key, (), ended=False, is_full=True)
                    continue
                yield from self._finished(is_end)
                yield from self._step(waiting)
        finally:
            for number in list(self._slots):
                self._close(number)

    def _begin(self, request: Request) -> bool:
        """Read a prompt into a sequence of its own; False where there is no room now."""
        used = sum(len(slot.request.ids) + len(slot.said) for slot in self._slots.values())
        if used + len(request.ids) + 1 >= self._context.n_ctx:
            return False
        number = self._free.pop()
        sampler = Sampler(request.sampling, self._context.model.vocabulary)
        slot = _Slot(request, sampler, TextStream(request.stops))
        try:
            row = self._read(number, request.ids)
        except NoRoom:
            self._context.truncate(number, 0)
            self._free.append(number)
            sampler.close()
            return self._let_go_of_base(request.ids) and self._begin(request)
        sampler.remember(request.ids)
        self._slots[number] = slot
        self._sample(slot, row)
        return True

    def _read(self, number: int, ids: Sequence[int]) -> int:
        context = self._context
        known = min(common_prefix(self._base or (), ids), len(ids) - 1)
        if known:
            context.copy(_BASE, number)
            known = context.truncate(number, known)  # none where a model's memory cannot be cut
        row = -1
        for start in range(known, len(ids), context.n_batch):
            row = context.decode([(number, ids[start : start + context.n_batch])])[0]
        if self._base is None:
            context.copy(number, _BASE)
            self._base = list(ids)
        elif known < len(self._base):  # what all have in common is kept, and no more
            self._keep_common(known)
        return row

    def _let_go_of_base(self, ids: Sequence[int]) -> bool:
        """Give up what is kept of the first prompt and is not the beginning of `ids`; tells whether there was any."""
        known = common_prefix(self._base or (), ids)
        if self._base is None or known == len(self._base):
            return False
        self._keep_common(known)
        return True

    def _keep_common(self, length: int) -> None:
        self._base = (self._base or [])[: self._context.truncate(_BASE, length)]

    def _sample(self, slot: _Slot, row: int) -> None:
        if self._context.is_broken(row):
            what = "its numbers come out as NaN; weights are damaged"
            raise BadWeights(self._context.model.path, what, hint="Which ones: qwenlocal inspect FILE")
        slot.said.append(slot.sampler.sample(self._context, row))
        if slot.request.stops:
            slot.text.feed(self._context.model.vocabulary.piece(slot.said[-1]))

    def _finished(self, is_end: Callable[[int], bool]) -> Iterator[Result]:
        for number, slot in list(self._slots.items()):
            ended = is_end(slot.said[-1])
            has_stopped = slot.text.stopped is not None and not ended
            if ended or has_stopped or len(slot.said) >= slot.request.limit:
                said = slot.said[:-1] if ended else slot.said
                yield Result(slot.request.key, tuple(said), ended=ended, is_full=False, has_stopped=has_stopped)
                self._finish(number)

    def _step(self, waiting: collections.deque[Request]) -> Iterator[Result]:
        """A token more for everyone; where the cache is full, whoever came last waits and begins again."""
        numbers = list(self._slots)
        if not numbers:
            return
        try:
            rows = self._context.decode([(number, self._slots[number].said[-1:]) for number in numbers])
        except NoRoom:
            yield from self._make_room(numbers, waiting)
            return
        for number, row in zip(numbers, rows, strict=True):
            self._sample(self._slots[number], row)

    def _make_room(self, numbers: Sequence[int], waiting: collections.deque[Request]) -> Iterator[Result]:
        last = self._slots[numbers[-1]]
        if len(numbers) > 1:
            waiting.appendleft(last.request)
            self._is_tight = True  # nobody else begins before somebody has finished
            self._close(numbers[-1])
        elif self._base:
            self._keep_common(0)
        else:
            yield Result(last.request.key, tuple(last.said), ended=False, is_full=True)
            self._finish(numbers[-1])

    def _finish(self, number: int) -> None:
        self._is_tight = False
        self._close(number)

    def _close(self, number: int) -> None:
        self._slots.pop(number).sampler.close()
        self._context.truncate(number, 0)
        self._free.append(number)
