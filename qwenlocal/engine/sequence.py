"""One conversation's tokens in the KV cache: only what is new is computed."""

from __future__ import annotations

import collections.abc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwenlocal.engine.context import Aborted, Context, NoRoom
from qwenlocal.engine.parking import WORTH_PARKING, Parking
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.engine.sampler import Sampler
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.saved import SavedStates
from qwenlocal.engine.speculation import Drafts, NoSpeculation
from qwenlocal.engine.watch import EVERY
from qwenlocal.errors import BadWeights, ContextFull

_SLOW, _QUICK = 3.0, 0.5  # seconds for a part of a long prompt, between which its size stays as it is
_DAMAGED = "Which ones: qwenlocal inspect FILE. One that was fetched can be mended: qwenlocal verify NAME"
_FIRST_CHUNK, _LEAST_CHUNK = 256, 64


@dataclass(frozen=True)
class Prefill:
    """`done` of `total` prompt tokens are in the KV cache; `reused` of them were there before."""

    done: int
    total: int
    reused: int


class Generator(Protocol):
    """Anything that continues token ids: a plain `TokenSequence`, or a scheduler of many."""

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[Prefill | int]:
        """
        Yield `Prefill` while the prompt is read, then the ids of the answer as they come, at most `limit`.

        End tokens are yielded like any other; it is the caller who stops there, by closing the iterator. The iterator
        ends early when it is stopped or the context is full (`is_full`).

        Raises
        ------
        ContextFull: the prompt leaves no room for an answer.
        BadWeights: the model computes NaN.
        """
        ...

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context is full."""
        ...

    def stop(self) -> None:
        """End what is being generated, within milliseconds; from any thread."""
        ...

    @property
    def was_stopped(self) -> bool:
        """Whether the last answer ended through `stop`."""
        ...


class TokenSequence:
    """Sequence `number` of a context. Fulfils `Generator`."""

    def __init__(
        self,
        context: Context,
        number: int = 0,
        clock: Callable[[], float] = time.monotonic,
        speculation: Drafts | None = None,
        parking: Parking | None = None,
        saved: SavedStates | None = None,
        watch: Callable[[], object] = lambda: None,
    ) -> None:
        """
        With `speculation`, several tokens are checked at once where the text repeats itself. What is left goes to
        `parking`; what is there or in `saved` is not computed again. `watch` is called now and then while something is
        computed; what it raises ends that.
        """
        self._context, self._number, self._clock = context, number, clock
        self._speculation, self._saved = speculation or NoSpeculation(), saved
        self._watch = watch
        self._parking = parking or Parking(context, context.options.sequences)  # no room: nothing is parked
        self._computed, self._seconds = 0, 0.0  # prompt tokens, and the time that they took
        self._held: list[int] = []  # exactly what the KV cache holds
        self._full = False
        self._stopped = False

    @property
    def held(self) -> tuple[int, ...]:
        """The tokens in the KV cache."""
        return tuple(self._held)

    def adopt(self, ids: Sequence[int]) -> None:
        """The cache holds `ids` already: another sequence object, or a saved state, put them there."""
        self._held = list(ids)
        self._settle()

    @property
    def is_full(self) -> bool:
        return self._full

    @property
    def was_stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        self._context.abort.set()

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[Prefill | int]:
        if not ids:
            raise ValueError("there is nothing to continue")
        if len(ids) >= self._context.n_ctx:
            raise ContextFull(len(ids), self._context.n_ctx, self._context.model.n_ctx_train)
        self._full = self._stopped = False
        self._context.abort.clear()
        self._settle()
        sampler = Sampler(sampling, self._context.model.vocabulary)
        try:
            yield from self._generate(ids, sampler, limit)
        except Aborted:
            self._stopped = True
        except NoRoom:
            self._full = True
        finally:
            sampler.close()
            self._settle()

    def _generate(self, ids: Sequence[int], sampler: Sampler, limit: int) -> Iterator[Prefill | int]:
        context = self._context
        row = yield from self._prefill(ids)
        sampler.remember(ids)
        self._speculation.begin(ids)
        draft: Sequence[int] = ()
        left, seconds, since = limit, None, 0
        if forced := sampler.forced()[:left]:
            row = yield from self._force((), forced)
            left -= len(forced)
        while left:
            came: list[int] = []
            for place in range(len(draft) + 1):
                token = self._sample(sampler, row + place)
                came.append(token)
                yield token
                if len(came) == left:
                    return
                if place == len(draft) or token != draft[place]:
                    break
                self._held.append(token)  # its keys and values are there already
            left -= len(came)
            since += len(came)
            if since >= EVERY:
                self._watch()
                since = 0
            if draft:
                self._settle()
            self._speculation.learn(came, len(draft), seconds)
            if context.abort:
                raise Aborted
            if len(self._held) >= context.n_ctx:
                raise NoRoom
            if forced := sampler.forced()[:left]:
                row, draft, seconds = (yield from self._force((token,), forced)), (), None
                self._speculation.learn(forced, 0, None)
                left -= len(forced)
                continue
            draft = self._speculation.propose(min(left, context.n_ctx - len(self._held)) - 1)
            started = self._clock()
            row = self._decode((token, *draft), all_logits=bool(draft))
            seconds = self._clock() - started
            self._held.append(token)

    def _decode(self, ids: Sequence[int], *, all_logits: bool = False) -> int:
        """`Context.decode` for this sequence; what is parked makes room where there is none."""
        while True:
            try:
                return self._context.decode([(self._number, ids)], all_logits=all_logits)[0]
            except NoRoom:
                if not self._parking.drop_oldest():
                    raise

    def _force(
        self, before: Sequence[int], forced: Sequence[int]
    ) -> collections.abc.Generator[Prefill | int, None, int]:
        """Compute `before` and what a grammar forces together, and say the latter; returns the row of logits."""
        row, rest = -1, [*before, *forced]
        while rest:
            new, rest = rest[: self._context.n_batch], rest[self._context.n_batch :]
            if len(self._held) + len(new) > self._context.n_ctx:
                raise NoRoom
            row = self._decode(new)
            self._held.extend(new)
        yield from forced
        return row

    def _sample(self, sampler: Sampler, row: int) -> int:
        if self._context.is_broken(row):
            what = "its numbers come out as NaN; weights are damaged"
            raise BadWeights(self._context.model.path, what, hint=_DAMAGED)
        return sampler.sample(self._context, row)

    def _prefill(self, ids: Sequence[int]) -> collections.abc.Generator[Prefill, None, int]:
        """Put `ids` into the cache but for what it holds already (never the last one); returns the row of logits."""
        self._recall(ids)
        self._truncate(min(common_prefix(self._held, ids), len(ids) - 1))
        reused = len(self._held)
        yield Prefill(reused, len(ids), reused)
        chunk, row = min(_FIRST_CHUNK, self._context.n_batch), -1
        while len(self._held) < len(ids):
            if self._context.abort:
                raise Aborted
            new = ids[len(self._held) : len(self._held) + chunk]
            self._watch()
            started = self._clock()
            row = self._decode(new)
            self._held.extend(new)
            seconds = self._clock() - started
            self._computed, self._seconds = self._computed + len(new), self._seconds + seconds
            yield Prefill(len(self._held), len(ids), reused)
            chunk = self._next_chunk(chunk, seconds)
        return row

    def _recall(self, ids: Sequence[int]) -> None:
        """Take what is parked or saved of the beginning of `ids`, where that is more than what is held."""
        known = common_prefix(self._held, ids)
        if len(self._held) - known >= WORTH_PARKING:
            self._parking.park(self._number, self._held)
        parked = self._parking.best(ids, known)
        if parked is not None:
            self._held = self._parking.take(parked, self._number)
            known = common_prefix(self._held, ids)
        if self._saved is None or len(ids) <= known + WORTH_PARKING:
            return
        found = self._saved.best(ids, known + WORTH_PARKING)
        if found and len(found.tokens) < self._context.n_ctx:
            while self._parking.drop_oldest():  # llama.cpp wants the room for all of it at once
                pass
            recalled = self._saved.restore(found, self._context, self._number)
            self._held = list(found.tokens) if recalled else []
            self._settle()

    def remember(self) -> bool:
        """Save what the cache holds, where that is quicker to read than to compute; tells whether it was."""
        if self._saved is None or not self._computed:
            return False
        return self._saved.save(self._context, self._number, self._held, self._seconds / self._computed)

    def _next_chunk(self, chunk: int, seconds: float) -> int:
        """Large parts are efficient (256 tokens read a tenth faster than 64), small ones show progress more often."""
        if seconds > _SLOW:
            return max(_LEAST_CHUNK, chunk // 2)
        return min(chunk * 2, self._context.n_batch) if seconds < _QUICK else chunk

    def _truncate(self, length: int) -> None:
        if length < len(self._held):
            del self._held[self._context.truncate(self._number, length) :]

    def _settle(self) -> None:
        """
        Go back to what is known to be in the cache.

        There is more after an abort and a wrong draft, and where another sequence object left something: the model
        would see both texts.
        """
        if self._context.length(self._number) > len(self._held):
            del self._held[self._context.truncate(self._number, len(self._held)) :]
