"""Files of automatic conversions (by `run` and `pull`): their folders, and the unfinished ones."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwenlocal import weights
from qwenlocal.errors import QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.paths import Folders, ensure_writable

_REMOVE_TIMEOUT = 0.5  # seconds to wait for a lock that `list` may hold briefly
_PROBE_TIMEOUT = 0.1  # seconds to wait for the lock of a conversion that may be running
_NOTE = "conversion.json"  # next to the output while it is written: the model's name and the source's stamp


def conversion_stamp(fingerprint: str) -> str:
    """Add the converter version to a source's fingerprint: `conversion_stamp("5eb63bbbe01e")` is "1:5eb63bbbe01e"."""
    return f"{weights.CONVERTER_VERSION}:{fingerprint}"


def is_current_stamp(stamp: str) -> bool:
    """Return True if the stamp is of this converter version."""
    version, colon, _ = stamp.partition(":")
    return (version if colon else "1") == str(weights.CONVERTER_VERSION)


@dataclass(frozen=True)
class UnfinishedConversion:
    """A conversion without a record yet: the model's name, its folder, and the bytes it occupies."""

    name: str
    folder: Path
    size: int

    @property
    def is_running(self) -> bool:
        """True if a process is converting, False if the conversion was interrupted."""
        return any(map(_is_locked, self.folder.glob("*.part.lock")))


class ConversionTarget(NamedTuple):
    """The path of the output; `is_complete`: it is already converted, only not recorded."""

    path: Path
    is_complete: bool


def prepare_target(
    folders: Folders, name: str, stem: str, level: str, stamp: str, recorded_paths: Collection[str]
) -> ConversionTarget:
    """
    Choose the output path for the model `name`, and note there what it is made from.

    `stem` is the readable part of the file name, `stamp` identifies the source and the converter. An existing output
    among `recorded_paths` belongs to an earlier state of the source and stays until it is replaced.

    Raises
    ------
    NotWritable: the folder cannot be written.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem) or "model"
    key = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    folder = ensure_writable(folders.files / "converted" / f"{readable}-{key}")
    path, note_path = folder / f"{readable}-{level}.gguf", folder / _NOTE
    note = {"name": name, "made_from": stamp}
    is_recorded = str(path) in recorded_paths
    is_complete = path.exists() and not is_recorded and _read_note(note_path) == note
    if not is_complete and not is_recorded:
        path.unlink(missing_ok=True)
    note_path.write_text(json.dumps(note), encoding="utf-8")
    return ConversionTarget(path, is_complete)


def mark_recorded(target: Path) -> None:
    """Delete the note next to an output that is complete and recorded."""
    (target.parent / _NOTE).unlink(missing_ok=True)


def unfinished_conversions(folders: Folders) -> Iterator[UnfinishedConversion]:
    """Yield conversions that were started but not recorded, by name."""
    for note_path in sorted((folders.files / "converted").glob(f"*/{_NOTE}")):
        note = _read_note(note_path)
        try:
            states = [file.stat() for ending in (".part", ".gguf") for file in note_path.parent.glob(f"*{ending}")]
        except OSError:
            continue
        if not states or not note:
            continue
        size = sum(getattr(state, "st_blocks", 0) * 512 for state in states)
        yield UnfinishedConversion(note["name"], note_path.parent, size)


def remove_unfinished(folder: Path, recorded_paths: Collection[str]) -> None:
    """
    Delete the files of an unfinished conversion, except those in `recorded_paths`.

    Raises
    ------
    QwenlocalError: the conversion is running.
    """
    import filelock

    outputs = {str(file).removesuffix(".part") for end in ("part", "gguf") for file in folder.glob(f"*.{end}")}
    try:
        with contextlib.ExitStack() as locks:
            for path in outputs:
                locks.enter_context(filelock.FileLock(f"{path}.part.lock", timeout=_REMOVE_TIMEOUT))
            for file in folder.iterdir():
                if str(file) not in recorded_paths and file.suffix != ".lock":
                    file.unlink(missing_ok=True)
    except filelock.Timeout as busy:
        raise QwenlocalError(tr("Another qwenlocal is converting it."), hint=tr("Stop that process first.")) from busy
    for lock in folder.glob("*.lock"):
        lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a recorded file is left in it
        folder.rmdir()


def _read_note(path: Path) -> dict[str, str] | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("name"), str) else None


def _is_locked(lock: Path) -> bool:
    """Return True if another process holds the lock. A writer waits longer for it than this probe does."""
    import filelock

    try:
        with filelock.FileLock(lock, timeout=_PROBE_TIMEOUT):
            lock.unlink(missing_ok=True)
            return False
    except (filelock.Timeout, PermissionError):  # PermissionError: possibly another user's process
        return True
    except OSError:
        return False
