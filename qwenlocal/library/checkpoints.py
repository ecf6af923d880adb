"""Checkpoints by name: in a local directory, in the Hub's cache, or in a repository of a hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from qwenlocal.errors import SourceUnreachable, UsageError
from qwenlocal.library.local_models import LocalCheckpoint, LocalModels, local_checkpoint
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName, ModelName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint, Puller

OpenPuller = Callable[[], AbstractContextManager["Puller"]]


class CheckpointFinder:
    """Finds the checkpoint that a name means: on this disk if all of it is there, otherwise on a hub."""

    def __init__(self, local: LocalModels, open_puller: OpenPuller) -> None:
        self._local, self._open_puller = local, open_puller

    @contextlib.contextmanager
    def find(self, name: ModelName) -> Iterator[LocalCheckpoint | HubCheckpoint]:
        """
        Find the checkpoint called `name`; a `HubCheckpoint` can download its weights within the block.

        Raises
        ------
        UsageError: it is not a checkpoint, or only a part of one.
        Everything that `Puller.inspect_checkpoint` raises.
        """
        from qwenlocal.weights.other_formats import PICKLED, pickled_weights

        if isinstance(name, HubCheckpointName):
            name = name.source
        if isinstance(name, PathName) and name.path.suffix in PICKLED:
            raise pickled_weights(name.path.parent, name.path.name)
        if isinstance(name, LocalCheckpointName):
            yield local_checkpoint(name.path)
            return
        if not isinstance(name, (CatalogName, HubName)) or (isinstance(name, HubName) and name.file):
            raise UsageError(
                f"{name} is not a checkpoint.",
                hint="Name a directory with config.json, a repository (hf:owner/repo) or a model "
                "(qwenlocal list --all). To convert a GGUF file: qwenlocal quantize",
            )
        if name.level:
            raise UsageError(f"{name} includes a type.", hint=f"Pass it as an option: --type {name.level}")
        with self.find_on_hub(name) as checkpoint:
            yield checkpoint

    @contextlib.contextmanager
    def find_on_hub(self, name: CatalogName | HubName) -> Iterator[LocalCheckpoint | HubCheckpoint]:
        """Find the checkpoint of a repository: in the Hub's cache if all of it is there, otherwise on the hub."""
        repo = checkpoint_repo(name)
        if local := self._local.find_checkpoint(repo):
            yield local
            return
        with self._open_puller() as puller:
            checkpoint: LocalCheckpoint | HubCheckpoint | None
            try:
                checkpoint = puller.inspect_checkpoint(name)
            except SourceUnreachable:
                checkpoint = self._local.find_checkpoint(repo, is_offline=True)
                if checkpoint is None:
                    raise
            yield checkpoint


def checkpoint_repo(name: CatalogName | HubName) -> HubName:
    """Return the repository that has a model's original weights."""
    return HubName("hf", name.card.checkpoint) if isinstance(name, CatalogName) else name
