"""Output of the commands: data on standard output, sentences on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qwenlocal.formatting import display_width, pad


def say(sentence: str) -> None:
    """Print a sentence on standard error, wrap at the terminal's width."""
    from qwenlocal.terminal.ansi import wrap

    sys.stderr.write(wrap(sentence, sys.stderr) + "\n")
    sys.stderr.flush()


def say_dimmed(sentence: str) -> None:
    """Print a sentence in gray on standard error, between the answers of a chat."""
    from qwenlocal.terminal.ansi import dim, escape_controls, wrap

    sys.stderr.write(dim(wrap(escape_controls(sentence), sys.stderr), sys.stderr) + "\n")
    sys.stderr.flush()


def print_json(data: Any) -> None:
    """Print `data` as JSON; NaN and infinity, which JSON lacks, become strings."""
    import json

    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=False, indent=1, default=str, allow_nan=False) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headings, aligned by display width."""
    widths = [max(display_width(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (pad(cell, width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
