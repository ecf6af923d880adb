"""How far a download is: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from qwenlocal.terminal.ansi import obeys

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
import contextlib
from collections.abc import Iterator

from qwenlocal.i18n import tr


class State(Protocol):
    """What is shown of a piece of work (`library.download.Progress` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def doing(self) -> str: ...
    @property
    def source(self) -> str: ...


class Plain:
    """A line every few seconds, and one at the end."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, every: float = 5.0) -> None:
        self._out, self._clock, self._every = out, clock, every
        self._shown = self._began = clock()
        self._start: int | None = None
        self._last: State | None = None

    def __call__(self, state: State) -> None:
        if self._start is None:
            self._start = state.done
        self._last = state
        now = self._clock()
        if now - self._shown >= self._every:
            self._shown = now
            self._write(state)

    def _write(self, state: State) -> None:
        seconds = max(1e-9, self._clock() - self._began)
        speed = (state.done - (self._start or 0)) / seconds
        left = f", {(state.total - state.done) / speed:.0f} s left" if speed > 0 and state.done < state.total else ""
        share = state.done / max(1, state.total)
        pace = f", {speed / 1e6:.1f} MB/s" if speed >= 1e5 else ""
        self._out.write(f"{state.doing} {state.name}: {share:.0%} of {_size(state.total)}{pace}{left}\n")
        self._out.flush()

    def __enter__(self) -> Plain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None and self._last.done >= self._last.total:
            self._write(self._last)


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


class Live:
    """A bar with bytes, speed and time left."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._bar: Bar | None = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, state: State) -> None:
        if self._bar is None:
            self._bar = self._start()
        if state.name not in self._tasks:
            for task in self._tasks.values():
                self._bar.remove_task(task)
            self._tasks = {state.name: self._bar.add_task(state.doing, total=state.total, completed=state.done)}
        self._bar.update(
            self._tasks[state.name], completed=state.done, total=state.total, description=f"{state.doing} {state.name}"
        )

    def _start(self) -> Bar:
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

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress(out: TextIO) -> Live | Plain:
    """What fits `out`."""
    return Live(out) if obeys(out) else Plain(out)


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
