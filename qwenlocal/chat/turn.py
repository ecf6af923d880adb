"""One answer, from token ids to events. Written once; every face of the program shows these events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from qwenlocal.chat.events import Done, Event, Reading, Stats, Text, Why
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Generator, Prefill
from qwenlocal.engine.text import TextStream


class Pieces(Protocol):
    """What is needed of a vocabulary."""

    def piece(self, token: int, *, special: bool = False) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


def answer(
    generator: Generator,
    vocabulary: Pieces,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    limit: int | None = None,
    stops: Sequence[str] = (),
    begun: Sequence[int] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Event]:
    """
    Continue `ids`, and behind them `begun`, an answer that was cut: some `Reading`, then `Text` as it becomes certain,
    then one `Done`.

    Ends at any token with which the model ends, at a stop string (which is not part of the text), after `limit`
    tokens, where the context is full, or where the generator was stopped.

    Raises
    ------
    ContextFull: before the first event, if `ids` leave no room for an answer.
    """
    text = TextStream(stops)
    for token in begun:  # the text of these is known, but it may end in the middle of a character
        text.feed(vocabulary.piece(token))
    tokens, reused, why = 0, 0, None
    said = list(begun)
    started = first = last = clock()
    if sampling.grammar is not None:
        sampling = replace(sampling, begun=tuple(begun))
    for step in generator.generate([*ids, *begun], sampling, limit=limit or 1 << 30):
        if isinstance(step, Prefill):
            reused = step.reused
            yield Reading(step.done, step.total, step.reused)
            continue
        tokens, last = tokens + 1, clock()
        if tokens == 1:
            first = last
        if vocabulary.is_end(step):
            why = Why.END
            break
        said.append(step)
        if certain := text.feed(vocabulary.piece(step)):
            yield Text(certain, tokens)
        if text.stopped is not None:
            why = Why.STOP
            break
    if rest := text.finish():
        yield Text(rest, tokens)
    if why is None:
        why = Why.INTERRUPTED if generator.was_stopped else Why.CONTEXT if generator.is_full else Why.LENGTH
    if not tokens:
        first = clock()
    yield Done(
        why,
        Stats(len(ids) + len(begun), reused, tokens, first - started, last - first if tokens else 0.0),
        tuple(said) if why is not Why.STOP else (),
    )
