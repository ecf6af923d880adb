"""
Model files that other programs brought to this disk: used where they are, never copied, never changed.

    Hugging Face cache   models--<owner>--<repo>/blobs/<sha256>, and the names in snapshots/<commit>/
    Ollama               blobs/sha256-<digest>
    LM Studio            <owner>/<repo>/<file>.gguf
    llama.cpp            <owner>_<repo>_<file>.gguf in its own cache
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.paths import Folders


@dataclass(frozen=True)
class Found:
    """A file of the right name or digest. `certain` is True where its place in another store vouches for its digest."""

    path: Path
    program: str
    certain: bool


@dataclass(frozen=True)
class FileQuery:
    """What to look for: the file's name, its size and digest where known, its repository where it has one."""

    file: str
    size: int | None
    sha256: str | None
    repo: str | None


def find(sought: FileQuery, folders: Folders, environ: Mapping[str, str] = os.environ) -> Iterator[Found]:
    """Files on this disk that are, or may be, the one sought; those of the right size only, the surest first."""
    for found in _candidates(sought, folders, environ):
        try:
            size = found.path.stat().st_size
        except OSError:
            continue
        if found.path.is_file() and size > 0 and sought.size in (None, size):
            yield found


def _candidates(sought: FileQuery, folders: Folders, environ: Mapping[str, str]) -> Iterator[Found]:
    if sought.sha256:
        yield from _by_digest(sought.sha256, sought.repo, folders, environ)
    if sought.repo:
        yield from _by_name(sought.file, sought.repo, folders, environ)


def _by_digest(sha256: str, repo: str | None, folders: Folders, environ: Mapping[str, str]) -> Iterator[Found]:
    hub = "the Hugging Face cache"
    if repo:
        yield Found(hub_repo(folders.hub_cache, repo) / "blobs" / sha256, hub, certain=True)
    for path in sorted(folders.hub_cache.glob(f"models--*/blobs/{sha256}")):
        yield Found(path, hub, certain=True)
    for folder in _ollama(folders, environ):
        yield Found(folder / "blobs" / f"sha256-{sha256}", "Ollama", certain=True)


def _by_name(file: str, repo: str, folders: Folders, environ: Mapping[str, str]) -> Iterator[Found]:
    for path in sorted(hub_repo(folders.hub_cache, repo).glob(f"snapshots/*/{glob.escape(file)}")):
        yield Found(path, "the Hugging Face cache", certain=False)
    last = file.rpartition("/")[2]
    for folder in _lm_studio(folders):
        yield Found(folder / repo / last, "LM Studio", certain=False)
    for folder in _llama_cpp(folders, environ):
        yield Found(folder / f"{repo.replace('/', '_')}_{file.replace('/', '_')}", "llama.cpp", certain=False)


def hub_repo(hub_cache: Path, repo: str) -> Path:
    """Where the hub's cache keeps a repository: `models--Qwen--Qwen1.5-0.5B-Chat-GGUF`."""
    return hub_cache / f"models--{repo.replace('/', '--')}"


def _ollama(folders: Folders, environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("OLLAMA_MODELS"):
        yield Path(environ["OLLAMA_MODELS"])
    yield folders.user / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def _lm_studio(folders: Folders) -> Iterator[Path]:
    yield folders.user / ".lmstudio" / "models"
    yield folders.user / ".cache" / "lm-studio" / "models"


def _llama_cpp(folders: Folders, environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("LLAMA_CACHE"):
        yield Path(environ["LLAMA_CACHE"])
    yield folders.cache / "llama.cpp"
