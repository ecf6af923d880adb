"""Checkpoints: in a local directory, in the Hub's cache, or in a repository of a hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import ModelNotFound, SourceUnreachable, UsageError
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName, ModelName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.local_models import LocalModels
    from qwenlocal.library.puller import Puller
    from qwenlocal.library.resolver import FileRequest, ResolvedModel
    from qwenlocal.library.store import StoredFile
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.safetensors import RawHeader
    from qwenlocal.weights.weight_files import WeightFiles

OpenPuller = Callable[[], AbstractContextManager["Puller"]]


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this disk; `repo` is its Hugging Face repository, "" if unknown."""

    path: Path
    name: str
    repo: str


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
    def repo(self) -> str:
        """The Hugging Face repository, "" for other hubs."""
        return self.resolved.repo if self.resolved.origin.startswith("hf:") else ""

    @property
    def missing_size(self) -> int:
        """Bytes of weights that are not on this disk."""
        return sum(request.artifact.size for request in self.weights if not request.target.exists())

    def read_outline(self) -> Checkpoint | None:
        """Read tensor names, types and shapes from the headers; None if the hub sends whole files only."""
        from qwenlocal.weights.checkpoint import Checkpoint

        return None if self.headers is None else Checkpoint.from_headers(self.resolved.folder, self.files, self.headers)

    def download(self, *, reserve: int = 0) -> LocalCheckpoint:
        """
        Download the weights, if the disk has room for them and for `reserve` bytes more.

        Raises
        ------
        Everything that `Puller.pull_checkpoint` raises.
        """
        self.puller.pull_checkpoint(self, extra_space=reserve)
        return LocalCheckpoint(self.resolved.folder, self.name, self.repo)


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
        folder = self._local.find_checkpoint(repo)
        if folder is None:
            with self._open_puller() as puller:
                try:
                    checkpoint = puller.inspect_checkpoint(name)
                except SourceUnreachable:
                    folder = self._local.find_checkpoint(repo, is_offline=True)
                    if folder is None:
                        raise
                else:
                    yield checkpoint
                    return
        yield LocalCheckpoint(folder, repo.repo.partition("/")[2], repo.repo if repo.hub == "hf" else "")


def checkpoint_repo(name: CatalogName | HubName) -> HubName:
    """Return the repository that has a model's original weights."""
    return HubName("hf", name.card.checkpoint) if isinstance(name, CatalogName) else name


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
