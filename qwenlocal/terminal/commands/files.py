"""Commands about files and chats."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from qwenlocal.chat.context_window import shortly
from qwenlocal.chat.documents import read_document
from qwenlocal.chat.export import as_html, as_json, as_markdown
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.errors import NotWritable, OutputExists, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import typed, writable
from qwenlocal.terminal.attachments import price
from qwenlocal.terminal.session import Session

_CODE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n(.*?)^\1[`~]*\s*$", re.MULTILINE | re.DOTALL)
_LONGEST_NUMBER = 18  # digits; SQLite's go up to 2**63
_MOST_COPIED = 100_000  # letters; terminals take no more through an escape sequence


def read(session: Session, rest: str) -> None:
    """A file's text goes with the next message."""
    if not rest.strip():
        raise UsageError(tr("Which file?"), hint=tr("/read FILE, or @FILE in a message."))
    path = typed(rest.strip().strip('"'))
    document = read_document(path)
    session.say(price(session, document))
    name = f'"{path}"' if " " in str(path) else str(path)
    session.default_text = f"@{name} "
    session.say(tr("It goes with the message below."))


def copy(session: Session, rest: str) -> None:
    """The last answer, its last code, or a turn's answer, to the clipboard of the terminal, over ssh too (OSC 52)."""
    what = rest.strip().lower()
    turn = session.turn("" if what == "code" else what)
    text = turn.answer.text if turn.answer else ""
    if what == "code":
        found = _CODE.findall(text)
        if not found:
            raise UsageError(tr("There is no code in the last answer."))
        text = found[-1][1].rstrip("\n")
    if not text:
        raise UsageError(tr("There is no answer to copy."))
    if len(text) > _MOST_COPIED:
        raise UsageError(
            tr("That is too long for a terminal's clipboard ({count:,} letters).", count=len(text)),
            hint="/export FILE",
        )
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode('utf-8', 'replace')).decode()}\x07")
    sys.stdout.flush()
    session.say(tr("Copied, where the terminal allows it: {count:,} letters.", count=len(text)))


def save(session: Session, rest: str) -> None:
    """The conversation as JSON, in the form that chat APIs use."""
    path = _target(session, rest, f"{datetime.now():%Y-%m-%d-%H%M%S}.json")
    _write(session, path, lambda: session.conversation.save(path, session.model))


def export(session: Session, rest: str) -> None:
    """The chat as Markdown, JSON or HTML, by the file's ending."""
    if not rest.strip():
        raise UsageError(tr("Which file?"), hint=tr("/export FILE.md, FILE.json or FILE.html"))
    path = _target(session, rest, "")
    makers: Mapping[str, Callable[[Thread, str], str]] = {
        ".md": as_markdown,
        ".html": as_html,
        ".json": functools.partial(as_json, model=session.model),
    }
    maker = makers.get(path.suffix.lower())
    if maker is None:
        raise UsageError(tr("{name} ends in none of {endings}.", name=path.name, endings=", ".join(makers)))
    text = maker(session.thread, _title(session))
    _write(session, path, lambda: path.write_text(text, encoding="utf-8", errors="replace"))


def load(session: Session, rest: str) -> None:
    """Go on with a file that /save wrote, or with a chat by its number."""
    word = rest.strip()
    if not word:
        raise UsageError(
            tr("Which file, or which chat?"), hint=tr("/load FILE, or /load 3; which there are: qwenlocal chats")
        )
    if word.lstrip("#").isdecimal() and len(word) <= _LONGEST_NUMBER and session.journal and not os.path.exists(word):
        number = int(word.lstrip("#"))
        session.talk_of(session.journal.thread(number), id=number)
    else:
        session.talk_of(_from_file(typed(word)))
    turns, count = session.thread.turns, len(session.thread.path)
    session.say(
        tr("Going on with {count} messages; the last: {text}", count=count, text=shortly(turns[-1].question.text))
        if turns
        else tr("Going on with {count} messages.", count=count)
    )


def title(session: Session, rest: str) -> None:
    """Another title for this chat."""
    if not rest.strip():
        session.say(_title(session))
    elif session.journal is None or session.keeper is None or session.keeper.id is None:
        raise UsageError(tr("This chat is not in the journal yet."), hint=tr("Ask something first."))
    else:
        session.journal.rename(session.keeper.id, rest.strip())
        session.say(tr("This chat is called “{title}”.", title=rest.strip()))


def _title(session: Session) -> str:
    if session.journal and session.keeper and session.keeper.id:
        return session.journal.chat(session.keeper.id).title
    turns = session.thread.turns
    return shortly(turns[0].question.text) if turns else tr("A chat")


def _from_file(path: Path) -> Thread:
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except OSError as reason:
        raise UsageError(tr("{path} cannot be read: {strerror}.", path=path, strerror=reason.strerror)) from reason
    except ValueError as reason:
        raise UsageError(tr("{path} is no saved conversation: it is not JSON.", path=path)) from reason
    found = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(found, list) or not all(_is_message(message) for message in found):
        raise UsageError(tr("{path} is no saved conversation: there are no messages in it.", path=path))
    thread = Thread()
    for message in found:
        if message["role"] == "system":
            thread.tell(message["content"])
        else:
            added = thread.add(message["role"], message["content"])
            thread.change(added, why="end of answer" if message["role"] == ASSISTANT else "")
    return thread


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", USER, ASSISTANT)
        and isinstance(message.get("content"), str)
    )


def _target(session: Session, rest: str, name: str) -> Path:
    word = rest.strip()
    return typed(word).absolute() if word else writable(session.exports) / name


def _write(session: Session, path: Path, write: Callable[[], object]) -> None:
    if os.path.exists(path) and path not in session.written:  # Path.exists raises without permission
        raise OutputExists(path, hint=tr("Choose another name."))
    try:
        write()
    except OSError as reason:
        raise NotWritable(path.parent, reason.strerror or str(reason), hint=tr("Choose another folder.")) from reason
    session.written.add(path)
    session.say(tr("Saved: {path}", path=path))
