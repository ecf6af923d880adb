"""Commands about files, the clipboard and saved chats."""

from __future__ import annotations

import base64
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from qwenlocal.chat.documents import format_mention, read_document
from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.export import FORMATS, export_messages, export_thread
from qwenlocal.chat.journal import parse_chat_number
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.errors import OutputExists, UsageError
from qwenlocal.fileio import replace_text
from qwenlocal.formatting import format_count, shorten
from qwenlocal.i18n import tr
from qwenlocal.paths import ensure_writable, parse_typed_path
from qwenlocal.terminal.attachments import describe_cost
from qwenlocal.terminal.commands.models import check_system_prompt
from qwenlocal.terminal.commands.turns import OPEN_ELSEWHERE, describe_cut
from qwenlocal.terminal.markdown import find_code_blocks
from qwenlocal.terminal.session import Session
from qwenlocal.text_encoding import read_text

_MAX_COPIED_CHARACTERS = 100_000  # terminals accept no more in one escape sequence


def attach_file(session: Session, argument: str) -> None:
    """Add a file to the next message."""
    if not argument:
        raise UsageError(tr("No file given."), hint=tr("Use /read FILE, or @FILE in a message."))
    path = parse_typed_path(argument)
    document = read_document(path)
    session.say(describe_cost(session, document))
    session.default_text = f"{format_mention(str(path))} "
    session.say(tr("It is sent with the next message."))


def copy_answer(session: Session, argument: str) -> None:
    """Copy an answer, or the last code block of the last one, through the terminal (OSC 52; also works over SSH)."""
    choice = argument.lower()
    turn = session.find_turn("" if choice == "code" else choice)
    text = turn.answer.text if turn.answer else ""
    if choice == "code":
        blocks = find_code_blocks(text)
        if not blocks:
            raise UsageError(tr("There is no code block in the last answer."))
        text = blocks[-1].rstrip("\n")
    if not text:
        raise UsageError(tr("There is no answer to copy."))
    if len(text) > _MAX_COPIED_CHARACTERS:
        raise UsageError(
            tr("The text is too long for the terminal's clipboard ({count:,} characters).", count=len(text)),
            hint="/export FILE",
        )
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode('utf-8', 'replace')).decode()}\x07")
    sys.stdout.flush()
    session.say(tr("Copied {characters}, if the terminal allows it.", characters=format_count(len(text), "character")))


def save_chat(session: Session, argument: str) -> None:
    """Save the conversation as JSON messages in the format of chat APIs; `--force` after the file overwrites it."""
    name, force = _split_force(argument)
    if name:
        path = parse_typed_path(name).absolute()
    else:
        path = ensure_writable(session.save_folder) / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
    _write_file(session, path, export_messages(session.thread, session.model), force=force)


def export_chat(session: Session, argument: str) -> None:
    """Export the chat as Markdown, JSON or HTML, depending on the suffix of the file; `--force` overwrites it."""
    name, force = _split_force(argument)
    if not name:
        raise UsageError(tr("No file given."), hint=tr("Use /export FILE.md, FILE.json or FILE.html"))
    path = parse_typed_path(name).absolute()
    format = path.suffix.lower().removeprefix(".")
    if format not in FORMATS:
        suffixes = ", ".join(f".{name}" for name in FORMATS)
        raise UsageError(tr("Cannot export to {name}: use one of {suffixes}.", name=path.name, suffixes=suffixes))
    text = export_thread(session.thread, _chat_title(session), session.model, format)
    _write_file(session, path, text, force=force)


def load_chat(session: Session, word: str) -> None:
    """Continue a conversation from a file that /save wrote, or a chat of the journal by its number."""
    if not word:
        raise UsageError(
            tr("No file or chat given."), hint=tr("Use /load FILE or /load NUMBER. List your chats: qwenlocal chats")
        )
    number = parse_chat_number(word)
    if number is not None and session.journal and not os.path.exists(word):
        session.switch_thread(session.journal.open_thread(number), chat_id=number)
    else:
        session.switch_thread(_read_thread(parse_typed_path(word)))
    turns, messages = session.thread.turns, format_count(len(session.thread.path), "message")
    session.say(
        tr("Loaded {messages}. Last question: {text}", messages=messages, text=shorten(turns[-1].question.text))
        if turns
        else tr("Loaded {messages}.", messages=messages)
    )
    if session.journal_writer and session.journal_writer.original is not None:
        session.say(tr(OPEN_ELSEWHERE))
    if turns and (cut := describe_cut(turns[-1])):
        session.say(cut)
    check_system_prompt(session)


def rename_chat(session: Session, title: str) -> None:
    """Rename the chat; without a title, show the current one."""
    if not title:
        session.say(_chat_title(session))
    elif session.journal is None or session.chat_id is None:
        raise UsageError(tr("This chat is not saved yet."), hint=tr("Ask something first."))
    else:
        session.journal.rename_chat(session.chat_id, title)
        session.say(tr("Renamed chat {id} to “{title}”.", id=session.chat_id, title=title))


def _chat_title(session: Session) -> str:
    if session.journal and session.chat_id:
        return session.journal.get_chat(session.chat_id).title
    turns = session.thread.turns
    return shorten(turns[0].question.text) if turns else tr("Untitled chat")


def _read_thread(path: Path) -> Thread:
    """
    Read a conversation that /save or a chat API wrote.

    Raises
    ------
    ModelNotFound: the file cannot be read. UsageError: it is not a saved conversation.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(tr("{path} is not a saved conversation: it is not JSON.", path=path)) from error
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UsageError(tr("{path} is not a saved conversation: it has no list of messages.", path=path))
    thread = Thread()
    for message in messages:
        if message["role"] == "system":
            thread.set_system_prompt(message["content"])
        else:
            added = thread.add(message["role"], message["content"])
            thread.update(added, finish_reason=FinishReason.EOS.value if message["role"] == ASSISTANT else "")
    return thread


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", USER, ASSISTANT)
        and isinstance(message.get("content"), str)
    )


def _split_force(argument: str) -> tuple[str, bool]:
    """`_split_force("a b.md --force")` is ("a b.md", True)."""
    name, _, last = argument.rpartition(" ")
    return (name.strip(), True) if last == "--force" else (argument, False)


def _write_file(session: Session, path: Path, text: str, *, force: bool) -> None:
    """
    Write `text`; replace an existing file only with `force`.

    Raises
    ------
    OutputExists: the file exists. NotWritable: the file cannot be written.
    """
    if os.path.exists(path) and not force:  # Path.exists raises without permission
        raise OutputExists(path, hint=tr("Choose another name, or add --force to overwrite it."))
    replace_text(path, text, hint=tr("Choose another folder."))
    session.say(tr("Saved: {path}", path=path))
