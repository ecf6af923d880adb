"""Levels of quantization of one model, made one after the other in a temporary folder and measured."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.gguf_files import write_files
from qwenlocal.cli.quality_run import run_steps
from qwenlocal.engine.context import ContextOptions
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.errors import Interrupted, UsageError
from qwenlocal.i18n import tr
from qwenlocal.library.local_models import LocalCheckpoint
from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName
from qwenlocal.measure.quality import LoadedReader, ModelFile, QualityMeter, QualityTest, SpeedSample
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import FileType, QuantOverrides, file_type, file_type_name
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.quantization import plan_quantization

if TYPE_CHECKING:
    from qwenlocal.cli.context import AppContext
    from qwenlocal.library.names import ModelName
    from qwenlocal.measure.kl_divergence import LogProbFile
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.imatrix import ImportanceMatrix

_SOURCE_TYPE = "f16"  # llama.cpp multiplies bf16 weights with inputs of 8 bits of precision, and f32 ones slowly
_REQUANTIZABLE = "q8_0"  # loses so little that other levels can be made from it
_N_CTX, _N_UBATCH = 4096, 128  # for the estimate of memory, as in `qwenlocal plan`


@dataclass
class LevelReport:
    """A level: its name, the bytes of its file and of memory with a context of 4,096 tokens, its scores and speed."""

    name: str
    size: int
    memory: int | None
    meter: QualityMeter
    speed: SpeedSample | None = None


@dataclass(frozen=True)
class LevelWriter:
    """Writes the files of levels to a temporary folder; `plan` plans one."""

    plan: Callable[[Path, FileType], ConversionPlan]
    folder: Path
    threads: int

    @contextlib.contextmanager
    def write(self, level: FileType, stem: str) -> Iterator[ModelFile]:
        """Write the file of a level; it is removed after the block."""
        path = self.folder / f"{stem}.gguf"
        hint = tr("Free some disk space, or set TMPDIR to a larger disk.")
        write_files(self.plan(path, level), threads=self.threads, disk_hint=hint)
        try:
            yield ModelFile(level.name, path, path.stat().st_size)
        finally:
            path.unlink()


@contextlib.contextmanager
def open_source(
    app: AppContext, text: str, overrides: QuantOverrides, imatrix: ImportanceMatrix | None, threads: int
) -> Iterator[tuple[ModelFile, LevelWriter]]:
    """
    Find the model that `text` names; return the file to compare its levels with, and their writer.

    A checkpoint is converted to f16 for the comparison. All that is written is removed after the block.

    Raises
    ------
    UsageError: it is quantized to less than eight bits already.
    Everything that finding, downloading and converting it raises.
    """
    name = app.library.models.parse(text)
    with tempfile.TemporaryDirectory(prefix="qwenlocal-") as folder:
        if not _is_checkpoint(name):
            source, plan = _open_file(app, text, overrides, imatrix)
            yield source, LevelWriter(plan, Path(folder), threads)
            return
        with app.library.checkpoints.find(name) as found:
            checkpoint = found if isinstance(found, LocalCheckpoint) else found.download()
        options = ConversionOptions(
            checkpoint.name, checkpoint.repo, overrides=overrides, imatrix=imatrix, requantize=True
        )

        def plan_level(path: Path, level: FileType) -> ConversionPlan:
            return plan_conversion(Checkpoint.open(checkpoint.path), [(path, level)], options)

        writer = LevelWriter(plan_level, Path(folder), threads)
        with writer.write(file_type(_SOURCE_TYPE), "source") as source:
            yield source, writer


def _is_checkpoint(name: ModelName) -> bool:
    """Return True for names that `convert` takes; others are GGUF files."""
    if isinstance(name, HubName):
        return not name.file and not name.level
    return isinstance(name, (LocalCheckpointName, HubCheckpointName)) or (
        isinstance(name, CatalogName) and not name.level
    )


def _open_file(
    app: AppContext, text: str, overrides: QuantOverrides, imatrix: ImportanceMatrix | None
) -> tuple[ModelFile, Callable[[Path, FileType], ConversionPlan]]:
    record = app.library.models.ensure_model(app.library.models.resolve(text))
    type_name = file_type_name(read_metadata(record.path).get("general.file_type"))
    requantize = type_name == _REQUANTIZABLE
    if requantize:
        app.say(tr("{name} is quantized to q8_0; its levels are made from that, and compared with it.", name=text))

    def plan_level(path: Path, level: FileType) -> ConversionPlan:
        try:
            return plan_quantization(record.path, [(path, level)], overrides, imatrix, requantize=requantize)
        except UsageError as error:
            error.hint = tr("Start from the checkpoint, or from an f16, bf16, f32 or q8_0 file.")
            raise

    return ModelFile(type_name or record.path.stem, record.path, record.size), plan_level


# --- measurement


def measure_levels(
    test: QualityTest, source: ModelFile, writer: LevelWriter, levels: Sequence[FileType], reports: list[LevelReport]
) -> None:
    """
    Measure the source, then each level against it; `reports` gets a report of each once it has scores.

    Raises
    ------
    Interrupted: Ctrl-C; the last report may cover only a part of the text.
    DiskFull, NotEnoughMemory: a level, or the log-probabilities of the source, cannot be kept.
    """
    with test.open_store() as store:
        _measure(test, source, store, reports, LoadedReader.store)
        for level in levels:
            with writer.write(level, level.name) as file:
                _measure(test, file, store, reports, LoadedReader.compare)


def _measure(
    test: QualityTest,
    file: ModelFile,
    store: LogProbFile,
    reports: list[LevelReport],
    evaluate: Callable[[LoadedReader, QualityMeter, LogProbFile], Iterator[QualityMeter]],
) -> None:
    report = LevelReport(file.name, file.size, _estimate_memory(file), QualityMeter(file.name))

    def steps() -> Iterator[QualityMeter]:
        with contextlib.closing(test.open(file)) as model:
            report.speed = model.measure_speed()
            yield from evaluate(model, report.meter, store)

    is_complete = run_steps(test, file.name, steps)
    if report.meter.tokens:
        reports.append(report)
    if not is_complete:
        raise Interrupted


def _estimate_memory(file: ModelFile) -> int | None:
    dims = ModelDims.from_metadata(read_metadata(file.path))
    if dims is None:
        return None
    options = ContextOptions(min(_N_CTX, dims.n_ctx_train), n_ubatch=_N_UBATCH, flash_attention=False)
    return estimate_memory(dims, file.size, options).total
