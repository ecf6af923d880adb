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
from qwenlocal.model_files import FILE_TYPES
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import FileType, QuantOverrides, file_type, file_type_name
from qwenlocal.weights.gguf_reader import read_metadata, read_raw_metadata
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
class LevelPlans:
    """
    The plans of the levels of a model, in a temporary folder, and of the file to compare them with.

    `outline` is a GGUF file with the model's metadata and vocabulary. Without a `source`, it is the model itself.
    """

    outline: ModelFile
    source: ConversionPlan | None
    levels: Sequence[ConversionPlan]

    def open_source(self, threads: int) -> contextlib.AbstractContextManager[ModelFile]:
        """Return a context manager that makes the file to compare the levels with, and removes it afterwards."""
        return _written(self.source, threads) if self.source else contextlib.nullcontext(self.outline)


@contextlib.contextmanager
def plan_levels(
    app: AppContext, text: str, levels: Sequence[FileType], overrides: QuantOverrides, imatrix: ImportanceMatrix | None
) -> Iterator[LevelPlans]:
    """
    Find the model that `text` names, and plan its levels; a checkpoint is compared as f16.

    All that is written is removed after the block.

    Raises
    ------
    UsageError: it is quantized to less than eight bits already, or a level needs an importance matrix.
    Everything that finding and downloading it raises.
    """
    name = app.library.models.parse(text)
    _refuse_quantized(name)
    with tempfile.TemporaryDirectory(prefix="qwenlocal-") as folder:
        targets = [(Path(folder) / f"{level.name}.gguf", level) for level in levels]
        if _is_checkpoint(name):
            yield _plan_from_checkpoint(app, name, Path(folder), targets, overrides, imatrix)
        else:
            yield _plan_from_file(app, text, targets, overrides, imatrix)


def _refuse_quantized(name: ModelName) -> None:
    """
    Check the level in a name, before anything is downloaded.

    Raises
    ------
    UsageError: it has less than eight bits.
    """
    level = name.level if isinstance(name, (CatalogName, HubName)) else None
    if level and level in FILE_TYPES and _is_quantized(level):
        raise UsageError(tr("{name} is quantized already.", name=name), hint=_quantized_hint())


def _is_quantized(type_name: str) -> bool:
    """Return True for types that levels cannot be made from."""
    return type_name != _REQUANTIZABLE and file_type(type_name).default.is_quantized


def _quantized_hint() -> str:
    return tr("Start from the checkpoint, or from an f16, bf16, f32 or q8_0 file.")


def _is_checkpoint(name: ModelName) -> bool:
    """Return True for names that `convert` takes; others are GGUF files."""
    if isinstance(name, HubName):
        return not name.file and not name.level
    return isinstance(name, (LocalCheckpointName, HubCheckpointName)) or (
        isinstance(name, CatalogName) and not name.level
    )


def _plan_from_checkpoint(
    app: AppContext,
    name: ModelName,
    folder: Path,
    targets: Sequence[tuple[Path, FileType]],
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None,
) -> LevelPlans:
    with app.library.checkpoints.find(name) as found:
        local = found if isinstance(found, LocalCheckpoint) else found.download()
    checkpoint = Checkpoint.open(local.path)
    options = ConversionOptions(local.name, local.repo, overrides=overrides, imatrix=imatrix, requantize=True)
    source = plan_conversion(checkpoint, [(folder / "source.gguf", file_type(_SOURCE_TYPE))], options)
    outline = folder / "outline.gguf"
    outline.write_bytes(source.job.outputs[0].header)
    outline.write_bytes(gguf_writer.make_layout(read_raw_metadata(outline), []).header)
    levels = [plan_conversion(checkpoint, [target], options) for target in targets]
    return LevelPlans(ModelFile(local.name, outline, source.files[0].size), source, levels)


def _plan_from_file(
    app: AppContext,
    text: str,
    targets: Sequence[tuple[Path, FileType]],
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None,
) -> LevelPlans:
    record = app.library.models.ensure_model(app.library.models.resolve(text))
    type_name = file_type_name(read_metadata(record.path).get("general.file_type"))
    requantize = type_name == _REQUANTIZABLE
    if requantize:
        app.say(tr("{name} is quantized to q8_0; its levels are made from that, and compared with it.", name=text))
    try:
        levels = [
            plan_quantization(record.path, [target], overrides, imatrix, requantize=requantize) for target in targets
        ]
    except UsageError as error:
        if type_name and _is_quantized(type_name):
            error.hint = _quantized_hint()
        raise
    return LevelPlans(ModelFile(type_name or record.path.stem, record.path, record.size), None, levels)


@contextlib.contextmanager
def _written(plan: ConversionPlan, threads: int) -> Iterator[ModelFile]:
    """Write the file of a plan; it is removed after the block."""
    file = plan.files[0]
    write_files(plan, threads=threads, disk_hint=tr("Free some disk space, or set TMPDIR to a larger disk."))
    try:
        yield ModelFile(file.type.name, file.path, file.path.stat().st_size)
    finally:
        file.path.unlink()


# --- measurement


def measure_levels(test: QualityTest, plans: LevelPlans, reports: list[LevelReport]) -> None:
    """
    Measure the source, then each level against it; `reports` gets a report of each once it has scores.

    Raises
    ------
    Interrupted: Ctrl-C; the last report may cover only a part of the text.
    DiskFull, NotEnoughMemory: a level, or the log-probabilities of the source, cannot be kept.
    """
    with plans.open_source(test.threads) as source, test.open_store() as store:
        _measure(test, source, store, reports, LoadedReader.store)
        for level in plans.levels:
            with _written(level, test.threads) as file:
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
