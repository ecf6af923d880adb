"""`qwenlocal chats`: list, show, search, export and remove the chats of the journal."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.console import can_ask, confirm, print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import ChatNotFound, InvalidChoice, NotWritable, OutputExists, QwenlocalError, UsageError
from qwenlocal.formatting import format_count, format_model_name, format_time
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import escape_controls, supports_color

if TYPE_CHECKING:
    from qwenlocal.chat.journal import ChatInfo


def list_chats(*, as_json: bool) -> None:
    """List all chats, the newest first."""
    journal = AppContext().open_existing_journal()
    chats = journal.list_chats() if journal else []
    if as_json:
        print_json([vars(chat) for chat in chats])
    elif not chats:
        sys.stdout.write(tr("There are no chats yet. To start one: qwenlocal run") + "\n")
    else:
        rows = [
            (str(c.id), format_time(c.changed), format_model_name(c.model), str(c.messages), escape_controls(c.title))
            for c in chats
        ]
        print_table(("CHAT", "LAST", "MODEL", "MESSAGES", "TITLE"), rows)


def show_chat(text: str, *, as_json: bool) -> None:
    """Print a chat as Markdown or JSON."""
    content = _export(text, "json" if as_json else "md")
    sys.stdout.write(escape_controls(content) if sys.stdout.isatty() else content)


def _export(text: str, format: str) -> str:
    from qwenlocal.chat.export import export_thread

    journal, chat = AppContext().find_chat(text)
    return export_thread(journal.load_thread(chat.id), chat.title, chat.model, format)


def search_chats(words: str, *, as_json: bool) -> None:
    """
    Print the messages that contain all `words`.

    Raises
    ------
    UsageError: there are no words.
    """
    if not words.strip():
        raise UsageError(
            tr("There are no words to search for."), hint=tr("For example: qwenlocal chats search tokenizer")
        )
    journal = AppContext().open_existing_journal()
    hits = journal.search(words) if journal else []
    if as_json:
        print_json([vars(hit) for hit in hits])
        return
    bold, reset = ("\x1b[1m", "\x1b[0m") if supports_color(sys.stdout) else ("", "")
    for hit in hits:
        before, match, after = map(escape_controls, (hit.before, hit.found, hit.after))
        start, end = "…" if hit.cut_before else "", "…" if hit.cut_after else ""
        excerpt = f"{start}{before}{bold}{match}{reset}{after}{end}"
        sys.stdout.write(f"{hit.chat}  {format_time(hit.created)}  {hit.role}: {excerpt}\n")
    if not hits:
        sys.stderr.write(tr("No message contains “{words}”.", words=escape_controls(words)) + "\n")


def rename_chat(text: str, title: str) -> None:
    """Rename a chat."""
    if not title.strip():
        raise UsageError(tr("The title is empty."))
    journal, chat = AppContext().find_chat(text)
    journal.rename_chat(chat.id, title.strip())
    renamed = tr("Renamed chat {id} to “{title}”.", id=chat.id, title=escape_controls(title.strip()))
    sys.stderr.write(renamed + "\n")


def remove_chats(texts: list[str], *, assume_yes: bool) -> None:
    """
    Delete chats permanently, and all prompt caches on disk, which contain their text. At a terminal, ask first.

    Raises
    ------
    ChatNotFound, UsageError: there is no such chat, or one is open in another window; nothing is deleted.
    """
    from qwenlocal.engine.prompt_cache import delete_prompt_caches

    app = AppContext()
    journal = app.open_existing_journal()
    if journal is None:
        raise ChatNotFound("")
    chats = _find_chats(journal.list_chats(), texts)
    for chat in chats:
        if not journal.acquire(chat.id):
            raise UsageError(
                tr("Chat {id} is open in another window.", id=chat.id),
                hint=tr("Close it first. Nothing was deleted."),
            )
    if not assume_yes and can_ask():
        for chat in chats:
            sys.stderr.write(f"{chat.id:>3}  {format_time(chat.changed)}  {escape_controls(chat.title)}\n")
        if not confirm(tr("Delete {chats} permanently?", chats=format_count(len(chats), "chat")), default=False):
            raise QwenlocalError(tr("Nothing was deleted."))
    try:
        for chat in chats:
            journal.delete_chat(chat.id)
            sys.stderr.write(f"Deleted: {chat.id} {escape_controls(chat.title)}\n")
    finally:
        delete_prompt_caches(app.library.folders.states)


def _find_chats(chats: list[ChatInfo], texts: list[str]) -> list[ChatInfo]:
    """
    Return the chats with these numbers, those in ranges such as 3-7, and the last one for "last".

    Raises
    ------
    ChatNotFound: there is none for one of the texts. UsageError: a range ends before it begins.
    """
    from qwenlocal.chat.journal import parse_chat_number

    selected: dict[int, ChatInfo] = {}
    for text in texts:
        matches = chats[:1] if text == "last" else []
        begin, dash, end = text.partition("-")
        first, last = parse_chat_number(begin), parse_chat_number(end if dash else begin)
        if first is not None and last is not None:
            if first > last:
                raise UsageError(
                    tr("“{text}” is not a range of chats.", text=text), hint=tr("For example: qwenlocal chats rm 3-7")
                )
            matches = [chat for chat in reversed(chats) if first <= chat.id <= last]
        if not matches:
            raise ChatNotFound("" if text == "last" else text)
        selected.update({chat.id: chat for chat in matches})
    return list(selected.values())


def export_chat(text: str, format: str | None, output: Path | None, *, force: bool) -> None:
    """
    Write a chat as Markdown, JSON or HTML, to a file or to standard output.

    Raises
    ------
    InvalidChoice: there is no such format. OutputExists: the file exists. NotWritable: it cannot be written.
    """
    from qwenlocal.chat.export import FORMATS
    from qwenlocal.fileio import replace_text

    format = format or (output.suffix.lstrip(".").lower() if output else "md")
    format = {"markdown": "md", "htm": "html"}.get(format, format)
    if format not in FORMATS:
        raise InvalidChoice(tr("The format"), FORMATS, format)
    content = _export(text, format)
    if output is None:
        sys.stdout.write(content)
        return
    if os.path.exists(output) and not force:  # Path.exists raises without permission
        raise OutputExists(output)
    replace_text(output, content, hint=tr("Choose another folder."))
    sys.stderr.write(tr("Saved: {path}", path=output) + "\n")


def recover_chats() -> None:
    """
    Copy the readable parts of a damaged journal to a new one; the damaged file is kept next to it.

    Raises
    ------
    JournalError: nothing is readable, or a newer version wrote it. NotWritable: the files cannot be replaced.
    """
    from qwenlocal.chat.recovery import is_intact, recover
    from qwenlocal.chat.sqlite_pages import wal_path

    path = AppContext().library.folders.journal
    if not path.exists() and not wal_path(path).exists():
        sys.stderr.write(tr("There are no chats yet.") + "\n")
        return
    if is_intact(path):
        sys.stderr.write(tr("The chats are not damaged; nothing was changed.") + "\n")
        return
    copy = path.with_name(path.name + ".recovering")
    try:
        for leftover in (copy, wal_path(copy)):
            leftover.unlink(missing_ok=True)
        chats, messages, cut, lost = recover(path, copy)
        damaged = _replace_journal(path, copy)
    except OSError as error:
        raise NotWritable(path, error.strerror or str(error)) from error
    sentences = [
        tr(
            "Recovered {chats} with {messages}.",
            chats=format_count(chats, "chat"),
            messages=format_count(messages, "message"),
        ),
        *([tr("Lost: {messages}, marked in the chats.", messages=format_count(lost, "message"))] if lost else []),
        *([tr("Recovered in part: {messages}.", messages=format_count(cut, "message"))] if cut else []),
        tr("The damaged file is kept: {path}", path=damaged),
    ]
    sys.stderr.write(" ".join(sentences) + "\n")


def _replace_journal(path: Path, copy: Path) -> Path:
    """
    Put the recovered `copy` in place of the journal, and return the new name of the damaged one.

    At every moment there is a journal, and no log next to it that belongs to another one.
    """
    from qwenlocal.chat.sqlite_pages import wal_path

    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    damaged = next(name for name in names if not name.exists() and not wal_path(name).exists())
    if path.exists():  # there may be nothing but a log
        shutil.copy2(path, damaged)
    log = wal_path(path)
    if log.exists() and log.stat().st_size:
        log.rename(wal_path(damaged))  # the latest writes, readable or not
    log.unlink(missing_ok=True)
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    copy.replace(path)
    return damaged
