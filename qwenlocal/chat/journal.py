"""
Every chat, in one SQLite file: each message is there before it is shown, an answer at most half a second after.

The file is in WAL mode, so several chats can be open at once, and whoever is killed loses nothing that was written.
Nothing in it leaves the machine. Format: `_SCHEMA`; `PRAGMA user_version` counts its versions.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.chat.keeper import Keeper, in_words, is_damage
from qwenlocal.chat.room import shortly
from qwenlocal.chat.thread import USER, Message, Thread
from qwenlocal.errors import ChatNotFound, JournalUnusable
from qwenlocal.language import tr

VERSION = 1
_APPLICATION = 0x71776C63  # "qwlc": PRAGMA application_id
_PATIENCE = 2.0  # seconds for another process to finish writing
_AROUND = 40  # letters shown on each side of what was found
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
class Chat:
    """A chat in the journal, without its messages."""

    id: int
    title: str
    model: str
    created: float
    changed: float
    messages: int


@dataclass(frozen=True)
class Hit:
    """A message that has every word that was looked for; `before`, `found` and `after` are a piece of it."""

    chat: int
    title: str
    role: str
    before: str
    found: str
    after: str
    created: float


class Journal:
    """The file at `path`, open."""

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        """
        Open the file, or make it.

        Raises
        ------
        JournalUnusable: it is damaged, of a newer version, locked, or cannot be written.
        """
        self.path, self._now, self._lock = path, now, threading.RLock()
        with problems(path):
            # What people say to a model is nobody else's business; SQLite gives the files beside it the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalUnusable(self.path, tr("it was written by a newer version of this program"))
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
        if version == 0:
            with self.writing():
                if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'chats'").fetchone():
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
                self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._db.execute("BEGIN IMMEDIATE")  # whether it can be written is known now, not in the middle of an answer
        self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is done in it, or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # --- reading

    def chats(self) -> list[Chat]:
        """All chats, the one that was changed last first."""
        with self._lock, problems(self.path):
            rows = self._db.execute(
                "SELECT id, title, model, created, changed, (SELECT count(*) FROM messages WHERE chat = chats.id) "
                "FROM chats ORDER BY changed DESC, id DESC"
            ).fetchall()
        return [Chat(*row) for row in rows]

    def chat(self, id: int) -> Chat:
        """
        The chat of that number.

        Raises
        ------
        ChatNotFound: there is none.
        """
        for chat in self.chats():
            if chat.id == id:
                return chat
        raise ChatNotFound(id)

    def thread(self, id: int) -> Thread:
        """
        What was said in a chat, not kept any further.

        Raises
        ------
        ChatNotFound: there is none.
        """
        with self._lock, problems(self.path):
            found = self._db.execute("SELECT system, leaf, left_out, summary FROM chats WHERE id = ?", (id,)).fetchone()
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM messages WHERE chat = ? ORDER BY number", (id,)).fetchall()
            if found is None:
                raise ChatNotFound(id)
            system, leaf, left, summary = found
            messages = {message.number: message for message in map(_message, rows)}
            whole = {number: message for number, message in messages.items() if _is_rooted(message, messages)}
            leaf = leaf if leaf == 0 or leaf in whole else max(whole, default=0)
            return Thread(system, leaf, whole, set(json.loads(left)), summary)

    def search(self, words: str) -> list[Hit]:
        """
        Messages that have every one of `words`, wherever they stand, in any script; the newest first.

        Capitals and accents typed in two ways make no difference.
        """
        wanted = [_folded(word) for word in words.split()]
        if not wanted:
            return []
        with self._lock, problems(self.path):
            rows = self._db.execute(
                "SELECT chat, title, role, text, messages.created FROM messages JOIN chats ON chats.id = chat "
                "ORDER BY messages.created DESC"
            )
            found = [(row, _folded(row[3])) for row in rows]
            return [_hit(row, folded, wanted[0]) for row, folded in found if all(word in folded for word in wanted)]

    # --- writing

    def rename(self, id: int, title: str) -> None:
        """
        Give a chat another title.

        Raises
        ------
        ChatNotFound: there is none.
        """
        self._change("UPDATE chats SET title = ? WHERE id = ?", (title, id), id)

    def remove(self, id: int) -> None:
        """
        Forget a chat, for good.

        Raises
        ------
        ChatNotFound: there is none.
        """
        with problems(self.path), self.writing() as db:
            db.execute("DELETE FROM messages WHERE chat = ?", (id,))
            if not db.execute("DELETE FROM chats WHERE id = ?", (id,)).rowcount:
                raise ChatNotFound(id)
        with problems(self.path), self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _change(self, statement: str, values: Sequence[Any], id: int) -> None:
        with problems(self.path), self.writing() as db:
            if not db.execute(statement, values).rowcount:
                raise ChatNotFound(id)

    def keep(self, thread: Thread, *, model: str, id: int | None = None) -> Keeper:
        """
        Keep what is said in `thread` from now on: as a new chat, or going on with `id`.

        Where another process has that chat open, what is said goes into a copy of it.
        """
        keeper = Keeper(self, thread, model)
        if id is not None and not self.is_open(id):
            keeper.id = id
            keeper.moved(thread)
        elif thread.messages:
            for message in thread.messages.values():
                keeper.changed(message)
        thread.recorder = keeper
        return keeper

    def is_open(self, id: int) -> bool:
        """Whether another living process has that chat open."""
        with self._lock, problems(self.path):
            return id in open_elsewhere(self._db)

    def write(self, keeper: Keeper, messages: Sequence[Message], removed: Sequence[int]) -> None:
        """
        Write what changed, the chat first where it is new.

        Raises
        ------
        sqlite3.Error: it cannot be written now.
        """
        thread, now = keeper.thread, self._now()
        state = (thread.system, thread.leaf, json.dumps(sorted(thread.left)), thread.summary, keeper.model, now)
        with self.writing() as db:
            id = keeper.id
            if (
                id is not None
                and not db.execute(
                    "UPDATE chats SET system = ?, leaf = ?, left_out = ?, summary = ?, model = ?, changed = ?, "
                    "open_by = ? WHERE id = ?",
                    (*_clean(state), os.getpid() if keeper.is_open else 0, id),
                ).rowcount
            ):
                # It was forgotten meanwhile, and goes on as a new one.
                id, messages = None, list(thread.messages.values())
            if id is None:
                id = db.execute(
                    "INSERT INTO chats(title, created, open_by, system, leaf, left_out, summary, model, changed) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (_title(thread), now, os.getpid() if keeper.is_open else 0, *_clean(state)),
                ).lastrowid
            for message in messages:
                db.execute(
                    f"INSERT OR REPLACE INTO messages(chat, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (id, *_clean(_row(message))),
                )
            db.executemany("DELETE FROM messages WHERE chat = ? AND number = ?", [(id, number) for number in removed])
        keeper.id = id


@contextlib.contextmanager
def problems(path: Path) -> Iterator[None]:
    """What SQLite says about the file at `path`, as `JournalUnusable`."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as reason:  # the last two of what damaged rows hold
        raise JournalUnusable(path, in_words(reason), damaged=is_damage(reason)) from reason


