"""One line that says what takes the time, and goes away when it is over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from qwenlocal.language import tr
from qwenlocal.terminal.plain import obeys

_PATIENCE = 0.7  # seconds; what is quicker needs no words
_ERASE = "\r\x1b[K"


class StatusLine:
    """Shows a changing sentence on a terminal once something takes longer than a moment; nothing elsewhere."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, patience: float = _PATIENCE) -> None:
        self._out, self._clock, self._patience = out, clock, patience
        self._began = clock()
        self._shown = ""

    def show(self, sentence: str) -> None:
        """Put `sentence` on the line."""
        if sentence == self._shown or not obeys(self._out) or self._clock() - self._began < self._patience:
            return
        self._shown = sentence
        self._out.write(f"{_ERASE}\x1b[2m{sentence}\x1b[0m")
        self._out.flush()

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._out.write(_ERASE)
            self._out.flush()
        self._shown = ""
        self._began = self._clock()


@contextlib.contextmanager
def loading_status(out: TextIO, name: str) -> Iterator[Callable[[float], None]]:
    """For loading a model: the function given gets a fraction between 0 and 1."""
    line = StatusLine(out)
    try:
        yield lambda fraction: line.show(tr("loading {name}: {fraction:.0%}", name=name, fraction=fraction))
    finally:
        line.clear()
