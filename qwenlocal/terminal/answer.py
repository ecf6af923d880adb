"""An answer as it comes: text on one stream, what takes the time on another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from qwenlocal.chat.events import Done, Event, LeftOut, Reading, Stats, Summarising, Text, Why
from qwenlocal.language import tr
from qwenlocal.terminal.plain import harmless, wrapped
from qwenlocal.terminal.status import StatusLine


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
