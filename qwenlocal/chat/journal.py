"""
The journal: all chats in one SQLite file.

A message is written before it is shown, an answer at most half a second later. The file is in WAL mode, so several
chats can be open at once, and a killed process loses nothing that was written. Nothing in it leaves the machine. The
format is `_SCHEMA`; `PRAGMA user_version` is its version.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.chat.journal_writer import JournalWriter, describe_error, is_corruption
from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.errors import ChatNotFound, JournalError
from qwenlocal.formatting import replace_surrogates, shorten
from qwenlocal.i18n import tr

VERSION = 1
_APPLICATION_ID = 0x71776C63  # "qwlc": PRAGMA application_id
_HIT_CONTEXT = 40  # characters shown on each side of a search hit
_SCHEMA = """
CREATE TABLE chats(
    id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, model TEXT NOT NULL, system TEXT NOT NULL,
    leaf INTEGER NOT NULL, left_out TEXT NOT NULL, summary TEXT NOT NULL,
    created REAL NOT NULL, changed REAL NOT NULL, open_by INTEGER NOT NULL);
CREATE TABLE messages(
    chat INTEGER NOT NULL, number INTEGER NOT NULL, parent INTEGER NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL,
    why TEXT NOT NULL, ids BLOB NOT NULL, model TEXT NOT NULL, pinned INTEGER NOT NULL, dropped INTEGER NOT NULL,
    created REAL NOT NULL, PRIMARY KEY(chat, number));
