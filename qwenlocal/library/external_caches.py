"""
Model files that other programs downloaded: used in place, never copied, never changed.

    Hugging Face cache   models--<owner>--<repo>/blobs/<sha256>, with file names in snapshots/<commit>/
    Ollama               blobs/sha256-<digest>, named in manifests/hf.co/<owner>/<repo>/<tag>
    LM Studio            <owner>/<repo>/<file>.gguf
    llama.cpp            <owner>_<repo>_<file>.gguf in its own cache
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
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
class CachedRepository:
    """
    The GGUF files of a hub's repository in a cache, by their paths in the repository.

    `has_tags_only`: the cache keeps no file names; here the files are called after their tags.
    """

    program: str
    files: Mapping[str, Path]
    has_tags_only: bool = False


@dataclass(frozen=True)
class FileQuery:
    """A file to look for: its name, and its size, digest and repository if known ("" otherwise)."""

    file: str
    size: int | None
    sha256: str | None
    repo: str


def find_external_files(query: FileQuery, folders: Folders) -> Iterator[ExternalFile]:
    """Yield existing files that match the query by digest or by name, and by size if known; by digest first."""
    by_digest = _candidates_by_digest(query.sha256, query.repo, folders) if query.sha256 else ()
    by_name = _candidates_by_name(query.file, query.repo, folders) if query.repo else ()
    for candidate in itertools.chain(by_digest, by_name):
        size = candidate.path.stat().st_size if candidate.path.is_file() else 0
        if size > 0 and query.size in (None, size):
            yield candidate


def find_cached_repositories(repo: str, revision: str | None, folders: Folders) -> Iterator[CachedRepository]:
    """Yield the files of a Hugging Face repository in each cache; only the Hub's own cache tells revisions apart."""
    for snapshot in find_snapshots(folders.hub_cache, repo, revision):
        yield CachedRepository(_HUGGING_FACE, gguf_files(snapshot))
    if revision:
        return
    for folder in _lm_studio_folders(folders):
        yield CachedRepository("LM Studio", gguf_files(find_ignoring_case(folder, repo)))
    prefix = f"{repo.replace('/', '_')}_".lower()
    for folder in _llama_cpp_folders(folders):
        files = {n[len(prefix) :]: path for n, path in gguf_files(folder).items() if n.lower().startswith(prefix)}
        yield CachedRepository("llama.cpp", files)
    for folder in _ollama_folders(folders):
        yield CachedRepository("Ollama", _read_manifests(folder, repo), has_tags_only=True)


def find_snapshots(hub_cache: Path, repo: str, revision: str | None) -> list[Path]:
    """
    Return the snapshots of a repository in the Hub's cache that a revision means.

    Without a revision, that is the one of the branch main, then all others (fetched by commit), the newest first. A
    short commit hash means every commit that it begins.
    """
    folder, commit = hub_cache_folder(hub_cache, repo), revision or "main"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    if re.fullmatch(r"[0-9a-f]{7,39}", commit):
        return sorted(folder.glob(f"snapshots/{commit}*"))
    if revision:
        return [snapshot]
    others = [path for path in folder.glob("snapshots/*") if path.is_dir() and path != snapshot]
    return [snapshot, *sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)]


def gguf_files(folder: Path) -> dict[str, Path]:
    """Return the GGUF files in a folder and below, by their paths in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() == ".gguf" and path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in files}


def hub_cache_folder(hub_cache: Path, repo: str) -> Path:
    """Return the folder of a repository in the Hub's cache, such as `models--Qwen--Qwen1.5-0.5B-Chat-GGUF`."""
    return find_ignoring_case(hub_cache, f"models--{repo.replace('/', '--')}")


def find_ignoring_case(folder: Path, path: str) -> Path:
    """Return the path in `folder`, spelled as it exists there: hubs ignore the case of repository names."""
    for name in path.split("/"):
        others = () if os.path.exists(folder / name) else sorted(folder.glob("*"))
        folder = next((other for other in others if other.name.lower() == name.lower()), folder / name)
    return folder


def _candidates_by_digest(sha256: str, repo: str, folders: Folders) -> Iterator[ExternalFile]:
    if repo:
        path = hub_cache_folder(folders.hub_cache, repo) / "blobs" / sha256
        yield ExternalFile(path, _HUGGING_FACE, has_digest_path=True)
    for path in sorted(folders.hub_cache.glob(f"models--*/blobs/{sha256}")):
        yield ExternalFile(path, _HUGGING_FACE, has_digest_path=True)
    for folder in _ollama_folders(folders):
        yield ExternalFile(folder / "blobs" / f"sha256-{sha256}", "Ollama", has_digest_path=True)


def _candidates_by_name(file: str, repo: str, folders: Folders) -> Iterator[ExternalFile]:
    names = {file, file.rpartition("/")[2], file.replace("/", "_")}  # not all programs keep the folders of a repository
    for cached in find_cached_repositories(repo, None, folders):
        for name in names & cached.files.keys():
            yield ExternalFile(cached.files[name], cached.program, has_digest_path=False)


def _read_manifests(ollama: Path, repo: str) -> dict[str, Path]:
    """Read which blobs the tags of a Hugging Face repository are."""
    files = {}
    for manifest in sorted(find_ignoring_case(ollama / "manifests" / "hf.co", repo).glob("*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a manifest
            for layer in json.loads(manifest.read_text(encoding="utf-8"))["layers"]:
                blob = ollama / "blobs" / layer["digest"].replace(":", "-")
                if layer["mediaType"] == "application/vnd.ollama.image.model" and blob.is_file():
                    files[f"{manifest.name}.gguf"] = blob
    return files


def _ollama_folders(folders: Folders) -> Iterator[Path]:
    if folder := os.environ.get("OLLAMA_MODELS"):
        yield Path(folder)
    yield folders.user / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def _lm_studio_folders(folders: Folders) -> Iterator[Path]:
    yield folders.user / ".lmstudio" / "models"
    yield folders.user / ".cache" / "lm-studio" / "models"


def _llama_cpp_folders(folders: Folders) -> Iterator[Path]:
    if folder := os.environ.get("LLAMA_CACHE"):
        yield Path(folder)
    yield folders.cache / "llama.cpp"
