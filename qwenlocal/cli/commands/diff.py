"""`qwenlocal diff`: compare two GGUF files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed
from qwenlocal.formatting import shorten

if TYPE_CHECKING:
    from qwenlocal.weights.gguf_diff import GgufDiff

FILES_DIFFER = 1
_MAX_VALUE = 100  # characters


def diff_files(left: str, right: str, *, as_json: bool) -> None:
    """Compare keys, tensors, types and weights of two files. Exits with 1 if they differ."""
    from qwenlocal.terminal.progress import status_line
    from qwenlocal.weights.gguf_diff import compare_files

    app = AppContext(quiet=as_json)
    left_path, right_path = (find_installed(app, text).path for text in (left, right))
    with status_line(sys.stderr) as show:
        difference = compare_files(
            left_path, right_path, lambda done, total: show(f"comparing: {done} of {total} tensors")
        )
    if as_json:
        print_json(asdict(difference))
    else:
        _show(difference)
    if not difference.is_empty:
        raise typer.Exit(FILES_DIFFER)


def _show(difference: GgufDiff) -> None:
    from qwenlocal.terminal.ansi import escape_controls

    if difference.is_empty:
        sys.stdout.write("The files have the same metadata and tensors.\n")
    for key in difference.keys:
        left, right = (_describe(value, key.where) for value in (key.left, key.right))
        sys.stdout.write(escape_controls(f"{key.key}\n  < {left}\n  > {right}\n"))
    for tensor in difference.tensors:
        if tensor.rmse is not None:
            text = f"{tensor.left} | {tensor.right}, error {tensor.rmse:.4%}"
        elif not tensor.left or not tensor.right:
            text = f"only in the {'second' if not tensor.left else 'first'} file ({tensor.left or tensor.right})"
        else:
            text = f"{list(tensor.shapes[0] or ())} | {list(tensor.shapes[1] or ())}"
        sys.stdout.write(escape_controls(f"{tensor.name}: {text}\n"))


def _describe(value: Any, place: int | None) -> str:
    """Spell a value in one line; of a list only its length and the entry at `place`."""
    if value is None:
        return "(missing)"
    if isinstance(value, list):
        entry = "" if place is None or place >= len(value) else f", {value[place]!r} at {place:,}"
        return f"{len(value):,} entries{entry}"
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_VALUE else f"{shorten(text, _MAX_VALUE)} ({len(str(value)):,} characters)"
