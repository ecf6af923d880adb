"""The commands that make GGUF files: convert (of a checkpoint) and quantize (of another GGUF file)."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal.cli.values import Stage, bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import NotEnoughMemory, OutputExists, UsageProblem
from qwenlocal.library.names import CatalogueName, CheckpointName, HubName, PathName

if TYPE_CHECKING:
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


class Source(NamedTuple):
    """A checkpoint to be converted: where it lies, what it is called, and the hub's repository it came from."""

    path: Path
    name: str
    repo: str


def convert_checkpoint(asked: Asked, about: AboutCheckpoint) -> None:
    """Convert, or with --dry-run say what would be done."""
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import Options, plan_conversion
    from qwenlocal.weights.mix import file_type

    if about.like not in (None, LIKE_LLAMA_CPP):
        raise UsageProblem(f"--like {about.like}: there is only --like {LIKE_LLAMA_CPP}.")
    kinds = list(dict.fromkeys(file_type(text) for text in asked.types))
    wishes, importance = _wishes(asked)
    program = Program(quiet=asked.as_json)
    source = find_source(program, asked.source, limit_rate=about.limit_rate)
    wanted = [(_output(asked.out, about.name or source.name, kind, len(kinds)), kind) for kind in kinds]
    options = Options(about.name or source.name, source.repo, about.pre, about.like is not None, wishes, importance)
    plan = plan_conversion(Checkpoint.open(source.path), wanted, options)
    _do(program, plan, asked)


def quantize_file(asked: Asked, *, again: bool) -> None:
    """Quantize a GGUF file, or with --dry-run say what would be done."""
    from qwenlocal.weights.mix import file_type
    from qwenlocal.weights.quantize import Options, plan_quantization

    kinds = list(dict.fromkeys(file_type(text) for text in asked.types))
    wishes, importance = _wishes(asked)
    program = Program(quiet=asked.as_json)
    name = program.parse(asked.source)
    if isinstance(name, CheckpointName):
        raise UsageProblem(f"{asked.source} is a checkpoint.", hint=f"Convert it: qwenlocal convert {asked.source}")
    record = program.have(name)
    wanted = [(_output(asked.out, record.path.stem, kind, len(kinds)), kind) for kind in kinds]
    for path, _ in wanted:
        if path.exists() and path.samefile(record.path):
            raise UsageProblem(f"{path} is what would be read.", hint="Write to another file.")
    plan = plan_quantization(record.path, wanted, Options(wishes, importance, again))
    _do(program, plan, asked)


def find_source(program: Program, text: str, *, limit_rate: int = 0) -> Source:
    """The checkpoint that `text` names, fetched if need be."""
    from qwenlocal.weights.checkpoint import PICKLED, pickled

    name = program.parse(text)
    if isinstance(name, CheckpointName):
        return local_source(name.path)
    if isinstance(name, PathName) and name.path.suffix in PICKLED:
        raise pickled(name.path.parent, name.path.name)
    if not isinstance(name, (CatalogueName, HubName)):
        raise UsageProblem(
            f"{text} is not a checkpoint.",
            hint="Give a directory with config.json, a repository (hf:owner/repo), or a name (qwenlocal list --all). "
            "For a GGUF file there is: qwenlocal quantize",
        )
    return fetch_source(program, name, limit_rate)


def local_source(path: Path) -> Source:
    """A checkpoint on this disk; in the hub's cache the folder above it says which repository it is."""
    folder = path if path.is_dir() else path.parent
    if folder.parent.name == "snapshots" and (match := re.fullmatch(r"models--(.+?)--(.+)", folder.parents[1].name)):
        return Source(path, match[2], f"{match[1]}/{match[2]}")
    return Source(path, folder.name, "")


