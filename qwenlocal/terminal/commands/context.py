"""Commands about what the model reads, and how it is shown."""

from __future__ import annotations

from qwenlocal.chat.context_window import is_read, shortly
from qwenlocal.chat.thread import Turn
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import padded
from qwenlocal.terminal.session import Session

_BAR = 40
_STATE = 14  # columns


def context(session: Session, _rest: str) -> None:
    """A bar for the context, and a line for each turn."""
    talk = session.conversation
    used, n_ctx = talk.tokens_read, talk.n_ctx or 0
    if n_ctx:
        filled = min(_BAR, round(_BAR * used / n_ctx))
        session.say(
            tr(
                "[{bar}] {used:,} of {n_ctx:,} tokens ({share:.0%})",
                bar="#" * filled + "." * (_BAR - filled),
                used=used,
                n_ctx=n_ctx,
                share=used / n_ctx,
            )
        )
    costs = [talk.cost(turn) for turn in session.thread.turns]
    read = [cost for turn, cost in zip(session.thread.turns, costs, strict=True) if is_read(session.thread, turn)]
    session.say(tr("       {count:>7,} tokens  {state}  system prompt", count=used - sum(read), state=" " * _STATE))
    if session.thread.summary:
        session.say(tr("  what left, in short: {text}", text=shortly(session.thread.summary)))
    for place, (turn, count) in enumerate(zip(session.thread.turns, costs, strict=True), start=1):
        left = turn.question.number in session.thread.left
        session.say(
            tr(
                "  {place:>3}  {count:>7,} tokens  {state}  {text}",
                place=place,
                count=count,
                state=padded(_state(turn, left=left), _STATE),
                text=shortly(turn.question.text),
            )
        )


def _state(turn: Turn, *, left: bool) -> str:
    if turn.dropped:
        return tr("dropped")
    if turn.pinned:
        return tr("pinned")
    return tr("out of context") if left else ""


def pin(session: Session, rest: str) -> None:
    """A turn stays in a full context, or not any more."""
    turn = session.turn(rest)
    session.thread.change(turn.question, pinned=not turn.pinned, dropped=False)
    session.thread.left.discard(turn.question.number)
    text = shortly(turn.question.text)
    if turn.pinned:
        session.say(tr("“{text}” stays in the context.", text=text))
    else:
        session.say(tr("“{text}” may leave a full context.", text=text))


def drop(session: Session, rest: str) -> None:
    """A turn is not read any more, or is again."""
    turn = session.turn(rest)
    session.thread.change(turn.question, dropped=not turn.dropped, pinned=False)
    text = shortly(turn.question.text)
    if turn.dropped:
        session.say(tr("“{text}” is not read any more.", text=text))
    else:
        session.say(tr("“{text}” is read again.", text=text))


def tokens(session: Session, rest: str) -> None:
    """How many tokens something is."""
    if rest:
        session.say(tr("{count:,} tokens", count=session.conversation.tokens(rest)))
    else:
        session.say(tr("The model reads {count:,} tokens of this chat.", count=session.conversation.tokens_read))


def stats(session: Session, _rest: str) -> None:
    """Say how quick answers were; the last one at once."""
    session.stats = not session.stats
    session.say(tr("How quick answers are is said from now on.") if session.stats else tr("No more numbers."))
    if session.stats and session.last:
        session.say(session.last.stats.sentence(session.last.why))


def markdown(session: Session, _rest: str) -> None:
    """Lay answers out, or show them as the model wrote them."""
    session.markdown = not session.markdown
    session.say(tr("Answers are laid out.") if session.markdown else tr("Answers are shown as the model writes them."))
