"""`qwenlocal inspect`: show and check a GGUF file, and repair it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed, write_files
from qwenlocal.cli.model_facts import header_facts, print_facts
from qwenlocal.errors import BadWeights, OutputExists, UsageError
from qwenlocal.formatting import format_bytes, format_quantity, format_shape
from qwenlocal.paths import parse_path
from qwenlocal.progress import TaskProgress

if TYPE_CHECKING:
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.weights.diagnosis import Diagnosis
    from qwenlocal.weights.gguf_reader import Header

_REPAIRED_ON_LOAD = "Serious problems are also repaired in memory whenever the file is loaded."


def inspect_file(text: str, *, as_json: bool, quick: bool, fix: bool, out: str | None, tensors: bool) -> None:
    """
    Show the contents and problems of a file; with `fix`, repair it in place or write a copy to `out`.

    Exits with 5 if a serious problem remains.
    """
    from qwenlocal.weights.diagnosis import diagnose_file
    from qwenlocal.weights.repair import undo_interrupted_patch

    if out and not fix:
        raise UsageError("-o is only for --fix.", hint="Add --fix.")
    app = AppContext(quiet=as_json)
    record = find_installed(app, text)
    if record.owned is False and undo_interrupted_patch(record.path):
        app.say("An earlier --fix was interrupted; its changes were undone.")
    diagnosis = diagnose_file(record.path, weights=False) if quick else _examine(record)
    if as_json:
        print_json(_facts(diagnosis))
    else:
        _show(diagnosis, tensors=tensors)
    if fix:
        _repair(app, record, diagnosis, out)
    if any(finding.is_serious and not (fix and finding.can_be_fixed) for finding in diagnosis.findings):
        raise typer.Exit(BadWeights.exit_code)


def _examine(record: ModelRecord) -> Diagnosis:
    from qwenlocal.terminal.progress import show_progress
    from qwenlocal.weights.diagnosis import diagnose_file

    name = record.path.name
    with show_progress(sys.stderr) as show:
        if not sys.stderr.isatty():
            return diagnose_file(record.path)
        return diagnose_file(record.path, lambda done, total: show(TaskProgress(name, done, total, "reading")))


# --- output


def _show(diagnosis: Diagnosis, *, tensors: bool) -> None:
    from qwenlocal.terminal.ansi import escape_controls

    sys.stdout.write(f"{diagnosis.path}\n\n")
    print_facts(header_facts(diagnosis.header))
    if tensors:
        _show_tensors(diagnosis.header)
    sys.stdout.write("\n")
    if not diagnosis.findings:
        sys.stdout.write("No problems found.\n")
    for finding in diagnosis.findings:
        label = "error" if finding.is_serious else "note"
        suffix = "  (repairable: --fix)" if finding.can_be_fixed else ""
        sys.stdout.write(f"{label:<6} {escape_controls(finding.problem)}{suffix}\n")


def _show_tensors(header: Header) -> None:
    rows = [(t.name, format_shape(t.shape), t.type.name.upper(), format_bytes(t.size)) for t in header.tensors]
    sys.stdout.write("\n")
    print_table(("TENSOR", "SHAPE", "TYPE", "SIZE"), rows)


def _facts(diagnosis: Diagnosis) -> dict[str, Any]:
    from qwenlocal.weights.gguf_reader import LongArray

    header = diagnosis.header
    return {
        "path": str(diagnosis.path),
        "size": diagnosis.model.size,
        "version": header.version,
        **header_facts(header),
        "metadata": {
            key: {"array of": value.length} if isinstance(value, LongArray) else value
            for key, value in header.metadata.items()
        },
        "tensor list": [
            {"name": t.name, "shape": list(t.shape), "type": t.type.name.upper(), "size": t.size}
            for t in header.tensors
        ],
        "findings": [
            {"what": f.problem, "serious": f.is_serious, "fixable": f.can_be_fixed} for f in diagnosis.findings
        ],
    }


# --- --fix


def _repair(app: AppContext, record: ModelRecord, diagnosis: Diagnosis, out: str | None) -> None:
    from qwenlocal.weights.repair import plan_copy, repaired_layout

    if not diagnosis.fixable:
        app.say("There is nothing that --fix can repair.")
        return
    if out is None:
        _repair_in_place(app, record, diagnosis)
        return
    layout = repaired_layout(diagnosis)
    target = parse_path(out)
    if target.exists():
        raise OutputExists(target, hint="Write to another file: -o FILE")
    write_files(
        plan_copy(diagnosis, layout, target),
        disk_hint="Write to another folder: -o FILE. Finished work is kept: with more disk space, the command "
        "continues.",
        not_finite_hint="The weights are damaged; download the model again.",
    )
    app.say(
        f"Wrote {target} ({format_bytes(layout.size)}); repaired {len(diagnosis.fixable):,} of "
        f"{format_quantity(len(diagnosis.findings), 'problem')}."
    )


def _repair_in_place(app: AppContext, record: ModelRecord, diagnosis: Diagnosis) -> None:
    from qwenlocal.weights.repair import fits_in_place, patch_header, repaired_layout

    layout = repaired_layout(diagnosis)
    if record.owned or record.files[0].sha256:
        raise UsageError(
            f"{record.path} is a published file, or another program's; --fix does not change it.",
            hint=f"Write a repaired copy: --fix -o FILE. {_REPAIRED_ON_LOAD}",
        )
    if len(diagnosis.model.paths) > 1:
        raise UsageError(
            f"The model is split into {len(diagnosis.model.paths)} files. {_REPAIRED_ON_LOAD}",
            hint="Write a repaired copy as one file: --fix -o FILE",
        )
    if not fits_in_place(diagnosis, layout):
        raise UsageError(
            "The repair changes the size of the header, so the weights would have to move.",
            hint="Write a repaired copy: --fix -o FILE",
        )
    patch_header(diagnosis, layout)
    app.say(f"Repaired {diagnosis.path} in place.")
