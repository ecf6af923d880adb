"""
The lower end of a terminal: lines that are finished scroll away for good, those below them may change.

Only what differs is written again, in one go, so nothing flickers; what has left the screen is never printed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO

from qwenlocal.terminal.ansi import width_of

_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # a synchronized update, for terminals that know of it
_LEAST_ROWS = 3


class Size(NamedTuple):
    """Of a terminal."""

    columns: int
    rows: int


class Screen:
    """
    Writes to `out`; `size` tells how large the terminal is now.

    Lines are without line breaks, with escape sequences for colours at most; they may be wider than the terminal.
    """

    def __init__(self, out: TextIO, size: Callable[[], Size]) -> None:
        self._out, self._size = out, size
        self._shown: list[str] = []  # lines that may change, as they are on the screen
        self._taken = 0  # of the open lines, those that had to scroll away before they were finished

    def update(self, finished: Sequence[str], open: Sequence[str], below: Sequence[str] = ()) -> None:
        """
        Print `finished` lines for good, above the `open` ones, above what stands `below` (a status line).

        Open lines that do not fit on the screen are printed for good as they are; when they are finished, they are not
        printed again.
        """
        size = self._size()
        done = list(finished[self._taken :])
        if finished:  # what had scrolled away was the beginning of these
            self._taken = 0
        shown = list(open[self._taken :])
        room = max(_LEAST_ROWS, size.rows - 1) - sum(rows_of(line, size.columns) for line in below)
        while len(shown) > 1 and sum(rows_of(line, size.columns) for line in shown) > room:
            done.append(shown.pop(0))
            self._taken += 1
        self._draw(done, [*shown, *below], size)

    def end(self, finished: Sequence[str]) -> None:
        """Print the last lines, take away what stood below them, and leave the cursor at the beginning of a line."""
        size = self._size()
        done = list(finished[self._taken :])
        self._taken = 0
        self._draw(done, [], size)

    def _draw(self, done: Sequence[str], shown: Sequence[str], size: Size) -> None:
        same = 0
        if not done:
            while same < min(len(shown), len(self._shown)) and shown[same] == self._shown[same]:
                same += 1
            if same == len(shown) == len(self._shown):
                return
        if same and same == len(shown):  # only the last lines went away: the cursor goes to the end of what is left
            same -= 1
        text = self._to_line(same, size) + "\x1b[J" + "".join(f"{line}\n" for line in done) + "\n".join(shown[same:])
        self._out.write(f"{_BEGIN}{text}{_END}")
        self._out.flush()
        self._shown = list(shown)

    def _to_line(self, number: int, size: Size) -> str:
        """From the end of the last shown line to the beginning of line `number`, as the terminal folds them now."""
        if not self._shown:
            return "\r" if number == 0 else ""
        if number >= len(self._shown):
            return "\n"
        up = sum(rows_of(line, size.columns) for line in self._shown[number:]) - 1
        return "\r" + (f"\x1b[{up}A" if up else "")


def rows_of(line: str, columns: int) -> int:
    """How many rows a line takes on a terminal of so many columns: at least one."""
    return max(1, -(-width_of(line) // max(1, columns)))
