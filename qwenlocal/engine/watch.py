"""Memory while a model answers: better an answer that stops than a system that ends programs."""

from __future__ import annotations

from collections.abc import Callable

from qwenlocal.errors import MemoryLow
from qwenlocal.machine import Memory

_LEAST = 128 << 20  # bytes; below this Linux begins to look for programs to end
_STALLED = 0.4  # of the last ten seconds; from here on a machine hardly answers to its keys
EVERY = 32  # tokens between two looks


class MemoryWatch:
    """
    Looks when it is called.

    `memory` tells how much there is, `stalled` for how much of the last seconds everything waited for it, `relief`
    gives something back that can be done without and tells whether it did.
    """

    def __init__(
        self,
        memory: Callable[[], Memory],
        stalled: Callable[[], float] = lambda: 0.0,
        relief: Callable[[], bool] = lambda: False,
        least: int = _LEAST,
    ) -> None:
        self._memory, self._stalled, self._relief, self._least = memory, stalled, relief, least

    def __call__(self) -> None:
        """
        Raises
        ------
        MemoryLow: there is so little left that something would be ended soon, and nothing to give back.
        """
        found, stalled = self._memory(), self._stalled()
        low = found.available < min(self._least, found.total // 16)
        if (low or stalled > _STALLED) and not self._relief():
            raise MemoryLow(found.available, 0.0 if low else stalled)
