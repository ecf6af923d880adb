"""Downloads of models and checkpoints: resolved, downloaded, verified, recorded; and repair of damaged ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.errors import BadWeights, DigestMismatch, DiskFull, DownloadFailed, SourceUnreachable
from qwenlocal.fileio import git_blob_sha1, hash_file
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import DownloadedFile, DownloadPolicy, ReportProgress
from qwenlocal.library.byte_source import RangesUnsupported
from qwenlocal.library.download import download_artifact
from qwenlocal.library.external_caches import FileQuery
from qwenlocal.library.http import TransferError
from qwenlocal.library.local_models import LocalCheckpoint, LocalModels
from qwenlocal.library.names import CHECKPOINT_SUFFIX, CatalogName, HubName, ModelName
from qwenlocal.library.partial_file import write_download_journal
from qwenlocal.library.remote_headers import read_headers, write_prefix
from qwenlocal.library.resolver import FileRequest, ResolvedModel, Resolver
from qwenlocal.library.store import FileDamage, ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders, ensure_writable
from qwenlocal.resumable import part_path
from qwenlocal.weights.architecture import check_convertible
from qwenlocal.weights.checkpoint import Checkpoint, read_config
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.safetensors import RawHeader
from qwenlocal.weights.split_model import shard_paths
from qwenlocal.weights.weight_files import WeightFiles, choose_weight_files


@dataclass(frozen=True)
class HubCheckpoint:
    """
    A checkpoint on a hub, whose small files are in `resolved.folder`; `puller` downloads its weights.

    `files` are the names of the weight files and `headers` their headers, None if the hub only sends whole files.
    `is_ours`: no other program downloaded files of it.
    """

    resolved: ResolvedModel
    documents: Sequence[StoredFile]
    files: WeightFiles
    weights: Sequence[FileRequest]
    headers: Sequence[RawHeader] | None
    is_ours: bool
    puller: Puller

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.resolved.repo.partition("/")[2]

    @property
    def folder(self) -> Path:
        """The folder with config.json."""
        return self.resolved.folder

    @property
    def repo(self) -> str:
        """The Hugging Face repository, "" for other hubs."""
        return self.resolved.repo if self.resolved.origin.startswith("hf:") else ""

    @property
    def missing_size(self) -> int:
        """Bytes of weights that are not on this disk."""
        return sum(request.artifact.size for request in self.weights if not request.target.exists())

    def read_outline(self) -> Checkpoint | None:
        """Read tensor names, types and shapes from the headers; None if the hub sends whole files only."""
        return None if self.headers is None else Checkpoint.from_headers(self.resolved.folder, self.files, self.headers)

    def discard_documents(self) -> None:
        """Delete the small files, unless weights are on this disk, too, or other programs use them."""
        self.puller.discard_documents(self)

    def download(self, *, reserve: int = 0) -> LocalCheckpoint:
        """
        Download the weights, if the disk has room for them and for `reserve` bytes more.

        Raises
        ------
        Everything that `Puller.pull_checkpoint` raises.
        """
        self.puller.pull_checkpoint(self, extra_space=reserve)
        return LocalCheckpoint(self.resolved.folder, self.name, self.repo)


class Puller:
    """Downloads models. `on_start` gets each model or checkpoint about to be downloaded, `report` the progress."""

    def __init__(
        self,
        folders: Folders,
        store: Store,
        local: LocalModels,
        resolver: Resolver,
        *,
        on_start: Callable[[ResolvedModel], None],
        report: ReportProgress,
        policy: DownloadPolicy,
    ) -> None:
        self._folders, self._store, self._local, self._resolver = folders, store, local, resolver
        self._on_start, self._report, self._policy = on_start, report, policy
        self.downloaded: list[StoredFile] = []  # model files that came over the network

    def pull(self, name: ModelName) -> ModelRecord:
        """
        Return the model, downloading it if necessary.

        Raises
        ------
        BadWeights: the downloaded file is not a model.
        Also all errors of `Resolver.resolve` and `download_artifact`.
        """
        if record := self._local.find(name):
            return record
        resolved = self._resolver.resolve(name)
        aliases = () if str(name) == resolved.name else (str(name),)
        record = self._store.get(resolved.name)
        if record and (unchanged := self._store.check_unchanged(record)):
            return self._store.add(replace(unchanged, aliases=sorted({*unchanged.aliases, *aliases})))
        if len(resolved.files) == 1:
            artifact = resolved.files[0].artifact
            query = FileQuery(artifact.name, artifact.size, artifact.sha256, resolved.repo)
            adopted = self._local.adopt(resolved.name, query, resolved.origin, resolved.license, aliases)
            if adopted:
                return adopted
        return self._download_all(resolved, aliases)

    def download_prefix(self, name: ModelName, folder: Path, count: int) -> tuple[Path, int]:
        """
        Download the first `count` bytes of a model to a file in `folder`; return it and the model's total size.

        Raises
        ------
        DownloadFailed: no source sends parts of a file.
        Also all errors of `Resolver.resolve`.
        """
        resolved = self._resolver.resolve(name)
        path = folder / "front.gguf"
        try:
            write_prefix(resolved.files[0], path, count)
        except (TransferError, RangesUnsupported) as reason:
            problem = str(reason) or "it only sends whole files"
            raise DownloadFailed(
                f"The header of {resolved.name} cannot be downloaded from {resolved.origin}: {problem}.",
                hint=tr("To download the whole model: qwenlocal pull {name}", name=name),
            ) from reason
        return path, resolved.size

    def inspect_checkpoint(self, name: CatalogName | HubName) -> HubCheckpoint:
        """
        Download the small files of a checkpoint, and read the headers of its weights.

        Raises
        ------
        BadCheckpoint: its index contradicts its files, or a header is damaged.
        UnsupportedCheckpoint: its config.json shows that it cannot be converted.
        Also all errors of `Resolver.resolve_checkpoint` and `download_artifact`.
        """
        resolved = self._resolver.resolve_checkpoint(name)
        large = {r.artifact.name: r for r in resolved.files if r.artifact.name.endswith(".safetensors")}
        small = [request for request in resolved.files if request.artifact.name not in large]
        own_paths = {file.path for record in self._store.records() if record.owned for file in record.files}
        is_ours = all(str(r.target) in own_paths for r in resolved.files if r.target.exists())
        documents = [self._download_document(request) for request in small]
        if self._store.get(f"{resolved.name}{CHECKPOINT_SUFFIX}") is None:
            missing = sum(request.artifact.size for request in large.values())
            self._record_checkpoint(resolved, documents, missing, owned=is_ours)
        check_convertible(resolved.folder)
        files = choose_weight_files(resolved.folder, read_config(resolved.folder), large)
        weights = [large[name] for name in files.names]
        try:
            headers = read_headers(resolved.folder, weights)
        except TransferError as error:
            raise SourceUnreachable(resolved.name, [f"{resolved.origin}: {error}"]) from error
        return HubCheckpoint(resolved, documents, files, weights, headers, is_ours, self)

    def pull_checkpoint(self, checkpoint: HubCheckpoint, *, extra_space: int = 0) -> None:
        """
        Download the weights of a checkpoint; the disk must have `extra_space` bytes more than they take.

        Raises
        ------
        All errors of `download_artifact`.
        """
        resolved, weights = checkpoint.resolved, checkpoint.weights
        self._on_start(replace(resolved, files=weights))
        self._check_disk_space(weights, extra_space)
        known = {(file.path, file.sha256): file for record in self._store.records() for file in record.files}
        keys = [(str(request.target), request.artifact.sha256 or "") for request in weights]
        stored = [known.get(key) if Path(key[0]).exists() else None for key in keys]
        self._record_weights(checkpoint, stored)
        for number, request in enumerate(weights):
            file = stored[number]
            if file is None or not file.has_times(request.target.stat()):
                stored[number] = self._store_file(request)
                self._record_weights(checkpoint, stored)

    def discard_documents(self, checkpoint: HubCheckpoint) -> None:
        """Delete the small files of a checkpoint of which no weights are on this disk."""
        record = self._store.get(f"{checkpoint.resolved.name}{CHECKPOINT_SUFFIX}")
        begun = {download.base for download in self._store.partial_downloads()}
        has_weights = any(r.target.exists() or r.part in begun for r in checkpoint.weights)
        if record and checkpoint.is_ours and not has_weights:
            self._store.remove(record)

    def repair(self, name: ModelName, record: ModelRecord, damage: Sequence[FileDamage]) -> ModelRecord:
        """
        Download the damaged blocks of a model again, or whole files if the damaged blocks are unknown.

        Raises
        ------
        BadWeights: another program downloaded the file, so it must not be changed.
        Also all errors of `Resolver.resolve` (before the damaged file is touched) and `download_artifact`.
        """
        if not record.owned:
            origin = record.origin
            hint = tr(
                "The file belongs to {origin}. Delete it there, then: qwenlocal pull {name}", origin=origin, name=name
            )
            raise BadWeights(record.path, "the file is damaged", hint=hint)
        resolved = self._resolver.resolve(name)
        for damaged in damage:
            request = next((r for r in resolved.files if _is_same_file(r, damaged)), None)
            if request:
                self._make_partial(request, damaged)
        repaired = self._download_all(resolved, record.aliases)
        kept = {file.path for file in repaired.files}
        for file in record.files:
            if file.path not in kept:  # the source has a new version or another path
                Path(file.path).unlink(missing_ok=True)
        return repaired

    # --- one file

    def _download(self, request: FileRequest) -> DownloadedFile:
        return download_artifact(
            request.artifact,
            request.target,
            part=request.part,
            locks=self._folders.locks,
            report=self._report,
            policy=self._policy,
        )

    def _download_document(self, request: FileRequest) -> StoredFile:
        """Download a small file; if the hub states git's hash of it, verify that even if the file exists."""
        target, blob = request.target, request.blob
        is_valid = blob is not None and target.exists() and git_blob_sha1(target) == blob
        if not is_valid:
            self._download(request)
            if blob and (actual := git_blob_sha1(target)) != blob:
                target.unlink()
                raise DigestMismatch(request.artifact.name, blob, actual, source="the hub")
        path, link = _link_snapshot(request)
        return StoredFile.from_path(path, hash_file(path), link=link)

    def _store_file(self, request: FileRequest) -> StoredFile:
        """Download a file, link it into the Hub's cache, and describe it."""
        downloaded = self._download(request)
        path, link = _link_snapshot(request)
        return StoredFile.from_path(path, downloaded.sha256, self._policy.block_size, downloaded.checksums, link)

    def _make_partial(self, request: FileRequest, damaged: FileDamage) -> None:
        """Turn a damaged file into a partial download in which only the damaged blocks are missing."""
        good: dict[int, int] = {}
        if damaged.blocks is not None and damaged.file.block == self._policy.block_size:
            good = {n: crc for n, crc in enumerate(damaged.file.checksums) if n not in damaged.blocks}
        ensure_writable(request.part.parent)
        write_download_journal(request.part, request.artifact.identity, self._policy.block_size, good)
        shutil.move(damaged.file.path, part_path(request.part))

    # --- all files

    def _download_all(self, resolved: ResolvedModel, aliases: Sequence[str]) -> ModelRecord:
        self._on_start(resolved)
        self._check_disk_space(resolved.files)
        files = []
        for request in resolved.files:
            files.append(self._store_file(request))
            missing = sum(other.artifact.size for other in resolved.files[len(files) :])
            if missing:  # recorded already, so that it can be listed and removed if it is never completed
                self._store.add(ModelRecord(resolved.name, files, resolved.origin, resolved.license, missing=missing))
        record = ModelRecord(resolved.name, files, resolved.origin, resolved.license, aliases=tuple(aliases))
        self._check_header(record)
        self.downloaded += files
        return self._store.add(record)

    def _check_disk_space(self, requests: Sequence[FileRequest], extra_space: int = 0) -> None:
        """
        Check that all files together fit; `download_artifact` checks each one again.

        Raises
        ------
        DiskFull: they do not.
        """
        done = {download.base: download.done for download in self._store.partial_downloads()}
        needed = extra_space + sum(r.artifact.size - done.get(r.part, 0) for r in requests if not r.target.exists())
        free = shutil.disk_usage(ensure_writable(self._folders.partial)).free
        if free < needed:
            raise DiskFull(self._folders.partial, needed, free)

    def _check_header(self, record: ModelRecord) -> None:
        try:
            read_metadata(record.path)
            shard_paths(record.path)
        except BadWeights as bad:
            for file in record.files:
                file.delete()
            raise BadWeights(
                record.origin,
                f"the downloaded file is not a model: {bad.reason}",
                hint=tr("The file was deleted. Check the URL."),
            ) from bad

    # --- records of checkpoints

    def _record_weights(self, checkpoint: HubCheckpoint, stored: Sequence[StoredFile | None]) -> None:
        """Record which weight files are complete; None stands for a missing one."""
        missing = sum(r.artifact.size for r, file in zip(checkpoint.weights, stored, strict=True) if file is None)
        files = [*checkpoint.documents, *(file for file in stored if file)]
        self._record_checkpoint(checkpoint.resolved, files, missing, owned=checkpoint.is_ours)

    def _record_checkpoint(
        self, resolved: ResolvedModel, files: Sequence[StoredFile], missing: int, *, owned: bool
    ) -> None:
        """Record the present files of a checkpoint, so that it can be listed and removed if it is never completed."""
        name = f"{resolved.name}{CHECKPOINT_SUFFIX}"
        origin, license = resolved.origin, resolved.license
        self._store.add(ModelRecord(name, files, origin, license, owned, missing=missing, is_checkpoint=True))


def _link_snapshot(request: FileRequest) -> tuple[Path, str]:
    """
    Link a blob of the Hub's cache into a snapshot as huggingface_hub does, and write the commit that the ref points to.

    Returns the path of the file and of the link, "" for a file outside the Hub's cache. If links are not permitted
    (Windows without the privilege), the file itself moves to the snapshot, as with huggingface_hub.
    """
    blob, snapshot = request.target, request.snapshot
    if snapshot is None:
        return blob, ""
    ensure_writable(snapshot.parent)
    repo = blob.parent.parent
    if request.ref:
        ref, commit = repo / "refs" / request.ref, snapshot.relative_to(repo / "snapshots").parts[0]
        (ensure_writable(ref.parent) / ref.name).write_text(commit, encoding="utf-8")
    snapshot.unlink(missing_ok=True)
    try:
        snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
    except OSError:
        blob.replace(snapshot)
        return snapshot, ""
    return blob, str(snapshot)


def _is_same_file(request: FileRequest, damaged: FileDamage) -> bool:
    sha256 = request.artifact.sha256
    return sha256 == damaged.file.sha256 if sha256 else str(request.target) == damaged.file.path
