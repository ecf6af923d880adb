"""JSON files of a checkpoint, which may be damaged or malicious."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.fileio import describe_pointer
from qwenlocal.weights.safetensors import describe_json_error, find_duplicate

_MAX_SIZE = 200_000_000  # bytes


def brief_repr(value: Any) -> str:
    """Return the repr of a value from a checkpoint, shortened to 78 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _reject_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    entries = list(pairs)
    result = dict(entries)
    if len(result) < len(entries):
        raise ValueError(f"“{find_duplicate(key for key, _ in entries)}” occurs twice")
    return result


def read_json(path: Path, content: str) -> dict[str, Any]:
    """
    Read a JSON object from a file of a checkpoint; `content` is what the file contains, for the error.

    Raises
    ------
    BadCheckpoint: the file is missing, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_SIZE:
            raise BadCheckpoint(path, f"it has {path.stat().st_size:,} bytes, more than any real one")
        data = path.read_bytes()
        if pointer := describe_pointer(data):
            raise BadCheckpoint(path, pointer)
        value = json.loads(data, object_pairs_hook=_reject_duplicates)
    except FileNotFoundError as reason:
        raise BadCheckpoint(path.parent, f"it has no {path.name}, which contains {content}") from reason
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason
    except (ValueError, RecursionError) as reason:
        raise BadCheckpoint(path, f"it is not valid JSON ({describe_json_error(reason)})") from reason
    if not isinstance(value, dict):
        raise BadCheckpoint(path, "it is not a JSON object")
    return value


def read_optional_json(path: Path, content: str) -> dict[str, Any]:
    """Read a file like `read_json`; a missing file counts as an empty object."""
    return read_json(path, content) if path.exists() else {}
