"""Commands that say something anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qwenlocal.chat.context_window import shortly
from qwenlocal.chat.events import Event
from qwenlocal.chat.thread import Message, Thread
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.terminal.session import Editing, Session

Answer = Callable[[], Iterator[Event]]
_MOST_RETRIES = 20


def undo(session: Session, _rest: str) -> None:
    """Back before the last question, which the next input line begins with."""
    turn = session.conversation.undo()
    session.default_text = turn.question.text
    session.say(
        tr(
            "Back before “{text}”; it stands below to be changed. /branch 1 goes forward again.",
            text=shortly(turn.question.text),
        )
    )


def retry(session: Session, rest: str) -> list[Answer]:
    """Other answers to the last question."""
    session.turn("")
    count = _number(rest, 1, _MOST_RETRIES) or 1
    return [session.conversation.retry] * count


def versions(session: Session, rest: str) -> None:
    """All answers to the last question; with a number, take that one."""
    turn = session.turn("")
    if turn.answer is None:
        raise UsageError(tr("The last question has no answer yet."))
    found = session.thread.versions(turn.answer)
    number = _number(rest, 1, len(found))
    if number:
        session.thread.choose(found[number - 1])
        session.say(
            tr(
                "Version {number} of {count}: {text}",
                number=number,
                count=len(found),
                text=shortly(found[number - 1].text),
            )
        )
        return
    for place, message in enumerate(found, start=1):
        mark = "*" if message is turn.answer else " "
        session.say(f"{mark} {place}  {shortly(message.text)}")


def edit(session: Session, rest: str) -> None:
    """The next line is a question in place of another one; what followed is kept as a branch."""
    turn = session.turn(rest)
    session.editing, session.default_text = Editing(turn, answer=False), turn.question.text
    session.say(tr("Change it below, and send it; an empty line leaves it as it is."))


def edit_answer(session: Session, rest: str) -> None:
    """The next line is what the model shall have said."""
    turn = session.turn(rest)
    session.editing = Editing(turn, answer=True)
    session.default_text = turn.answer.text if turn.answer else ""
    session.say(tr("Change it below, and send it; an empty line leaves it as it is."))


def go_on(session: Session, _rest: str) -> Answer:
    """More of the last answer."""
    session.turn("")
    return session.conversation.go_on


def branch(session: Session, rest: str) -> None:
    """All ends of the tree, the last one that was said first; with a number, go there."""
    ends = sorted(_ends(session.thread), key=lambda message: -message.number)
    if not ends:
        raise UsageError(tr("Nothing was asked yet."))
    number = _number(rest, 1, len(ends))
    if number:
        session.thread.go_to(ends[number - 1].number)
        session.say(tr("Going on behind “{text}”.", text=shortly(ends[number - 1].text)))
        return
    for place, message in enumerate(ends, start=1):
        mark = "*" if message.number == session.thread.leaf else " "
        session.say(
            tr(
                "{mark} {place}  {depth} messages, the last: {text}",
                mark=mark,
                place=place,
                depth=_depth(session.thread, message),
                text=shortly(message.text),
            )
        )


def _ends(thread: Thread) -> list[Message]:
    parents = {message.parent for message in thread.messages.values()}
    return [message for message in thread.messages.values() if message.number not in parents]


def _depth(thread: Thread, message: Message) -> int:
    count = 1
    while message.parent:
        message, count = thread.messages[message.parent], count + 1
    return count


def fork(session: Session, rest: str) -> None:
    """A new chat with a copy of what was said up to a turn."""
    turn = session.turn(rest)
    last = (turn.answer or turn.question).number
    copy = Thread(session.thread.system)
    for message in session.thread.path:
        added = copy.add(message.role, message.text, model=message.model)
        copy.change(added, why=message.why, ids=message.ids, pinned=message.pinned, dropped=message.dropped)
        if message.number == last:
            break
    session.talk_of(copy)
    kept = " " + tr("It is chat {id}.", id=session.keeper.id) if session.keeper and session.keeper.id else ""
    session.say(tr("Another chat begins here, with {count} messages.", count=len(copy.messages)) + kept)


def clear(session: Session, _rest: str) -> None:
    """A new chat with the same system prompt."""
    session.talk_of(Thread(session.thread.system))
    session.say(
        tr("The conversation is forgotten by the model.")
        + (" " + tr("It is kept: qwenlocal chats") if session.keeper else "")
    )


def _number(text: str, least: int, most: int) -> int | None:
    """
    A number between `least` and `most`; None where nothing was typed.

    Raises
    ------
    UsageError: it is none.
    """
    word = text.strip()
    if not word:
        return None
    if not word.isdecimal() or not least <= int(word) <= most:
        raise UsageError(
            tr("A number from {least} to {most} is wanted; it is “{word}”.", least=least, most=most, word=word)
        )
    return int(word)
