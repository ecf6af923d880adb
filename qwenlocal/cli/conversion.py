"""A model that exists only as a checkpoint, converted when it is first needed; the result is kept like a download."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.checkpoints import Remote, Source, is_there, local_source, on_hub, repository
from qwenlocal.cli.convert import Advice, cost_in_words, write
from qwenlocal.cli.values import Stage, bytes_for_people
from qwenlocal.errors import BadCheckpoint, BadWeights
from qwenlocal.library.conversion_files import conversion_stamp, drop, finish, place
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName
from qwenlocal.library.store import Record, StoredFile

if TYPE_CHECKING:
    from qwenlocal.cli.wiring import Program
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.plan import Plan

_USUAL_LEVEL = "q4_k_m"


def converted(
    program: Program,
    name: CatalogName | HubName | LocalCheckpointName,
    *,
    limit_rate: int = 0,
    again: bool = False,
) -> Record:
    """The model as a GGUF file of ours: that of an earlier time if nothing changed (not if `again`), or made now."""
    import filelock

    full = _full_name(name)
    record = program.store.get(full)
    ready = program.store.ready(record) if record and not again else None
    if ready and not isinstance(name, LocalCheckpointName):
        return ready
    if ready and isinstance(name, LocalCheckpointName) and not is_there(name.path):
        program.say(f"{name} is gone; what was made of it is still here.")
        return ready
    source = local_source(name.path) if isinstance(name, LocalCheckpointName) else _fetched(program, name, limit_rate)
    made_from = conversion_stamp(fingerprint(source.path))
    if ready and ready.made_from == made_from:
        return ready
    asked = {str(name), *(record.asked if record else ())} - {full}
    again_as = str(name.path) if isinstance(name, LocalCheckpointName) else str(_bare(name))
    target = place(program.folders, full, source.name, _level(name), made_from, program.store.paths())
    if not target.is_whole:
        _make(program, source, _level(name), target.path, again_as)
    with filelock.FileLock(f"{target.path}.part.lock"):  # nobody removes it while it is looked at
        file = _checked(target.path)
        made = program.store.add(
            Record(full, [file], f"converted from {_origin(source)}", asked=sorted(asked), made_from=made_from)
        )
        finish(target.path)
    Path(f"{target.path}.part.lock").unlink(missing_ok=True)
    kept = None if isinstance(name, LocalCheckpointName) else program.store.get(str(HubCheckpointName(_bare(name))))
    if kept and kept.owned:
        size = bytes_for_people(kept.size)
        program.say(f"The checkpoint is kept, too. To have its {size} back: qwenlocal rm {kept.name}")
    return made


def _fetched(program: Program, name: CatalogName | HubName, limit_rate: int) -> Source:
    """The checkpoint on this disk; what it costs to bring it here is said before."""
    with on_hub(program, name, limit_rate) as source:
        if isinstance(source, Source):
            return source
        there, size = source.as_far_as_known(), 0
        if there:
            plan = _plan_of(there, source, Path(f"{source.name}.gguf"), _level(name))
            size = plan.files[0].size
            program.say(cost_in_words(source, plan))
        return source.fetch(beside=size)


def _plan_of(checkpoint: Checkpoint, source: Source | Remote, target: Path, level: str) -> Plan:
    from qwenlocal.weights.convert import Options, plan_conversion
    from qwenlocal.weights.mix import file_type

    return plan_conversion(checkpoint, [(target, file_type(level))], Options(source.name, source.repo))


def _full_name(name: CatalogName | HubName | LocalCheckpointName) -> str:
    return str(replace(name, level=_level(name)) if isinstance(name, HubName) else name)


def _bare(name: CatalogName | HubName) -> HubName:
    return replace(repository(name), level=None, file=None)


def _level(name: CatalogName | HubName | LocalCheckpointName) -> str:
    """The type in its full spelling: "q4_k" is q4_k_m."""
    from qwenlocal.weights.mix import file_type

    if isinstance(name, CatalogName):
        return file_type(name.level or name.card.level).name
    return file_type((name.level if isinstance(name, HubName) else None) or _USUAL_LEVEL).name


def _origin(source: Source) -> str:
    return source.repo or str(source.path)


def fingerprint(path: Path) -> str:
    """
    Differs as soon as a file of the checkpoint does: their names, sizes and times of change.

    Raises
    ------
    BadCheckpoint: the folder cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        files = sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")])
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.suffix in _READ]
    except OSError as reason:
        raise BadCheckpoint.unreadable(folder, reason) from reason
    return hashlib.sha256(repr((path.name, states)).encode(errors="replace")).hexdigest()[:16]


_READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")


def _make(program: Program, source: Source, level: str, target: Path, again_as: str) -> None:
    from qwenlocal.weights.checkpoint import Checkpoint

    advice = Advice(
        elsewhere="Free some room (qwenlocal list, qwenlocal rm NAME), or move QWENLOCAL_HOME elsewhere.",
        not_finite=f"The model was damaged in training or on the way; with zeros in their place: "
        f"qwenlocal convert {again_as} --allow-nan",
        memory="Close something, and try again.",
    )
    try:
        plan = _plan_of(Checkpoint.open(source.path), source, target, level)
        _announce(program, plan, source)
        write(program, plan, replace=True, advice=advice)
    except BadWeights:  # another try would end in the same way
        drop(target.parent, program.store.paths())
        raise


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
    from qwenlocal.fileio import hash_blocks
    from qwenlocal.library.partial_file import BLOCK
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.header import read_header

    size = path.stat().st_size
    with progress(sys.stderr) as shown:
        sha256, checksums = hash_blocks(path, BLOCK, lambda done: shown(Stage(path.name, done, size, "checking")))
    if not read_header(path).tensors:
        raise BadWeights(path, "nothing was written to it")
    return StoredFile.of(path, sha256, BLOCK, checksums)
