"""JSON files of a checkpoint, which may be damaged or malicious."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.fileio import describe_pointer

if TYPE_CHECKING:
    from typing import TypeGuard

_MAX_SIZE = 200_000_000  # bytes


def is_integer(value: Any) -> TypeGuard[int]:
    """Return True for an integer; in Python, True is one, but not in JSON."""
    return isinstance(value, int) and not isinstance(value, bool)


def find_duplicate(values: Iterable[Any]) -> Any:
    """Return the first of `values` that occurred before; None if all differ."""
    seen = set[Any]()
    return next((value for value in values if value in seen or seen.add(value)), None)  # type: ignore[func-returns-value]


def describe_json_error(reason: Exception) -> str:
    """Return why JSON cannot be parsed, rephrased if Python's message is about Python's own limits."""
    if isinstance(reason, RecursionError):
        return "too deeply nested"
    return "a number with thousands of digits" if "int_max_str_digits" in str(reason) else str(reason)


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


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a file like `read_json`; a missing file counts as an empty object."""
    return read_json(path, "") if path.exists() else {}
