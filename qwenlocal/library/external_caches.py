"""
Model files that other programs downloaded: used in place, never copied, never changed.

    Hugging Face cache   models--<owner>--<repo>/blobs/<sha256>, with file names in snapshots/<commit>/
    Ollama               blobs/sha256-<digest>
    LM Studio            <owner>/<repo>/<file>.gguf
    llama.cpp            <owner>_<repo>_<file>.gguf in its own cache
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.paths import Folders

_HUGGING_FACE = "the Hugging Face cache"


@dataclass(frozen=True)
class ExternalFile:
    """A file in another program's cache; `has_digest_path`: its path contains its digest, so it needs no hashing."""

    path: Path
    program: str
    has_digest_path: bool


@dataclass(frozen=True)
class FileQuery:
    """A file to look for: its name, and its size, digest and repository if known ("" otherwise)."""

    file: str
    size: int | None
    sha256: str | None
    repo: str


def find_external_files(
    query: FileQuery, folders: Folders, environ: Mapping[str, str] = os.environ
) -> Iterator[ExternalFile]:
    """Yield existing files that match the query by digest or by name, and by size if known; by digest first."""
    by_digest = _candidates_by_digest(query.sha256, query.repo, folders, environ) if query.sha256 else ()
    by_name = _candidates_by_name(query.file, query.repo, folders, environ) if query.repo else ()
    for candidate in itertools.chain(by_digest, by_name):
        try:
            size = candidate.path.stat().st_size
        except OSError:
            continue
        if candidate.path.is_file() and size > 0 and query.size in (None, size):
            yield candidate


def hub_cache_folder(hub_cache: Path, repo: str) -> Path:
    """Return the folder of a repository in the Hub's cache, such as `models--Qwen--Qwen1.5-0.5B-Chat-GGUF`."""
    return hub_cache / f"models--{repo.replace('/', '--')}"


def _candidates_by_digest(
    sha256: str, repo: str, folders: Folders, environ: Mapping[str, str]
) -> Iterator[ExternalFile]:
    if repo:
        path = hub_cache_folder(folders.hub_cache, repo) / "blobs" / sha256
        yield ExternalFile(path, _HUGGING_FACE, has_digest_path=True)
    for path in sorted(folders.hub_cache.glob(f"models--*/blobs/{sha256}")):
        yield ExternalFile(path, _HUGGING_FACE, has_digest_path=True)
    for folder in _ollama_folders(folders, environ):
        yield ExternalFile(folder / "blobs" / f"sha256-{sha256}", "Ollama", has_digest_path=True)


def _candidates_by_name(file: str, repo: str, folders: Folders, environ: Mapping[str, str]) -> Iterator[ExternalFile]:
    for path in sorted(hub_cache_folder(folders.hub_cache, repo).glob(f"snapshots/*/{glob.escape(file)}")):
        yield ExternalFile(path, _HUGGING_FACE, has_digest_path=False)
    file_name = file.rpartition("/")[2]
    for folder in _lm_studio_folders(folders):
        yield ExternalFile(folder / repo / file_name, "LM Studio", has_digest_path=False)
    flat_name = f"{repo.replace('/', '_')}_{file.replace('/', '_')}"
    for folder in _llama_cpp_folders(folders, environ):
        yield ExternalFile(folder / flat_name, "llama.cpp", has_digest_path=False)


def _ollama_folders(folders: Folders, environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("OLLAMA_MODELS"):
        yield Path(environ["OLLAMA_MODELS"])
    yield folders.user / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def _lm_studio_folders(folders: Folders) -> Iterator[Path]:
    yield folders.user / ".lmstudio" / "models"
    yield folders.user / ".cache" / "lm-studio" / "models"


def _llama_cpp_folders(folders: Folders, environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("LLAMA_CACHE"):
        yield Path(environ["LLAMA_CACHE"])
    yield folders.cache / "llama.cpp"
