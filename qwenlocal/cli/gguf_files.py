"""GGUF files of the commands in the "Weights" panel: installed ones to read, new ones to write."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import InvalidChoice, ModelNotFound, NotWritable, OutOfRange, OutputExists, UsageError
from qwenlocal.formatting import format_bytes, format_percent, format_quantity, format_shape
from qwenlocal.library.names import LocalCheckpointName
from qwenlocal.paths import parse_path
from qwenlocal.progress import TaskProgress

if TYPE_CHECKING:
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.library.streaming.checkpoint_stream import CheckpointStream
    from qwenlocal.weights.conversion_plan import ConversionPlan, PlannedFile, PlannedTensor
    from qwenlocal.weights.file_types import FileType, QuantOverrides
    from qwenlocal.weights.imatrix import ImportanceMatrix
    from qwenlocal.weights.packed_alternatives import PackedAlternative
    from qwenlocal.weights.packed_proof import PackedProof
    from qwenlocal.weights.write_workers import WriteResult

_OTHER_FOLDER = "Write to another folder. Finished work is kept: with more disk space, the same command continues."

_MAX_THREADS = 512
_MIXES = ("llama.cpp", "best")


@dataclass(frozen=True)
class WriteOptions:
    """The options that `convert` and `quantize` share; no `types`: the one that suits the weights."""

    source: str
    out: str | None
    types: Sequence[str]
    types_option: str = "--type"  # as errors name it
    ends: str | None = None
    mix: str = "llama.cpp"
    tensor_types: Sequence[str] = ()
    imatrix: str | None = None
    pure: bool = False
    requantize: bool = False
    threads: int | None = None
    force: bool = False
    dry_run: bool = False
    as_json: bool = False
    allow_nan: bool = False


def find_installed(app: AppContext, text: str) -> ModelRecord:
    """
    Find the GGUF file that `text` names, without downloading or converting anything.

    Raises
    ------
    ModelNotFound: it is not on this disk. BadCheckpoint, UnsupportedCheckpoint: it is a checkpoint of another kind.
    """
    from qwenlocal.weights.checkpoint import Checkpoint

    name = app.library.models.resolve(text)
    record = app.library.local.find_offline(name)
    if record is not None:
        return record
    if isinstance(name, LocalCheckpointName):
        Checkpoint.open(name.path)
        hint = f"It is a checkpoint; convert it: qwenlocal convert {shlex.quote(text)}"
    else:
        hint = f"Download it: qwenlocal pull {name}"
    raise ModelNotFound(text, reason=f"There is no GGUF file of {text} on this disk.", hint=hint)


def read_options(options: WriteOptions) -> tuple[list[FileType], QuantOverrides, ImportanceMatrix | None]:
    """
    Return the types to write, how the options override the usual mix of types, and the importance matrix.

    Raises
    ------
    UsageError: `-t`, a type or `--tensor-type` is invalid. BadWeights: the importance matrix cannot be read.
    """
    from qwenlocal.weights.file_types import QuantOverrides, file_type, parse_tensor_types, parse_type
    from qwenlocal.weights.imatrix import read_imatrix

    types = list(dict.fromkeys(file_type(text, option=options.types_option) for text in options.types))
    if options.threads is not None and not 1 <= options.threads <= _MAX_THREADS:
        raise OutOfRange("-t", 1, _MAX_THREADS, options.threads)
    imatrix = read_imatrix(parse_path(options.imatrix)) if options.imatrix else None
    if options.mix not in _MIXES:
        raise InvalidChoice("--mix", _MIXES, options.mix)
    if options.mix == "best" and options.pure:
        raise UsageError("--mix best cannot be used with --pure.", hint="Leave out one of them.")
    ends = parse_type("--ends", options.ends) if options.ends else None
    tensor_types = parse_tensor_types(options.tensor_types)
    overrides = QuantOverrides(tensor_types, options.pure, imatrix is not None, ends, options.mix == "best")
    return types, overrides, imatrix


def choose_targets(options: WriteOptions, name: str, types: Sequence[FileType]) -> list[tuple[Path, FileType]]:
    """
    Return the file to write for each type of the model `name`.

    Unless nothing will be written, check that the files can be created, before anything is downloaded or read.

    Raises
    ------
    OutputExists: a file exists, without `--force`. UsageError, NotWritable: the path cannot be a new file.
    """
    targets = [(_output_path(options.out, name, type, len(types)), type) for type in types]
    if not options.dry_run:
        for path, _ in targets:
            refuse_existing(path, force=options.force)
    return targets


def _output_path(out: str | None, name: str, type: FileType, count: int) -> Path:
    """
    Return the file to write for one of `count` types: `_output_path(None, "Qwen1.5-0.5B", q8_0, 1)` is
    Qwen1.5-0.5B-q8_0.gguf. `out` may be a folder, or contain {type}.
    """
    default = f"{name.strip('/') or 'model'}-{type.name}.gguf".replace("/", "-")
    if out is None:
        return Path(default)
    path = parse_path(out.replace("{type}", type.name))
    if os.path.isdir(path) or out.endswith(("/", "\\")):  # Path.is_dir raises without permission
        return path / default
    if count > 1 and "{type}" not in out:
        raise UsageError(
            f"All {count} types would be written to {out}.", hint="Name a folder, or a file with {type} in its name."
        )
    return path if path.name.lower().endswith(".gguf") else path.with_name(path.name + ".gguf")


def refuse_existing(path: Path, *, force: bool) -> None:
    """
    Check that a file can be created at `path`, or overwritten with `force`.

    Raises
    ------
    OutputExists: it exists. UsageError: it is a folder, or the name is invalid. NotWritable: permission is denied.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder.", hint="Name a file, or pass a folder to write into with -o.")
        if not force and path.exists():
            raise OutputExists(path)
    except PermissionError as error:
        raise NotWritable(path.parent, "permission denied", hint=_OTHER_FOLDER) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be a file name: {error.strerror}.", hint="Name it: -o FILE") from error


