"""
Files that are written in blocks and can be resumed: partial downloads and interrupted conversions.

`<name>.part` holds the bytes, `<name>.part.journal` lists the blocks. A journal is append-only text: its first
line is a JSON object that identifies the file, each further line describes a block by whole numbers (its number, the
CRC-32 of its bytes, …) and is appended after the bytes were written. After a crash or a power cut the checksums decide
which blocks count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_ENTRY = re.compile(r"-?[0-9]{1,15}(?: -?[0-9]{1,15})*")


def part_path(path: Path) -> Path:
    """Return the path of the file that collects the bytes of `path`."""
    return path.with_name(path.name + ".part")


def journal_path(path: Path) -> Path:
    """Return the path of the journal for `path`."""
    return path.with_name(path.name + ".part.journal")


class JournalContent(NamedTuple):
    """The content of a journal: the object that identifies the file, and the numbers of each line."""

    identity: dict[str, Any]
    entries: list[list[int]]


def read_journal(path: Path) -> JournalContent | None:
    """
    Read a journal; None if there is none or its first line is damaged.

    Torn or garbled lines are ignored, so that their blocks are written again.
    """
    try:
        first, *lines = path.read_text(encoding="ascii", errors="replace").split("\n")
        identity = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(identity, dict):
        return None
    complete = lines[:-1]  # text after the last line break is a torn line
    return JournalContent(identity, [list(map(int, line.split(" "))) for line in complete if _ENTRY.fullmatch(line)])


def write_journal(path: Path, identity: Mapping[str, Any], entries: Iterable[Sequence[int]] = ()) -> None:
    """Write a new journal that lists the blocks `entries`."""
    lines = [json.dumps(identity), *(" ".join(map(str, entry)) for entry in entries)]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


class JournalAppender:
    """A journal that is open for appending. It has no lock: callers in several threads hold their own."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="ascii")

    def append(self, *entry: int) -> None:
        """Append a line and hand it to the operating system."""
        self._file.write(" ".join(map(str, entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
