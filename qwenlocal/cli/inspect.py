"""The commands that look into GGUF files: inspect (and put right), diff."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from qwenlocal.cli.values import Stage, bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import BadWeights, ModelNotFound, OutputExists, UsageProblem
from qwenlocal.library.names import LocalCheckpointName
from qwenlocal.paths import typed

if TYPE_CHECKING:
    from qwenlocal.library.store import Record
    from qwenlocal.weights.checkup import Checkup, Finding
    from qwenlocal.weights.difference import Difference
    from qwenlocal.weights.header import Header

DIFFERENT = 1


def inspect_file(text: str, *, as_json: bool, quick: bool, fix: bool, out: str | None, tensors: bool) -> None:
    """What a file says of itself and what is wrong with it; with `fix`, put it right."""
    from qwenlocal.weights.checkup import examine_file
    from qwenlocal.weights.repair import finish_interrupted

    if out and not fix:
        raise UsageProblem("-o is where --fix writes to.", hint="Add --fix.")
    program = Program(quiet=as_json)
    record = _record(program, text)
    if record.owned is False and finish_interrupted(record.path):
        program.say("An earlier --fix was cut short; the file is as it was before.")
    checkup = examine_file(record.path, weights=False) if quick else _examined(record)
    if as_json:
        print_json(_as_json(checkup))
    else:
        _show(checkup, tensors=tensors)
    if fix:
        _fix(program, record, checkup, out)
    if any(finding.is_serious and not (fix and finding.can_be_fixed) for finding in checkup.findings):
        raise typer.Exit(BadWeights.exit_code)


def _record(program: Program, text: str) -> Record:
    name = program.parse(text)
    record = program.local.here(name)
    if record is not None:
        return record
    if isinstance(name, LocalCheckpointName):
        hint = f"It is a checkpoint; a GGUF file is made of it by: qwenlocal convert {text}"
    else:
        hint = f"Fetch it: qwenlocal pull {name}"
    raise ModelNotFound(text, reason=f"A GGUF file of {text} is not here.", hint=hint)


def _examined(record: Record) -> Checkup:
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.checkup import examine_file

    with progress(sys.stderr) as shown:
        name = record.path.name
        report = (lambda done, all: shown(Stage(name, done, all, "reading"))) if sys.stderr.isatty() else _quiet
        return examine_file(record.path, report)


def _quiet(_done: int, _all: int) -> None:
    """Nobody watches."""


# --- what is shown


def _show(checkup: Checkup, *, tensors: bool) -> None:
    from qwenlocal.terminal.ansi import harmless

    facts = header_facts(checkup.header)
    width = max(len(key) for key in facts)
    sys.stdout.write(f"{checkup.path}\n\n")
    for key, value in facts.items():
        if value not in (None, "", {}):
            shown = template_words(value) if key == "chat template" else _words(value)
            sys.stdout.write(f"{key:<{width}}  {harmless(shown)}\n")
    if tensors:
        _show_tensors(checkup.header)
    sys.stdout.write("\n")
    if not checkup.findings:
        sys.stdout.write("Nothing is wrong with it.\n")
    for finding in checkup.findings:
        mark = "wrong" if finding.is_serious else "note"
        end = "  (--fix puts it right)" if finding.can_be_fixed else ""
        sys.stdout.write(f"{mark:<6} {harmless(finding.what)}{end}\n")


def _show_tensors(header: Header) -> None:
    from qwenlocal.weights.header import tensor_bytes, tensor_type_name

    rows = [
        (t.name, " x ".join(map(str, t.shape)), tensor_type_name(t.type), bytes_for_people(tensor_bytes(t) or 0))
        for t in header.tensors
    ]
    sys.stdout.write("\n")
    print_table(("TENSOR", "SHAPE", "TYPE", "SIZE"), rows)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, float):
        return f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def header_facts(header: Header) -> dict[str, Any]:
    """What a GGUF header says, by the names under which people look for it."""
    from qwenlocal.engine.shape import Shape
    from qwenlocal.weights.header import tensor_bytes, tensor_type_name
    from qwenlocal.weights.mix import file_type_numbered

    types: dict[str, int] = {}
    total = elements = 0
    for tensor in header.tensors:
        kind = tensor_type_name(tensor.type)
        types[kind] = types.get(kind, 0) + 1
        total += tensor_bytes(tensor) or 0
        elements += tensor.elements
    shape, said = Shape.of(header.metadata), header.metadata
    template, tokens, number = (
        said.get(key) for key in ("tokenizer.chat_template", "tokenizer.ggml.tokens", "general.file_type")
    )
    return {
        "title": said.get("general.name"),
        "licence": said.get("general.license.name") or said.get("general.license"),
        "architecture": header.architecture,
        "type": file_type_numbered(number) if isinstance(number, int) else None,
        "parameters": elements,
        "bits per weight": round(total * 8 / elements, 2) if elements else None,
        "tensors": dict(sorted(types.items(), key=lambda item: -item[1])),
        "layers": header.hyperparameter("block_count"),
        "embedding": header.hyperparameter("embedding_length"),
        "heads": header.hyperparameter("attention.head_count"),
        "kv heads": header.hyperparameter("attention.head_count_kv"),
        "experts": header.hyperparameter("expert_count"),
        "context": header.hyperparameter("context_length"),
        "context memory": memory_words(shape.kv_bytes(1), shape.n_ctx_train) if shape else None,
        "rope base": header.hyperparameter("rope.freq_base"),
        "vocabulary": _length(tokens),
        "pre-tokenizer": said.get("tokenizer.ggml.pre"),
        "end tokens": _ends(said),
        "chat template": template if isinstance(template, str) else None,
    }


def _length(value: object) -> int | None:
    from qwenlocal.weights.header import LongArray

    if isinstance(value, LongArray):
        return value.length
    return len(value) if isinstance(value, list) else None


def _ends(said: Mapping[str, Any]) -> str:
    found = {role: said.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
    return ", ".join(f"{role} {number}" for role, number in found.items() if isinstance(number, int))


def template_words(template: str) -> str:
    """A template is a page long; what is shown instead."""
    return f"yes, {len(template):,} characters (--json shows it)"


def memory_words(kv_bytes_per_token: int, most: int) -> str:
    """`memory_words(98304, 8192)` is "0.19 GiB at 2,048 tokens, 0.75 GiB at 8,192 tokens"."""
    sizes = [n for n in (2048, 8192, 32768) if n <= most]
    return ", ".join(f"{_binary(kv_bytes_per_token * n)} at {n:,} tokens" for n in sizes)


def _binary(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"


def _as_json(checkup: Checkup) -> dict[str, Any]:
    from qwenlocal.weights.header import LongArray, tensor_bytes, tensor_type_name

    header = checkup.header
    return {
        "path": str(checkup.path),
        "size": checkup.parts.size,
        "version": header.version,
        **header_facts(header),
        "metadata": {
            key: {"array of": value.length} if isinstance(value, LongArray) else value
            for key, value in header.metadata.items()
        },
        "tensor list": [
            {"name": t.name, "shape": list(t.shape), "type": tensor_type_name(t.type), "size": tensor_bytes(t)}
            for t in header.tensors
        ],
        "findings": [{"what": f.what, "serious": f.is_serious, "fixable": f.can_be_fixed} for f in checkup.findings],
    }


# --- --fix


def _fix(program: Program, record: Record, checkup: Checkup, out: str | None) -> None:
    from qwenlocal.cli.convert import Advice, write
    from qwenlocal.weights.repair import fits_in_place, patch, plan_copy, repaired_layout

    findings: Sequence[Finding] = checkup.fixable
    if not findings:
        program.say("There is nothing that --fix could put right.")
        return
    layout = repaired_layout(checkup, findings)
    if out is None:
        if record.owned or record.files[0].sha256:
            raise UsageProblem(
                f"{record.path} is the file that was published, or another program's; it stays as it is.",
                hint="Write a repaired copy: --fix -o FILE. What matters is put right whenever it is loaded.",
            )
        if len(checkup.parts.paths) > 1:
            raise UsageProblem(
                f"It is split in {len(checkup.parts.paths)} files. What matters is put right whenever it is loaded.",
                hint="Write a repaired copy, in one file: --fix -o FILE",
            )
        if not fits_in_place(checkup, layout):
            raise UsageProblem(
                "The repair changes what comes before the weights, or takes some out, so that the rest moves.",
                hint="Write a repaired copy: --fix -o FILE",
            )
        patch(checkup, layout)
        program.say(f"Repaired {checkup.path} in place.")
        return
    target = typed(out)
    if target.exists():
        raise OutputExists(target, hint="Write to another file: -o FILE")
    advice = Advice(
        elsewhere="Write into another folder: -o FILE. What was done is kept: with more room, the command goes on.",
        not_finite="The model was damaged in training or on the way; fetch it again, whole.",
        memory="Close something, and try again.",
    )
    write(program, plan_copy(checkup, layout, target), advice=advice)
    program.say(
        f"Wrote {target} ({bytes_for_people(layout.size)}), with {len(findings)} of {len(checkup.findings)} mended."
    )


# --- diff


def diff_files(left: str, right: str, *, as_json: bool) -> None:
    """What two files have not in common; the exit code is 1 where that is anything."""
    from qwenlocal.terminal.progress import StatusLine
    from qwenlocal.weights.difference import compare

    program = Program(quiet=as_json)
    paths = [_record(program, text).path for text in (left, right)]
    line = StatusLine(sys.stderr)
    try:
        found = compare(paths[0], paths[1], lambda done, all: line.show(f"comparing: {done} of {all} tensors"))
    finally:
        line.clear()
    if as_json:
        print_json(asdict(found))
    else:
        _show_difference(found)
    if not found.is_empty:
        raise typer.Exit(DIFFERENT)


def _show_difference(found: Difference) -> None:
    from qwenlocal.terminal.ansi import harmless

    if found.is_empty:
        sys.stdout.write("The same: every key, every tensor.\n")
    for key in found.keys:
        left, right = (_shortly(value, key.where) for value in (key.left, key.right))
        sys.stdout.write(harmless(f"{key.key}\n  < {left}\n  > {right}\n"))
    for tensor in found.tensors:
        if tensor.rmse is not None:
            what = f"{tensor.left} | {tensor.right}, error {tensor.rmse:.4%}"
        elif not tensor.left or not tensor.right:
            what = f"only in the {'second' if not tensor.left else 'first'} file ({tensor.left or tensor.right})"
        else:
            what = f"{list(tensor.shapes[0] or ())} | {list(tensor.shapes[1] or ())}"
        sys.stdout.write(harmless(f"{tensor.name}: {what}\n"))


def _shortly(value: Any, where: int | None) -> str:
    if value is None:
        return "(not there)"
    if isinstance(value, list):
        near = "" if where is None or where >= len(value) else f", {value[where]!r} at {where:,}"
        return f"{len(value):,} entries{near}"
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}… ({len(str(value)):,} characters)"
