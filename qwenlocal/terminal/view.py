"""An answer on a terminal: Markdown as it comes, and below it what the model is at and what is typed meanwhile."""

from __future__ import annotations

import contextlib
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from qwenlocal.chat.events import Done, Event, LeftOut, Reading, Stats, Summarising, Text, Why
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import harmless, width_of, wrapped
from qwenlocal.terminal.markdown import Lines, Look, MarkdownStream
from qwenlocal.terminal.progress import StatusLine
from qwenlocal.terminal.screen import Screen

_LEAST, _MOST = 0.04, 0.4  # seconds between two pictures
_SHARE = 40  # times as long as a picture took is waited before the next: laying out takes 1/40 of the time
_PATIENCE = 0.3  # seconds before it is said what the model is at


class PlainStream:
    """Text as it is, in place of `MarkdownStream`: a line is finished when the next one begins."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> None:
        """More of the text."""
        self._rest += harmless(text)

    def lines(self, look: Look) -> Lines:
        """Whole lines, and the one that is not."""
        *finished, self._rest = self._rest.split("\n")
        return Lines(finished, [self._rest] if self._rest else [])

    def end(self, look: Look) -> Lines:
        """No more text comes."""
        finished = self._rest.split("\n") if self._rest else []
        self._rest = ""
        return Lines(finished, [])


class Progress:
    """What the model is at, in one line: `n_ctx` tokens are what it has room for."""

    def __init__(self, n_ctx: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._n_ctx, self._clock = n_ctx, clock
        self._begun = clock()
        self._first: float | None = None  # when the answer began
        self._read = self._said = 0
        self._event: Event | None = None

    def happened(self, event: Event) -> None:
        """Take note of it."""
        self._event = event
        if isinstance(event, Reading):
            self._read = event.total
        elif isinstance(event, Text):
            self._first = self._first or self._clock()
            self._said = event.tokens

    def sentence(self) -> str:
        """`reading 1,024 of 4,096 tokens (25 %), 12 s left`, or `37.2 tokens/s, 512 of 8,192 tokens`."""
        now, event = self._clock(), self._event
        if isinstance(event, Reading):
            if now - self._begun < _PATIENCE:
                return ""
            new, left = event.done - event.reused, event.total - event.done
            seconds = (now - self._begun) / new * left if new else 0
            rest = tr(", {time} left", time=_duration(seconds)) if left and new else ""
            share = event.done / event.total
            read = tr(
                "reading {done:,} of {total:,} tokens ({share:.0%})", done=event.done, total=event.total, share=share
            )
            return read + rest
        if isinstance(event, Summarising):
            return tr(
                "the context is full; summarising {turns} turns: {words} words", turns=event.turns, words=event.words
            )
        if self._first is None:
            return ""
        parts = []
        if self._said > 1 and now > self._first:
            parts.append(tr("{speed:.1f} tokens/s", speed=(self._said - 1) / (now - self._first)))
        if self._n_ctx:
            used = self._read + self._said
            parts.append(tr("{used:,} of {n_ctx:,} tokens of context", used=used, n_ctx=self._n_ctx))
        return ", ".join(parts)


class AnswerView:
    """
    Draws on `screen`. `look` tells how wide lines are now, `typed` what is being typed.

    Drawn at most 25 times a second, and so seldom that laying out takes a fortieth of the time; what is typed is drawn
    at once.
    """

    def __init__(
        self,
        screen: Screen,
        look: Callable[[], Look],
        progress: Progress,
        typed: Callable[[], str] = lambda: "",
        *,
        markdown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._screen, self._look, self._progress, self._typed = screen, look, progress, typed
        self._stream: MarkdownStream | PlainStream = MarkdownStream() if markdown else PlainStream()
        self._clock = clock
        self._lock = threading.Lock()
        self._open: Sequence[str] = []
        self._above: list[str] = []  # sentences that go before the answer
        self._next = 0.0  # when it may be drawn again
        self._is_new = False
        self.seconds = 0.0  # that drawing took

    def show(self, events: Iterable[Event]) -> Done:
        """Draw what happens until it is over, and tell how it ended."""
        done = Done(Why.END, Stats(0, 0, 0, 0.0, 0.0))
        with self._painting():
            for event in events:
                with self._lock:
                    self._progress.happened(event)
                    if isinstance(event, Text):
                        self._stream.feed(event.text)
                        self._is_new = True
                    elif isinstance(event, LeftOut):
                        self._above += _dim_lines(harmless(event.sentence()), self._look())
                    elif isinstance(event, Done):
                        done = event
        with self._lock:
            self._screen.end(self._stream.end(self._look()).finished)
        return done

    def key(self) -> None:
        """Something was typed: draw it now."""
        with self._lock:
            self._screen.update([], self._open, self._below(self._look()))

    @contextlib.contextmanager
    def _painting(self) -> Iterator[None]:
        over = threading.Event()

        def paint() -> None:
            while not over.wait(_LEAST):
                self._paint()

        painter = threading.Thread(target=paint, daemon=True)
        painter.start()
        try:
            yield
        finally:
            over.set()
            painter.join()

    def _paint(self) -> None:
        with self._lock:
            begun = self._clock()
            if begun < self._next:
                return
            look, finished = self._look(), list[str]()
            if self._is_new:
                lines = self._stream.lines(look)
                finished, self._open, self._is_new = list(lines.finished), lines.open, False
            if self._above:
                self._screen.update([], [])
                self._screen.end(self._above)
                self._above = []
            self._screen.update(finished, self._open, self._below(look))
            taken = self._clock() - begun
            self.seconds += taken
            self._next = begun + min(_MOST, _SHARE * taken)

    def _below(self, look: Look) -> list[str]:
        """The status line, and what is being typed."""
        found = [_dim(status, look)] if (status := self._progress.sentence()) else []
        typed = self._typed()
        if typed:
            line = harmless(typed.rpartition("\n")[2])
            while width_of(line) > look.width - 3:
                line = line[1:]
            found.append(f"> {line}")
        return found


def _dim_lines(text: str, look: Look) -> list[str]:
    return [f"\x1b[2m{line}\x1b[0m" for line in textwrap.wrap(text, look.width)]


def _dim(text: str, look: Look) -> str:
    """Shortened to one row."""
    while width_of(text) > look.width:
        text = text[:-2] + "…"
    return f"\x1b[2m{text}\x1b[0m"


def _duration(seconds: float) -> str:
    """`_duration(95)` is "1 min 35 s"."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def show_answer(events: Iterable[Event], out: TextIO, aside: TextIO) -> Done:
    """
    Write the text of `events` to `out` and return how it ended.

    On a terminal, control characters in the text are made visible; a pipe gets the text as it is. The text ends with a
    line break.
    """
    status = StatusLine(aside)
    clean = harmless if out.isatty() else str
    done = Done(Why.END, Stats(0, 0, 0, 0.0, 0.0))
    last = "\n"
    for event in events:
        if isinstance(event, Reading):
            status.show(
                tr(
                    "reading: {done:,} of {total:,} tokens ({share:.0%})",
                    done=event.done,
                    total=event.total,
                    share=event.done / event.total,
                )
            )
        elif isinstance(event, Text):
            status.clear()
            out.write(clean(event.text))
            out.flush()
            last = event.text[-1]
        elif isinstance(event, Summarising):
            status.show(tr("the context is full; summarising the oldest turns: {words} words", words=event.words))
        elif isinstance(event, LeftOut):
            status.clear()
            aside.write(wrapped(harmless(event.sentence()), aside) + "\n")
            aside.flush()
        else:
            done = event
    status.clear()
    if last != "\n":
        out.write("\n")
    out.flush()
    return done
