"""Copy the readable parts of a damaged journal, page by page, and check every value."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal.chat.chat_locks import ChatLocks
from qwenlocal.chat.events import FinishReason
from qwenlocal.chat.journal import Journal, default_title, insert_chat, lock_path, translate_errors
from qwenlocal.chat.journal_rows import (
    CHAT_COLUMNS,
    ERASED,
    FINISH_REASONS,
    MESSAGE_COLUMNS,
    ROLES,
    ChatRow,
    is_line,
    is_number,
    is_time,
    parse_evicted,
    parse_ids,
)
from qwenlocal.chat.sqlite_pages import Record, read_records
from qwenlocal.chat.thread import ASSISTANT, USER, Message
from qwenlocal.errors import JournalError
from qwenlocal.i18n import tr

_N_CHAT, _N_MESSAGE = len(CHAT_COLUMNS.split(",")), len(MESSAGE_COLUMNS.split(","))
_TEXT = 4  # the index of the column `text` of a message; the columns before it are always short
_UNREADABLE = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as `read_records` returns them
_MAX_UNREADABLE = 0.1  # share of the characters; more is not a text


class Recovered(NamedTuple):
    """
    The numbers of chats and messages that were recovered.

    Of `messages`, `cut` have only the beginning of their text. `lost` more are known by their number only.
    """

    chats: int
    messages: int
    cut: int
    lost: int


def is_intact(path: Path) -> bool:
    """
    Return True if every chat of a journal can be read; reading changes nothing.

    Raises
    ------
    JournalError: it cannot be read for another reason than damage.
    """
    if not path.exists() or not path.stat().st_size:  # there may be a log
        return False
    try:
        with contextlib.closing(Journal(path)) as journal:
            for chat in journal.list_chats():
                journal.load_thread(chat.id)
    except JournalError as error:
        if error.damaged:
            return False
        raise
    return True


def recover(path: Path, target: Path) -> Recovered:
    """
    Copy the readable parts of a damaged journal to a new one at `target`.

    In place of a message that is lost and that others follow, the copy says so. The damaged file is only read.

    Raises
    ------
    JournalError: nothing is readable, a chat is open, or `target` is not writable.
    """
    with contextlib.closing(ChatLocks(lock_path(path))) as locks:
        with translate_errors(path):
            if not locks.acquire_all():
                raise JournalError(path, tr("a chat is open in another window"))
            records = sorted(read_records(path), key=lambda record: (record.is_complete, record.rank))
        return _copy_records(records, path, target)


def _copy_records(records: Sequence[Record], path: Path, target: Path) -> Recovered:
    messages, cut = _collect_messages(records)
    if not messages:
        hint = tr("The file was not changed. To start over, rename it: {path}", path=path)
        raise JournalError(path, tr("there is no readable message in it"), hint=hint)
    columns = {record.key: record.columns for record in records if _is_chat(record)}
    chat_ids, lost = sorted({*messages, *columns}), 0
    with contextlib.closing(Journal(target)) as copy, translate_errors(target):
        for chat_id in chat_ids:
            readable = messages.get(chat_id, {})
            chat = _repair_chat(chat_id, columns.get(chat_id), readable)
            stand_ins = list(_stand_ins(chat, readable))
            for message in readable.values():
                message.created = message.created or chat.created
            with copy.transaction() as db:
                insert_chat(db, chat, [*readable.values(), *stand_ins])
            lost += len(stand_ins)
    return Recovered(len(chat_ids), sum(map(len, messages.values())), len(cut), lost)


def _collect_messages(records: Iterable[Record]) -> tuple[dict[int, dict[int, Message]], set[tuple[int, int]]]:
    """
    Return the messages by the numbers of their chat and their own, and the pairs of numbers of those that are cut.

    Of several versions of a message, the last one counts.
    """
    messages: defaultdict[int, dict[int, Message]] = defaultdict(dict)
    cut: set[tuple[int, int]] = set()
    for record in records:
        chat_id: Any = record.columns[0] if record.columns else None
        if not is_number(chat_id, 1) or (repaired := _repair_message(record)) is None:
            continue
        message, is_cut = repaired
        messages[chat_id][message.number] = message
        (cut.add if is_cut else cut.discard)((chat_id, message.number))
    return messages, cut


def _repair_message(record: Record) -> tuple[Message, bool] | None:
    """
    Build a message from a record, with defaults for damaged values, and tell whether its text is cut.

    Returns None if the record is not a message or has no readable text.
    """
    columns, is_cut = record.columns, not record.is_complete
    if not (_TEXT < len(columns) <= _N_MESSAGE) or (record.is_complete and len(columns) < _N_MESSAGE):
        return None
    _, number, parent, role, text = columns[: _TEXT + 1]
    if not (is_number(number, 1) and is_number(parent) and parent < number and role in ROLES and isinstance(text, str)):
        return None
    text, unreadable = _UNREADABLE.subn("\ufffd", text)
    if unreadable > len(text) * _MAX_UNREADABLE:
        return None
    text, erased, _ = text.partition(ERASED)
    rest: list[Any] = ["", b"", "", 0, 0, 0] if is_cut else columns[_TEXT + 1 :]
    finish_reason, ids, model, pinned, dropped, created = rest
    if finish_reason not in FINISH_REASONS[1:] or erased:
        finish_reason = FinishReason.INTERRUPTED.value if role == ASSISTANT else ""
    message = Message(number, parent, role, text, finish_reason, pinned=pinned == 1, dropped=dropped == 1)
    with contextlib.suppress(ValueError):
        message.ids = parse_ids(ids if not erased else b"")
    message.model = model if isinstance(model, str) else ""
    message.created = created if is_time(created) else 0.0
    return message, is_cut or bool(erased)


def _is_chat(record: Record) -> bool:
    """Return True for a row of the table `chats`: of the key SQLite keeps a NULL among the columns."""
    if len(record.columns) != _N_CHAT or not record.is_complete or not is_number(record.key, 1):
        return False
    chat_id, title, model, system, leaf = record.columns[:5]
    return chat_id is None and is_line(title) and is_line(model) and isinstance(system, str) and is_number(leaf)


def _repair_chat(chat_id: int, columns: Sequence[Any] | None, messages: Mapping[int, Message]) -> ChatRow:
    """Build a chat from its columns, None if only messages are left of it, with defaults for damaged values."""
    if columns is None:
        title = default_title(message for _, message in sorted(messages.items()))
        model = next((message.model for message in messages.values() if message.model), "")
        columns = [None, title, model, "", 0, "[]", "", None, None, 0]
    _, title, model, system, leaf, left_out, summary, created, changed, _ = columns
    evicted: tuple[int, ...] = ()
    with contextlib.suppress(ValueError):
        evicted = tuple(number for number in parse_evicted(left_out) if number in messages)
    leaf = leaf or max(messages, default=0)  # else its messages would not be seen
    times = [message.created for message in messages.values() if message.created] or [0.0]
    summary = summary if isinstance(summary, str) else ""
    created, changed = created if is_time(created) else min(times), changed if is_time(changed) else max(times)
    return ChatRow(chat_id, title, model, system, leaf, evicted, summary, created, changed)


def _stand_ins(chat: ChatRow, messages: Mapping[int, Message]) -> Iterator[Message]:
    """Yield messages that stand in for lost ones: parents of others, and the last message of the path."""
    lost = {message.parent: message.role for message in messages.values() if message.parent not in (0, *messages)}
    if chat.leaf and chat.leaf not in messages:
        lost.setdefault(chat.leaf, messages[max(messages)].role if messages else ASSISTANT)
    for number, neighbor_role in sorted(lost.items()):
        role = ASSISTANT if neighbor_role == USER else USER
        before = [other.number for other in messages.values() if other.number < number and other.role != role]
        finish_reason = FinishReason.INTERRUPTED.value if role == ASSISTANT else ""
        text = tr("[This message could not be recovered.]")
        yield Message(number, max(before, default=0), role, text, finish_reason, created=chat.created)
