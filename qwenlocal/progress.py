"""Progress of tasks: bytes of a file, tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Say = Callable[[str], None]  # prints a sentence for the user


class TaskProgress(NamedTuple):
    """`done` of `total` bytes; `doing` is the verb to show; `source` names where the bytes come from."""

    name: str
    done: int
    total: int
    doing: str
    source: str = ""


class PromptProgress(NamedTuple):
    """`done` of `total` prompt tokens are in the KV cache; `reused` of them were there already."""

    done: int
    total: int
    reused: int
