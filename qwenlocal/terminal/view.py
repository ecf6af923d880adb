"""Answers on a terminal: rendered as they arrive, with a status line and the type-ahead below; or as plain text."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, Summarizing, Text, TurnsEvicted
from qwenlocal.chat.worker import run_alongside
from qwenlocal.formatting import display_width, format_count, format_duration, join_sentences
from qwenlocal.i18n import mark, tr
from qwenlocal.progress import PromptProgress
from qwenlocal.terminal.ansi import dim, escape_controls
from qwenlocal.terminal.markdown import MarkdownStream, RenderedLines, RenderOptions
from qwenlocal.terminal.progress import StatusLine
from qwenlocal.terminal.screen import Screen
from qwenlocal.terminal.wrapping import join_fitting, wrap, wrap_line

if TYPE_CHECKING:
    from qwenlocal.engine.draft_model import ModelDrafter

_MIN_INTERVAL, _MAX_INTERVAL = 0.04, 0.4  # seconds between two redraws
_REST_FACTOR = 40  # the pause after a redraw, as a multiple of the time it took
_STATUS_DELAY = 0.3  # seconds before prompt progress is shown
DRAFT_UNLOADED = mark("The draft model was unloaded because memory is low.")
_NO_ANSWER = Done(FinishReason.EOS, GenerationStats(0, 0, 0, 0.0, 0.0))


def print_answer(events: Iterable[Event], out: TextIO, err: TextIO) -> Done:
    """
    Write the text of `events` to `out`, notes and progress to `err`, and return the last event.

    A terminal gets control characters made visible, a pipe the text unchanged. The text ends with a line break.
    """
    status = StatusLine(err)
    clean = escape_controls if out.isatty() else str
    done = _NO_ANSWER
    last = "\n"
    try:
        for event in events:
            if isinstance(event, PromptProgress):
                status.show(_describe_prompt_progress(event))
            elif isinstance(event, Summarizing):
                status.show(_describe_summarizing(event))
            elif isinstance(event, Text):
                status.clear()
                out.write(clean(event.text))
                out.flush()
                last = event.text[-1]
            elif isinstance(event, TurnsEvicted):
                status.clear()
                err.write(wrap(escape_controls(describe_eviction(event)), err) + "\n")
                err.flush()
            else:
                done = event
    finally:  # an answer that breaks off ends with a line break, too
        status.clear()
        if last != "\n":
            out.write("\n")
        out.flush()
    return done


class PlainTextStream:
    """Shows text as the model writes it, with the interface of `MarkdownStream`."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> None:
        """Append text; its control characters are made visible."""
        self._rest += escape_controls(text)

    def render(self, options: RenderOptions) -> RenderedLines:
        """Return the complete lines since the last call, and the incomplete one."""
        *finished, self._rest = self._rest.split("\n")
        return RenderedLines(finished, [self._rest] if self._rest else [])

    def finish(self, options: RenderOptions) -> RenderedLines:
        """Return the remaining lines: no more text follows."""
        finished = self._rest.split("\n") if self._rest else []
        self._rest = ""
        return RenderedLines(finished, [])


class AnswerProgress:
    """Describes in one line what the model is doing; `n_ctx` is the size of its context, 0 if it is not known."""

    def __init__(self, n_ctx: int) -> None:
        self._n_ctx, self._started_at = n_ctx, time.monotonic()
        self._first_text_at: float | None = None
        self._prompt_tokens = self._answer_tokens = 0
        self._event: Event | None = None

    def update(self, event: Event) -> None:
        """Record an event."""
        self._event = event
        if isinstance(event, PromptProgress):
            self._prompt_tokens = event.total
        elif isinstance(event, Text):
            self._first_text_at = self._first_text_at or time.monotonic()
            self._answer_tokens = event.tokens

    def describe(self) -> str:
        """
        Return the text of the status line, "" for none.

        It is `reading prompt: 1,024 of 4,096 tokens (25%), 12 s left`, and later `37.2 tokens/s, 512 of 8,192 tokens
        of context`.
        """
        now = time.monotonic()
        if isinstance(self._event, PromptProgress):
            return self._describe_prompt(self._event, now - self._started_at)
        if isinstance(self._event, Summarizing):
            return _describe_summarizing(self._event)
        return self._describe_answer(now)

    def _describe_prompt(self, event: PromptProgress, elapsed: float) -> str:
        if elapsed < _STATUS_DELAY:
            return ""
        new, left = event.done - event.reused, event.total - event.done
        seconds = elapsed / new * left if new else 0
        time_left = tr(", {time} left", time=format_duration(seconds)) if left and new else ""
        return _describe_prompt_progress(event) + time_left

    def _describe_answer(self, now: float) -> str:
        if self._first_text_at is None:
            return ""
        parts = []
        if self._answer_tokens > 1 and now > self._first_text_at:
            speed = (self._answer_tokens - 1) / (now - self._first_text_at)
            parts.append(_describe_speed(speed))
        if self._n_ctx:
            used = min(self._prompt_tokens + self._answer_tokens, self._n_ctx)
            parts.append(tr("{used:,} of {n_ctx:,} tokens of context", used=used, n_ctx=self._n_ctx))
        return ", ".join(parts)


def _describe_prompt_progress(event: PromptProgress) -> str:
    return tr(
        "reading prompt: {done:,} of {total:,} tokens ({share:.0%})",
        done=event.done,
        total=event.total,
        share=event.done / event.total,
    )


def _describe_summarizing(event: Summarizing) -> str:
    turns, words = format_count(event.turns, "turn"), format_count(event.words, "word")
    return tr("context full, summarizing {turns}: {words}", turns=turns, words=words)


