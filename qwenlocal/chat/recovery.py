"""Copy what is readable of a damaged journal."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwenlocal.chat.journal import Journal, find_chats_open_elsewhere, translate_errors
from qwenlocal.errors import JournalError
from qwenlocal.i18n import tr


def recover(path: Path, target: Path) -> tuple[int, int]:
    """
    Copy what is readable of a damaged journal to a new one at `target`; return the numbers of chats and messages.

    The damaged file is opened read-only.

    Raises
    ------
    JournalError: the file is not a journal, one of its chats is open, or `target` is not writable.
    """
    copy, counts, source = Journal(target), [], f"{path.absolute().as_uri()}?mode=ro"
    with translate_errors(path), contextlib.closing(sqlite3.connect(source, uri=True)) as damaged:
        with contextlib.suppress(sqlite3.DatabaseError):  # the list of open chats may be among what is damaged
            if find_chats_open_elsewhere(damaged):
                raise JournalError(path, tr("a chat is open in another window"))
        for table in ("chats", "messages"):
            with copy.transaction() as db:
                columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
                placeholders = ", ".join("?" * len(columns))
                rows = list(_readable_rows(damaged, table, columns))
                db.executemany(f"INSERT OR REPLACE INTO {table}({', '.join(columns)}) VALUES ({placeholders})", rows)
            counts.append(len(rows))
    copy.close()
    return counts[0], counts[1]


def _readable_rows(db: sqlite3.Connection, table: str, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Yield the rows in order. Steps over unreadable pages, doubling the step until a row can be read again."""
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
