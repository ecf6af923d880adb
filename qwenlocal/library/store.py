"""
The store of installed models: one small JSON record per model.

A record has the paths of the files, their sizes, times of change and digests, so that a model can be loaded as the
verified file it was without hashing it again and without the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadWeights, NotWritable, QwenlocalError
from qwenlocal.fileio import hash_blocks, hash_file, replace_text
from qwenlocal.i18n import tr
from qwenlocal.library.partial_file import FileIdentity, lock_path, read_download_journal, remove_partial
from qwenlocal.paths import Folders, ensure_writable
from qwenlocal.resumable import part_path

_JOURNAL_ENDING = ".part.journal"


@dataclass(frozen=True)
class StoredFile:
    """
    One file of a model. `checksums` are the CRC-32 of its blocks of `block` bytes, empty if another program downloaded
    it; `link` is its path in a snapshot of the Hub's cache. `ctime_ns` is the time when its inode changed, which
    programs cannot set.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    block: int = 0
    checksums: Sequence[int] = ()
    link: str = ""
    ctime_ns: int = 0

    @classmethod
    def from_path(
        cls, path: Path, sha256: str, block_size: int = 0, checksums: Sequence[int] = (), link: str = ""
    ) -> StoredFile:
        """Describe a file by its present size and time of change."""
        state = path.stat()
        return cls(
            str(path), state.st_size, state.st_mtime_ns, sha256, block_size, tuple(checksums), link, state.st_ctime_ns
        )

    def has_times(self, state: os.stat_result) -> bool:
        """Return True if the file had the same times of change when it was recorded."""
        return (state.st_mtime_ns, state.st_ctime_ns) == (self.mtime_ns, self.ctime_ns)

    def delete(self) -> None:
        """Delete the file and its link."""
        for path in filter(None, (self.link, self.path)):
            Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class ModelRecord:
    """An installed model. `owned`: qwenlocal downloaded or made the files, and may delete them."""

    name: str
    files: Sequence[StoredFile]
    origin: str  # source of the bytes, for display
    license: str = ""
    owned: bool = True
    added: str = ""
    aliases: Sequence[str] = ()  # other names that led to the model
    missing: int = 0  # bytes of further files still to be downloaded
    made_from: str = ""  # converter version and fingerprint of the source, for a converted model
    is_checkpoint: bool = False  # original weights, which must be converted to run

    @property
    def path(self) -> Path:
        """The file to load: the first one (llama.cpp opens the other shards itself)."""
        first = self.files[0]
        return Path(first.link or first.path)

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(file.size for file in self.files)


class FileDamage(NamedTuple):
    """A damaged file: its actual SHA-256, and the numbers of its bad blocks (None if unknown)."""

    file: StoredFile
    sha256: str
    blocks: Sequence[int] | None


class PartialDownload(NamedTuple):
    """An unfinished download, which another process may be continuing."""

    base: Path
    identity: FileIdentity
    done: int


