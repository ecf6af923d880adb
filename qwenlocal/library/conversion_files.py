"""Where conversions of `run` and `pull` are kept, and which of them were cut short."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.paths import Folders, writable
from qwenlocal.weights import edition

_PATIENCE = 0.5  # seconds for a lock, which `list` may have for a moment
_GLANCE = 0.1  # seconds for the lock of a conversion that is looked at
_NOTE = "conversion.json"  # beside a file that grows: what it will be called, and what it is made from


def conversion_stamp(made_from: str) -> str:
    """`conversion_stamp("5eb63bbbe01eeed0")` is "1:5eb63bbbe01eeed0", what a record says of its source."""
    return f"{edition.EDITION}:{made_from}"


def is_current_stamp(made_from: str) -> bool:
    """Whether what a record says of its source was written by a program that converts as this one does."""
    number, colon, _ = made_from.partition(":")
    return (number if colon else "1") == str(edition.EDITION)


@dataclass(frozen=True)
class UnfinishedConversion:
    """A conversion that is not recorded yet: the model's name, its folder, the bytes that it takes there."""

    name: str
    folder: Path
    size: int

    @property
    def is_running(self) -> bool:
        """Whether somebody is at it, or it was cut short."""
        return any(map(_is_held, self.folder.glob("*.part.lock")))


class ConversionTarget(NamedTuple):
    """Where a model is to be written; `is_whole`: it was already, and only not recorded."""

    path: Path
    is_whole: bool


def place(
    folders: Folders, name: str, stem: str, level: str, made_from: str, kept: Collection[str]
) -> ConversionTarget:
    """
    Where the model called `name` is to be written; `stem` is what its file is called for people, `made_from` what it is
    made from, `kept` are the files that are recorded: of an earlier state, if this one is among them.

    Raises
    ------
    CannotWrite: the folder does not allow it.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem) or "model"
    key = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    folder = writable(folders.files / "converted" / f"{readable}-{key}")
    path, note = folder / f"{readable}-{level}.gguf", folder / _NOTE
    now = {"name": name, "made_from": made_from}
    is_whole = path.exists() and str(path) not in kept and _read(note) == now
    if not is_whole and str(path) not in kept:
        path.unlink(missing_ok=True)
    note.write_text(json.dumps(now), encoding="utf-8")
    return ConversionTarget(path, is_whole)


def _read(note: Path) -> dict[str, str] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("name"), str) else None


def finish(target: Path) -> None:
    """The file that `place` named is whole, and recorded."""
    (target.parent / _NOTE).unlink(missing_ok=True)


def unfinished(folders: Folders) -> Iterator[UnfinishedConversion]:
    """Conversions that began and did not end yet, by name."""
    for note in sorted((folders.files / "converted").glob(f"*/{_NOTE}")):
        said = _read(note)
        try:
            states = [file.stat() for ending in (".part", ".gguf") for file in note.parent.glob(f"*{ending}")]
        except OSError:
            continue
        if not states or not said:
            continue
        size = sum(getattr(state, "st_blocks", 0) * 512 for state in states)
        yield UnfinishedConversion(said["name"], note.parent, size)


def _is_held(lock: Path) -> bool:
    """Whether a process that writes has this lock; those who write have more patience than those who look."""
    import filelock

    try:
        with filelock.FileLock(lock, timeout=_GLANCE):
            lock.unlink(missing_ok=True)
            return False
    except (filelock.Timeout, PermissionError):  # another person's process, perhaps
        return True
    except OSError:
        return False


def drop(folder: Path, kept: Collection[str]) -> None:
    """
    Throw away what an unfinished conversion left in its folder, but no file that is `kept`, by path.

    Raises
    ------
    QwenlocalError: it is not left, but running.
    """
    import filelock

    try:
        with contextlib.ExitStack() as held:
            for path in {
                str(file).removesuffix(".part") for end in ("part", "gguf") for file in folder.glob(f"*.{end}")
            }:
                held.enter_context(filelock.FileLock(f"{path}.part.lock", timeout=_PATIENCE))
            for file in folder.iterdir():
                if str(file) not in kept and file.suffix != ".lock":
                    file.unlink(missing_ok=True)
    except filelock.Timeout as busy:
        raise QwenlocalError(tr("Another qwenlocal is converting it."), hint=tr("Stop that one first.")) from busy
    for lock in folder.glob("*.lock"):
        lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something whole is in it
        folder.rmdir()
