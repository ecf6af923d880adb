"""Answers to many prompts, several at once, on a `Scheduler`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwenlocal.engine.context import Context
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.scheduler import Ended, Sampled, Scheduler, SequenceRequest
from qwenlocal.engine.speculation import CostCurve
from qwenlocal.engine.tokenizer import IncrementalDetokenizer
from qwenlocal.errors import ContextFull

_MIN_GAIN = 1.1  # in speed, for a larger batch to be worth its memory


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


class _Answer:
    """The tokens of a request so far."""

    def __init__(self, request: BatchRequest, piece: Callable[[int], bytes], is_end: Callable[[int], bool]) -> None:
        self._request, self._piece, self._is_end = request, piece, is_end
        self._detokenizer = IncrementalDetokenizer(request.stops)
        self._ids: list[int] = []

    def add(self, token: int) -> BatchResult | None:
        """Append a token; return the result if it ends the answer."""
        if self._is_end(token):
            return self.result(hit_eos=True)
        self._ids.append(token)
        if self._request.stops:
            self._detokenizer.feed(self._piece(token))
        return self.result() if self._detokenizer.matched_stop is not None else None

    def result(self, *, hit_eos: bool = False, is_full: bool = False) -> BatchResult:
        """Return the answer so far."""
        hit_stop = self._detokenizer.matched_stop is not None
        return BatchResult(self._request.key, tuple(self._ids), hit_eos=hit_eos, is_full=is_full, hit_stop=hit_stop)


class BatchGenerator:
    """A generator for many requests, as many at once as `context` has sequences."""

    def __init__(self, context: Context) -> None:
        self._context, self._stopped = context, False
        self._scheduler = Scheduler(context, max(1, context.options.n_seq_max - 1))

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
        source, answers = iter(requests), dict[int, _Answer]()
        try:
            while not self._stopped:
                while not self._scheduler.n_waiting and (request := next(source, None)):
                    answers[request.key] = answer = _Answer(request, self._context.model.tokenizer.piece, is_end)
                    try:
                        self._scheduler.submit(
                            SequenceRequest(request.key, request.ids, request.sampling, request.limit)
                        )
                    except ContextFull:
                        yield answer.result(is_full=True)
                if self._scheduler.is_idle:
                    return
                yield from self._step(answers)
        finally:
            self._scheduler.close()

    def _step(self, answers: dict[int, _Answer]) -> Iterator[BatchResult]:
        for event in self._scheduler.step():
            answer = answers.get(event.key)  # none: it has ended by an earlier token of the same step
            if answer is None:
                continue
            result = None
            if isinstance(event, Sampled):
                result = answer.add(event.id)
                if result:
                    self._scheduler.finish(event.key)
            elif isinstance(event, Ended):
                if event.error:
                    raise event.error
                result = answer.result(is_full=event.is_full)
            if result:
                del answers[event.key]
                yield result
