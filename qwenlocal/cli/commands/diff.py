"""`qwenlocal diff`: compare two GGUF files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed
from qwenlocal.formatting import format_quantity, format_shape, shorten

if TYPE_CHECKING:
    from qwenlocal.weights.gguf_diff import GgufDiff, TensorDifference

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
        return
    for key in difference.keys:
        left, right = (_describe(value, key.where) for value in (key.left, key.right))
        sys.stdout.write(escape_controls(f"{shorten(key.key, _MAX_VALUE)}\n  < {left}\n  > {right}\n"))
    for tensor in difference.tensors:
        sys.stdout.write(escape_controls(f"{tensor.name}: {_describe_tensor(tensor)}\n"))
    sys.stdout.write(f"\n{_summarize(difference)}\n")


def _describe_tensor(tensor: TensorDifference) -> str:
    if not tensor.left or not tensor.right:
        return f"only in the {'second' if not tensor.left else 'first'} file ({tensor.left or tensor.right})"
    types = tensor.left if tensor.left == tensor.right else f"{tensor.left} | {tensor.right}"
    if tensor.shapes[0] != tensor.shapes[1]:
        return f"{types}, {' | '.join(format_shape(shape or ()) for shape in tensor.shapes)}"
    if tensor.rmse is None:
        return f"{types}, cannot be compared"
    return f"{types}, relative RMSE {tensor.rmse:.4%}"


def _summarize(difference: GgufDiff) -> str:
    """Count the differences, and name the tensor that differs most."""
    counts = {"key": len(difference.keys), "tensor": len(difference.tensors)}
    listed = " and ".join(format_quantity(count, noun) for noun, count in counts.items() if count)
    summary = f"{listed} {'differs' if sum(counts.values()) == 1 else 'differ'}."
    errors = [(tensor.rmse, tensor.name) for tensor in difference.tensors if tensor.rmse is not None]
    if not errors:
        return summary
    worst, name = max(errors)
    return f"{summary} The largest relative RMSE is {worst:.4%} ({name}), measured against the first file."


def _describe(value: Any, place: int | None) -> str:
    """Spell a value in one line; of a list only its length and the entry at `place`."""
    if value is None:
        return "(missing)"
    if isinstance(value, list):
        entry = ""
        if place is not None and place < len(value):
            entry = f", {shorten(repr(value[place]), _MAX_VALUE)} at {place:,}"
        return f"{format_quantity(len(value), 'entry', 'entries')}{entry}"
    text = shorten(str(value), _MAX_VALUE)
    return f"{text} ({len(str(value)):,} characters)" if len(str(value)) > _MAX_VALUE else text
