"""
The journal: all chats in one SQLite file.

A message is written before it is shown, an answer at most half a second later. The file is in WAL mode, so several
chats can be open at once, and a killed process loses nothing that was written. Nothing in it leaves the machine. The
format is `journal_rows.SCHEMA`; `PRAGMA user_version` is its version.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.chat.chat_locks import ChatLocks
from qwenlocal.chat.journal_rows import (
    CHAT_COLUMNS,
    MESSAGE_COLUMNS,
    SCHEMA,
    ChatRow,
    check_text,
    message_to_sql,
    parse_chat,
    parse_message,
)
from qwenlocal.chat.sqlite_pages import PAGE_SIZE, has_damaged_log
from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.errors import ChatNotFound, JournalError
from qwenlocal.formatting import replace_surrogates, shorten
from qwenlocal.i18n import tr

VERSION = 1
_APPLICATION_ID = 0x71776C63  # "qwlc": PRAGMA application_id
_ACCESS_PROBLEMS = ("locked", "busy", "readonly", "unable to open", "is full", "disk I/O")  # in messages of SQLite
_MAX_ID_DIGITS = 18  # SQLite's integers end at 2**63
_HIT_CONTEXT = 40  # characters shown on each side of a search hit


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
    """The open journal at `path`; `chat_locks` tell other processes which chats are open here."""

    def __init__(self, path: Path, *, lock_timeout: float = 2.0) -> None:
        """
        Open the file, or create it. Waits up to `lock_timeout` seconds for another process to finish writing.

        Raises
        ------
        JournalError: the file is damaged, of a newer version, locked or not writable.
        """
        self.path, self._lock = path, threading.RLock()
        self.chat_locks = ChatLocks(lock_path(path))
        with translate_errors(path):
            _check_file(path, lock_timeout)
            # Chats are private. SQLite creates its -wal and -shm files with the mode of the database. If there is one,
            # it is not opened here: closing it would drop the locks of this process's connections to it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self._db = sqlite3.connect(path, timeout=lock_timeout, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        self._db.execute(f"PRAGMA page_size = {PAGE_SIZE}")  # SQLite's default, on which recovery relies
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")  # overwrite deleted messages
        if version == 0:
            with self.transaction():
                if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'chats'").fetchone():
                    for statement in SCHEMA.split(";\n"):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute("BEGIN IMMEDIATE")  # fails now if the file is not writable, not in the middle of an answer
        self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file and its chats."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self.chat_locks.close()
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction; an exception rolls it back."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    # --- reading

    def list_chats(self) -> list[ChatInfo]:
        """Return all chats, the most recently changed one first."""
        with self._lock, translate_errors(self.path):
            rows = self._db.execute(
                f"SELECT {CHAT_COLUMNS}, (SELECT count(*) FROM messages WHERE chat = chats.id) "
                "FROM chats ORDER BY changed DESC, id DESC"
            ).fetchall()
            chats = [(parse_chat(row), row[-1]) for row in rows]
        return [ChatInfo(chat.id, chat.title, chat.model, chat.created, chat.changed, count) for chat, count in chats]

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
        Return the messages of a chat. Changes of the thread are not written; see `JournalWriter`.

        Raises
        ------
        ChatNotFound: there is no such chat. JournalError: it is damaged.
        """
        with self._lock, translate_errors(self.path):
            row = self._db.execute(f"SELECT {CHAT_COLUMNS} FROM chats WHERE id = ?", (chat_id,)).fetchone()
            rows = self._db.execute(
                f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE chat = ? ORDER BY number", (chat_id,)
            ).fetchall()
            if row is None:
                raise ChatNotFound(chat_id)
            chat, messages = parse_chat(row), {message.number: message for message in map(parse_message, rows)}
            missing = {chat.leaf, *(message.parent for message in messages.values())} - {0, *messages}
            if missing:
                raise ValueError(f"chat {chat_id} has no message {min(missing)}")
            return Thread(chat.system, chat.leaf, messages, set(chat.evicted), chat.summary)

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
            texts = []
            for row in rows:
                check_text(*row[2:])
                texts.append((row, _normalize(row[3])))
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
            title = replace_surrogates(title).replace("\0", "")
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

    def acquire(self, chat_id: int) -> bool:
        """Open a chat until `release`, `close` or the end of the process; False if it is open elsewhere."""
        with self._lock, translate_errors(self.path):
            return self.chat_locks.acquire(chat_id)

    def open_thread(self, chat_id: int) -> Thread:
        """
        Open a chat, if no other process has it open, and load it: in this order, so that no other can change it since.

        Raises
        ------
        ChatNotFound: there is no such chat. JournalError: it is damaged. The chat is not left open then.
        """
        with self._lock:
            was_open = self.chat_locks.is_held(chat_id)
            self.acquire(chat_id)
            try:
                return self.load_thread(chat_id)
            except (ChatNotFound, JournalError):
                if not was_open:
                    self.release(chat_id)
                raise

    def release(self, chat_id: int) -> None:
        """Let other processes open a chat."""
        with self._lock:
            self.chat_locks.release(chat_id)


