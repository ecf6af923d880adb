"""
Snapshots of the KV cache on disk, so that continuing a chat later needs no prefill.

A file is a line of JSON, the tokens as int32, and llama.cpp's state of the sequence, with a CRC-32 over both. It is
valid for one model file with its adapters, one set of KV cache types, and one version of llama.cpp; the folder name is
a hash of these.
Files are written under a temporary name and renamed; if they take too much space, the least recently used ones are
deleted. Nothing depends on them: a damaged file is deleted, and its tokens are computed again.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.prefix_cache import MIN_PREFIX_TOKENS, common_prefix
from qwenlocal.errors import NotWritable, QwenlocalError
from qwenlocal.fileio import fingerprint_file, hash_samples
from qwenlocal.weights.adapter_spec import AdapterSpec
from qwenlocal.weights.split_model import shard_paths

_VERSION = 1
_DISK_SHARE = 0.1  # of the disk's free space
_CONTAINED = 0.9  # share of a file's tokens that a newer file must also hold to replace it
_ABANDONED_SECONDS = 3600.0  # a temporary file of this age is no longer being written
_DISK_SPEED = 300e6  # bytes per second that a slow disk reads


def compute_cache_key(model: Path, options: ContextOptions, adapters: Sequence[AdapterSpec] = ()) -> str:
    """
    Hash everything that a state depends on.

    That is the model file, the adapters and their scales, the KV cache's layout, and the version of llama.cpp.
    """
    layout = (options.key_type, options.value_type, options.flash_attention, options.rope)
    version = importlib.metadata.version("llama-cpp-python")
    parts: tuple[object, ...] = (_VERSION, version, layout, list(map(fingerprint_file, shard_paths(model))))
    if changes := sorted((fingerprint_file(spec.path), spec.scale) for spec in adapters if spec.scale):
        parts = (*parts, changes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def fingerprint_model(model: Path) -> str:
    """Hash samples of a model file; copies of it have the same hash."""
    return hash_samples(model)[:32]


def delete_prompt_caches(folder: Path) -> None:
    """
    Delete all files in `folder`.

    Raises
    ------
    NotWritable: a file cannot be deleted.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as reason:
        raise NotWritable(folder, reason.strerror or str(reason)) from reason


@dataclass(frozen=True)
class CachedPrompt:
    """A file with the keys and values of `tokens`; the state is `size` bytes at `offset`."""

    path: Path
    tokens: Sequence[int]
    offset: int
    size: int
    crc: int


class PromptCache:
    """The files of one key in `folder`."""

    def __init__(self, folder: Path, key: str, *, share: float = _DISK_SHARE) -> None:
        """Open the cache; all files in `folder` may take `share` of the space that would be free without them."""
        self._root, self._folder, self._share = folder, folder / key, share

    def find_longest_prefix(self, ids: Sequence[int], more_than: int) -> CachedPrompt | None:
        """Find the file that shares the longest prefix with `ids`; None unless it has more than `more_than` tokens."""
        best, best_length = None, more_than
        for path in self._folder.glob("*.kv"):
            cached = _read_header(path)
            if cached and (length := common_prefix(cached.tokens, ids)) > best_length:
                best, best_length = cached, length
        return best

    def load(self, cached: CachedPrompt, context: Context, sequence: int) -> bool:
        """Load a file into the sequence; if it is damaged or llama.cpp rejects it, delete it and return False."""
        try:
            data = bytearray(cached.size)
            with cached.path.open("rb") as file:
                file.seek(cached.offset)
                is_valid = file.readinto(data) == cached.size
            is_valid = is_valid and zlib.crc32(data, zlib.crc32(_pack(cached.tokens))) == cached.crc
            if is_valid and context.set_state(sequence, (ctypes.c_uint8 * len(data)).from_buffer(data)):
                os.utime(cached.path)
                return True
            cached.path.unlink(missing_ok=True)
        except OSError:
            pass
        return False

    def save(self, context: Context, sequence: int, ids: Sequence[int], seconds_per_token: float) -> bool:
        """Save the sequence, which holds `ids`, if reading it is faster than computing it and there is space."""
        if len(ids) < MIN_PREFIX_TOKENS or context.length(sequence) != len(ids):
            return False
        with contextlib.suppress(OSError, MemoryError, QwenlocalError):
            data = context.get_state(sequence)
            if len(data) / _DISK_SPEED > seconds_per_token * len(ids):
                return False
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._free_space(len(data)):
                return False
            self._delete_contained(ids, self._write(data, ids))
            return True
        return False

    def _write(self, data: Any, ids: Sequence[int]) -> Path:
        tokens = _pack(ids)
        crc = zlib.crc32(data, zlib.crc32(tokens))
        header = {"version": _VERSION, "tokens": len(ids), "size": len(data), "crc": crc}
        path = self._folder / f"{hashlib.sha256(tokens).hexdigest()[:24]}.kv"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                temporary.chmod(0o600)
                file.write(json.dumps(header).encode() + b"\n" + tokens)
                file.write(memoryview(data))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _delete_contained(self, ids: Sequence[int], new: Path) -> None:
        """Delete the files whose tokens are nearly all in the file `new` as well."""
        for path in self._folder.glob("*.kv"):
            cached = _read_header(path)
            if cached and path != new and common_prefix(cached.tokens, ids) >= _CONTAINED * len(cached.tokens):
                path.unlink(missing_ok=True)

    def _free_space(self, size: int) -> bool:
        """Delete the least recently used files, of any model, until `size` more bytes are within the share."""
        for temporary in self._root.glob("*/*.part"):  # left by a process that was killed
            if time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                temporary.unlink(missing_ok=True)
        files = sorted(self._root.glob("*/*.kv"), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        budget = self._share * (shutil.disk_usage(self._root).free + used)
        if size > budget:
            return False
        for path in files:
            if used + size <= budget:
                break
            used -= path.stat().st_size
            path.unlink(missing_ok=True)
        return True


def _read_header(path: Path) -> CachedPrompt | None:
    """Read the first line and the tokens of a file; if they are invalid, delete it and return None."""
    try:
        with path.open("rb") as file:
            line = file.readline(1000)
            header = json.loads(line)
            count, size, crc = (int(header[key]) for key in ("tokens", "size", "crc"))
            tokens: array.array[int] = array.array("i")
            tokens.frombytes(file.read(4 * count) if 0 < count < 1 << 24 else b"")
            offset = len(line) + 4 * count
            if header["version"] == _VERSION and len(tokens) == count and path.stat().st_size == offset + size:
                return CachedPrompt(path, tokens.tolist(), offset, size, crc)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def _pack(ids: Sequence[int]) -> bytes:
    return array.array("i", ids).tobytes()
