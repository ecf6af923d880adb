"""Going on with a chat that was left: which one, and what it was about."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from qwenlocal.chat.journal import Chat, Journal
from qwenlocal.chat.keeper import Keeper
from qwenlocal.chat.room import shortly
from qwenlocal.chat.thread import Thread
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import ChatNotFound, Interrupted, JournalUnusable, UsageProblem
from qwenlocal.language import tr
from qwenlocal.terminal.plain import harmless

LAST, PICK = "last", "?"
_SHOWN = 20
_LINES = 6  # of the last answer


@dataclass(frozen=True)
class GoingOn:
    """A chat of the journal that goes on."""

    journal: Journal
    chat: Chat
    thread: Thread


def chosen_chat(program: Program, which: str) -> GoingOn:
    """
    The chat of a number, the last one (`LAST`), or the one that is picked from a list (`PICK`).

    Raises
    ------
    ChatNotFound: there is none. JournalUnusable: the journal cannot be read.
    """
    path = program.folders.journal
    if not path.exists():
        raise ChatNotFound(which if which not in (LAST, PICK) else "")
    journal = Journal(path)
    chats = journal.chats()
    if not chats:
        raise ChatNotFound(which if which not in (LAST, PICK) else "")
    chat = chats[0] if which == LAST else _picked(chats) if which == PICK else _numbered(chats, which)
    return GoingOn(journal, chat, journal.thread(chat.id))


def open_journal(program: Program) -> Journal | None:
    """The journal; where it cannot be used, that is said, and the chat goes on without it."""
    from qwenlocal.errors import CannotWrite
    from qwenlocal.paths import writable

    path = program.folders.journal
    try:
        writable(path.parent)
        return Journal(path)
    except (JournalUnusable, CannotWrite) as reason:
        kept = tr("This chat is not kept.")
        program.say(f"{reason} {kept} {reason.hint}")
        return None


def say_where_it_was(going_on: GoingOn, keeper: Keeper | None, say: Callable[[str], None]) -> None:
    """Which chat goes on, and the end of what was said last."""
    chat, turns = going_on.chat, going_on.thread.turns
    say(
        tr(
            "Going on with chat {id}, “{title}”: {count} messages.",
            id=chat.id,
            title=chat.title,
            count=len(going_on.thread.path),
        )
    )
    if keeper and keeper.id is not None and keeper.id != chat.id:
        say(tr("It is open in another window, so this is a copy: chat {id}.", id=keeper.id))
    if turns:
        say(f"> {shortly(turns[-1].question.text)}")
        said = (turns[-1].answer.text if turns[-1].answer else tr("(no answer yet)")).strip().splitlines()
        for line in [*(["…"] if len(said) > _LINES else []), *said[-_LINES:]]:
            say(line)


def _numbered(chats: list[Chat], which: str) -> Chat:
    for chat in chats:
        if str(chat.id) == which.lstrip("#"):
            return chat
    raise ChatNotFound(which)


def _picked(chats: list[Chat]) -> Chat:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageProblem(
            tr("--resume asks which chat, and this is no terminal."), hint=tr("--resume NUMBER, or --continue")
        )
    for place, chat in enumerate(chats[:_SHOWN], start=1):
        day = f"{datetime.fromtimestamp(chat.changed):%Y-%m-%d %H:%M}"
        count = tr("{count} messages", count=chat.messages)
        sys.stderr.write(f"{place:>3}  {day}  {harmless(chat.title)}  ({count}, {chat.model})\n")
    from prompt_toolkit import prompt

    while True:
        try:
            answer = prompt(tr("Which one? [{default}] ", default=1)).strip() or "1"
        except (EOFError, KeyboardInterrupt) as stop:
            raise Interrupted from stop
        if answer.isdecimal() and 1 <= int(answer) <= min(len(chats), _SHOWN):
            return chats[int(answer) - 1]
