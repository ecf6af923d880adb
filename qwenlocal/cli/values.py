"""Values that people type with units."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwenlocal.errors import UsageProblem
from qwenlocal.language import tr

_FASTEST = 1e15  # bytes a second
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}


def rate(text: str | None) -> int:
    """
    Bytes a second: `rate("2M")` is 2,000,000; 0 where nothing was said.

    Raises
    ------
    UsageProblem: it is not a number with K, M or G.
    """
    if text is None:
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:b(?:/s)?|i?b)?", text.strip().lower())
    value = float(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= value <= _FASTEST:
        raise UsageProblem(
            tr("“{text}” is not a rate.", text=text), hint=tr("Write it like 500K, 2M or 1.5M: bytes a second.")
        )
    return int(value)


def values_from(texts: Sequence[str]) -> dict[str, str]:
    """
    `values_from(["lang=French"])` is {"lang": "French"}.

    Raises
    ------
    UsageProblem: one is not of the form NAME=TEXT.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageProblem(
                tr("“{text}” is not of the form NAME=TEXT.", text=text), hint=tr("For example: --var lang=French")
            )
        found[name] = value
    return found


def listed(text: str) -> list[str]:
    """What stands between the commas: `listed("q4_0, q8_0,")` is ["q4_0", "q8_0"]; `text` itself where nothing does."""
    return [part.strip() for part in text.split(",") if part.strip()] or [text]


class Stage(NamedTuple):
    """How far something is, for `terminal.progress`."""

    name: str
    done: int
    total: int
    doing: str
    source: str = ""


def print_json(data: Any) -> None:
    """Data for programs; what is no number for JSON (NaN, infinity) becomes its name."""
    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=False, indent=1, default=str, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their headings, on standard output; Chinese letters are two columns wide."""
    widths = [max(_columns(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = (cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    import wcwidth

    return max(0, wcwidth.wcswidth(text))


def bytes_for_people(count: int) -> str:
    """`bytes_for_people(491400064)` is "491 MB"."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