def write_files(
    plan: ConversionPlan,
    *,
    threads: int | None = None,
    replace: bool = False,
    allow_nan: bool = False,
    disk_hint: str = _OTHER_FOLDER,
    not_finite_hint: str = "",
    memory_hint: str = "",
    stream: CheckpointStream | None = None,
) -> WriteResult:
    """
    Carry out a plan, with its progress on stderr; with a `stream`, from a hub. "" keeps the hint of an error.
    """
    from qwenlocal.library.plan_execution import execute_plan
    from qwenlocal.terminal.progress import show_progress

    name = plan.files[0].path.name if len(plan.files) == 1 else f"{len(plan.files)} files"
    with show_progress(sys.stderr) as show:
        return execute_plan(
            plan,
            threads=threads or 0,
            replace=replace,
            allow_nan=allow_nan,
            report=lambda done, total: show(TaskProgress(name, done, total, "writing")),
            disk_hint=disk_hint,
            not_finite_hint=not_finite_hint,
            memory_hint=memory_hint,
            sources=stream.files if stream else None,
            inspect=stream.proofs.compare if stream else None,
        )


def check_files(plan: ConversionPlan, threads: int | None = None) -> Mapping[Path, PackedProof]:
    """Compare the files of a plan with the packed weights they were made from, with its progress on stderr."""
    from qwenlocal.library.plan_execution import check_packed_weights
    from qwenlocal.terminal.progress import show_progress

    with show_progress(sys.stderr) as show:
        return check_packed_weights(
            plan,
            threads=threads or 0,
            report=lambda name, done, total: show(TaskProgress(name, done, total, "comparing")),
        )


def write_or_show(
    app: AppContext, plan: ConversionPlan, options: WriteOptions, stream: CheckpointStream | None = None
) -> None:
    """Write the files of a plan, with a `stream` from a hub, and report them; with `--dry-run`, only show the plan."""
    from qwenlocal.library.plan_execution import describe_proof

    for note in plan.notes:
        app.say(note)
    if options.dry_run:
        _show_plan(plan, options)
        return
    begin = time.monotonic()
    written = write_files(
        plan,
        threads=options.threads,
        replace=options.force,
        allow_nan=options.allow_nan,
        not_finite_hint="The weights are damaged. To write zeros instead: --allow-nan",
        memory_hint="Close other programs, or use fewer threads: -t 1",
        stream=stream,
    )
    seconds = time.monotonic() - begin
    proofs = stream.proofs.results() if stream else check_files(plan, options.threads)
    if options.as_json:
        files = [{**_file_facts(file), **_proof_facts(proofs.get(file.path))} for file in plan.files]
        counts = {"seconds": round(seconds, 2), "zeroed": written.non_finite, "resumed": written.resumed}
        print_json({"files": files, **counts, "notes": list(plan.notes)})
    for file in plan.files:
        app.say(f"Wrote {file.path}: {_describe_file(file)}, in {seconds:.1f} s.")
        if proof := proofs.get(file.path):
            app.say(describe_proof(proof))
    if written.non_finite:
        weights = format_quantity(written.non_finite, "weight was", "weights were")
        app.say(f"{weights} NaN or infinite, and set to zero.")
    if written.resumed:
        app.say(f"An earlier attempt had already processed {format_bytes(written.resumed)}.")


