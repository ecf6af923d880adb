"""
Continuous batching: many prompts in one context, each in its own sequence; every step decodes a token of each.

A step of k tokens takes far less time than k steps of one (see `CostCurve`), because the weights are read once for all
of them. A common prefix of the prompts is in the KV cache once.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qwenlocal.engine.context import CacheFull, Context
from qwenlocal.engine.prefix_cache import common_prefix
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.speculation import CostCurve
from qwenlocal.engine.tokenizer import IncrementalDetokenizer

_MIN_GAIN = 1.1  # in speed, for a larger batch to be worth its memory
_PREFIX = 0  # the sequence that holds the common prefix of the prompts


@dataclass(frozen=True)
class BatchRequest:
    """A prompt as token ids, with its sampling, the maximum number of tokens, and stop strings."""

    key: int
    ids: Sequence[int]
    sampling: Sampling
    limit: int
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class BatchResult:
    """
    The answer to a request as token ids, without the end token, and why it ended.

    `hit_eos`: the model ended it. `is_full`: the context is full. `hit_stop`: the last token completes a stop string.
    None of these: it reached its limit.
    """

    key: int
    ids: Sequence[int]
    hit_eos: bool
    is_full: bool
    hit_stop: bool = False


@dataclass
class _Slot:
    request: BatchRequest
    sampler: Sampler
    detokenizer: IncrementalDetokenizer
    ids: list[int] = field(default_factory=list)


def choose_batch_size(costs: CostCurve, max_size: int) -> int:
    """
    Choose how many sequences to decode at once for the most tokens per second, at most `max_size`.

    With the default costs, t(4) = 2.3 and t(8) = 3.8, a batch of 8 gives 2.1 tokens in the time of one, 16 give 2.7.
    """
    best, best_speed = 1, 1.0
    for size in costs.known:
        speed = size / costs.known[size]
        if size <= max_size and speed >= best_speed * _MIN_GAIN:
            best, best_speed = size, speed
    return best


class BatchGenerator:
    """A generator for many requests; `context` needs one sequence per concurrent request, plus one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._free = list(range(context.options.n_seq_max - 1, _PREFIX, -1))
        self._slots: dict[int, _Slot] = {}
        self._prefix: list[int] | None = None
        self._stopped = self._is_tight = False

    def stop(self) -> None:
        """Stop after the current step, from any thread; unfinished answers are lost."""
        self._stopped = True

    def generate(self, requests: Iterable[BatchRequest], is_end: Callable[[int], bool]) -> Iterator[BatchResult]:
        """
        Yield the results as they finish, in any order.

        A prompt that leaves no room for an answer even alone yields a result without tokens that `is_full`.

        Raises
        ------
        BadWeights: the model computes NaN.
        """
        waiting = collections.deque(requests)
        try:
            while (waiting or self._slots) and not self._stopped:
                while waiting and self._free and not (self._stopped or self._is_tight) and self._start(waiting[0]):
                    waiting.popleft()
                if not self._slots:
                    if waiting and not self._stopped:
                        yield BatchResult(waiting.popleft().key, (), hit_eos=False, is_full=True)
                    continue
                yield from self._pop_finished(is_end)
                yield from self._step(waiting)
        finally:
            for number in list(self._slots):
                self._close(number)

    def _start(self, request: BatchRequest) -> bool:
        """Process a prompt into a free sequence; return False if there is no room now."""
        used = sum(len(slot.request.ids) + len(slot.ids) for slot in self._slots.values())
        if used + len(request.ids) + 1 >= self._context.n_ctx:
            return False
        sampler = Sampler(request.sampling, self._context.model.tokenizer)
        number = self._free.pop()
        self._slots[number] = slot = _Slot(request, sampler, IncrementalDetokenizer(request.stops))
        try:
            row = self._prefill(number, request.ids)
        except CacheFull:
            self._close(number)
            return self._shorten_prefix(request.ids) and self._start(request)
        sampler.accept_prompt(request.ids)
        self._sample(slot, row)
        return True

    def _prefill(self, number: int, ids: Sequence[int]) -> int:
        context = self._context
        cached = min(common_prefix(self._prefix or (), ids), len(ids) - 1)
        if cached:
            context.copy(_PREFIX, number)
            cached = context.truncate(number, cached)  # 0 for recurrent models
        row = -1
        for start in range(cached, len(ids), context.n_batch):
            row = context.decode([(number, ids[start : start + context.n_batch])])[0]
        if self._prefix is None:
            context.copy(number, _PREFIX)
            self._prefix = list(ids)
        elif cached < len(self._prefix):  # keep only what all prompts share
            self._truncate_prefix(cached)
        return row

    def _shorten_prefix(self, ids: Sequence[int]) -> bool:
        """Free the part of the first prompt that is not a prefix of `ids`; return False if there is none."""
        shared = common_prefix(self._prefix or (), ids)
        if self._prefix is None or shared == len(self._prefix):
            return False
        self._truncate_prefix(shared)
        return True

    def _truncate_prefix(self, length: int) -> None:
        self._prefix = (self._prefix or [])[: self._context.truncate(_PREFIX, length)]

    def _sample(self, slot: _Slot, row: int) -> None:
        slot.ids.append(slot.sampler.sample(self._context, row))
        if slot.request.stops:
            slot.detokenizer.feed(self._context.model.tokenizer.piece(slot.ids[-1]))

    def _pop_finished(self, is_end: Callable[[int], bool]) -> Iterator[BatchResult]:
        for number, slot in list(self._slots.items()):
            hit_eos = is_end(slot.ids[-1])
            hit_stop = slot.detokenizer.matched_stop is not None and not hit_eos
            if hit_eos or hit_stop or len(slot.ids) >= slot.request.limit:
                ids = slot.ids[:-1] if hit_eos else slot.ids
                yield BatchResult(slot.request.key, tuple(ids), hit_eos=hit_eos, is_full=False, hit_stop=hit_stop)
                self._close(number)

    def _step(self, waiting: collections.deque[BatchRequest]) -> Iterator[BatchResult]:
        """Generate a token for each slot; if the cache is full, the newest slot goes back to the queue."""
        numbers = list(self._slots)
        if not numbers:
            return
        try:
            rows = self._context.decode([(number, self._slots[number].ids[-1:]) for number in numbers])
        except CacheFull:
            yield from self._make_room(numbers, waiting)
            return
        for number, row in zip(numbers, rows, strict=True):
            self._sample(self._slots[number], row)

    def _make_room(self, numbers: Sequence[int], waiting: collections.deque[BatchRequest]) -> Iterator[BatchResult]:
        newest = self._slots[numbers[-1]]
        if len(numbers) > 1:
            waiting.appendleft(newest.request)
            self._close(numbers[-1])
            self._is_tight = True  # start no request until another one has finished
        elif self._prefix:
            self._truncate_prefix(0)
        else:
            yield BatchResult(newest.request.key, tuple(newest.ids), hit_eos=False, is_full=True)
            self._close(numbers[-1])

    def _close(self, number: int) -> None:
        self._is_tight = False
        self._slots.pop(number).sampler.close()
        self._context.truncate(number, 0)
        self._free.append(number)
