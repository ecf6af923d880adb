"""Models already on this disk, downloaded by qwenlocal or by another program. Nothing here uses the network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qwenlocal.errors import BadCheckpoint, NotWritable
from qwenlocal.fileio import hash_file
from qwenlocal.library.catalog import KnownFile
from qwenlocal.library.external_caches import ExternalFile, FileQuery, find_external_files, hub_cache_folder
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, ModelName, PathName, level_from_filename
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.model_files import parse_shard
from qwenlocal.paths import Folders
from qwenlocal.weights.checkpoint import has_vocabulary
from qwenlocal.weights.json_files import read_json
from qwenlocal.weights.split_model import shard_paths
from qwenlocal.weights.weight_files import find_weight_files


def known_file(name: CatalogName) -> KnownFile | None:
    """Return the file of a catalog name if its digest is in the catalog."""
    level = name.level or name.card.level
    return next((file for file in name.card.files if level_from_filename(file.path) == level), None)


class LocalModels:
    """
    The models on this disk.

    `on_external_file` gets each file of another program that is used; `report_hashing` the file being hashed, the
    bytes done and the total.
    """

    def __init__(
        self,
        folders: Folders,
        store: Store,
        *,
        on_external_file: Callable[[ExternalFile], None] = lambda _file: None,
        report_hashing: Callable[[ExternalFile, int, int], None] = lambda _file, _done, _total: None,
    ) -> None:
        self._folders, self._store = folders, store
        self._on_external_file, self._report_hashing = on_external_file, report_hashing

    def find(self, name: ModelName) -> ModelRecord | None:
        """
        Return the model if it is on this disk and unchanged.

        Raises
        ------
        BadWeights: its file was changed, or one of its files is missing.
        """
        if isinstance(name, PathName):
            files = [StoredFile.from_path(path, "") for path in shard_paths(name.path)]
            return ModelRecord(str(name.path), files, "a file on this disk", owned=False)
        record = self._store.get(str(name))
        if record and not record.is_checkpoint and (unchanged := self._store.check_unchanged(record)):
            return unchanged
        query = _file_query(name)
        return self.adopt(str(name), query) if query else None

    def find_checkpoint(self, name: HubName) -> Path | None:
        """Return the folder of a repository's checkpoint if all of it is on this disk, whoever downloaded it."""
        record = self._store.get(str(HubCheckpointName(replace(name, level=None, file=None))))
        if record and record.is_checkpoint and not record.missing and _is_complete(record.path.parent):
            return record.path.parent
        if name.hub != "hf":
            return None
        folder = hub_cache_folder(self._folders.hub_cache, name.repo)
        commit = name.revision or "main"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
        snapshot = folder / "snapshots" / commit
        return snapshot if _is_complete(snapshot) else None

    def adopt(
        self, name: str, query: FileQuery, origin: str = "", license: str = "", aliases: Sequence[str] = ()
    ) -> ModelRecord | None:
        """Use a file of another program in place. A file that matches by name only is hashed first."""
        for external in find_external_files(query, self._folders):
            if not external.has_digest_path and query.sha256 and self._hash(external) != query.sha256:
                continue
            own_file = self._find_own_file(external)
            if own_file is None:
                self._on_external_file(external)
            file = own_file or StoredFile.from_path(external.path, query.sha256 or "")
            owned = own_file is not None
            record = ModelRecord(name, [file], origin or external.program, license, owned=owned, aliases=tuple(aliases))
            with contextlib.suppress(NotWritable):  # on a read-only disk it is usable without a record
                return self._store.add(record)
            return record
        return None

    def _find_own_file(self, external: ExternalFile) -> StoredFile | None:
        """Return the record of the very same file if qwenlocal downloaded it under another name."""
        own_files = (file for record in self._store.records() if record.owned for file in record.files)
        return next((file for file in own_files if str(external.path) in (file.path, file.link)), None)

    def _hash(self, external: ExternalFile) -> str:
        size = external.path.stat().st_size
        return hash_file(external.path, lambda done: self._report_hashing(external, done, size))


def _file_query(name: ModelName) -> FileQuery | None:
    """Return how to find a model's file on this disk without asking a hub; None if that is impossible."""
    if isinstance(name, CatalogName) and (known := known_file(name)):
        return FileQuery(known.path, known.size, known.sha256, name.card.gguf or "")
    if (
        isinstance(name, HubName)
        and name.file
        and name.hub == "hf"
        and not name.revision
        and not parse_shard(name.file)
    ):
        return FileQuery(name.file, None, None, name.repo)
    return None


def _is_complete(folder: Path) -> bool:
    """Return True if the folder has everything that a conversion needs."""
    try:
        config = read_json(folder / "config.json", "the model's configuration")
        names = find_weight_files(folder, config).names
    except BadCheckpoint:
        return False
    return has_vocabulary(folder) and all((folder / name).is_file() for name in names)
