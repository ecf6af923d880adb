"""
In-place updates at the bottom of the terminal: finished lines scroll away for good, pending lines may still change.

Only the difference is written, in a single synchronized update, so that nothing flickers. A line that has scrolled off
the screen is never printed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TextIO

from qwenlocal.formatting import display_width

_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"  # synchronized update, for terminals that support it
_MIN_ROWS = 3


class Screen:
    """
    Writes lines to `out`; `size` returns the current size of the terminal.

    Lines contain no line breaks, and no escape sequences except colors. They may be wider than the terminal.
    """

    def __init__(self, out: TextIO, size: Callable[[], os.terminal_size]) -> None:
        self._out, self._size = out, size
        self._shown: list[str] = []  # lines on the screen that may still change
        self._scrolled = 0  # number of pending lines that had to scroll away before they were finished
        self._is_overwritten = False

    def update(self, finished: Sequence[str], pending: Sequence[str], footer: Sequence[str] = ()) -> None:
        """
        Print the `finished` lines for good, then the `pending` lines, then the `footer` (a status line).

        Pending lines that do not fit on the screen are printed for good as they are, and not again once they are
        finished.
        """
        size = self._size()
        final = list(finished[self._scrolled :])
        if finished:  # the lines that had scrolled away are the first of these
            self._scrolled = 0
        shown = list(pending[self._scrolled :])
        free_rows = max(_MIN_ROWS, size.lines - 1) - sum(rows_of(line, size.columns) for line in footer)
        while len(shown) > 1 and sum(rows_of(line, size.columns) for line in shown) > free_rows:
            final.append(shown.pop(0))
            self._scrolled += 1
        self._draw(final, [*shown, *footer], size)

    def insert(self, lines: Sequence[str]) -> None:
        """Print lines for good above the pending ones."""
        if lines:
            self._draw(lines, self._shown, self._size())

    def end(self, finished: Sequence[str]) -> None:
        """Print the last lines, erase the footer, and leave the cursor at the start of a line."""
        self.update(finished, [])
        self._scrolled = 0

    def leave(self) -> None:
        """Draw below the cursor from now on: another program has written to the terminal. Safe in signal handlers."""
        self._is_overwritten = True

    def _draw(self, final: Sequence[str], shown: Sequence[str], size: os.terminal_size) -> None:
        if self._is_overwritten:
            self._shown, self._is_overwritten = [], False
        unchanged = 0
        if not final:
            while unchanged < min(len(shown), len(self._shown)) and shown[unchanged] == self._shown[unchanged]:
                unchanged += 1
            if unchanged == len(shown) == len(self._shown):
                return
        if unchanged and unchanged == len(shown):  # only trailing lines disappear: end at the last remaining line
            unchanged -= 1
        move = self._move_to_line(unchanged, size)
        text = move + "\x1b[J" + "".join(f"{line}\n" for line in final) + "\n".join(shown[unchanged:])
        self._out.write(f"{_BEGIN}{text}{_END}")
        self._out.flush()
        self._shown = list(shown)

    def _move_to_line(self, index: int, size: os.terminal_size) -> str:
        """Return the sequence that moves the cursor from the end of the shown lines to the start of line `index`."""
        if not self._shown:
            return "\r" if index == 0 else ""
        if index >= len(self._shown):
            return "\n"
        up = sum(rows_of(line, size.columns) for line in self._shown[index:]) - 1
        return "\r" + (f"\x1b[{up}A" if up else "")


def rows_of(line: str, columns: int) -> int:
    """Count the rows that a line takes on a terminal with `columns` columns, at least 1."""
    return max(1, -(-display_width(line) // max(1, columns)))
