"""
The rows of the journal: their columns, and checks of every value, which a damaged file may have changed.

The functions that parse or check a value raise ValueError if it is impossible.
"""

from __future__ import annotations

import array
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.thread import ASSISTANT, USER, Message
from qwenlocal.formatting import replace_surrogates

SCHEMA = """
CREATE TABLE chats(
    id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, model TEXT NOT NULL, system TEXT NOT NULL,
    leaf INTEGER NOT NULL, left_out TEXT NOT NULL, summary TEXT NOT NULL,
    created REAL NOT NULL, changed REAL NOT NULL, open_by INTEGER NOT NULL);
CREATE TABLE messages(
    chat INTEGER NOT NULL, number INTEGER NOT NULL, parent INTEGER NOT NULL, role TEXT NOT NULL, text TEXT NOT NULL,
    why TEXT NOT NULL, ids BLOB NOT NULL, model TEXT NOT NULL, pinned INTEGER NOT NULL, dropped INTEGER NOT NULL,
    created REAL NOT NULL, PRIMARY KEY(chat, number));
"""  # open_by is unused: locks tell which chats are open (chat_locks.py)
CHAT_COLUMNS = "id, title, model, system, leaf, left_out, summary, created, changed, open_by"
MESSAGE_COLUMNS = "chat, number, parent, role, text, why, ids, model, pinned, dropped, created"
ROLES = (USER, ASSISTANT)
FINISH_REASONS = ("", *(reason.value for reason in FinishReason))
ERASED = "\0" * 64  # part of a page that the disk lost
_MAX_NUMBER = 2**31
_MAX_TIME = 253_370_764_800  # the year 9999 in seconds, the last that `datetime` knows


@dataclass(frozen=True)
class ChatRow:
    """A row of the table `chats`; `evicted` is its column `left_out`, and `id` 0 stands for the next number."""

    id: int
    title: str
    model: str
    system: str
    leaf: int
    evicted: tuple[int, ...]
    summary: str
    created: float
    changed: float

    def to_sql(self) -> list[object]:
        """Return the values of `CHAT_COLUMNS`."""
        evicted = json.dumps(sorted(self.evicted))
        row = (self.id or None, self.title, self.model, self.system, self.leaf, evicted, self.summary)
        return replace_row_surrogates((*row, self.created, self.changed, 0))


def parse_chat(row: Sequence[Any]) -> ChatRow:
    """Check the values of `CHAT_COLUMNS`, of which `open_by` may be missing."""
    chat_id, title, model, system, leaf, left_out, summary, created, changed = row[:9]
    _check("the number of a chat", is_number(chat_id, 1), chat_id)
    _check("the title or model of a chat", is_line(title) and is_line(model), (title, model))
    _check("a text of a chat", isinstance(system, str) and isinstance(summary, str), (system, summary))
    _check("the last message of a chat", is_number(leaf), leaf)
    _check("the time of a chat", is_time(created) and is_time(changed), (created, changed))
    return ChatRow(chat_id, title, model, system, leaf, parse_evicted(left_out), summary, created, changed)


def parse_evicted(text: Any) -> tuple[int, ...]:
    """Parse the column `left_out`, a JSON list of message numbers."""
    try:
        numbers = json.loads(text)
    except (RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    _check("a list of turns", isinstance(numbers, list) and all(map(is_number, numbers)), text)
    return tuple(numbers)


def parse_message(row: Sequence[Any]) -> Message:
    """
    Check the values of `MESSAGE_COLUMNS`, and return the message without its chat.

    An answer without a finish reason was interrupted by the end of its process.
    """
    _chat, number, parent, role, text, finish_reason, ids, model, pinned, dropped, created = row
    _check("the number of a message", is_number(number, 1), number)
    _check("the parent of a message", is_number(parent) and parent < number, parent)
    check_text(role, text, created)
    _check("a finish reason", finish_reason in FINISH_REASONS, finish_reason)
    _check("the model of a message", isinstance(model, str), model)
    _check("a mark of a message", pinned in (0, 1) and dropped in (0, 1), (pinned, dropped))
    if role == ASSISTANT:
        finish_reason = finish_reason or FinishReason.INTERRUPTED.value
    return Message(
        number, parent, role, text, finish_reason, parse_ids(ids), model, bool(pinned), bool(dropped), created
    )


def check_text(role: object, text: object, created: object) -> None:
    """Check what is shown of a message."""
    _check("a role", role in ROLES, role)
    _check("the text of a message", isinstance(text, str) and ERASED not in text, text)
    _check("the time of a message", is_time(created), created)


def parse_ids(data: object) -> tuple[int, ...]:
    """Parse the column `ids`: token ids as C integers."""
    ids = array.array("i")
    _check("the tokens of a message", isinstance(data, bytes) and len(data) % ids.itemsize == 0, data)
    assert isinstance(data, bytes)
    ids.frombytes(data)
    _check("a token", min(ids, default=0) >= 0, min(ids, default=0))
    return tuple(ids)


def message_to_sql(chat_id: int, message: Message) -> list[object]:
    """
    Return the values of `MESSAGE_COLUMNS`.

    Long runs of zero bytes, as at the end of a log after a power failure, become U+FFFD: they mark erased text.
    """
    text = message.text.replace(ERASED, "\ufffd" * len(ERASED))
    ids = array.array("i", message.ids).tobytes()
    row = (chat_id, message.number, message.parent, message.role, text, message.finish_reason, ids)
    return replace_row_surrogates((*row, message.model, message.pinned, message.dropped, message.created))


def replace_row_surrogates(row: Sequence[object]) -> list[object]:
    """Replace lone surrogates, which SQLite rejects."""
    return [replace_surrogates(value) if isinstance(value, str) else value for value in row]


def is_number(value: object, smallest: int = 0) -> bool:
    """Return True for the number of a chat or message, from `smallest` on."""
    return type(value) is int and smallest <= value < _MAX_NUMBER


def is_line(value: object) -> bool:
    """Return True for a text without null characters, which stand for bytes that the disk lost."""
    return isinstance(value, str) and "\0" not in value


def is_time(value: object) -> bool:
    """Return True for a time in seconds since 1970 that `datetime` can represent."""
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value < _MAX_TIME


def _check(name: str, is_possible: bool, value: object) -> None:
    if not is_possible:
        raise ValueError(f"{name} is {value!r:.60}")