def fetch_source(program: Program, name: CatalogueName | HubName, limit_rate: int) -> Source:
    """A checkpoint from a hub; whether it can be converted is looked at before its weights are fetched."""
    from qwenlocal.weights.architecture import examine

    repo = name.card.checkpoint if isinstance(name, CatalogueName) else name.repo
    pinned = isinstance(name, HubName) and (name.hub != "hf" or name.revision)
    if not pinned and (here := program.local.checkpoint(repo)):
        return local_source(here)
    with program.puller(limit_rate) as found:
        there = found.pull_checkpoint(name, examine)
    return Source(there.folder, there.repo.partition("/")[2], there.repo if there.is_from_the_hub else "")


def write(
    program: Program, plan: Plan, *, threads: int | None = None, replace: bool = False, allow_nan: bool = False
) -> Written:
    """Carry a plan out, its progress on stderr."""
    from qwenlocal.machine import this_machine
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.writing import carry_out, memory_needed

    machine = this_machine()
    count = threads or machine.cores
    needed, available = memory_needed(plan.job, count), machine.memory().available
    if needed > available:
        raise NotEnoughMemory("Converting", needed, available, hint="Close something, or take fewer threads: -t 1")
    name = plan.files[0].path.name if len(plan.files) == 1 else f"{len(plan.files)} files"
    with progress(sys.stderr) as shown:
        return carry_out(
            plan.job,
            threads=count,
            replace=replace,
            allow_nan=allow_nan,
            report=lambda done, all: shown(Stage(name, done, all, "writing")),
        )


def _do(program: Program, plan: Plan, asked: Asked) -> None:
    for note in plan.notes:
        program.say(note)
    if asked.dry_run:
        _show_plan(plan, asked)
        return
    for file in plan.files:
        if not asked.force and file.path.exists():
            raise OutputExists(file.path)
    begin = time.monotonic()
    written = write(program, plan, threads=asked.threads, replace=asked.force, allow_nan=asked.allow_nan)
    if written.not_finite:
        program.say(f"{written.not_finite:,} weights were NaN or infinite; they are zero now.")
    if written.resumed:
        program.say(f"Of that, {bytes_for_people(written.resumed)} had been read by an earlier attempt.")
    seconds = time.monotonic() - begin
    if asked.as_json:
        print_json([_file_json(file) for file in plan.files])
    for file in plan.files:
        program.say(f"Wrote {file.path}: {_in_words(file)}, in {seconds:.1f} s.")


def _in_words(file: PlannedFile) -> str:
    return f"{file.type.name}, {bytes_for_people(file.size)}, {file.bits_per_weight:.2f} bits a weight"


def _wishes(asked: Asked) -> tuple[Wishes, Importance | None]:
    from qwenlocal.weights.importance import read_importance
    from qwenlocal.weights.mix import Wishes, parse_overrides

    if asked.threads is not None and asked.threads < 1:
        raise UsageProblem(f"-t must be at least 1; it is {asked.threads}.")
    importance = read_importance(Path(asked.imatrix).expanduser()) if asked.imatrix else None
    return Wishes(parse_overrides(asked.tensor_types), asked.pure, importance is not None), importance


def _output(out: str | None, name: str, kind: FileType, count: int) -> Path:
    """`_output(None, "Qwen1.5-0.5B", q8_0, 1)` is Qwen1.5-0.5B-q8_0.gguf; `out` may be a folder, or hold {type}."""
    usual = f"{name.strip('/') or 'model'}-{kind.name}.gguf".replace("/", "-")
    if out is None:
        return Path(usual)
    path = Path(out.replace("{type}", kind.name)).expanduser()
    if path.is_dir() or out.endswith(("/", "\\")):
        return path / usual
    if count > 1 and "{type}" not in out:
        raise UsageProblem(
            f"{count} types would all be written to {out}.", hint="Give a folder, or a name with {type} in it."
        )
    return path if path.name.lower().endswith(".gguf") else path.with_name(path.name + ".gguf")


# --- what would be done


def _show_plan(plan: Plan, asked: Asked) -> None:
    from qwenlocal.machine import this_machine
    from qwenlocal.weights.plan import estimate_seconds
    from qwenlocal.weights.writing import memory_needed

    threads = asked.threads or this_machine().cores
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
