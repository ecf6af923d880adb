"""The checkpoint that a name means: where it lies on this disk, or how it is fetched once it is worth it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.wiring import Program
from qwenlocal.errors import ModelNotFound, UsageProblem
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.puller import Puller
    from qwenlocal.library.remote_checkpoint import RemoteCheckpoint
    from qwenlocal.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk: where it lies, what it is called, and the hub's repository it came from."""

    path: Path
    name: str
    repo: str


@dataclass(frozen=True)
class Remote:
    """A checkpoint on a hub, of which everything but the weights is here."""

    outline: RemoteCheckpoint
    puller: Puller

    @property
    def name(self) -> str:
        """What it is called."""
        return self.outline.located.repo.partition("/")[2]

    @property
    def repo(self) -> str:
        """The repository of the Hugging Face hub, "" for one of another hub."""
        return self.outline.located.repo if self.outline.located.is_from_the_hub else ""

    def as_far_as_known(self) -> Checkpoint | None:
        """What its weights are, by their headers; None where the hub sends whole files only."""
        from qwenlocal.weights.checkpoint import Checkpoint

        fronts = self.outline.fronts
        return None if fronts is None else Checkpoint.outline(self.outline.folder, fronts)

    def fetch(self, *, beside: int = 0) -> Source:
        """Fetch the weights; `beside` is how many bytes more must have room on the disk."""
        there = self.puller.pull_checkpoint(self.outline, beside=beside)
        return Source(there.folder, self.name, self.repo)


@contextlib.contextmanager
def find_source(program: Program, text: str, *, limit_rate: int = 0) -> Iterator[Source | Remote]:
    """
    The checkpoint that `text` names.

    Raises
    ------
    UsageProblem: it names no checkpoint, or a part of one.
    What `Puller.outline` raises.
    """
    from qwenlocal.weights.checkpoint import PICKLED, pickled

    name = program.parse(text)
    if isinstance(name, HubCheckpointName):
        name = name.source
    if isinstance(name, PathName) and name.path.suffix in PICKLED:
        raise pickled(name.path.parent, name.path.name)
    if isinstance(name, LocalCheckpointName):
        yield local_source(name.path)
        return
    if not isinstance(name, (CatalogName, HubName)) or (isinstance(name, HubName) and name.file):
        raise UsageProblem(
            f"{text} is not a checkpoint.",
            hint="Give a directory with config.json, a repository (hf:owner/repo), or a name (qwenlocal list --all). "
            "For a GGUF file there is: qwenlocal quantize",
        )
    if name.level:
        raise UsageProblem(f"{text} names a type, too.", hint=f"Say it as: --type {name.level}")
    with on_hub(program, name, limit_rate) as found:
        yield found


@contextlib.contextmanager
def on_hub(program: Program, name: CatalogName | HubName, limit_rate: int) -> Iterator[Source | Remote]:
    """A checkpoint of a repository: in the hub's cache if all of it is there, otherwise to be fetched."""
    repo = repository(name)
    if here := program.local.checkpoint(repo):
        yield Source(here, repo.repo.partition("/")[2], repo.repo if repo.hub == "hf" else "")
        return
    with program.puller(limit_rate) as puller:
        yield Remote(puller.outline(name), puller)


def repository(name: CatalogName | HubName) -> HubName:
    """Where the original weights of a model are."""
    return HubName("hf", name.card.checkpoint) if isinstance(name, CatalogName) else name


def is_there(path: Path) -> bool:
    """Whether the directory, or the one file, is a checkpoint still."""
    return path.is_file() or (path / "config.json").is_file()


def local_source(path: Path) -> Source:
    """
    A checkpoint on this disk; in the hub's cache the folder above it says which repository it is.

    Raises
    ------
    ModelNotFound: it is gone.
    """
    if not is_there(path):
        raise ModelNotFound(str(path), reason=f"There is no checkpoint {path} any more.", hint="Check the path.")
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and (match := re.fullmatch(r"models--(.+?)--(.+)", folder.parents[1].name)):
        return Source(path, match[2], f"{match[1]}/{match[2]}")
    return Source(path, folder.name, "")
