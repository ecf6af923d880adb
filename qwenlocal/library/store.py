"""
What is on this disk: a small JSON record for every model, beside the files themselves.

A record says where the files are, how large they were, when they were last changed, and their digests; so a start
needs no hashing and no network to know that the file is the one that was checked when it arrived.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadWeights, CannotWrite, QwenlocalError
from qwenlocal.i18n import tr
from qwenlocal.library.partial_file import Identity, lock_of, part_of, read_journal, remove
from qwenlocal.paths import Folders, writable

_JOURNAL = ".part.journal"


@dataclass(frozen=True)
class StoredFile:
    """
    One file of a model. `checksums` are the CRC-32 of its blocks of `block` bytes, empty where another program brought
    it; `link` is the name under which the hub's cache shows it.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    block: int = 0
    checksums: Sequence[int] = ()
    link: str = ""

    @classmethod
    def of(cls, path: Path, sha256: str, block: int = 0, checksums: Sequence[int] = (), link: str = "") -> StoredFile:
        """The record of a file as it lies there now."""
        state = path.stat()
        return cls(str(path), state.st_size, state.st_mtime_ns, sha256, block, tuple(checksums), link)


@dataclass(frozen=True)
class Record:
    """A model that is here. `owned` tells whether we brought the files, and may take them away."""

    name: str
    files: Sequence[StoredFile]
    origin: str  # where the bytes came from, for people
    licence: str = ""
    owned: bool = True
    added: str = ""
    asked: Sequence[str] = field(default_factory=tuple)  # other names that led to it
    missing: int = 0  # bytes of further files that are still to be fetched
    made_from: str = ""  # which edition converted it, and from what state of its source
    is_checkpoint: bool = False  # weights to be converted, not to be run

    @property
    def path(self) -> Path:
        """What to load: the first file (llama.cpp opens the other parts of a split one itself)."""
        first = self.files[0]
        return Path(first.link or first.path)

    @property
    def size(self) -> int:
        """Bytes altogether."""
        return sum(file.size for file in self.files)


class Damage(NamedTuple):
    """What a full check found wrong with a file: the numbers of bad blocks, or None where they cannot be told."""

    file: StoredFile
    sha256: str
    blocks: Sequence[int] | None
    block_size: int


class Incomplete(NamedTuple):
    """A file on its way that nobody is fetching now, or somebody is."""

    base: Path
    identity: Identity
    done: int


