"""Progress of a task that reads or writes a file."""

from __future__ import annotations

from typing import NamedTuple


class TaskProgress(NamedTuple):
    """`done` of `total` bytes; `doing` is the verb to show; `source` names where the bytes come from."""

    name: str
    done: int
    total: int
    doing: str
    source: str = ""
