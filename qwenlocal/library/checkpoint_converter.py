"""Conversion on first use: a model that is published as a checkpoint only becomes a GGUF file, kept like a download."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import BadCheckpoint, BadWeights
from qwenlocal.fileio import fingerprint_file, hash_blocks
from qwenlocal.formatting import format_bytes, join_sentences
from qwenlocal.library.checkpoints import CheckpointFinder, checkpoint_repo
from qwenlocal.library.conversion_files import conversion_stamp, mark_recorded, prepare_target, remove_unfinished
from qwenlocal.library.local_models import LocalCheckpoint, is_present, local_checkpoint
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName
from qwenlocal.library.partial_file import BLOCK_SIZE
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders
from qwenlocal.progress import TaskProgress

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint
    from qwenlocal.progress import Say
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.file_types import FileType

ConvertibleName = CatalogName | HubName | LocalCheckpointName
OpenProgress = Callable[[], AbstractContextManager[Callable[[TaskProgress], None]]]

_INPUT_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")


class CheckpointConverter:
    """Converts checkpoints and records the results; `say` gets sentences, `open_progress` opens a progress display."""

    def __init__(
        self, folders: Folders, store: Store, finder: CheckpointFinder, *, say: Say, open_progress: OpenProgress
    ) -> None:
        self._folders, self._store, self._finder = folders, store, finder
        self._say, self._open_progress = say, open_progress

    def ensure_converted(self, name: ConvertibleName, *, force: bool = False) -> ModelRecord:
        """
        Return the model as a GGUF file: converted now, or earlier if nothing changed since (never with `force`).

        Raises
        ------
        BadCheckpoint, BadWeights: the checkpoint is damaged, or llama.cpp cannot run it.
        NotEnoughMemory, DiskFull, NotWritable: it cannot be written here.
        Everything that `CheckpointFinder.find_on_hub` and `HubCheckpoint.download` raise.
        """
        record = self._store.get(str(name))  # by its full name, or by that without a type
        ready = self._store.check_unchanged(record) if record and not force else None
        if ready:
            if not isinstance(name, LocalCheckpointName):
                return ready
            if not is_present(name.path):
                self._say(f"The checkpoint {name} was deleted; using the model converted from it.")
                return ready
        checkpoint = local_checkpoint(name.path) if isinstance(name, LocalCheckpointName) else self._download(name)
        stamp = conversion_stamp(fingerprint(checkpoint.path))
        if ready and ready.made_from == stamp:
            return ready
        level = _choose_level(name, checkpoint.folder)
        record_name = str(replace(name, level=level) if isinstance(name, HubName) else name)
        aliases = {str(name), *(record.aliases if record else ())} - {record_name}
        target = prepare_target(self._folders, record_name, checkpoint.name, level, stamp, self._store.file_paths())
        if not target.is_complete:
            self._convert(checkpoint, level, target.path, _checkpoint_argument(name))
        converted = self._record(record_name, checkpoint, target.path, sorted(aliases), stamp)
        self._mention_kept_checkpoint(name)
        return converted

    def _download(self, name: CatalogName | HubName) -> LocalCheckpoint:
        """Return the checkpoint on this disk; before a download, say how much it will cost."""
        with self._finder.find_on_hub(name) as checkpoint:
            if isinstance(checkpoint, LocalCheckpoint):
                return checkpoint
            outline, size = checkpoint.read_outline(), 0
            if outline:
                plan = _plan(
                    outline, checkpoint, Path(f"{checkpoint.name}.gguf"), _choose_level(name, checkpoint.folder)
                )
                size = plan.files[0].size
                self._say(download_cost(checkpoint, plan))
            return checkpoint.download(reserve=size)

    def _convert(self, checkpoint: LocalCheckpoint, level: str, target: Path, argument: str) -> None:
        from qwenlocal.library.plan_execution import check_packed_weights, describe_proof, execute_plan
        from qwenlocal.weights.checkpoint import Checkpoint

        try:
            plan = _plan(Checkpoint.open(checkpoint.path), checkpoint, target, level)
            self._announce(plan, checkpoint)
            with self._open_progress() as show:
                execute_plan(
                    plan,
                    replace=True,
                    report=lambda done, total: show(TaskProgress(target.name, done, total, "writing")),
                    disk_hint="Free disk space (qwenlocal list, qwenlocal rm NAME), "
                    "or set QWENLOCAL_HOME to a larger disk.",
                    not_finite_hint="The weights are damaged. "
                    f"To write zeros instead: qwenlocal convert {shlex.quote(argument)} --allow-nan",
                )
                proofs = check_packed_weights(
                    plan, report=lambda name, done, total: show(TaskProgress(name, done, total, "comparing"))
                )
            for proof in proofs.values():
                self._say(describe_proof(proof))
        except BadWeights:  # the next attempt would fail in the same way
            remove_unfinished(target.parent, self._store.file_paths())
            raise

    def _announce(self, plan: ConversionPlan, checkpoint: LocalCheckpoint) -> None:
        file = plan.files[0]
        self._say(
            f"{checkpoint.name} is a checkpoint ({format_bytes(plan.job.read_bytes)}). Converting it once to "
            f"{file.type.name} ({format_bytes(file.size)}, about {estimated_seconds(plan)} s); other types: "
            "qwenlocal convert"
        )
        for note in plan.notes:
            self._say(note)

    def _record(
        self, record_name: str, checkpoint: LocalCheckpoint, path: Path, aliases: list[str], stamp: str
    ) -> ModelRecord:
        import filelock

        origin = f"converted from {checkpoint.repo or checkpoint.path}"
        with filelock.FileLock(f"{path}.part.lock"):  # so that no other process removes the file meanwhile
            file = self._checked_file(path)
            record = self._store.add(ModelRecord(record_name, [file], origin, aliases=aliases, made_from=stamp))
            mark_recorded(path)
        Path(f"{path}.part.lock").unlink(missing_ok=True)
        return record

    def _checked_file(self, path: Path) -> StoredFile:
        """Read the finished file back and compute its digests, which a download would have."""
        from qwenlocal.weights.gguf_reader import read_header

        size = path.stat().st_size
        with self._open_progress() as show:
            sha256, checksums = hash_blocks(
                path, BLOCK_SIZE, lambda done: show(TaskProgress(path.name, done, size, "checking"))
            )
        if not read_header(path).tensors:
            raise BadWeights(path, "the file has no tensors")
        return StoredFile.from_path(path, sha256, BLOCK_SIZE, checksums)

    def _mention_kept_checkpoint(self, name: ConvertibleName) -> None:
        if isinstance(name, LocalCheckpointName):
            return
        kept = self._store.get(str(HubCheckpointName(_bare_repo(name))))
        if kept and kept.owned:
            self._say(
                f"The checkpoint is kept as well. To free its {format_bytes(kept.size)}: qwenlocal rm {kept.name}"
            )


def plan_checkpoint(
    checkpoint: LocalCheckpoint | HubCheckpoint,
    targets: Sequence[tuple[Path, FileType]],
    options: ConversionOptions,
    say: Say,
) -> ConversionPlan:
    """
    Return the plan of a conversion, once the weights are on this disk; `say` gets the cost of a download.

    Raises
    ------
    BadCheckpoint, UnsupportedCheckpoint: it cannot be converted.
    Everything that `HubCheckpoint.download` raises.
    """
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.conversion import plan_conversion

    if not isinstance(checkpoint, LocalCheckpoint):
        outline = checkpoint.read_outline()
        preview = plan_conversion(outline, targets, options) if outline else None
        if preview:
            say(download_cost(checkpoint, preview))
        checkpoint = checkpoint.download(reserve=sum(file.size for file in preview.files) if preview else 0)
    return plan_conversion(Checkpoint.open(checkpoint.path), targets, options)


def download_cost(checkpoint: HubCheckpoint, plan: ConversionPlan) -> str:
    """
    Say what a checkpoint on a hub costs: bytes to download, bytes to write, seconds of conversion.

    A note about weight files that are not downloaded follows.
    """
    files = ", ".join(f"{file.type.name} {format_bytes(file.size)}" for file in plan.files)
    cost = (
        f"{checkpoint.name} is a checkpoint: {format_bytes(checkpoint.missing_size)} to download, then about "
        f"{estimated_seconds(plan)} s to convert it ({files})."
    )
    return join_sentences(cost, checkpoint.files.note)


def estimated_seconds(plan: ConversionPlan) -> int:
    """Estimate the seconds of a conversion with one thread per fast core, at least 1."""
    from qwenlocal.machine import this_machine
    from qwenlocal.weights.conversion_plan import estimate_seconds

    return max(1, round(estimate_seconds(plan, this_machine().cores)))


def fingerprint(path: Path) -> str:
    """
    Hash the names and the `fingerprint_file` of a checkpoint's files.

    Raises
    ------
    BadCheckpoint: the folder or one of them cannot be read.
    """
    folder, states = path if path.is_dir() else path.parent, []
    try:
        for file in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja")]):
            if file.suffix in _INPUT_SUFFIXES and file.is_file():
                states.append((file.name, fingerprint_file(file)))
    except OSError as reason:
        raise BadCheckpoint.unreadable(folder, reason) from reason
    return hashlib.sha256(repr((path.name, states)).encode(errors="replace")).hexdigest()[:16]


def _plan(weights: Checkpoint, checkpoint: LocalCheckpoint | HubCheckpoint, target: Path, level: str) -> ConversionPlan:
    from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
    from qwenlocal.weights.file_types import file_type

    return plan_conversion(weights, [(target, file_type(level))], ConversionOptions(checkpoint.name, checkpoint.repo))


def _bare_repo(name: CatalogName | HubName) -> HubName:
    return replace(checkpoint_repo(name), level=None, file=None)


def _checkpoint_argument(name: ConvertibleName) -> str:
    """Spell the checkpoint as `qwenlocal convert` takes it."""
    return str(name.path if isinstance(name, LocalCheckpointName) else _bare_repo(name))


def _choose_level(name: ConvertibleName, folder: Path) -> str:
    """Return the type in its full spelling, "q4_k" is q4_k_m; without one in the name, the one for these weights."""
    from qwenlocal.weights.conversion import default_file_type
    from qwenlocal.weights.file_types import file_type

    if isinstance(name, CatalogName):
        return file_type(name.level or name.card.level).name
    level = name.level if isinstance(name, HubName) else None
    return file_type(level).name if level else default_file_type(folder).name
