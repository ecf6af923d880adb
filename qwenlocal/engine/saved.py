"""
What a sequence held, kept on disk: who comes back to a conversation need not wait until all of it was read again.

A file is a line of JSON, the tokens as int32, and llama.cpp's state of the sequence, with a CRC-32 over both. It
belongs to one model file, one way to keep keys and values, and one version of llama.cpp: all of that is in the folder's
name. Files are written under another name first, and the one that was not used for the longest time goes when there are
too many. Nothing depends on them: one that is damaged is deleted, and the tokens are computed again.
"""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Any

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.errors import CannotWrite, QwenlocalError

if TYPE_CHECKING:
    import array

_VERSION = 1
_SHARE = 0.1  # of the disk's free room
_LEAST_TOKENS = 64  # fewer are computed in a moment
_SAMPLES, _SAMPLE = 16, 1 << 16  # places of a model file, and bytes at each, that tell it from others
_NEARLY = 0.9
_ABANDONED = 3600.0  # seconds after which nobody is writing a draft any more
_DISK = 300e6  # bytes a second that a slow disk reads


def key_of(model: Path, options: ContextOptions) -> str:
    """Differs for other weights, a file that was mended, another layout of the cache, other versions of llama.cpp."""
    layout = (options.key_type, options.value_type, options.flash_attention, options.rope)
    what = (
        _VERSION,
        importlib.metadata.version("llama-cpp-python"),
        layout,
        digest_of(model),
        model.stat().st_mtime_ns,
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def digest_of(model: Path) -> str:
    """Tells a model file from others, without reading all of it: its size, and samples over its length."""
    size = model.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with model.open("rb") as file:
        for place in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * place // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


def forget_all(folder: Path) -> None:
    """
    Delete every state in `folder`.

    Raises
    ------
    CannotWrite: one cannot be deleted.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as reason:
        raise CannotWrite(folder, reason.strerror or str(reason)) from reason


@dataclass(frozen=True)
class Saved:
    """A file and the tokens whose keys and values are in it."""

    path: Path
    tokens: Sequence[int]
    offset: int
    size: int
    crc: int


class SavedStates:
    """The files of one key in `folder`."""

    def __init__(self, folder: Path, key: str, *, share: float = _SHARE) -> None:
        """All files in `folder` together take at most `share` of the room that would be free without them."""
        self._root, self._folder, self._share = folder, folder / key, share

    def best(self, ids: Sequence[int], more_than: int) -> Saved | None:
        """The file that has the most of the beginning of `ids`, if that is more than `more_than` tokens."""
        best, most = None, more_than
        for path in self._folder.glob("*.kv"):
            saved = _read_front(path)
            if saved and (count := common_prefix(saved.tokens, ids)) > most:
                best, most = saved, count
        return best

    def restore(self, saved: Saved, context: Context, sequence: int) -> bool:
        """Put it into the sequence. False, and the file is gone, where it is damaged or llama.cpp does not take it."""
        try:
            data = bytearray(saved.size)
            with saved.path.open("rb") as file:
                file.seek(saved.offset)
                whole = file.readinto(data) == saved.size
            whole = whole and zlib.crc32(data, zlib.crc32(_packed(saved.tokens))) == saved.crc
            if whole and context.restore(sequence, _as_c(data)):
                os.utime(saved.path)
                return True
            saved.path.unlink(missing_ok=True)
        except OSError:
            pass
        return False

    def save(self, context: Context, sequence: int, ids: Sequence[int], seconds_a_token: float) -> bool:
        """Keep what the sequence holds, `ids`, where reading is quicker than computing it, and there is room."""
        if len(ids) < _LEAST_TOKENS or context.length(sequence) != len(ids):
            return False
        with contextlib.suppress(OSError, MemoryError, QwenlocalError):
            data = context.state(sequence)
            if len(data) / _DISK > seconds_a_token * len(ids):
                return False
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._make_room(len(data)):
                return False
            self._drop_beginnings(ids, self._write(data, ids))
            return True
        return False

    def _write(self, data: Any, ids: Sequence[int]) -> Path:
        tokens = _packed(ids)
        head = {"version": _VERSION, "tokens": len(ids), "size": len(data), "crc": zlib.crc32(data, zlib.crc32(tokens))}
        path = self._folder / f"{hashlib.sha256(tokens).hexdigest()[:24]}.kv"
        draft = path.with_suffix(f".{os.getpid()}.part")
        try:
            with draft.open("wb") as file:
                draft.chmod(0o600)
                file.write(json.dumps(head).encode() + b"\n" + tokens)
                file.write(memoryview(data))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def _drop_beginnings(self, ids: Sequence[int], new: Path) -> None:
        """What is in the new file as well, nearly all of it, need not be there twice."""
        for path in self._folder.glob("*.kv"):
            saved = _read_front(path)
            if saved and path != new and common_prefix(saved.tokens, ids) >= _NEARLY * len(saved.tokens):
                path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Delete what was not used for the longest time, of any model, until `size` more bytes are within the share."""
        for draft in self._root.glob("*/*.part"):  # of somebody who was killed
            if time.time() - draft.stat().st_mtime > _ABANDONED:
                draft.unlink(missing_ok=True)
        files = sorted(self._root.glob("*/*.kv"), key=lambda path: path.stat().st_mtime)
        taken = sum(path.stat().st_size for path in files)
        budget = self._share * (shutil.disk_usage(self._root).free + taken)
        if size > budget:
            return False
        for path in files:
            if taken + size <= budget:
                break
            taken -= path.stat().st_size
            path.unlink(missing_ok=True)
        return True


def _read_front(path: Path) -> Saved | None:
    """A file's first line and tokens; None, and the file is gone, where they are not what they should be."""
    import array

    try:
        with path.open("rb") as file:
            line = file.readline(1000)
            head = json.loads(line)
            count, size, crc = (int(head[key]) for key in ("tokens", "size", "crc"))
            tokens: array.array[int] = array.array("i")
            tokens.frombytes(file.read(4 * count) if 0 < count < 1 << 24 else b"")
            offset = len(line) + 4 * count
            if head["version"] == _VERSION and len(tokens) == count and path.stat().st_size == offset + size:
                return Saved(path, tokens.tolist(), offset, size, crc)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def _packed(ids: Sequence[int]) -> bytes:
    import array

    return array.array("i", ids).tobytes()


def _as_c(data: bytearray) -> Any:
    import ctypes

    return (ctypes.c_uint8 * len(data)).from_buffer(data)
