"""Fewer and longer texts: each chunk of a stream costs the server and its client about half a millisecond."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qwenlocal.chat.answer_loop import AnswerItem
from qwenlocal.chat.events import Text

_INTERVAL = 0.06  # seconds; a text of 17 pieces per second still flows


class EventBuffer:
    """
    Joins the texts of a fast model into chunks of about 60 ms.

    The first text of an answer and every other event go out at once, with everything that was held back. Texts also go
    out if they would have to wait longer than that for the next step of the model. One thread calls `add`.

    A model that needs 13 ms per token gives chunks of four tokens; one that needs more than 30 ms, of one.
    """

    def __init__(
        self,
        emit: Callable[[Sequence[tuple[int, AnswerItem]]], object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emit, self._clock = emit, clock
        self._items: list[tuple[int, AnswerItem]] = []
        self._positions: dict[int, int] = {}  # of the last text of each key in these items
        self._started: set[int] = set()  # the keys whose first text was passed on
        self._emitted = self._added = clock()

    def add(self, items: Sequence[tuple[int, AnswerItem]]) -> None:
        """Add the events of a step of the model."""
        now = self._clock()
        is_due = now + (now - self._added) > self._emitted + _INTERVAL
        self._added = now
        for key, item in items:
            is_due |= self._append(key, item)
        if is_due:
            self._emit(self._items)
            self._items, self._emitted = [], now
            self._positions.clear()

    def _append(self, key: int, item: AnswerItem) -> bool:
        """Append an event; return True if it cannot wait."""
        if not isinstance(item, Text):
            self._items.append((key, item))
            self._started.discard(key)
            self._positions.pop(key, None)
            return True
        if (position := self._positions.get(key)) is None:
            self._positions[key] = len(self._items)
            self._items.append((key, item))
        else:
            earlier = self._items[position][1]
            assert isinstance(earlier, Text)
            self._items[position] = (key, earlier + item)
        is_first = key not in self._started
        self._started.add(key)
        return is_first
