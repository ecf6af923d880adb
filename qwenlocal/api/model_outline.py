"""The header of a model, for plans before the model is downloaded or loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.engine.device_plan import choose_offload, plan_load_with_offload, plan_with_fallback
from qwenlocal.engine.gpu_offload import GpuOffload, GpuRequest, LayerSizes
from qwenlocal.engine.load_plan import LoadPlan, LoadRequest
from qwenlocal.engine.memory import ModelDims
from qwenlocal.engine.prompt_cache import fingerprint_model
from qwenlocal.engine.tuned_settings import read_tuned_settings
from qwenlocal.errors import SourceUnreachable, UnsupportedCheckpoint
from qwenlocal.library.model_library import ModelLibrary
from qwenlocal.library.names import ModelName
from qwenlocal.machine import power_source
from qwenlocal.paths import Folders
from qwenlocal.weights.gguf_reader import Header, read_header
from qwenlocal.weights.load_errors import check_file

_HEADER_BYTES = 8 << 20  # larger than the header of any Qwen model


@dataclass(frozen=True)
class ModelOutline:
    """A model's header, its dimensions and the size of its weights; `path` is None if it is not installed."""

    name: str
    header: Header
    dims: ModelDims
    size: int
    path: Path | None

    @property
    def has_known_mixes(self) -> bool:
        """True if the size of its weights in other types can be estimated."""
        return self.header.architecture in ("qwen2", "qwen2moe")


def plan_outline(
    model: ModelOutline, folders: Folders, available: int, request: LoadRequest, gpu: GpuRequest
) -> LoadPlan:
    """
    Plan how a model would be loaded into `available` bytes and the GPUs; settings measured earlier are in `folders`.

    Raises
    ------
    NotEnoughMemory: it does not fit. UsageError: a setting does not suit the model or the GPUs.
    """

    def read_sizes() -> LayerSizes:
        return LayerSizes.from_tensors({tensor.name: tensor.size for tensor in model.header.tensors})

    offload = choose_offload(read_sizes, model.dims, model.size, request, gpu)
    if gpu.is_auto and model.path:
        tuned = read_tuned_settings(folders.tuned, fingerprint_model(model.path), power_source())
        offload = offload.limited_to(tuned.gpu) if tuned.gpu else offload

    def plan_with(offload: GpuOffload) -> LoadPlan:
        return plan_load_with_offload(model.name, model.dims, model.size, available, request, offload)

    return plan_with_fallback(plan_with, offload, gpu)


def read_outline(library: ModelLibrary, name: ModelName) -> ModelOutline:
    """
    Read the header of the installed file, or from the first bytes of the file on a hub.

    Raises
    ------
    ModelNotFound, SourceUnreachable: there is no such file, or no hub answers.
    UnsupportedCheckpoint: the header lacks the model's dimensions.
    """
    record = library.local.find(name)
    if record is None:
        try:
            with tempfile.TemporaryDirectory() as folder, library.open_puller() as puller:
                path, size = puller.download_prefix(name, Path(folder), _HEADER_BYTES)
                header = read_header(path)
        except SourceUnreachable:
            record = library.local.find_offline(name)
            if record is None:
                raise
    if record is not None:
        header = check_file(record.path).header
        size = header.weights_size or record.size
    dims = ModelDims.from_metadata(header.metadata)
    if dims is None:
        raise UnsupportedCheckpoint(
            str(name), "the header lacks the dimensions of the model", hint="Try to run it: qwenlocal run"
        )
    return ModelOutline(str(name), header, dims, size, record.path if record else None)