class Store:
    """The records in `folders.records`."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    def records(self) -> list[Record]:
        """All of them, by name; a damaged record counts as not there."""
        found = [record for path in sorted(self._folders.records.glob("*.json")) if (record := _read(path))]
        return sorted(found, key=lambda record: record.name)

    def paths(self) -> set[str]:
        """Every file that a record speaks of."""
        return {file.path for record in self.records() for file in record.files}

    def get(self, name: str) -> Record | None:
        """The record of this name, or of another name that led to it."""
        direct = _read(self._path(name))
        if direct and direct.name == name:
            return direct
        return next((record for record in self.records() if name in (record.name, *record.asked)), None)

    def add(self, record: Record) -> Record:
        """
        Write a record, in one step.

        Raises
        ------
        CannotWrite: the folder does not allow it.
        """
        from datetime import datetime, timezone

        record = replace(record, added=record.added or datetime.now(timezone.utc).isoformat(timespec="seconds"))
        path = self._path(record.name)
        writable(path.parent)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
            draft.replace(path)
        except OSError as reason:
            raise CannotWrite(path.parent, reason.strerror or str(reason)) from reason
        return record

    def ready(self, record: Record) -> Record | None:
        """
        The record, if its files are still those that were checked when they came: same sizes, same time of change.

        None where a file is gone, or some are still to be fetched. A file of the right size that was touched since is
        hashed again, once; if it is the same, the record is renewed.

        Raises
        ------
        BadWeights: a file was changed.
        """
        if record.missing:
            return None
        files = []
        for file in record.files:
            try:
                state = Path(file.path).stat()
            except OSError:
                return None
            if state.st_size != file.size:
                raise _changed(record, file, f"it has {state.st_size:,} bytes instead of {file.size:,}")
            if state.st_mtime_ns != file.mtime_ns:
                if file.sha256 and not _is_still(file):
                    raise _changed(record, file, "its content was changed since it was fetched")
                file = replace(file, mtime_ns=state.st_mtime_ns)
            files.append(file)
        if files != list(record.files):
            record = replace(record, files=tuple(files))
            with contextlib.suppress(CannotWrite):  # a read-only home costs the same check again next time, no more
                self.add(record)
        return record

    def check(self, record: Record, report: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
        """
        Read every byte and compare with what arrived; `report` gets bytes done and bytes altogether.

        Raises
        ------
        BadWeights: a file is gone.
        """
        from qwenlocal.fileio import hash_blocks

        damage, before = [], 0
        for file in record.files:
            if not Path(file.path).is_file():
                raise BadWeights(
                    file.path, "the file is gone", hint=tr("Fetch it again: qwenlocal pull {name}", name=record.name)
                )
            from_here = functools.partial(_report_after, report, before, record.size)
            try:
                sha256, checksums = hash_blocks(Path(file.path), file.block, from_here)
            except OSError as reason:
                what = tr("it cannot be read ({strerror})", strerror=reason.strerror)
                raise BadWeights(file.path, what, hint=tr("Check who may read it.")) from reason
            before += file.size
            if file.sha256 and sha256 != file.sha256:
                damage.append(Damage(file, sha256, _differing(file, checksums), file.block))
        return damage

    def remove(self, record: Record) -> int:
        """Forget a model; its files go too, if we brought them and nothing else uses them. Returns the bytes freed."""
        self._path(record.name).unlink(missing_ok=True)
        if not record.owned:
            return 0
        in_use = {file.path for other in self.records() for file in other.files}
        freed = 0
        for file in record.files:
            if file.path not in in_use:
                freed += _remove_file(file)
        return freed

    def incomplete(self) -> list[Incomplete]:
        """Files on their way."""
        found = []
        for journal in sorted(self._folders.partial.glob(f"*{_JOURNAL}")):
            base = journal.with_name(journal.name.removesuffix(_JOURNAL))
            read = read_journal(journal)
            if read and part_of(base).exists():
                identity, block, blocks = read
                found.append(Incomplete(base, identity, min(identity.size, block * len(blocks))))
        return found

    def drop(self, incomplete: Incomplete) -> None:
        """
        Throw away a file on its way.

        Raises
        ------
        QwenlocalError: another process is fetching it right now.
        """
        import filelock

        try:
            with filelock.FileLock(lock_of(incomplete.base, writable(self._folders.locks)), timeout=0):
                remove(incomplete.base)
        except filelock.Timeout as busy:
            raise QwenlocalError(
                f"{incomplete.identity.name} is being fetched by another qwenlocal.", hint=tr("Stop that one first.")
            ) from busy

    def _path(self, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-60:].strip("-.")
        return self._folders.records / f"{readable}-{zlib.crc32(os.fsencode(name)):08x}.json"


def _read(path: Path) -> Record | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(StoredFile(**{**file, "checksums": tuple(file["checksums"])}) for file in data.pop("files"))
        record = Record(files=files, **{**data, "asked": tuple(data["asked"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if files else None


def _report_after(report: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    report(before + done, total)


def _is_still(file: StoredFile) -> bool:
    from qwenlocal.fileio import hash_file

    return hash_file(Path(file.path)) == file.sha256


def _changed(record: Record, file: StoredFile, what: str) -> BadWeights:
    return BadWeights(
        file.path, what, hint=tr("Mend it, fetching only what is damaged: qwenlocal verify {name}", name=record.name)
    )


def _differing(file: StoredFile, checksums: Sequence[int]) -> list[int] | None:
    """The blocks that are not what they were; those that a cut file lacks count, too."""
    if not file.checksums:
        return None
    now = dict(enumerate(checksums))
    return [number for number, then in enumerate(file.checksums) if now.get(number) != then]


def _remove_file(file: StoredFile) -> int:
    """Delete a file and the name the hub's cache shows it under, unless another name there leads to it too."""
    path = Path(file.path)
    if file.link:
        link, repo = Path(file.link), path.parent.parent
        link.unlink(missing_ok=True)
        others = (other for other in (repo / "snapshots").rglob("*") if other.is_symlink())
        if any(other.resolve() == path.resolve() for other in others):
            return 0
        _remove_empty(link.parent, repo)
    size = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    repo = path.parent.parent
    _remove_empty(path.parent, repo.parent)
    if file.link and repo.is_dir() and [inside.name for inside in repo.iterdir()] == ["refs"]:
        shutil.rmtree(repo, ignore_errors=True)
    return size


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove `folder` and those above it, up to `top`, as long as they are empty."""
    while folder != top and top in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