def _show_plan(plan: ConversionPlan, options: WriteOptions) -> None:
    """Print the files and tensors that a plan would write, and its time and memory."""
    from qwenlocal.machine import this_machine
    from qwenlocal.weights.conversion_plan import estimate_seconds
    from qwenlocal.weights.packed_alternatives import list_packed_alternatives
    from qwenlocal.weights.write_job import memory_needed

    threads = options.threads or this_machine().cores
    memory, seconds = memory_needed(plan.job, threads), estimate_seconds(plan, threads)
    alternatives = list_packed_alternatives(plan)
    if options.as_json:
        summary = {"seconds": round(seconds, 1), "memory": memory, "threads": threads, "read": plan.job.read_bytes}
        files = [
            {
                **_file_facts(file),
                "exists": os.path.exists(file.path),
                "tensors": list(map(_tensor_facts, file.tensors)),
            }
            for file in plan.files
        ]
        packed = {"packed_types": list(map(_alternative_facts, alternatives))} if alternatives else {}
        print_json({**summary, "files": files, "notes": list(plan.notes), **packed})
        return
    for file in plan.files:
        rows = [
            (t.name, format_shape(t.shape), t.source_format, t.choice.type.name, format_bytes(t.size), t.choice.reason)
            for t in file.tensors
        ]
        print_table(("TENSOR", "SHAPE", "FROM", "TO", "SIZE", "REASON"), rows)
        sys.stdout.write(f"\n{file.path}: {_describe_file(file)}, {format_quantity(len(file.tensors), 'tensor')}\n")
        if os.path.exists(file.path):  # Path.exists raises without permission
            advice = "it will be overwritten" if options.force else "to overwrite it, add --force"
            sys.stdout.write(f"the file already exists; {advice}\n")
    if alternatives:
        _show_alternatives(alternatives)
    sys.stdout.write(
        f"reads {format_bytes(plan.job.read_bytes)}, takes about {max(1, round(seconds))} s with "
        f"{format_quantity(threads, 'thread')} and {format_bytes(memory)} of memory; nothing was written\n"
    )


def _show_alternatives(alternatives: Sequence[PackedAlternative]) -> None:
    """Print the types that packed weights can have."""
    rows = [
        (
            facts["type"],
            format_bytes(facts["size"]),
            "fast" if facts["has_fast_kernel"] else "slower prompts",
            {None: "not measured", 0: "none"}.get(facts["error"]) or format_percent(facts["error"]),
            "as planned" if number == 0 else f"--type {facts['type']}{' --requantize' if facts['requantized'] else ''}",
        )
        for number, facts in enumerate(map(_alternative_facts, alternatives))
    ]
    sys.stdout.write("\n")
    print_table(("PACKED WEIGHTS AS", "FILE", "SPEED HERE", "ERROR", "OPTION"), rows)
    sys.stdout.write("\n")


def _alternative_facts(alternative: PackedAlternative) -> dict[str, Any]:
    from qwenlocal.machine import this_machine
    from qwenlocal.weights.quant_mix import has_fast_kernel

    is_fast = has_fast_kernel(alternative.type, this_machine().features)
    error = alternative.error and round(alternative.error, 6)
    return {
        "type": alternative.type.name,
        "size": alternative.size,
        "has_fast_kernel": is_fast,
        "error": error,
        "requantized": alternative.is_requantized,
    }


def _describe_file(file: PlannedFile) -> str:
    return f"{file.type.name}, {format_bytes(file.size)}, {file.bits_per_weight:.2f} bits per weight"


def _proof_facts(proof: PackedProof | None) -> dict[str, Any]:
    if proof is None:
        return {}
    return {
        "compared_weights": proof.weights,
        "largest_difference": proof.difference,
        "compared_earlier": proof.earlier,
    }


def _file_facts(file: PlannedFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "type": file.type.name,
        "size": file.size,
        "bits_per_weight": round(file.bits_per_weight, 3),
    }


def _tensor_facts(tensor: PlannedTensor) -> dict[str, Any]:
    choice = tensor.choice
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "from": tensor.source_format,
        "to": choice.type.name,
        "size": tensor.size,
        "why": choice.reason,
    }
