"""Commands that change questions and answers, and switch between versions, branches and chats."""

from __future__ import annotations

import re

from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.thread import Thread, Turn
from qwenlocal.errors import UsageError
from qwenlocal.formatting import format_count, join_sentences, shorten
from qwenlocal.i18n import mark, tr
from qwenlocal.terminal.session import AnswerStarter, PendingEdit, Session

_MAX_RETRIES = 20
OPEN_ELSEWHERE = mark(
    "It is open in another window. Unless you close that window first, your next message starts a copy."
)


def undo_turn(session: Session, _argument: str) -> None:
    """Go back to before the last question, and put it into the next input line."""
    turn = session.conversation.undo()
    session.default_text = turn.question.text
    text = shorten(turn.question.text)
    session.say(tr("Took back “{text}”. Edit it below, or restore it with /branch 1.", text=text))


def retry_answer(session: Session, argument: str) -> list[AnswerStarter]:
    """Answer the last question again, several times if `argument` is a number."""
    session.find_turn("")
    count = _parse_number(argument, _MAX_RETRIES) or 1
    return [session.conversation.retry] * count


def show_versions(session: Session, argument: str) -> None:
    """List all answers to the last question; with a number, switch to that one."""
    turn = session.find_turn("")
    if turn.answer is None:
        raise UsageError(tr("The last question has no answer yet."))
    versions = session.thread.versions(turn.answer)
    number = _parse_number(argument, len(versions))
    if number:
        version = versions[number - 1]
        session.thread.select_version(version)
        text = shorten(version.text)
        session.say(tr("Version {number} of {count}: {text}", number=number, count=len(versions), text=text))
        return
    for number, version in enumerate(versions, start=1):
        marker = "*" if version is turn.answer else " "
        session.say(f"{marker} {number}  {shorten(version.text)}")


def edit_question(session: Session, argument: str) -> None:
    """Let the next line replace a question; what followed stays in another branch."""
    turn = session.find_turn(argument)
    session.pending_edit, session.default_text = PendingEdit(turn, is_answer=False), turn.question.text
    session.say(tr("Edit it below and press Enter. An empty line cancels."))


def edit_answer(session: Session, argument: str) -> None:
    """Let the next line replace an answer."""
    turn = session.find_turn(argument)
    session.pending_edit = PendingEdit(turn, is_answer=True)
    session.default_text = turn.answer.text if turn.answer else ""
    session.say(tr("Edit it below and press Enter. An empty line cancels."))


def continue_answer(session: Session, _argument: str) -> list[AnswerStarter]:
    """Continue the last answer."""
    session.find_turn("")
    return [session.conversation.continue_answer]


def describe_cut(turn: Turn) -> str:
    """Return a note that offers /continue if the turn has no answer or an unfinished one, else ""."""
    if turn.answer is None:
        return tr("The last question has no answer yet; /continue answers it.")
    if turn.answer.finish_reason in (FinishReason.INTERRUPTED.value, FinishReason.LENGTH.value):
        return tr("The last answer was cut off; /continue finishes it.")
    return ""


def show_branches(session: Session, argument: str) -> None:
    """List the branches of the chat, the newest first; with a number, switch to that one."""
    messages = session.thread.messages.values()
    parents = {message.parent for message in messages}
    leaves = sorted((m for m in messages if m.number not in parents), key=lambda message: -message.number)
    if not leaves:
        raise UsageError(tr("There are no questions yet."))
    number = _parse_number(argument, len(leaves))
    if number:
        leaf = leaves[number - 1]
        session.thread.set_leaf(leaf.number)
        session.say(tr("Continuing after “{text}”.", text=shorten(leaf.text)))
        return
    for number, leaf in enumerate(leaves, start=1):
        session.say(
            tr(
                "{marker} {number}  {messages}, last: {text}",
                marker="*" if leaf.number == session.thread.leaf else " ",
                number=number,
                messages=format_count(len(session.thread.path_to(leaf.number)), "message"),
                text=shorten(leaf.text),
            )
        )


def fork_chat(session: Session, argument: str) -> None:
    """Start a new chat with a copy of the messages up to a turn."""
    turn = session.find_turn(argument)
    copy = Thread(session.thread.system)
    for message in session.thread.path_to((turn.answer or turn.question).number):
        added = copy.add(message.role, message.text, model=message.model)
        copy.update(
            added, finish_reason=message.finish_reason, ids=message.ids, pinned=message.pinned, dropped=message.dropped
        )
    session.switch_thread(copy)
    note = tr("Started a new chat with {messages}.", messages=format_count(len(copy.messages), "message"))
    if session.chat_id:
        note = join_sentences(note, tr("It is chat {id}.", id=session.chat_id))
    session.say(note)


def clear_chat(session: Session, _argument: str) -> None:
    """Start a new chat with the same system prompt."""
    session.switch_thread(Thread(session.thread.system))
    note = tr("Started a new chat.")
    if session.journal_writer:
        note = join_sentences(note, tr("The previous one is saved: qwenlocal chats"))
    session.say(note)


def _parse_number(word: str, maximum: int) -> int | None:
    """
    Parse a number from 1 to `maximum`; return None for an empty text.

    Raises
    ------
    UsageError: it is not such a number.
    """
    if not word:
        return None
    if not re.fullmatch(r"\d{1,9}", word) or not 1 <= int(word) <= maximum:
        raise UsageError(tr("“{word}” is not a number from 1 to {maximum}.", word=word, maximum=maximum))
    return int(word)
