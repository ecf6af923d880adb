"""`qwenlocal chats`: what was said, from the journal."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.values import print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import CannotWrite, ChatNotFound, OutputExists, UsageProblem
from qwenlocal.language import tr
from qwenlocal.terminal.plain import harmless, has_colours

if TYPE_CHECKING:
    from qwenlocal.chat.journal import Chat, Journal

FORMATS = ("md", "json", "html")


def list_chats(*, as_json: bool) -> None:
    """All chats, the newest first."""
    journal = _journal(Program())
    chats = journal.chats() if journal else []
    if as_json:
        print_json([vars(chat) for chat in chats])
    elif not chats:
        sys.stdout.write(tr("There are no chats yet. Begin one: qwenlocal run") + "\n")
    else:
        rows = [(str(c.id), _day(c.changed), c.model, str(c.messages), harmless(c.title)) for c in chats]
        print_table(("CHAT", "LAST", "MODEL", "MESSAGES", "TITLE"), rows)


def show_chat(text: str, *, as_json: bool) -> None:
    """What was said in one chat."""
    from qwenlocal.chat.export import as_json as export_json
    from qwenlocal.chat.export import as_markdown

    journal, chat = _found(text)
    thread = journal.thread(chat.id)
    if as_json:
        sys.stdout.write(export_json(thread, chat.title, chat.model))
        return
    said = as_markdown(thread, chat.title)
    sys.stdout.write(harmless(said) if sys.stdout.isatty() else said)


def search_chats(words: str, *, as_json: bool) -> None:
    """
    Messages that have every one of the words.

    Raises
    ------
    ChatNotFound: there is none.
    """
    if not words.strip():
        raise UsageProblem(
            tr("There is nothing to look for."), hint=tr("For example: qwenlocal chats search tokenizer")
        )
    journal = _journal(Program())
    hits = journal.search(words) if journal else []
    if as_json:
        print_json([vars(hit) for hit in hits])
        return
    bold, plain = ("\x1b[1m", "\x1b[0m") if has_colours(sys.stdout) else ("", "")
    for hit in hits:
        before, found, after = map(harmless, (hit.before, hit.found, hit.after))
        sys.stdout.write(f"{hit.chat}  {_day(hit.created)}  {hit.role}: …{before}{bold}{found}{plain}{after}…\n")
    if not hits:
        sys.stderr.write(tr("Nobody said “{words}”.", words=harmless(words)) + "\n")


def rename_chat(text: str, title: str) -> None:
    """Give a chat another title."""
    if not title.strip():
        raise UsageProblem(tr("A title has at least one letter."))
    journal, chat = _found(text)
    journal.rename(chat.id, title.strip())


def remove_chats(texts: list[str]) -> None:
    """Forget chats, for good; what was read is computed again, since the states on disk have the words in them."""
    from qwenlocal.engine.saved import forget_all

    found = {chat.id: (journal, chat) for journal, chat in map(_found, texts)}
    for journal, chat in found.values():
        if journal.is_open(chat.id):
            raise UsageProblem(
                tr("Chat {id} is open in another window.", id=chat.id),
                hint=tr("Close it first; nothing was forgotten."),
            )
    try:
        for journal, chat in found.values():
            journal.remove(chat.id)
            sys.stderr.write(f"Forgotten: {chat.id} {harmless(chat.title)}\n")
    finally:
        forget_all(Program().folders.states)


def export_chat(text: str, form: str | None, output: Path | None, *, force: bool) -> None:
    """
    Write a chat as Markdown, JSON or HTML: to a file, or to standard output.

    Raises
    ------
    UsageProblem: there is no such format. OutputExists: the file is there already.
    """
    from qwenlocal.chat.export import as_html, as_json, as_markdown

    kind = form or (output.suffix.lstrip(".").lower() if output else "md")
    kind = {"markdown": "md", "htm": "html"}.get(kind, kind)
    if kind not in FORMATS:
        raise UsageProblem(
            tr("There is no format {kind}.", kind=kind), hint=tr("There are: {names}", names=", ".join(FORMATS))
        )
    journal, chat = _found(text)
    thread = journal.thread(chat.id)
    said = {
        "md": lambda: as_markdown(thread, chat.title),
        "json": lambda: as_json(thread, chat.title, chat.model),
        "html": lambda: as_html(thread, chat.title),
    }[kind]()
    if output is None:
        sys.stdout.write(said)
        return
    if os.path.exists(output) and not force:  # Path.exists raises without permission
        raise OutputExists(output)
    draft = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(said, encoding="utf-8")
        draft.replace(output)
    except OSError as reason:
        raise CannotWrite(output, reason.strerror or str(reason), hint=tr("Choose another folder.")) from reason
    sys.stderr.write(tr("Saved: {path}", path=output) + "\n")


def recover_chats() -> None:
    """Copy what can be read of a damaged journal into a new one; the damaged file is kept beside it."""
    from qwenlocal.chat.salvage import recover

    path = Program().folders.journal
    if not path.exists():
        sys.stderr.write(tr("There are no chats yet.") + "\n")
        return
    copy = path.with_name(path.name + ".recovering")
    copy.unlink(missing_ok=True)
    chats, messages = recover(path, copy)
    aside = path.with_name(f"{path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        path.rename(aside)
        with contextlib.suppress(FileNotFoundError):  # what was written last is in there, readable or not
            path.with_name(f"{path.name}-wal").rename(aside.with_name(f"{aside.name}-wal"))
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        copy.rename(path)
    except OSError as reason:
        raise CannotWrite(path, reason.strerror or str(reason)) from reason
    read = tr("{chats:,} chats with {messages:,} messages could be read.", chats=chats, messages=messages)
    sys.stderr.write(read + " " + tr("The old file is kept: {path}", path=aside) + "\n")


def _journal(program: Program) -> Journal | None:
    from qwenlocal.chat.journal import Journal

    path = program.folders.journal
    return Journal(path) if path.exists() else None


def _found(text: str) -> tuple[Journal, Chat]:
    """
    The chat that a number, or "last", means.

    Raises
    ------
    ChatNotFound: there is none.
    """
    journal = _journal(Program())
    chats = journal.chats() if journal else []
    if journal is None or not chats:
        raise ChatNotFound(text)
    if text == "last":
        return journal, chats[0]
    for chat in chats:
        if str(chat.id) == text.lstrip("#"):
            return journal, chat
    raise ChatNotFound(text)


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
