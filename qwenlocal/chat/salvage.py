"""Copying what can still be read out of a damaged journal."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenlocal.chat.journal import Journal, open_elsewhere, problems
from qwenlocal.errors import JournalUnusable
from qwenlocal.language import tr


def recover(path: Path, target: Path) -> tuple[int, int]:
    """
    Copy what can be read of a damaged journal into a new one at `target`; returns how many chats and messages.

    The damaged file is only read.

    Raises
    ------
    JournalUnusable: it is no journal at all, a chat in it is open, or `target` cannot be written.
    """
    whole, counts = Journal(target), []
    with problems(path), contextlib.closing(_to_read(path)) as damaged:
        with contextlib.suppress(sqlite3.DatabaseError):  # who has it open cannot be read: the rest may be
            if open_elsewhere(damaged):
                raise JournalUnusable(path, tr("a chat is open in another window"))
        for table in ("chats", "messages"):
            with whole.writing() as db:
                columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                places = ", ".join("?" * len(columns))
                rows = list(_readable_rows(damaged, table, columns))
                db.executemany(f"INSERT OR REPLACE INTO {table}({', '.join(columns)}) VALUES ({places})", rows)
            counts.append(len(rows))
    whole.close()
    return counts[0], counts[1]


def _to_read(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _readable_rows(db: sqlite3.Connection, table: str, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Rows in turn; where a page cannot be read, in ever longer steps over it."""
    last, step = 0, 1
    while step < 1 << 24:
        try:
            row = db.execute(
                f"SELECT rowid, {', '.join(columns)} FROM {table} NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT 1",
                (last,),
            ).fetchone()
        except sqlite3.DatabaseError:
            last, step = last + step, step * 2
            continue
        if row is None:
            return
        last, step = row[0], 1
        yield row[1:]