def parse_chat_number(text: str) -> int | None:
    """`parse_chat_number("#03")` is 3; None for text that is no number of a chat."""
    digits = text.lstrip("#")
    return int(digits) if digits.isdecimal() and len(digits) <= _MAX_ID_DIGITS else None


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's and the system's errors about the file at `path` as `JournalError`."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:  # the last two: values in damaged rows
        raise JournalError(path, describe_error(error), damaged=is_corruption(error)) from error


def describe_error(error: Exception) -> str:
    """Return why SQLite could not read or write the file, as part of a sentence."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return tr("it is locked by another program")
    is_inaccessible = isinstance(error, (PermissionError, FileNotFoundError))
    if is_inaccessible or "readonly" in text or "unable to open" in text:
        return tr("it cannot be written")
    if isinstance(error, OSError):
        return error.strerror or text
    return tr("it is damaged ({text})", text=text) if is_corruption(error) else text


def is_corruption(error: Exception) -> bool:
    """True if the file's contents are at fault, and not access to it."""
    is_access = isinstance(error, sqlite3.OperationalError) and any(text in str(error) for text in _ACCESS_PROBLEMS)
    return not isinstance(error, OSError) and not is_access


def _check_file(path: Path, lock_timeout: float) -> None:
    """
    Check the structure of a journal, if there is one, and change nothing.

    A connection that can write would, when it is closed, move the log into the file and drop what is damaged.

    Raises
    ------
    JournalError: it is of a newer version. sqlite3.Error: it is damaged or cannot be read.
    """
    # Another process may be writing to the log: a page that is half-written at first is complete the second time.
    if has_damaged_log(path) and has_damaged_log(path):
        raise sqlite3.DatabaseError("a frame of the write-ahead log has a wrong checksum")
    if not path.exists():
        return
    if not path.is_file():
        raise JournalError(path, tr("it is not a file"))
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, timeout=lock_timeout, uri=True)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalError(path, tr("it was written by a newer version of qwenlocal"))
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()  # takes 1 ms per megabyte
        if verdict != "ok":
            raise sqlite3.DatabaseError("database disk image is malformed")


def lock_path(path: Path) -> Path:
    """Return the path of the file with the locks of the journal at `path`."""
    return path.with_name(f"{path.name}-locks")


def default_title(messages: Iterable[Message]) -> str:
    """Return the beginning of the first question."""
    first = next((message.text for message in messages if message.role == USER), "")
    return shorten(replace_surrogates(first).replace("\0", "")) or tr("(no title)")


def insert_chat(db: sqlite3.Connection, chat: ChatRow, messages: Iterable[Message]) -> int:
    """
    Add a chat, or replace its row, with new and changed messages; return its number.

    Raises
    ------
    sqlite3.Error: the file cannot be written now.
    """
    chat_id = db.execute(_insert_statement("chats", CHAT_COLUMNS), chat.to_sql()).lastrowid or 0
    db.executemany(
        _insert_statement("messages", MESSAGE_COLUMNS), [message_to_sql(chat_id, message) for message in messages]
    )
    return chat_id


def _insert_statement(table: str, columns: str) -> str:
    placeholders = ", ".join("?" * len(columns.split(",")))
    return f"INSERT OR REPLACE INTO {table}({columns}) VALUES ({placeholders})"


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