class Store:
    """The records in `folders.records`."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    def records(self) -> list[ModelRecord]:
        """Return all records by name, without damaged ones."""
        records = [record for path in sorted(self._folders.records.glob("*.json")) if (record := _read_record(path))]
        return sorted(records, key=lambda record: record.name)

    def file_paths(self) -> set[str]:
        """Return the paths of all recorded files."""
        return {file.path for record in self.records() for file in record.files}

    def get(self, name: str) -> ModelRecord | None:
        """Return the record of this name or alias."""
        record = _read_record(self._record_path(name))
        if record and record.name == name:
            return record
        return next((record for record in self.records() if name in (record.name, *record.aliases)), None)

    def add(self, record: ModelRecord) -> ModelRecord:
        """
        Write a record atomically.

        Raises
        ------
        NotWritable: the folder cannot be written.
        """
        from datetime import datetime, timezone

        record = replace(record, added=record.added or datetime.now(timezone.utc).isoformat(timespec="seconds"))
        path = self._record_path(record.name)
        ensure_writable(path.parent)
        replace_text(path, json.dumps(_to_json(record), indent=1))
        return record

    def check_unchanged(self, record: ModelRecord) -> ModelRecord | None:
        """
        Return the record if its files have the recorded sizes and times of change, None if a file is missing.

        A file of the right size but another time of change is hashed again; if it is the same, the record is updated.

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
            if not file.has_times(state):
                if file.sha256 and hash_file(Path(file.path)) != file.sha256:
                    raise _changed(record, file, "it has changed since it was downloaded")
                file = replace(file, mtime_ns=state.st_mtime_ns, ctime_ns=state.st_ctime_ns)
            files.append(file)
        if files != list(record.files):
            record = replace(record, files=tuple(files))
            with contextlib.suppress(NotWritable):  # in a read-only home the file is hashed again next time
                self.add(record)
        return record

    def find_damage(
        self, record: ModelRecord, report: Callable[[int, int], None] = lambda done, total: None
    ) -> list[FileDamage]:
        """
        Read every byte and compare it with the recorded digests; `report` gets the bytes done and the total.

        Raises
        ------
        BadWeights: a file is missing or unreadable.
        """
        damage, offset = [], 0
        for file in record.files:
            if not Path(file.path).is_file():
                hint = tr("Download it again: qwenlocal pull {name}", name=record.name)
                raise BadWeights(file.path, "the file is missing", hint=hint)

            def report_file(done: int, offset: int = offset) -> None:
                report(offset + done, record.size)

            try:
                sha256, checksums = hash_blocks(Path(file.path), file.block, report_file)
            except OSError as reason:
                raise BadWeights.unreadable(file.path, reason) from reason
            offset += file.size
            if file.sha256 and sha256 != file.sha256:
                damage.append(FileDamage(file, sha256, _bad_blocks(file, checksums)))
        return damage

    def remove(self, record: ModelRecord) -> int:
        """Delete a record, and its files if they are owned and no other record uses them; return the bytes freed."""
        self._record_path(record.name).unlink(missing_ok=True)
        if not record.owned:
            return 0
        in_use = self.file_paths()
        return sum(_remove_file(file) for file in record.files if file.path not in in_use)

    def partial_downloads(self) -> list[PartialDownload]:
        """Return the unfinished downloads."""
        downloads = []
        for path in sorted(self._folders.partial.glob(f"*{_JOURNAL_ENDING}")):
            base = path.with_name(path.name.removesuffix(_JOURNAL_ENDING))
            journal = read_download_journal(path)
            if journal and part_path(base).exists():
                downloads.append(PartialDownload(base, journal.identity, journal.done))
        return downloads

    def remove_partial(self, download: PartialDownload) -> None:
        """
        Delete an unfinished download.

        Raises
        ------
        QwenlocalError: another process is continuing it.
        """
        import filelock

        try:
            with filelock.FileLock(lock_path(download.base, ensure_writable(self._folders.locks)), timeout=0):
                remove_partial(download.base)
        except filelock.Timeout as busy:
            raise QwenlocalError(
                f"Another qwenlocal is downloading {download.identity.name}.", hint=tr("Stop that process first.")
            ) from busy

    def _record_path(self, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-60:].strip("-.")
        return self._folders.records / f"{readable}-{zlib.crc32(os.fsencode(name)):08x}.json"


def _to_json(record: ModelRecord) -> dict[str, object]:
    keys = {"aliases": "asked", "license": "licence"}
    return {keys.get(name, name): value for name, value in asdict(record).items()}


def _read_record(path: Path) -> ModelRecord | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(StoredFile(**{**file, "checksums": tuple(file["checksums"])}) for file in data.pop("files"))
        aliases, license = tuple(data.pop("asked")), data.pop("licence", "")
        record = ModelRecord(files=files, aliases=aliases, license=license, **data)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if files else None


def _changed(record: ModelRecord, file: StoredFile, problem: str) -> BadWeights:
    hint = tr("To repair it, downloading only damaged blocks: qwenlocal verify {name}", name=record.name)
    return BadWeights(file.path, problem, hint=hint)


def _bad_blocks(file: StoredFile, checksums: Sequence[int]) -> list[int] | None:
    """Return the blocks whose checksum differs or that are missing; None if the checksums are unknown."""
    if not file.checksums:
        return None
    actual = dict(enumerate(checksums))
    return [number for number, crc in enumerate(file.checksums) if actual.get(number) != crc]


def _remove_file(file: StoredFile) -> int:
    """Delete a file and its link in the Hub's cache, unless another link there points to it; return the bytes freed."""
    path = Path(file.path)
    if file.link:
        link, repo = Path(file.link), path.parent.parent
        link.unlink(missing_ok=True)
        other_links = (entry for entry in (repo / "snapshots").rglob("*") if entry.is_symlink())
        if any(other.resolve() == path.resolve() for other in other_links):
            return 0
        _remove_empty_folders(link.parent, repo)
    size = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    repo = path.parent.parent
    _remove_empty_folders(path.parent, repo.parent)
    if file.link and repo.is_dir() and [entry.name for entry in repo.iterdir()] == ["refs"]:
        shutil.rmtree(repo, ignore_errors=True)
    return size


def _remove_empty_folders(folder: Path, top: Path) -> None:
    """Remove `folder` and its parents below `top`, as long as they are empty."""
    while folder != top and top in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
