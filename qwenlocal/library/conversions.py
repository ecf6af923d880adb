"""Where conversions of `run` and `pull` are kept, and which of them were cut short."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.paths import Folders, writable

_NAME = "name.txt"  # beside a file that grows: what it will be called


@dataclass(frozen=True)
class Unfinished:
    """A conversion that ended early: the model's name, its folder, and the bytes that it takes there."""

    name: str
    folder: Path
    size: int


def place(folders: Folders, name: str, stem: str, level: str) -> Path:
    """
    Where the model called `name` is to be written; `stem` is what its file is called for people.

    Raises
    ------
    CannotWrite: the folder does not allow it.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem) or "model"
    key = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    folder = writable(folders.files / "converted" / f"{readable}-{key}")
    (folder / _NAME).write_text(name, encoding="utf-8", errors="replace")
    return folder / f"{readable}-{level}.gguf"


def finish(target: Path) -> None:
    """The file that `place` named is whole."""
    (target.parent / _NAME).unlink(missing_ok=True)


def unfinished(folders: Folders) -> Iterator[Unfinished]:
    """Conversions that began and did not end, by name."""
    for note in sorted((folders.files / "converted").glob(f"*/{_NAME}")):
        try:
            name = note.read_text(encoding="utf-8", errors="replace")
            states = [file.stat() for file in note.parent.glob("*.part")]
        except OSError:
            continue
        if not states:
            continue
        yield Unfinished(name, note.parent, sum(getattr(state, "st_blocks", 0) * 512 for state in states))


def drop(conversion: Unfinished) -> int:
    """`drop_folder` of a conversion; returns the bytes freed."""
    drop_folder(conversion.folder)
    return conversion.size


def drop_folder(folder: Path) -> None:
    """Throw away what an unfinished conversion left in its folder, but no whole file beside it."""
    for file in [*folder.glob("*.part*"), folder / _NAME]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something whole is in it
        folder.rmdir()
