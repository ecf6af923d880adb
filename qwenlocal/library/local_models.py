"""Models already on this disk, downloaded by qwenlocal or by another program. Nothing here uses the network."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.errors import BadCheckpoint, BadWeights, ModelNotFound, NotWritable
from qwenlocal.fileio import hash_file
from qwenlocal.library.external_caches import (
    CachedRepository,
    ExternalFile,
    FileQuery,
    find_cached_repositories,
    find_external_files,
    find_ignoring_case,
    find_snapshots,
    gguf_files,
)
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, ModelName, PathName
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders
from qwenlocal.weights.checkpoint import has_vocabulary
from qwenlocal.weights.json_files import read_json
from qwenlocal.weights.split_model import shard_paths
from qwenlocal.weights.weight_files import find_weight_files


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this disk; `repo` is its Hugging Face repository, "" if unknown."""

    path: Path
    name: str
    repo: str

    @property
    def folder(self) -> Path:
        """The folder with config.json; `path` may be one of its weight files."""
        return self.path if self.path.is_dir() else self.path.parent


def own_folder(folders: Folders, hub: str, repo: str) -> Path:
    """Return the folder for files of a repository that do not go into the Hub's cache, in folders by commit."""
    return find_ignoring_case(folders.files / hub, repo.replace("/", "--"))


def is_present(path: Path) -> bool:
    """Tell whether `path`, a directory or one of its files, is still a checkpoint."""
    return path.is_file() or (path / "config.json").is_file()


