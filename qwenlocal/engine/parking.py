"""
What a sequence held before it turned elsewhere, kept in the same cache: going back costs nothing.

Editing an early message or asking again drops the end of a conversation; before that, the whole is parked under another
sequence number. With a unified cache the common beginning is there once, whatever the number of sequences that hold it
(llama.h: llama_memory_seq_cp). Parked ends take room that nobody misses; where it is needed, the oldest goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.engine.context import Context
from qwenlocal.engine.prefix import common_prefix

WORTH_PARKING = 64  # tokens; fewer are computed in a moment


class Parking:
    """Parked sequences of a context, under the numbers from `first` on, as many as the context has."""

    def __init__(self, context: Context, first: int = 1) -> None:
        self._context = context
        self._free = list(range(first, context.options.sequences))
        self._parked: dict[int, list[int]] = {}  # by number, the oldest first

    def park(self, source: int, ids: Sequence[int]) -> None:
        """Keep what sequence `source` holds, `ids`; what is a beginning of it need not be kept any more."""
        for number, held in list(self._parked.items()):
            if list(ids[: len(held)]) == held:
                self._drop(number)
        if not self._free and not self.drop_oldest():
            return
        number = self._free.pop()
        self._context.copy(source, number)
        self._parked[number] = list(ids)

    def best(self, ids: Sequence[int], more_than: int) -> int | None:
        """The parked sequence that has the most of the beginning of `ids`, if that is more than `more_than` tokens."""
        best, most = None, more_than
        for number, held in self._parked.items():
            count = common_prefix(held, ids)
            if count > most:
                best, most = number, count
        return best

    def take(self, number: int, target: int) -> list[int]:
        """Have sequence `target` hold what is parked under `number`, which stays there; returns the tokens."""
        self._context.copy(number, target)
        self._parked[number] = held = self._parked.pop(number)  # the newest now
        return list(held)

    def drop_oldest(self) -> bool:
        """Give the room of the one that was parked first back; False where there is none."""
        if not self._parked:
            return False
        self._drop(next(iter(self._parked)))
        return True

    def _drop(self, number: int) -> None:
        del self._parked[number]
        self._context.truncate(number, 0)
        self._free.append(number)
