"""The commands that make GGUF files: convert (of a checkpoint) and quantize (of another GGUF file)."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal.cli.checkpoints import Remote, Source, find_source
from qwenlocal.cli.values import Stage, bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import (
    CannotWrite,
    DiskFull,
    DownloadFailed,
    NotEnoughMemory,
    NotFinite,
    OutputExists,
    UsageProblem,
)
from qwenlocal.library.names import LocalCheckpointName
from qwenlocal.paths import typed

if TYPE_CHECKING:
    from qwenlocal.weights.convert import Options
    from qwenlocal.weights.importance import Importance
    from qwenlocal.weights.mix import FileType, Wishes
    from qwenlocal.weights.plan import Plan, PlannedFile
    from qwenlocal.weights.writing import Written

LIKE_LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Asked:
    """What the command line said, as far as both commands share it."""

    source: str
    out: str | None
    types: Sequence[str]
    tensor_types: Sequence[str] = ()
    imatrix: str | None = None
    pure: bool = False
    threads: int | None = None
    force: bool = False
    dry_run: bool = False
    as_json: bool = False
    allow_nan: bool = False


@dataclass(frozen=True)
class AboutCheckpoint:
    """What only `convert` can be told."""

    pre: str | None = None
    name: str | None = None
    like: str | None = None
    limit_rate: int = 0


def convert_checkpoint(asked: Asked, about: AboutCheckpoint) -> None:
    """Convert, or with --dry-run say what would be done."""
    from qwenlocal.weights.convert import Options
    from qwenlocal.weights.mix import file_type

    if about.like not in (None, LIKE_LLAMA_CPP):
        raise UsageProblem(f"--like {about.like}: there is only --like {LIKE_LLAMA_CPP}.")
    gc.disable()  # nothing here goes in circles, and visiting a vocabulary's 300,000 texts takes 0.2 s
    kinds = list(dict.fromkeys(file_type(text) for text in asked.types))
    wishes, importance = _wishes(asked)
    program = Program(quiet=asked.as_json)
    with find_source(program, asked.source, limit_rate=about.limit_rate) as source:
        name = about.name or source.name
        wanted = [(_output(asked.out, name, kind, len(kinds)), kind) for kind in kinds]
        if not asked.dry_run:
            _refuse_existing(wanted, asked)
        options = Options(name, source.repo, about.pre, about.like is not None, wishes, importance)
        plan = _plan(program, source, wanted, options, asked)
    if plan:
        _do(program, plan, asked)


def _plan(
    program: Program, source: Source | Remote, wanted: Sequence[tuple[Path, FileType]], options: Options, asked: Asked
) -> Plan | None:
    """The plan; of a checkpoint on a hub before its weights are fetched, and none with --dry-run, which shows it."""
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import plan_conversion

    if isinstance(source, Remote):
        there = source.as_far_as_known()
        first = plan_conversion(there, wanted, options) if there else None
        if asked.dry_run:
            _show_unfetched(program, source, first, asked)
            return None
        if first:
            program.say(cost_in_words(source, first))
        source = source.fetch(beside=sum(file.size for file in first.files) if first else 0)
    return plan_conversion(Checkpoint.open(source.path), wanted, options)


def cost_in_words(source: Remote, plan: Plan) -> str:
    """What a checkpoint on a hub will cost: bytes to fetch, bytes to write, seconds of converting."""
    files = ", ".join(f"{file.type.name} {bytes_for_people(file.size)}" for file in plan.files)
    return (
        f"{source.name} is a checkpoint; {bytes_for_people(source.outline.to_fetch)} are to be fetched, and converting "
        f"it ({files}) takes about {_seconds(plan, _cores())} s then."
    )


def _show_unfetched(program: Program, source: Remote, plan: Plan | None, asked: Asked) -> None:
    if plan is None:
        raise DownloadFailed(
            f"{source.outline.located.origin} sends whole files only, so what {source.name} is shows when it is here.",
            hint="Without --dry-run it is fetched, and kept.",
        )
    for note in plan.notes:
        program.say(note)
    program.say(f"{bytes_for_people(source.outline.to_fetch)} are to be fetched before that; only the headers were.")
    _show_plan(plan, asked)


def quantize_file(asked: Asked, *, again: bool) -> None:
    """Quantize a GGUF file, or with --dry-run say what would be done."""
    from qwenlocal.weights.mix import file_type
    from qwenlocal.weights.quantize import Options, plan_quantization

    kinds = list(dict.fromkeys(file_type(text) for text in asked.types))
    wishes, importance = _wishes(asked)
    program = Program(quiet=asked.as_json)
    name = program.parse(asked.source)
    if isinstance(name, LocalCheckpointName):
        raise UsageProblem(f"{asked.source} is a checkpoint.", hint=f"Convert it: qwenlocal convert {asked.source}")
    record = program.have(name)
    wanted = [(_output(asked.out, record.path.stem, kind, len(kinds)), kind) for kind in kinds]
    if not asked.dry_run:
        _refuse_existing(wanted, asked)
    for path, _ in wanted:
        if os.path.exists(path) and path.samefile(record.path):  # Path.exists raises without permission
            raise UsageProblem(f"{path} is what would be read.", hint="Write to another file.")
    plan = plan_quantization(record.path, wanted, Options(wishes, importance, again))
    _do(program, plan, asked)


class Advice(NamedTuple):
    """The next steps that a command has to offer where writing fails."""

    elsewhere: str = "Write into another folder. What was done is kept: with more room, the same command goes on."
    not_finite: str = "The model was damaged in training or on the way. To write zeros in their place: --allow-nan"
    memory: str = "Close something, or take fewer threads: -t 1"


def write(
    program: Program,
    plan: Plan,
    *,
    threads: int | None = None,
    replace: bool = False,
    allow_nan: bool = False,
    advice: Advice = Advice(),
) -> Written:
    """Carry a plan out, its progress on stderr."""
    from qwenlocal.machine import this_machine
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.writing import carry_out, memory_needed

    count = threads or _cores()
    needed, available = memory_needed(plan.job, count), this_machine().memory().available
    if needed > available:
        raise NotEnoughMemory("Converting", needed, available, hint=advice.memory)
    name = plan.files[0].path.name if len(plan.files) == 1 else f"{len(plan.files)} files"
    try:
        with progress(sys.stderr) as shown:
            return carry_out(
                plan.job,
                threads=count,
                replace=replace,
                allow_nan=allow_nan,
                report=lambda done, all: shown(Stage(name, done, all, "writing")),
            )
    except (DiskFull, CannotWrite) as problem:
        problem.hint = advice.elsewhere
        raise
    except NotFinite as problem:
        problem.hint = advice.not_finite
        raise


def _cores() -> int:
    from qwenlocal.machine import this_machine

    return this_machine().cores


def _refuse_existing(wanted: Sequence[tuple[Path, FileType]], asked: Asked) -> None:
    for path, _ in wanted:
        try:
            if path.is_dir():
                raise UsageProblem(f"{path} is a folder.", hint="Name a file, or give -o a folder to write into.")
            if not asked.force and path.exists():
                raise OutputExists(path)
        except PermissionError as reason:
            raise CannotWrite(path.parent, "permission denied", hint=Advice().elsewhere) from reason
        except OSError as reason:
            raise UsageProblem(f"{path} can be no file's name: {reason.strerror}.", hint="Name it: -o FILE") from reason


def _do(program: Program, plan: Plan, asked: Asked) -> None:
    for note in plan.notes:
        program.say(note)
    if asked.dry_run:
        _show_plan(plan, asked)
        return
    begin = time.monotonic()
    written = write(program, plan, threads=asked.threads, replace=asked.force, allow_nan=asked.allow_nan)
    seconds = time.monotonic() - begin
    if asked.as_json:
        files = [_file_json(file) for file in plan.files]
        counts = {"seconds": round(seconds, 2), "zeroed": written.not_finite, "resumed": written.resumed}
        print_json({"files": files, **counts, "notes": list(plan.notes)})
    for file in plan.files:
        program.say(f"Wrote {file.path}: {_in_words(file)}, in {seconds:.1f} s.")
    if written.not_finite:
        program.say(f"{_weights(written.not_finite)} NaN or infinite; zero now.")
    if written.resumed:
        program.say(f"An earlier attempt had done {bytes_for_people(written.resumed)} of the reading.")


def _weights(count: int) -> str:
    return "1 weight was" if count == 1 else f"{count:,} weights were"


def _in_words(file: PlannedFile) -> str:
    return f"{file.type.name}, {bytes_for_people(file.size)}, {file.bits_per_weight:.2f} bits a weight"


def _wishes(asked: Asked) -> tuple[Wishes, Importance | None]:
    from qwenlocal.weights.importance import read_importance
    from qwenlocal.weights.mix import Wishes, parse_overrides

    if asked.threads is not None and asked.threads < 1:
        raise UsageProblem(f"-t must be at least 1; it is {asked.threads}.")
    importance = read_importance(typed(asked.imatrix)) if asked.imatrix else None
    return Wishes(parse_overrides(asked.tensor_types), asked.pure, importance is not None), importance


def _output(out: str | None, name: str, kind: FileType, count: int) -> Path:
    """`_output(None, "Qwen1.5-0.5B", q8_0, 1)` is Qwen1.5-0.5B-q8_0.gguf; `out` may be a folder, or hold {type}."""
    usual = f"{name.strip('/') or 'model'}-{kind.name}.gguf".replace("/", "-")
    if out is None:
        return Path(usual)
    path = typed(out.replace("{type}", kind.name))
    if os.path.isdir(path) or out.endswith(("/", "\\")):  # Path.exists raises without permission
        return path / usual
    if count > 1 and "{type}" not in out:
        raise UsageProblem(
            f"{count} types would all be written to {out}.", hint="Give a folder, or a name with {type} in it."
        )
    return path if path.name.lower().endswith(".gguf") else path.with_name(path.name + ".gguf")


# --- what would be done


def _seconds(plan: Plan, threads: int) -> int:
    from qwenlocal.weights.plan import estimate_seconds

    return max(1, round(estimate_seconds(plan, threads)))


def _show_plan(plan: Plan, asked: Asked) -> None:
    from qwenlocal.weights.plan import estimate_seconds
    from qwenlocal.weights.writing import memory_needed

    threads = asked.threads or _cores()
    seconds, memory = estimate_seconds(plan, threads), memory_needed(plan.job, threads)
    if asked.as_json:
        summary = {"seconds": round(seconds, 1), "memory": memory, "threads": threads, "read": plan.job.read_bytes}
        files = [_file_json(file, tensors=True) for file in plan.files]
        print_json({**summary, "files": files, "notes": list(plan.notes)})
        return
    for file in plan.files:
        rows = [
            (
                t.name,
                " x ".join(map(str, t.shape)),
                t.source.name,
                t.choice.type.name,
                bytes_for_people(t.size),
                t.choice.why,
            )
            for t in file.tensors
        ]
        print_table(("TENSOR", "SHAPE", "FROM", "TO", "SIZE", "WHY"), rows)
        sys.stdout.write(f"\n{file.path}: {_in_words(file)}, {len(file.tensors)} tensors\n")
    sys.stdout.write(
        f"reads {bytes_for_people(plan.job.read_bytes)}, about {max(1, round(seconds))} s of quantizing with {threads} "
        f"thread{'s' if threads > 1 else ''}, {bytes_for_people(memory)} of memory; nothing was written\n"
    )


def _file_json(file: PlannedFile, *, tensors: bool = False) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "path": str(file.path),
        "type": file.type.name,
        "size": file.size,
        "bits_per_weight": round(file.bits_per_weight, 3),
    }
    if tensors:
        found["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "from": t.source.name, "to": t.choice.type.name, "size": t.size,
             "why": t.choice.why}
            for t in file.tensors
        ]  # fmt: skip
    return found