def describe_eviction(event: TurnsEvicted) -> str:
    """Return `To make room, the oldest 3 turns, starting with “Hello, …”, were removed from the context.`"""
    if event.turns == 1:
        text = tr("To make room, the oldest turn, “{first}”, was removed from the context.", first=event.first)
    else:
        text = tr(
            "To make room, the oldest {turns} turns, starting with “{first}”, were removed from the context.",
            turns=event.turns,
            first=event.first,
        )
    if event.lacks_room:
        text = join_sentences(text, tr("There was no room for a summary."))
    return join_sentences(text, tr("Summary: {summary}", summary=event.summary) if event.summary else "")


def describe_stats(done: Done) -> str:
    """Return all known numbers of an answer and the reason why it ended in one line."""
    stats = done.stats
    first_token = tr("first token after {seconds:.2f} s", seconds=stats.first_token)
    if not stats.prompt_tokens:
        return f"{first_token} | {tr(done.finish_reason.value)}"
    prompt = tr("prompt {tokens}", tokens=format_count(stats.prompt_tokens, "token"))
    answer = tr("answer {tokens}", tokens=format_count(stats.answer_tokens, "token"))
    reused = " " + tr("({count:,} reused)", count=stats.reused_tokens) if stats.reused_tokens else ""
    parts = (
        _append_speed(f"{prompt}{reused}", stats.prompt_speed),
        first_token,
        _append_speed(answer, stats.answer_speed),
        tr(done.finish_reason.value),
    )
    return " | ".join(parts)


def describe_drafting(drafter: ModelDrafter) -> str:
    """Return `draft model: 61 of 80 drafted tokens accepted`."""
    return tr(
        "draft model: {accepted:,} of {drafted:,} drafted tokens accepted",
        accepted=drafter.accepted,
        drafted=drafter.drafted,
    )


def _describe_speed(tokens_per_second: float) -> str:
    return tr("{speed:.1f} tokens/s", speed=tokens_per_second)


def _append_speed(text: str, tokens_per_second: float) -> str:
    return f"{text}, {_describe_speed(tokens_per_second)}" if tokens_per_second else text  # 0 for a single token


class AnswerView:
    """
    Draws an answer on `screen`; `options` returns the current render options, `typed` the lines typed meanwhile.
    `n_ctx` is the size of the model's context, 0 if it is not known.

    It redraws at most 25 times a second, and rarely enough that rendering takes 1/40 of the time. Keys are drawn at
    once.
    """

    def __init__(
        self,
        screen: Screen,
        options: Callable[[], RenderOptions],
        n_ctx: int,
        typed: Callable[[], Sequence[str]] = tuple,
        *,
        markdown: bool = True,
    ) -> None:
        self._screen, self._options, self._progress, self._typed = screen, options, AnswerProgress(n_ctx), typed
        self._stream: MarkdownStream | PlainTextStream = MarkdownStream() if markdown else PlainTextStream()
        self._lock = threading.Lock()
        self._pending: Sequence[str] = []
        self._notes: list[str] = []  # lines to print before the answer
        self._next_redraw = 0.0
        self._has_new_text = self._has_ended = False
        self.drawing_seconds = 0.0

    def show(self, events: Iterable[Event]) -> Done:
        """Draw the events until the answer ends, and return the last one."""
        done = _NO_ANSWER
        try:
            with run_alongside(self._redraw_until):
                for event in events:
                    done = self._process(event) or done
        finally:  # an answer that breaks off stays on the screen, too
            with self._lock:
                self._has_ended = True
                self._print_notes()
                self._screen.end(self._stream.finish(self._options()).finished)
        return done

    def _process(self, event: Event) -> Done | None:
        """Take in an event; return it if it is the last one."""
        with self._lock:
            self._progress.update(event)
            if isinstance(event, Text):
                self._stream.feed(event.text)
                self._has_new_text = True
            elif isinstance(event, TurnsEvicted):
                self._add_note(describe_eviction(event))
        return event if isinstance(event, Done) else None

    def add_note(self, text: str) -> None:
        """
        Print lines above the block of the answer that is being written, or below an answer that has ended.

        Can be called from any thread.
        """
        with self._lock:
            self._add_note(text)
            if self._has_ended:
                self._print_notes()

    def _add_note(self, text: str) -> None:
        rows = (row for line in escape_controls(text).split("\n") for row in wrap_line(line, self._options().width))
        self._notes += map(dim, rows)

    def _print_notes(self) -> None:
        self._screen.insert(self._notes)
        self._notes = []

    def redraw_footer(self) -> None:
        """Show a key that was just typed."""
        with self._lock:
            if not self._has_ended:
                self._screen.update([], self._pending, self._footer(self._options()))

    def _redraw_until(self, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; writing the end of the answer reports it
            while not stop.wait(_MIN_INTERVAL):
                self._redraw()

    def _redraw(self) -> None:
        with self._lock:
            start = time.monotonic()
            if start < self._next_redraw:
                return
            options, finished = self._options(), list[str]()
            if self._has_new_text:
                lines = self._stream.render(options)
                finished, self._pending, self._has_new_text = list(lines.finished), lines.pending, False
            self._print_notes()
            self._screen.update(finished, self._pending, self._footer(options))
            elapsed = time.monotonic() - start
            self.drawing_seconds += elapsed
            self._next_redraw = start + min(_MAX_INTERVAL, _REST_FACTOR * elapsed)

    def _footer(self, options: RenderOptions) -> list[str]:
        """Return the status line and the lines typed meanwhile."""
        status = self._progress.describe()
        lines = [dim(join_fitting(status.split(", "), ", ", options.width))] if status else []
        for typed in self._typed():
            end = escape_controls(typed.rpartition("\n")[2])[-options.width :]
            while display_width(end) > options.width - 3:
                end = end[1:]
            lines.append(f"> {end}")
        return lines