"""
_COLUMNS = "number, parent, role, text, why, ids, model, pinned, dropped, created"


@dataclass(frozen=True)
class ChatInfo:
    """A chat in the journal without its messages. The field names are the keys of `chats --json`."""

    id: int
    title: str
    model: str
    created: float
    changed: float
    messages: int


@dataclass(frozen=True)
class SearchHit:
    """
    A message that contains all words of a search; `before`, `found` and `after` are an excerpt around the first word.

    `cut_before` and `cut_after` are True if the message has more text there.

    The field names are the keys of `chats search --json`.
    """

    chat: int
    title: str
    role: str
    before: str
    found: str
    after: str
    created: float
    cut_before: bool
    cut_after: bool


class Journal:
    """The open journal at `path`."""

    def __init__(self, path: Path, *, lock_timeout: float = 2.0) -> None:
        """
        Open the file, or create it. Waits up to `lock_timeout` seconds for another process to finish writing.

        Raises
        ------
        JournalError: the file is damaged, of a newer version, locked or not writable.
        """
        self.path, self._lock = path, threading.RLock()
        with translate_errors(path):
            # Chats are private. SQLite creates its -wal and -shm files with the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=lock_timeout, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalError(self.path, tr("it was written by a newer version of qwenlocal"))
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")  # overwrite deleted messages
        if version == 0:
            with self.transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'chats'").fetchone():
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute("BEGIN IMMEDIATE")  # fails now if the file is not writable, not in the middle of an answer
        self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction; an exception rolls it back."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # --- reading

    def list_chats(self) -> list[ChatInfo]:
        """Return all chats, the most recently changed one first."""
        with self._lock, translate_errors(self.path):
            rows = self._db.execute(
                "SELECT id, title, model, created, changed, (SELECT count(*) FROM messages WHERE chat = chats.id) "
                "FROM chats ORDER BY changed DESC, id DESC"
            ).fetchall()
        return [ChatInfo(*row) for row in rows]

    def get_chat(self, chat_id: int) -> ChatInfo:
        """
        Return the chat `chat_id`.

        Raises
        ------
        ChatNotFound: there is no such chat.
        """
        for chat in self.list_chats():
            if chat.id == chat_id:
                return chat
        raise ChatNotFound(chat_id)

    def load_thread(self, chat_id: int) -> Thread:
        """
        Return the messages of a chat. Changes of the thread are not written; see `open_writer`.

        Raises
        ------
        ChatNotFound: there is no such chat.
        """
        with self._lock, translate_errors(self.path):
            chat = self._db.execute(
                "SELECT system, leaf, left_out, summary FROM chats WHERE id = ?", (chat_id,)
            ).fetchone()
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE chat = ? ORDER BY number", (chat_id,)
            ).fetchall()
            if chat is None:
                raise ChatNotFound(chat_id)
            system, leaf, evicted, summary = chat
            messages = {message.number: message for message in map(_from_row, rows)}
            rooted = {number: message for number, message in messages.items() if _is_rooted(message, messages)}
            leaf = leaf if leaf == 0 or leaf in rooted else max(rooted, default=0)
            return Thread(system, leaf, rooted, set(json.loads(evicted)), summary)

    def search(self, words: str) -> list[SearchHit]:
        """
        Return the messages that contain all `words`, in any script, the newest first.

        Words match anywhere in a text, regardless of case and of how accents are encoded.
        """
        terms = [_normalize(word) for word in words.split()]
        if not terms:
            return []
        with self._lock, translate_errors(self.path):
            rows = self._db.execute(
                "SELECT chat, title, role, text, messages.created FROM messages JOIN chats ON chats.id = chat "
                "ORDER BY messages.created DESC"
            )
            texts = [(row, _normalize(row[3])) for row in rows]
            return [_search_hit(row, text, terms[0]) for row, text in texts if all(term in text for term in terms)]

    # --- writing

    def rename_chat(self, chat_id: int, title: str) -> None:
        """
        Set the title of a chat.

        Raises
        ------
        ChatNotFound: there is no such chat.
        """
        with translate_errors(self.path), self.transaction() as db:
            if not db.execute("UPDATE chats SET title = ? WHERE id = ?", (title, chat_id)).rowcount:
                raise ChatNotFound(chat_id)

    def delete_chat(self, chat_id: int) -> None:
        """
        Delete a chat, overwriting its text in the file.

        Raises
        ------
        ChatNotFound: there is no such chat.
        """
        with translate_errors(self.path), self.transaction() as db:
            db.execute("DELETE FROM messages WHERE chat = ?", (chat_id,))
            if not db.execute("DELETE FROM chats WHERE id = ?", (chat_id,)).rowcount:
                raise ChatNotFound(chat_id)
        with translate_errors(self.path), self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def open_writer(self, thread: Thread, *, model: str, chat_id: int | None = None) -> JournalWriter:
        """
        Write `thread` and its future changes: to the chat `chat_id`, or to a new one.

        If another process has that chat open, the thread is written to a copy of it.
        """
        writer = JournalWriter(self, thread, model)
        if chat_id is not None and not self.is_open_elsewhere(chat_id):
            writer.chat_id = chat_id
            writer.moved(thread)
        else:
            for message in thread.messages.values():
                writer.changed(message)
        thread.observer = writer
        return writer

    def is_open_elsewhere(self, chat_id: int) -> bool:
        """True if another running process has the chat open."""
        with self._lock, translate_errors(self.path):
            return chat_id in find_chats_open_elsewhere(self._db)

    def write_thread(self, writer: JournalWriter, messages: Sequence[Message], removed: Sequence[int]) -> None:
        """
        Write the changes of the writer's thread; create the chat if it is new.

        Raises
        ------
        sqlite3.Error: the file cannot be written now.
        """
        thread, now = writer.thread, time.time()
        state = (thread.system, thread.leaf, json.dumps(sorted(thread.evicted)), thread.summary, writer.model, now)
        process = os.getpid() if writer.is_open else 0
        with self.transaction() as db:
            chat_id = writer.chat_id
            if (
                chat_id is not None
                and not db.execute(
                    "UPDATE chats SET system = ?, leaf = ?, left_out = ?, summary = ?, model = ?, changed = ?, "
                    "open_by = ? WHERE id = ?",
                    (*_to_sql(state), process, chat_id),
                ).rowcount
            ):
                # The chat was deleted meanwhile: write all of it to a new one.
                chat_id, messages = None, list(thread.messages.values())
            if chat_id is None:
                chat_id = db.execute(
                    "INSERT INTO chats(title, created, open_by, system, leaf, left_out, summary, model, changed) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (_default_title(thread), now, process, *_to_sql(state)),
                ).lastrowid
            for message in messages:
                db.execute(
                    f"INSERT OR REPLACE INTO messages(chat, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (chat_id, *_to_sql(_to_row(message))),
                )
            db.executemany(
                "DELETE FROM messages WHERE chat = ? AND number = ?", [(chat_id, number) for number in removed]
            )
        writer.chat_id = chat_id


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's and the system's errors about the file at `path` as `JournalError`."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:  # the last two: values in damaged rows
        raise JournalError(path, describe_error(error), damaged=is_corruption(error)) from error


def find_chats_open_elsewhere(db: sqlite3.Connection) -> set[int]:
    """Return the ids of the chats that other running processes have open."""
    rows = db.execute("SELECT id, open_by, changed FROM chats WHERE open_by NOT IN (0, ?)", (os.getpid(),)).fetchall()
    return {chat_id for chat_id, process, changed in rows if _has_run_since(process, changed)}


def _has_run_since(process: int, moment: float) -> bool:
    """True if a process is running and started before `moment`; one that started later only reuses the id."""
    import psutil

    try:
        return bool(psutil.Process(process).create_time() <= moment)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it is running, but denies access
        return True


def _default_title(thread: Thread) -> str:
    first = next((message.text for message in thread.messages.values() if message.role == USER), "")
    return shorten(replace_surrogates(first)) or tr("(no title)")


def _to_sql(row: Sequence[Any]) -> list[object]:
    """Replace lone surrogates, which SQLite rejects."""
    return [replace_surrogates(value) if isinstance(value, str) else value for value in row]


def _to_row(message: Message) -> tuple[object, ...]:
    ids = array.array("i", message.ids).tobytes()
    return (
        message.number, message.parent, message.role, message.text, message.finish_reason, ids, message.model,
        message.pinned, message.dropped, message.created,
    )  # fmt: skip


def _from_row(row: Sequence[Any]) -> Message:
    number, parent, role, text, finish_reason, ids, model, pinned, dropped, created = row
    tokens = array.array("i")
    tokens.frombytes(ids[: len(ids) // tokens.itemsize * tokens.itemsize])
    return Message(
        number, parent, role, text, finish_reason, tuple(tokens), model, bool(pinned), bool(dropped), created
    )


def _is_rooted(message: Message, messages: dict[int, Message]) -> bool:
    """True if all ancestors of a message exist; in a damaged journal some may be missing."""
    visited: set[int] = set()
    while message.parent:
        visited.add(message.number)
        parent = messages.get(message.parent)
        if parent is None or parent.number in visited:
            return False
        message = parent
    return True


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _search_hit(row: Sequence[Any], normalized: str, term: str) -> SearchHit:
    """Cut the excerpt around `term`. If normalizing changed the length of the text, which is rare, it is a bit off."""
    chat, title, role, text, created = row
    start = normalized.index(term)
    end, text = start + len(term), str(text)
    before = " ".join(text[max(0, start - _HIT_CONTEXT) : start].splitlines())
    after = " ".join(text[end : end + _HIT_CONTEXT].splitlines())
    cut_before, cut_after = start > _HIT_CONTEXT, end + _HIT_CONTEXT < len(text)
    return SearchHit(chat, title, role, before, text[start:end], after, created, cut_before, cut_after)
