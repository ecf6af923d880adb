"""Memory while a model answers: better an answer that stops than a system that ends programs."""

from __future__ import annotations

from collections.abc import Callable

from qwenlocal.errors import MemoryLow
from qwenlocal.machine import Memory

_LEAST = 128 << 20  # bytes; below this Linux begins to look for programs to end
EVERY = 32  # tokens between two looks


class MemoryWatch:
    """Looks when it is called. `memory` is what tells how much there is."""

    def __init__(self, memory: Callable[[], Memory], least: int = _LEAST) -> None:
        self._memory, self._least = memory, least

    def __call__(self) -> None:
        """
        Raises
        ------
        MemoryLow: there is so little left that something would be ended soon.
        """
        found = self._memory()
        if found.available < min(self._least, found.total // 16):
            raise MemoryLow(found.available)
