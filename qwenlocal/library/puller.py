"""Having a model: what is here is used, see `local.py`; the rest is fetched, checked and recorded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadWeights, DigestMismatch, DiskFull, DownloadFailed, SourceUnreachable
from qwenlocal.fileio import git_blob_sha1, hash_file
from qwenlocal.i18n import tr
from qwenlocal.library.byte_source import RangesUnsupported
from qwenlocal.library.download import DownloadPolicy, Fetched, Report, fetch
from qwenlocal.library.http import HttpClient, TransferError
from qwenlocal.library.local_models import Local, Say
from qwenlocal.library.names import CatalogName, HubName, Name, checkpoint_record
from qwenlocal.library.partial_file import write_journal
from qwenlocal.library.remote_checkpoint import RemoteCheckpoint, read_fronts, write_front
from qwenlocal.library.resolver import FileRequest, ResolvedCheckpoint, ResolvedModel, Sources
from qwenlocal.library.store import Damage, Record, Store, StoredFile
from qwenlocal.paths import Folders, writable
from qwenlocal.weights.architecture import examine
from qwenlocal.weights.checkpoint import weight_names
from qwenlocal.weights.header import read_metadata


class DownloadedCheckpoint(NamedTuple):
    """A checkpoint that is here: its folder, its repository, whether that is on the Hugging Face hub."""

    folder: Path
    repo: str
    is_from_the_hub: bool


class Puller:
    """Brings models to this disk. `say` gets sentences for people, `report` the progress of a download."""

    def __init__(
        self,
        folders: Folders,
        store: Store,
        local: Local,
        sources: Sources,
        client: HttpClient,
        *,
        say: Say,
        report: Report,
        manner: DownloadPolicy = DownloadPolicy(),
    ) -> None:
        self._folders, self._store, self._local = folders, store, local
        self._sources, self._client = sources, client
        self._say, self._report, self._manner = say, report, manner
        self.fetched: list[StoredFile] = []  # what came over the network, for whoever wants to say so

    def pull(self, name: Name) -> Record:
        """
        Have the model here, fetching it if need be.

        Raises
        ------
        What `Sources.locate` and `download.fetch` raise, and BadWeights where what came is no model.
        """
        if record := self._local.here(name):
            return record
        located = self._sources.locate(name)
        asked = () if str(name) == located.name else (str(name),)
        record = self._store.get(located.name)
        if record and (ready := self._store.ready(record)):
            return self._store.add(replace(ready, asked=sorted({*ready.asked, *asked})))
        if len(located.files) == 1:
            adopted = self._local.adopt(located.name, located.files[0].sought, located.origin, located.licence, asked)
            if adopted:
                return adopted
        return self._fetch_all(located, asked)

    def front(self, name: Name, folder: Path, count: int) -> tuple[Path, int]:
        """
        The first `count` bytes of a model that is not here, as a file in `folder`, and the size of all its files.

        Raises
        ------
        What `Sources.locate` raises; DownloadFailed where no place sends parts of a file.
        """
        located = self._sources.locate(name)
        first, path = located.files[0], folder / "front.gguf"
        try:
            write_front(first, path, count)
        except (TransferError, RangesUnsupported) as reason:
            raise DownloadFailed(
                f"The beginning of {located.name} cannot be had from {located.origin}: {reason or 'whole files only'}.",
                hint=tr("Fetch all of it: qwenlocal pull {name}", name=name),
            ) from reason
        return path, sum(wanted.artifact.size for wanted in located.files)

    def outline(self, name: CatalogName | HubName) -> RemoteCheckpoint:
        """
        Have everything of a checkpoint here but its weights, of which only the headers are read.

        Raises
        ------
        What `Sources.locate_checkpoint` and `download.fetch` raise.
        BadCheckpoint: its index and its files do not fit, or a header is damaged.
        CannotExpress: its config.json alone tells that it cannot be converted.
        """
        located = self._sources.locate_checkpoint(name)
        large = {w.artifact.name: w for w in located.files if w.artifact.name.endswith(".safetensors")}
        small = [wanted for wanted in located.files if wanted.artifact.name not in large]
        ours = {file.path for record in self._store.records() if record.owned for file in record.files}
        brought = [w for w in located.files if w.target.exists() and str(w.target) not in ours]  # by somebody else
        documents = [self._fetch_small(wanted) for wanted in small]
        if self._store.get(checkpoint_record(located.name)) is None:
            self._note(located, documents, sum(wanted.artifact.size for wanted in large.values()), owned=not brought)
        examine(located.folder)
        weights = [large[file] for file in weight_names(located.folder, large)]
        try:
            fronts = read_fronts(located.folder, weights)
        except TransferError as trouble:
            raise SourceUnreachable(located.name, [f"{located.origin}: {trouble}"]) from trouble
        return RemoteCheckpoint(located, documents, weights, fronts, is_ours=not brought)

    def pull_checkpoint(self, outline: RemoteCheckpoint, *, beside: int = 0) -> DownloadedCheckpoint:
        """
        Fetch the weights of a checkpoint, too; `beside` is how many bytes more must have room on the disk.

        Raises
        ------
        What `download.fetch` raises.
        """
        located = outline.located
        self._say(
            tr(
                "Fetching the checkpoint {name} ({size}, {count} file(s)).",
                name=located.name,
                size=_sum(outline.weights),
                count=len(outline.weights),
            )
        )
        if located.licence:
            self._say(tr("Licence: {licence}", licence=located.licence))
        self._check_room(outline.weights, beside)
        have = [self._weights_here(wanted) for wanted in outline.weights]
        self._note_weights(outline, have)
        for number, wanted in enumerate(outline.weights):
            known = have[number]
            if known is None or wanted.target.stat().st_mtime_ns != known.mtime_ns:
                have[number] = self._shelve(wanted, self._fetch(wanted))
                self._note_weights(outline, have)
        return DownloadedCheckpoint(located.folder, located.repo, located.is_from_the_hub)

    def _note_weights(self, outline: RemoteCheckpoint, have: Sequence[StoredFile | None]) -> None:
        """Record which of the weights are here; None stands for those that are not."""
        missing = sum(w.artifact.size for w, file in zip(outline.weights, have, strict=True) if file is None)
        files = [*outline.documents, *(file for file in have if file)]
        self._note(outline.located, files, missing, owned=outline.is_ours)

    def _note(self, located: ResolvedCheckpoint, files: Sequence[StoredFile], missing: int, *, owned: bool) -> None:
        """Record what is here of a checkpoint, so that it can be listed and removed, should it never be whole."""
        name = checkpoint_record(located.name)
        if files:
            self._store.add(Record(name, tuple(files), located.origin, located.licence, owned, missing=missing,
                                   is_checkpoint=True))  # fmt: skip

    def _fetch_small(self, wanted: FileRequest) -> StoredFile:
        """A file of which the hub states git's digest: it is kept in memory's reach, so that is checked each time."""
        there = wanted.blob is not None and wanted.target.exists() and git_blob_sha1(wanted.target) == wanted.blob
        if not there:
            self._fetch(wanted)
            if wanted.blob and (actual := git_blob_sha1(wanted.target)) != wanted.blob:
                wanted.target.unlink()
                raise DigestMismatch(wanted.artifact.name, wanted.blob, actual, source="the hub")
        path, link = wanted.target, ""
        if wanted.snapshot:
            path, link = _link(path, wanted.snapshot, wanted.ref)
        return StoredFile.of(path, hash_file(path), link=link)

    def _weights_here(self, wanted: FileRequest) -> StoredFile | None:
        """What is recorded of a file that is there, whether it was touched since or not."""
        return self._known_file(wanted.target, wanted.artifact.sha256 or "") if wanted.target.exists() else None

    def _fetch(self, wanted: FileRequest) -> Fetched:
        return fetch(
            wanted.artifact,
            wanted.target,
            part=wanted.part,
            client=self._client,
            locks=self._folders.locks,
            report=self._report,
            manner=self._manner,
        )

    def mend(self, name: Name, record: Record, damage: Sequence[Damage]) -> Record:
        """
        Fetch the damaged blocks of a model anew, or whole files where it is not known which blocks are bad.

        Raises
        ------
        BadWeights: another program brought the file; it is not ours to change.
        What `Sources.locate` and `download.fetch` raise; the damaged file stays until the network has answered.
        """
        if not record.owned:
            raise BadWeights(
                record.path,
                "the file is damaged",
                hint=tr(
                    "{origin} brought it, so it is left alone. Remove it there, then: qwenlocal pull {name}",
                    origin=record.origin,
                    name=name,
                ),
            )
        located = self._sources.locate(name)
        for bad in damage:
            wanted = next((w for w in located.files if _is_same(w, bad)), None)
            if wanted:
                self._make_partial(wanted, bad)
        mended = self._fetch_all(located, record.asked)
        kept = {file.path for file in mended.files}
        for file in record.files:
            if file.path not in kept:  # the source has another version by now, or keeps it elsewhere
                Path(file.path).unlink(missing_ok=True)
        return mended

    def _make_partial(self, wanted: FileRequest, bad: Damage) -> None:
        """Turn a damaged file back into a download of which only the damaged blocks are missing."""
        good: dict[int, int] = {}
        if bad.blocks is not None and bad.block_size == self._manner.block:
            good = {n: crc for n, crc in enumerate(bad.file.checksums) if n not in bad.blocks}
        writable(wanted.part.parent)
        write_journal(wanted.part, wanted.artifact.identity, self._manner.block, good)
        shutil.move(bad.file.path, wanted.part.with_name(f"{wanted.part.name}.part"))

    def _fetch_all(self, located: ResolvedModel, asked: Sequence[str]) -> Record:
        self._say(
            tr(
                "Fetching {name} from {origin} ({size}).",
                name=located.name,
                origin=located.origin,
                size=_sum(located.files),
            )
        )
        if located.licence:
            self._say(tr("Licence: {licence}", licence=located.licence))
        self._check_room(located.files)
        files = []
        for wanted in located.files:
            files.append(self._shelve(wanted, self._fetch(wanted)))
            left = sum(other.artifact.size for other in located.files[len(files) :])
            if left:  # so that it can be listed and removed, should it never be finished
                self._store.add(Record(located.name, files, located.origin, located.licence, missing=left))
        record = Record(located.name, files, located.origin, located.licence, asked=tuple(asked))
        self._check_header(record)
        self.fetched = [*self.fetched, *files]
        return self._store.add(record)

    def _check_room(self, files: Sequence[FileRequest], beside: int = 0) -> None:
        """Of a model in several files, all must have room; each is looked at again before it is fetched."""
        coming = {incomplete.base: incomplete.done for incomplete in self._store.incomplete()}
        needed = sum(w.artifact.size - coming.get(w.part, 0) for w in files if not w.target.exists())
        free = shutil.disk_usage(writable(self._folders.partial)).free
        if free < needed + beside:
            raise DiskFull(self._folders.partial, needed + beside, free)

    def _check_header(self, record: Record) -> None:
        try:
            read_metadata(Path(record.files[0].path))
        except BadWeights as bad:
            for file in record.files:
                Path(file.path).unlink(missing_ok=True)
                if file.link:
                    Path(file.link).unlink(missing_ok=True)
            raise BadWeights(
                record.origin,
                f"what is there is not a model: {bad.reason}",
                hint=tr("Nothing was kept. Check the address."),
            ) from bad

    def _shelve(self, wanted: FileRequest, fetched: Fetched) -> StoredFile:
        path = fetched.path
        link = ""
        if wanted.snapshot:
            path, link = _link(path, wanted.snapshot, wanted.ref)
        if not fetched.checksums and (known := self._known_file(path, fetched.sha256)):
            return known
        return StoredFile.of(path, fetched.sha256, fetched.block if fetched.checksums else 0, fetched.checksums, link)

    def _known_file(self, path: Path, sha256: str) -> StoredFile | None:
        """What another process that fetched this very file has noted of it."""
        files = (file for record in self._store.records() for file in record.files)
        return next((file for file in files if file.path == str(path) and file.sha256 == sha256), None)


def _link(blob: Path, snapshot: Path, ref: str | None) -> tuple[Path, str]:
    """
    Show a blob of the hub's cache under its name, as huggingface_hub does: a relative link, and what `ref` points at.

    Where links are not allowed (Windows without the right), the file itself goes there, as huggingface_hub does too.
    """
    writable(snapshot.parent)
    repo = blob.parent.parent
    if ref:
        commit = snapshot.relative_to(repo / "snapshots").parts[0]
        (writable((repo / "refs" / ref).parent) / Path(ref).name).write_text(commit, encoding="utf-8")
    snapshot.unlink(missing_ok=True)
    try:
        snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
    except OSError:
        blob.replace(snapshot)
        return snapshot, ""
    return blob, str(snapshot)


def _is_same(wanted: FileRequest, bad: Damage) -> bool:
    digest = wanted.artifact.sha256
    return digest == bad.file.sha256 if digest else str(wanted.target) == bad.file.path


def _sum(files: Sequence[FileRequest]) -> str:
    total = sum(wanted.artifact.size for wanted in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
