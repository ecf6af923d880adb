"""Commands about the context: its contents, pinned and dropped turns, token counts, statistics, rendering."""

from __future__ import annotations

from qwenlocal.chat.context_window import is_in_context
from qwenlocal.chat.thread import Turn
from qwenlocal.formatting import format_count, pad, shorten
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Session
from qwenlocal.terminal.view import describe_stats
from qwenlocal.terminal.wrapping import terminal_width

_MAX_BAR = 40
_STATE_WIDTH = 14


def show_context(session: Session, _argument: str) -> None:
    """Show how full the context is, and a line for each turn."""
    window, thread = session.require_window("/ctx"), session.thread
    total, used, n_ctx = window.count_prompt_tokens(thread), window.count_used_tokens(thread), window.n_ctx
    width = min(_MAX_BAR, terminal_width() - len("[]"))
    filled = round(width * used / n_ctx)
    bar, share = "#" * filled + "." * (width - filled), used / n_ctx
    session.say(tr("[{bar}] {used:,} of {n_ctx:,} tokens ({share:.0%})", bar=bar, used=used, n_ctx=n_ctx, share=share))
    counts = [window.count_turn_tokens(turn) for turn in thread.turns]
    in_context = [count for turn, count in zip(thread.turns, counts, strict=True) if is_in_context(thread, turn)]
    system_tokens = total - sum(in_context)
    session.say(tr("       {count:>7,} tokens  {state}  system prompt", count=system_tokens, state=" " * _STATE_WIDTH))
    if thread.summary:
        session.say(tr("  summary of earlier turns: {text}", text=shorten(thread.summary)))
    for number, (turn, count) in enumerate(zip(thread.turns, counts, strict=True), start=1):
        state = _describe_state(turn, evicted=turn.question.number in thread.evicted)
        session.say(
            tr(
                "  {number:>3}  {count:>7,} tokens  {state}  {text}",
                number=number,
                count=count,
                state=pad(state, _STATE_WIDTH),
                text=shorten(turn.question.text),
            )
        )
    if total > n_ctx:
        session.say(tr("The chat has {total:,} tokens, more than the context holds.", total=total))


def _describe_state(turn: Turn, *, evicted: bool) -> str:
    if turn.question.dropped:
        return tr("dropped")
    if turn.question.pinned:
        return tr("pinned")
    return tr("out of context") if evicted else ""


def toggle_pin(session: Session, argument: str) -> None:
    """Keep a turn in a full context, or no longer."""
    question = session.find_turn(argument).question
    session.require_window("/pin")  # without one, no turn leaves the context
    session.thread.update(question, pinned=not question.pinned, dropped=False)
    session.thread.evicted.discard(question.number)
    text = shorten(question.text)
    if question.pinned:
        session.say(tr("Pinned “{text}”: it stays in the context.", text=text))
    else:
        session.say(tr("Unpinned “{text}”.", text=text))


def toggle_drop(session: Session, argument: str) -> None:
    """Remove a turn from the context, or put it back."""
    question = session.find_turn(argument).question
    session.thread.update(question, dropped=not question.dropped, pinned=False)
    text = shorten(question.text)
    if question.dropped:
        session.say(tr("Dropped “{text}”: the model no longer sees it.", text=text))
    else:
        session.say(tr("“{text}” is back in the context.", text=text))


def count_tokens(session: Session, argument: str) -> None:
    """Count the tokens of a text, or of the chat."""
    window = session.require_window("/tokens")
    if argument:
        session.say(format_count(window.count_tokens(argument), "token"))
    else:
        used, n_ctx = window.count_used_tokens(session.thread), window.n_ctx
        session.say(tr("This chat takes {used:,} of {n_ctx:,} tokens.", used=used, n_ctx=n_ctx))


def toggle_stats(session: Session, _argument: str) -> None:
    """Show statistics after each answer, starting with the last one; or no longer."""
    session.show_stats = not session.show_stats
    session.say(tr("Statistics on.") if session.show_stats else tr("Statistics off."))
    if session.show_stats and session.last_result:
        session.say(describe_stats(session.last_result))


def toggle_markdown(session: Session, _argument: str) -> None:
    """Render answers as Markdown, or show them as the model writes them."""
    session.render_markdown = not session.render_markdown
    session.say(tr("Markdown rendering on.") if session.render_markdown else tr("Markdown rendering off."))
