"""Progress on stderr: a bar for downloads and conversions (plain lines if not a terminal), and a one-line status."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import dim, supports_ansi
from qwenlocal.terminal.wrapping import join_fitting, terminal_width

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from qwenlocal.progress import TaskProgress

_PRINT_INTERVAL = 5.0  # seconds
_ERASE_LINE = "\r\x1b[K"


class PlainProgress:
    """Prints a line every few seconds, and one at the end."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._printed_at = self._started_at = clock()
        self._initial: int | None = None  # bytes that were done at the start
        self._last: TaskProgress | None = None

    def __call__(self, state: TaskProgress) -> None:
        if self._initial is None:
            self._initial = state.done
        self._last = state
        now = self._clock()
        if now - self._printed_at >= _PRINT_INTERVAL:
            self._printed_at = now
            self._print(state)

    def _print(self, state: TaskProgress) -> None:
        seconds = max(1e-9, self._clock() - self._started_at)
        speed = (state.done - (self._initial or 0)) / seconds
        left = f", {(state.total - state.done) / speed:.0f} s left" if speed > 0 and state.done < state.total else ""
        share = state.done / max(1, state.total)
        rate = f", {speed / 1e6:.1f} MB/s" if speed >= 1e5 else ""
        self._out.write(f"{state.doing} {state.name}: {share:.0%} of {format_bytes(state.total)}{rate}{left}\n")
        self._out.flush()

    def close(self) -> None:
        """Print the end of a finished task."""
        if self._last is not None and self._last.done >= self._last.total:
            self._print(self._last)


class ProgressBar:
    """Shows a bar with bytes, speed and time left."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._bar: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, state: TaskProgress) -> None:
        if self._bar is None:
            self._bar = self._start()
        if state.name not in self._tasks:
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks = {state.name: self._bar.add_task(state.doing, total=state.total, completed=state.done)}
        self._bar.update(
            self._tasks[state.name], completed=state.done, total=state.total, description=f"{state.doing} {state.name}"
        )

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=self._out),
            transient=True,
        )
        bar.start()
        return bar

    def close(self) -> None:
        """Erase the bar."""
        if self._bar is not None:
            self._bar.stop()


def show_progress(out: TextIO) -> contextlib.closing[ProgressBar | PlainProgress]:
    """Open a bar if `out` is a terminal, otherwise plain lines."""
    return contextlib.closing(ProgressBar(out) if supports_ansi(out) else PlainProgress(out))


class StatusLine:
    """Shows one changing line once a task takes longer than `delay` seconds; nothing if `out` is not a terminal."""

    def __init__(self, out: TextIO, delay: float = 0.7) -> None:
        self._out, self._delay, self._started_at = out, delay, time.monotonic()
        self._shown = ""

    def show(self, text: str) -> None:
        """Replace the line by `text`."""
        if text == self._shown or not supports_ansi(self._out) or time.monotonic() - self._started_at < self._delay:
            return
        self._shown = text
        self._out.write(f"{_ERASE_LINE}{dim(join_fitting([text], '', terminal_width() - 1))}")
        self._out.flush()

    def clear(self) -> None:
        """Erase the line and restart the delay."""
        if self._shown:
            self._out.write(_ERASE_LINE)
            self._out.flush()
        self._shown, self._started_at = "", time.monotonic()


@contextlib.contextmanager
def status_line(out: TextIO, delay: float = 0.7) -> Iterator[Callable[[str], None]]:
    """Yield `StatusLine.show`; the line is erased at the end."""
    line = StatusLine(out, delay)
    try:
        yield line.show
    finally:
        line.clear()


@contextlib.contextmanager
def loading_status(out: TextIO, name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that takes the loaded fraction of a model, from 0 to 1, and shows it."""
    with status_line(out) as show:
        yield lambda fraction: show(tr("loading {name}: {fraction:.0%}", name=name, fraction=fraction))