def open_elsewhere(db: sqlite3.Connection) -> set[int]:
    """The chats that other living processes have open."""
    rows = db.execute("SELECT id, open_by, changed FROM chats WHERE open_by NOT IN (0, ?)", (os.getpid(),)).fetchall()
    return {id for id, process, changed in rows if _was_alive(process, changed)}


def _was_alive(process: int, then: float) -> bool:
    """Whether a process lives that began before `then`; one that began later only has the number of another."""
    import psutil

    try:
        return bool(psutil.Process(process).create_time() <= then)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it lives, and may not be asked
        return True


def _title(thread: Thread) -> str:
    first = next((message.text for message in thread.messages.values() if message.role == USER), "")
    return shortly(_text(first)) or tr("(no title)")


def _text(value: str) -> str:
    """SQLite takes no lone surrogates, which are bytes of a terminal that are no text."""
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _clean(row: Sequence[Any]) -> list[object]:
    return [_text(value) if isinstance(value, str) else value for value in row]


def _row(message: Message) -> tuple[object, ...]:
    ids = array.array("i", message.ids).tobytes()
    return (
        message.number, message.parent, message.role, message.text, message.why, ids, message.model,
        int(message.pinned), int(message.dropped), message.created,
    )  # fmt: skip


def _message(row: Sequence[Any]) -> Message:
    number, parent, role, text, why, ids, model, pinned, dropped, created = row
    tokens = array.array("i")
    tokens.frombytes(ids[: len(ids) // tokens.itemsize * tokens.itemsize])
    return Message(
        number,
        parent,
        role,
        text,
        why,
        tuple(tokens),
        model,
        bool(pinned),
        bool(dropped),
        created,
    )


def _is_rooted(message: Message, messages: dict[int, Message]) -> bool:
    """Whether every message before it is there: of a journal that was damaged, some may not be."""
    seen: set[int] = set()
    while message.parent:
        seen.add(message.number)
        before = messages.get(message.parent)
        if before is None or before.number in seen:
            return False
        message = before
    return True


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _hit(row: Sequence[Any], folded: str, word: str) -> Hit:
    """A piece around the first word; folding hardly ever changes a text's length, and then the piece is a bit off."""
    chat, title, role, text, created = row
    at = folded.index(word)
    line = " ".join(str(text)[max(0, at - _AROUND) : at].splitlines())
    found, after = str(text)[at : at + len(word)], str(text)[at + len(word) : at + len(word) + _AROUND]
    return Hit(chat, title, role, line, found, " ".join(after.splitlines()), created)
