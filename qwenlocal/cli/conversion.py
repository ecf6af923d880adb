"""A model that exists only as a checkpoint, converted when it is first needed; the result is kept like a download."""

from __future__ import annotations

import hashlib
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.convert import Source, fetch_source, local_source, write
from qwenlocal.cli.values import Stage, bytes_for_people
from qwenlocal.errors import BadWeights
from qwenlocal.library.names import CatalogueName, CheckpointName, HubName
from qwenlocal.library.store import Record, StoredFile
from qwenlocal.paths import writable

if TYPE_CHECKING:
    from qwenlocal.cli.wiring import Program
    from qwenlocal.weights.plan import Plan

_USUAL_LEVEL = "q4_k_m"


def converted(
    program: Program,
    name: CatalogueName | HubName | CheckpointName,
    *,
    limit_rate: int = 0,
    again: bool = False,
) -> Record:
    """The model as a GGUF file of ours: that of an earlier time if nothing changed (not if `again`), or made now."""
    full = _full_name(name)
    record = program.store.get(full)
    if isinstance(name, CheckpointName):
        source = local_source(name.path)
    elif record and not again and (ready := program.store.ready(record)):
        return ready
    else:
        source = fetch_source(program, name, limit_rate)
    made_from = fingerprint(source.path)
    if record and not again and record.made_from == made_from and (ready := program.store.ready(record)):
        return ready
    asked = {str(name), *(record.asked if record else ())} - {full}
    made = Record(full, [_make(program, source, _level(name), full)], f"converted from {_origin(source)}",
                  asked=sorted(asked), made_from=made_from)  # fmt: skip
    kept = program.store.get(f"hf:{source.repo}@checkpoint") if source.repo else None
    if kept and kept.owned:
        size = bytes_for_people(kept.size)
        program.say(f"The checkpoint stays in the hub's cache. To have its {size} back: qwenlocal rm {kept.name}")
    return program.store.add(made)


def _full_name(name: CatalogueName | HubName | CheckpointName) -> str:
    return str(replace(name, level=_level(name)) if isinstance(name, HubName) else name)


def _level(name: CatalogueName | HubName | CheckpointName) -> str:
    if isinstance(name, CatalogueName):
        return name.level or name.card.level
    return (name.level if isinstance(name, HubName) else None) or _USUAL_LEVEL


def _origin(source: Source) -> str:
    return source.repo or str(source.path)


def fingerprint(path: Path) -> str:
    """Differs as soon as a file of the checkpoint does: their names, sizes and times of change."""
    folder = path if path.is_dir() else path.parent
    files = sorted(
        file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt")
    )
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((path.name, states)).encode(errors="replace")).hexdigest()[:16]


def _make(program: Program, source: Source, level: str, full: str) -> StoredFile:
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import Options, plan_conversion
    from qwenlocal.weights.mix import file_type

    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name) or "model"
    folder = program.folders.files / "converted" / f"{stem}-{zlib.crc32(full.encode(errors='replace')):08x}"
    target = writable(folder) / f"{stem}-{level}.gguf"
    options = Options(source.name, source.repo)
    plan = plan_conversion(Checkpoint.open(source.path), [(target, file_type(level))], options)
    _announce(program, plan, source)
    write(program, plan, replace=True)
    return _checked(target)


def _announce(program: Program, plan: Plan, source: Source) -> None:
    from qwenlocal.machine import this_machine
    from qwenlocal.weights.plan import estimate_seconds

    file, threads = plan.files[0], this_machine().cores
    seconds = max(1, round(estimate_seconds(plan, threads)))
    program.say(
        f"{source.name} is a checkpoint ({bytes_for_people(plan.job.read_bytes)}). Converting it once to "
        f"{file.type.name} ({bytes_for_people(file.size)}, about {seconds} s); other types: qwenlocal convert"
    )
    for note in plan.notes:
        program.say(note)


def _checked(path: Path) -> StoredFile:
    """The finished file, with its digests, as a download would have them."""
    from qwenlocal.library.digests import digests_of
    from qwenlocal.library.partial import BLOCK
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.header import read_header

    size = path.stat().st_size
    with progress(sys.stderr) as shown:
        sha256, checksums = digests_of(path, BLOCK, lambda done: shown(Stage(path.name, done, size, "checking")))
    if not read_header(path).tensors:
        raise BadWeights(path, "nothing was written to it")
    return StoredFile.of(path, sha256, BLOCK, checksums)
