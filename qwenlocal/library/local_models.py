"""Models that are on this disk already, ours or another program's; no network is asked, and nothing here can ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qwenlocal.errors import BadCheckpoint, CannotWrite
from qwenlocal.fileio import hash_file
from qwenlocal.library import external_caches
from qwenlocal.library.catalog import KnownFile
from qwenlocal.library.external_caches import FileQuery, Found
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, Name, PathName, level_of
from qwenlocal.library.store import Record, Store, StoredFile
from qwenlocal.model_files import parse_shard
from qwenlocal.paths import Folders
from qwenlocal.weights.checkpoint import has_vocabulary, is_checkpoint, weight_files
from qwenlocal.weights.parts import files_of

Say = Callable[[str], None]


def known_file(name: CatalogName) -> KnownFile | None:
    """The file of a catalog name whose digest is known beforehand."""
    level = name.level or name.card.level
    return next((file for file in name.card.files if level_of(file.path) == level), None)


def recognise(name: Name) -> list[FileQuery]:
    """How to find a model's file on this disk without asking anybody; empty where that cannot be said."""
    if isinstance(name, CatalogName):
        known = known_file(name)
        return [FileQuery(known.path, known.size, known.sha256, name.card.gguf)] if known else []
    if (
        isinstance(name, HubName)
        and name.file
        and name.hub == "hf"
        and not name.revision
        and not parse_shard(name.file)
    ):
        return [FileQuery(name.file, None, None, name.repo)]
    return []


def _is_whole(folder: Path) -> bool:
    """Whether everything that converting needs is there."""
    try:
        return is_checkpoint(folder) and has_vocabulary(folder) and all(file.is_file() for file in weight_files(folder))
    except BadCheckpoint:
        return False


class Local:
    """What is on this disk. `say` gets a sentence when another program's file is found, `checking` bytes hashed."""

    def __init__(
        self,
        folders: Folders,
        store: Store,
        *,
        say: Say = lambda _: None,
        checking: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    ) -> None:
        self._folders, self._store, self._say, self._checking = folders, store, say, checking

    def here(self, name: Name) -> Record | None:
        """
        The model, if it is on this disk and was not changed.

        Raises
        ------
        BadWeights: it is here, but its file was changed, or it has several files, and one is missing.
        """
        if isinstance(name, PathName):
            files = [StoredFile.of(path, "") for path in files_of(name.path)]
            return Record(str(name.path), files, "a file on this disk", owned=False)
        record = self._store.get(str(name))
        if record and not record.is_checkpoint and (ready := self._store.ready(record)):
            return ready
        for sought in recognise(name):
            if record := self.adopt(str(name), sought):
                return record
        return None

    def checkpoint(self, name: HubName) -> Path | None:
        """The folder of a repository's checkpoint, where all of it is on this disk; whoever brought it."""
        record = self._store.get(str(HubCheckpointName(replace(name, level=None, file=None))))
        if record and record.is_checkpoint and not record.missing and _is_whole(record.path.parent):
            return record.path.parent
        if name.hub != "hf":
            return None
        folder = external_caches.hub_repo(self._folders.hub_cache, name.repo)
        commit = name.revision or "main"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
        snapshot = folder / "snapshots" / commit
        return snapshot if _is_whole(snapshot) else None

    def adopt(
        self, name: str, sought: FileQuery, origin: str = "", licence: str = "", asked: Sequence[str] = ()
    ) -> Record | None:
        """Use a file where another program put it. One that only has the right name is hashed before it is believed."""
        for found in external_caches.find(sought, self._folders):
            if not found.certain and sought.sha256 and self._digest(found) != sought.sha256:
                continue
            ours = self._own_file(found)
            if ours is None:
                self._say(f"Found it in {found.program}: {found.path}")
            file = ours or StoredFile.of(found.path, sought.sha256 or "")
            record = Record(name, [file], origin or found.program, licence, owned=ours is not None, asked=tuple(asked))
            with contextlib.suppress(
                CannotWrite
            ):  # it can be used without being noted, for example on a read-only disk
                return self._store.add(record)
            return record
        return None

    def _own_file(self, found: Found) -> StoredFile | None:
        """The record of that very file, if we fetched it under another name."""
        for record in self._store.records():
            for file in record.files:
                if record.owned and str(found.path) in (file.path, file.link):
                    return file
        return None

    def _digest(self, found: Found) -> str:
        size = found.path.stat().st_size
        return hash_file(found.path, lambda done: self._checking(f"the file of {found.program}", done, size))
