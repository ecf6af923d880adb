"""`qwenlocal chats`: list, show, search, export and remove the chats of the journal."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import NotWritable, OutputExists, UsageError
from qwenlocal.formatting import format_count, format_model_name
from qwenlocal.i18n import tr
from qwenlocal.terminal.ansi import escape_controls, supports_color


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
            (str(c.id), _day(c.changed), format_model_name(c.model), str(c.messages), escape_controls(c.title))
            for c in chats
        ]
        print_table(("CHAT", "LAST", "MODEL", "MESSAGES", "TITLE"), rows)


def show_chat(text: str, *, as_json: bool) -> None:
    """Print a chat as Markdown or JSON."""
    from qwenlocal.chat.export import export_json, export_markdown

    journal, chat = AppContext().find_chat(text)
    thread = journal.load_thread(chat.id)
    if as_json:
        sys.stdout.write(export_json(thread, chat.title, chat.model))
        return
    text = export_markdown(thread, chat.title)
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)


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
        sys.stdout.write(f"{hit.chat}  {_day(hit.created)}  {hit.role}: {excerpt}\n")
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


def remove_chats(texts: list[str]) -> None:
    """
    Delete chats permanently, and all prompt caches on disk, which contain their text.

    Raises
    ------
    UsageError: a chat is open in another window; nothing is deleted.
    """
    from qwenlocal.engine.prompt_cache import delete_prompt_caches

    app = AppContext()
    chats = {chat.id: (journal, chat) for journal, chat in map(app.find_chat, texts)}
    for journal, chat in chats.values():
        if journal.is_open_elsewhere(chat.id):
            raise UsageError(
                tr("Chat {id} is open in another window.", id=chat.id),
                hint=tr("Close it first. Nothing was deleted."),
            )
    try:
        for journal, chat in chats.values():
            journal.delete_chat(chat.id)
            sys.stderr.write(f"Deleted: {chat.id} {escape_controls(chat.title)}\n")
    finally:
        delete_prompt_caches(app.folders.states)


def export_chat(text: str, format: str | None, output: Path | None, *, force: bool) -> None:
    """
    Write a chat as Markdown, JSON or HTML, to a file or to standard output.

    Raises
    ------
    UsageError: there is no such format. OutputExists: the file exists. NotWritable: it cannot be written.
    """
    from qwenlocal.chat.export import FORMATS, export_thread
    from qwenlocal.fileio import replace_text

    format = format or (output.suffix.lstrip(".").lower() if output else "md")
    format = {"markdown": "md", "htm": "html"}.get(format, format)
    if format not in FORMATS:
        raise UsageError(
            tr("Unknown format: {format}.", format=format),
            hint=tr("Formats: {names}", names=", ".join(FORMATS)),
        )
    journal, chat = AppContext().find_chat(text)
    thread = journal.load_thread(chat.id)
    content = export_thread(thread, chat.title, chat.model, format)
    if output is None:
        sys.stdout.write(content)
        return
    if os.path.exists(output) and not force:  # Path.exists raises without permission
        raise OutputExists(output)
    replace_text(output, content, hint=tr("Choose another folder."))
    sys.stderr.write(tr("Saved: {path}", path=output) + "\n")


def recover_chats() -> None:
    """
    Copy what is readable in a damaged journal to a new one; the damaged file is kept next to it.

    Raises
    ------
    NotWritable: the files cannot be renamed.
    """
    from qwenlocal.chat.recovery import recover

    path = AppContext().folders.journal
    if not path.exists():
        sys.stderr.write(tr("There are no chats yet.") + "\n")
        return
    copy = path.with_name(path.name + ".recovering")
    copy.unlink(missing_ok=True)
    chats, messages = recover(path, copy)
    damaged = path.with_name(f"{path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        path.rename(damaged)
        with contextlib.suppress(FileNotFoundError):  # the latest writes, readable or not
            path.with_name(f"{path.name}-wal").rename(damaged.with_name(f"{damaged.name}-wal"))
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        copy.rename(path)
    except OSError as error:
        raise NotWritable(path, error.strerror or str(error)) from error
    summary = tr(
        "Recovered {chats} with {messages}.",
        chats=format_count(chats, "chat"),
        messages=format_count(messages, "message"),
    )
    sys.stderr.write(summary + " " + tr("The damaged file is kept: {path}", path=damaged) + "\n")


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
