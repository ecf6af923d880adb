"""Commands about what the model reads, and how it is shown."""

from __future__ import annotations

from qwenlocal.chat.room import shortly
from qwenlocal.terminal.session import Session

_BAR = 40


def context(session: Session, _rest: str) -> None:
    """A bar for the context, and a line for each turn."""
    talk = session.conversation
    used, n_ctx = talk.tokens_read, talk.n_ctx or 0
    if n_ctx:
        filled = min(_BAR, round(_BAR * used / n_ctx))
        session.say(f"[{'#' * filled}{'.' * (_BAR - filled)}] {used:,} of {n_ctx:,} tokens ({used / n_ctx:.0%})")
    if session.thread.summary:
        session.say(f"  what left, in short: {shortly(session.thread.summary)}")
    for place, turn in enumerate(session.thread.turns, start=1):
        count = sum(talk.tokens(message.text) for message in turn.messages)
        left = turn.question.number in session.thread.left
        state = "dropped" if turn.dropped else "pinned" if turn.pinned else "out of context" if left else ""
        session.say(f"  {place:>3}  {count:>7,} tokens  {state:<14}  {shortly(turn.question.text)}")


def pin(session: Session, rest: str) -> None:
    """A turn stays in a full context, or not any more."""
    turn = session.turn(rest)
    session.thread.change(turn.question, pinned=not turn.pinned, dropped=False)
    session.thread.left.discard(turn.question.number)
    said = "stays in the context" if turn.pinned else "may leave a full context"
    session.say(f"“{shortly(turn.question.text)}” {said}.")


def drop(session: Session, rest: str) -> None:
    """A turn is not read any more, or is again."""
    turn = session.turn(rest)
    session.thread.change(turn.question, dropped=not turn.dropped, pinned=False)
    said = "is not read any more" if turn.dropped else "is read again"
    session.say(f"“{shortly(turn.question.text)}” {said}.")


def tokens(session: Session, rest: str) -> None:
    """How many tokens something is."""
    if rest:
        session.say(f"{session.conversation.tokens(rest):,} tokens")
    else:
        session.say(f"The model reads {session.conversation.tokens_read:,} tokens of this chat.")


def stats(session: Session, _rest: str) -> None:
    """Say how quick answers were; the last one at once."""
    session.stats = not session.stats
    session.say("How quick answers are is said from now on." if session.stats else "No more numbers.")
    if session.stats and session.last:
        session.say(session.last.stats.sentence(session.last.why))


def markdown(session: Session, _rest: str) -> None:
    """Lay answers out, or show them as the model wrote them."""
    session.markdown = not session.markdown
    session.say("Answers are laid out." if session.markdown else "Answers are shown as the model writes them.")