def local_checkpoint(path: Path) -> LocalCheckpoint:
    """
    Describe the checkpoint at `path`; in the Hub's cache, the folder above names its repository.

    Raises
    ------
    ModelNotFound: it was deleted.
    """
    if not is_present(path):
        raise ModelNotFound(str(path), reason=f"The checkpoint {path} does not exist anymore.", hint="Check the path.")
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and (match := re.fullmatch(r"models--(.+?)--(.+)", folder.parents[1].name)):
        return LocalCheckpoint(path, match[2], f"{match[1]}/{match[2]}")
    return LocalCheckpoint(path, folder.name, "")


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
        if isinstance(name, CatalogName):
            return self._find_catalog_model(name)
        return self._find_in_repository(name) if isinstance(name, HubName) and (name.file or name.level) else None

    def find_offline(self, name: ModelName) -> ModelRecord | None:
        """
        Return the model, or if the name leaves the choice to a hub, the best one of the repository on this disk.

        Raises
        ------
        BadWeights: as `find`.
        """
        return self.find(name) or (self._find_in_repository(name) if isinstance(name, HubName) else None)

    def _find_catalog_model(self, name: CatalogName) -> ModelRecord | None:
        card = name.card
        if known := name.known_file:
            return self.adopt(str(name), FileQuery(known.path, known.size, known.sha256, card.gguf or ""))
        if card.gguf is None:
            return None
        level = name.level or card.level
        records = (self._find_in_repository(HubName(hub, card.gguf, level=level)) for hub in ("hf", *card.mirrors))
        return next((record for record in records if record), None)

    def _find_in_repository(self, name: HubName) -> ModelRecord | None:
        """
        Return the model of a repository that `name` means, among its files on this disk.

        Raises
        ------
        BadWeights: its file was changed.
        """
        for cached in self._cached_repositories(name):
            if file := _select_file(name, cached.files):
                try:
                    paths = shard_paths(cached.files[file])
                except BadWeights:  # a part of the model is missing
                    continue
                return self._use_cached_files(name, cached, file, paths)
        return None

    def _cached_repositories(self, name: HubName) -> Iterator[CachedRepository]:
        """Yield the files of a repository on this disk: ours, our conversions, those of other programs."""
        own = own_folder(self._folders, name.hub, name.repo)
        for folder in [own / name.revision.replace("/", "--")] if name.revision else sorted(own.glob("*")):
            yield CachedRepository("", gguf_files(folder))
        files = {file: record.path for file, record in self._records_of(name).items() if record.path.is_file()}
        yield CachedRepository("", files)
        if name.hub == "hf":
            yield from find_cached_repositories(name.repo, name.revision, self._folders)

    def _use_cached_files(
        self, name: HubName, cached: CachedRepository, file: str, paths: Sequence[Path]
    ) -> ModelRecord:
        known = self._find_record_of_file(paths[0])
        record = self._store.check_unchanged(known) if known else None
        if record is None:
            tag = file.removesuffix(".gguf").casefold() if cached.has_tags_only else None
            full_name = replace(name, file=None if tag else file, level=tag)
            files = [StoredFile.from_path(path, "") for path in paths]
            origin = cached.program or f"{name.hub}:{name.repo}"
            record = ModelRecord(str(full_name), files, origin, owned=not cached.program)
            if cached.program:
                self._on_external_file(ExternalFile(paths[0], cached.program, has_digest_path=False))
        if (name.file or name.level) and str(name) != record.name:
            record = replace(record, aliases=sorted({*record.aliases, str(name)}))
        return record if record == known else self._add(record)

    def _add(self, record: ModelRecord) -> ModelRecord:
        with contextlib.suppress(NotWritable):  # on a read-only disk it is usable without a record
            return self._store.add(record)
        return record

    def _find_record_of_file(self, path: Path) -> ModelRecord | None:
        """Return the record of a model whose first file is `path`, under any name."""
        records = (record for record in self._store.records() if not record.is_checkpoint)
        paths = {str(path), str(path.resolve())}
        return next((record for record in records if paths & {record.files[0].path, record.files[0].link}), None)

    def find_record(self, name: ModelName) -> ModelRecord | None:
        """Return the record that `name` means, whether or not its files are still there and unchanged."""
        record = self._store.get(str(name))
        if record or not isinstance(name, HubName) or not name.level:
            return record
        records = self._records_of(name)
        file = _select_file(name, records)
        return records[file] if file else None

    def _records_of(self, name: HubName) -> dict[str, ModelRecord]:
        """Return the records of a repository's models by file; that of a conversion is called after its type."""
        repo, revision = f"{name.hub}:{name.repo}".lower(), f"@{name.revision}" if name.revision else ""
        records = {}
        for record in self._store.records():
            start, rest = record.name[: len(repo)], record.name[len(repo) :]
            if start.lower() == repo and rest.startswith((f"{revision}/", f"{revision}:")):
                mark, file = rest[len(revision)], rest[len(revision) + 1 :]
                records[file if mark == "/" else f"{file}.gguf"] = record
        return records

    def find_checkpoint(self, name: HubName, *, is_offline: bool = False) -> LocalCheckpoint | None:
        """
        Return a repository's checkpoint if all of it is on this disk, whoever downloaded it.

        Without a revision, that is the one of the branch main; offline, one that was fetched by commit will do.
        """
        record = self._store.get(str(HubCheckpointName(replace(name, level=None, file=None))))
        folders = [record.path.parent] if record and record.is_checkpoint and not record.missing else []
        if name.hub == "hf":
            folders += find_snapshots(self._folders.hub_cache, name.repo, name.revision)[: None if is_offline else 1]
        folder, repo = next(filter(_is_complete, folders), None), name.repo
        return LocalCheckpoint(folder, repo.partition("/")[2], repo if name.hub == "hf" else "") if folder else None

    def adopt(
        self, name: str, query: FileQuery, origin: str = "", license: str = "", aliases: Sequence[str] = ()
    ) -> ModelRecord | None:
        """Use a file of another program in place. A file that matches by name only is hashed first."""
        for external in find_external_files(query, self._folders):
            if not external.has_digest_path and query.sha256 and self._hash(external) != query.sha256:
                continue
            record = self._find_record_of_file(external.path)
            own_file = record.files[0] if record and record.owned else None
            if own_file is None:
                self._on_external_file(external)
            file = own_file or StoredFile.from_path(external.path, query.sha256 or "")
            owned = own_file is not None
            origin = origin or external.program
            return self._add(ModelRecord(name, [file], origin, license, owned=owned, aliases=tuple(aliases)))
        return None

    def _hash(self, external: ExternalFile) -> str:
        size = external.path.stat().st_size
        return hash_file(external.path, lambda done: self._report_hashing(external, done, size))


def _select_file(name: HubName, files: Iterable[str]) -> str | None:
    """Return the file of a repository that `name` means, of those that are given; None if there is none."""
    from qwenlocal.library.hubs import RemoteFile, RepoListing  # 30 ms
    from qwenlocal.library.repo_files import select_model

    try:
        model = select_model(RepoListing(name.repo, "", [RemoteFile(file, 0, None) for file in files]), name)
    except ModelNotFound:
        return None
    return None if model.is_cut else model.name


def _is_complete(folder: Path) -> bool:
    """Return True if the folder has everything that a conversion needs."""
    try:
        config = read_json(folder / "config.json", "the model's configuration")
        names = find_weight_files(folder, config).names
    except BadCheckpoint:
        return False
    return has_vocabulary(folder) and all((folder / name).is_file() for name in names)
