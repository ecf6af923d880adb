"""Loading of models: from a file, a load request and the machine to a model in memory with an empty context."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.engine.adapters import LoadedAdapters
from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.device_plan import (
    DraftSpec,
    choose_offload,
    plan_load_with_draft,
    plan_load_with_offload,
    plan_with_fallback,
)
from qwenlocal.engine.draft_model import DraftModel, ModelDrafter, shares_vocabulary
from qwenlocal.engine.gpu_offload import ALL_LAYERS, GpuOffload, GpuRequest, read_layer_sizes
from qwenlocal.engine.llama import LoadCancelled, Model
from qwenlocal.engine.load_plan import (
    FewerGpuLayers,
    FileRepaired,
    LoadNote,
    LoadPlan,
    LoadRequest,
    SamplingIgnored,
    WeightsNotOnGpu,
)
from qwenlocal.engine.memory import MemoryCheck, ModelDims
from qwenlocal.engine.prefix_cache import PrefixCache
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, Drafter, NoSpeculation, Speculation
from qwenlocal.engine.threads import ThreadAdapter
from qwenlocal.engine.tuned_settings import TunedSettings
from qwenlocal.errors import BadWeights, ContextNotCreated, Interrupted, UsageError
from qwenlocal.huge_pages import read_ahead
from qwenlocal.i18n import tr
from qwenlocal.machine import Machine
from qwenlocal.weights.adapter_spec import AdapterSpec
from qwenlocal.weights.diagnosis import missing_rope_base
from qwenlocal.weights.gguf_reader import MetadataValue, read_header, read_metadata
from qwenlocal.weights.split_model import shard_paths

_READING_SHARE = 0.5  # of the progress of loading
_UNSUPPORTED_SHARE = 0.02  # of a GPU's weights; if the processor computes with more of them, a note says so
_LOG_PRECISION = 1 << 20  # bytes

# Recommended sampling in a GGUF file (gguf-py, constants.py: Keys.General.SAMPLING_*).
_SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True)
class LoadOptions:
    """
    Options for loading a model.

    `request` and `gpu` constrain the load plan; `tuned` fills what they leave open. `lookup` enables prompt lookup.
    Prompt caches are kept in the folder `prompt_caches`, or not at all. `adapters` are loaded together with the model.
    """

    request: LoadRequest = field(default_factory=LoadRequest)
    gpu: GpuRequest = field(default_factory=GpuRequest)
    lookup: bool = True
    prompt_caches: Path | None = None
    tuned: TunedSettings = field(default_factory=TunedSettings)
    draft: DraftSpec | None = None
    adapters: Sequence[AdapterSpec] = ()


@dataclass(frozen=True)
class LoadedModel:
    """
    A model in memory with an empty context.

    `sampling` is what its makers recommend. `costs` are learned while it answers. `drafter` uses the draft model.
    """

    name: str
    model: Model
    context: Context
    sequence: TokenSequence
    sampling: Sampling
    plan: LoadPlan
    costs: CostCurve
    adapters: LoadedAdapters
    notes: tuple[LoadNote, ...] = ()
    drafter: ModelDrafter | None = None

    def close(self) -> None:
        """Free the memory of the model, its context and its draft model."""
        if self.drafter:
            self.drafter.close()
        self.context.close()
        self.model.close()


class EngineLoader:
    """Loads models in the calling thread; another thread can cancel that."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop loading soon."""
        self._cancelled.set()

    def load(
        self,
        path: Path,
        options: LoadOptions,
        machine: Machine,
        *,
        name: str,
        size: int,
        recommended: Mapping[str, float] = {},
        report: Callable[[float], None] = lambda fraction: None,
    ) -> LoadedModel:
        """
        Load the model in `path`, `size` bytes of weights; `report` gets fractions from 0 to 1.

        `recommended` is the catalog's sampling; the file's own recommendation takes precedence.

        Raises
        ------
        BadWeights: the file cannot be used. NotEnoughMemory: it does not fit. Interrupted: `cancel` was called.
        """
        metadata = read_metadata(path)
        repairs = _find_repairs(path, metadata)
        request = _apply_tuned_settings(options.request, options.tuned, machine)
        size += sum(adapter.path.stat().st_size for adapter in options.adapters)
        dims = ModelDims.from_metadata(metadata)
        files = shard_paths(path)
        offload = choose_offload(lambda: read_layer_sizes(files), dims, size, request, options.gpu)
        if options.gpu.is_auto and options.tuned.gpu:
            offload = offload.limited_to(options.tuned.gpu)
        available = machine.memory().available

        def plan_with(offload: GpuOffload) -> LoadPlan:
            if options.draft:
                return plan_load_with_draft(options.draft, name, dims, size, available, request, offload)
            return plan_load_with_offload(name, dims, size, available, request, offload)

        plan = plan_with_fallback(plan_with, offload, options.gpu)

        def on_progress(fraction: float) -> bool:
            report(_READING_SHARE + (1 - _READING_SHARE) * fraction)
            return not self._cancelled.is_set()

        thread_adapter = ThreadAdapter(plan.options.threads, machine.cpu_times) if machine.cpu_times else None
        try:
            self._read_ahead(files, report)
            model, context, adapters, offload, offload_notes = open_model(
                path, plan.options, plan.offload, repairs, on_progress, thread_adapter, options.adapters
            )
        except LoadCancelled as reason:
            raise Interrupted from reason
        plan = replace(plan, offload=offload)
        try:
            sampling, sampling_notes = recommend_sampling(metadata, recommended)
            draft_model = _open_draft(options.draft, context, offload) if options.draft else None
        except BaseException:
            context.close()
            model.close()
            raise
        costs = CostCurve(options.tuned.costs)
        lookup: Drafter = Speculation(costs) if options.lookup and model.can_truncate else NoSpeculation()
        drafter = ModelDrafter(draft_model, lookup, costs) if draft_model else None

        def open_prompt_cache() -> PromptCache | None:
            folder = options.prompt_caches
            return PromptCache(folder, compute_cache_key(path, plan.options, adapters.specs)) if folder else None

        sequence = TokenSequence(
            context,
            speculation=drafter or lookup,
            prefix_cache=PrefixCache(context),
            prompt_cache=open_prompt_cache(),
            check_memory=MemoryCheck(
                machine.memory, machine.memory_pressure, drafter.give_up if drafter else lambda: False
            ),
        )

        def use_adapters() -> None:
            sequence.save_prompt_cache()
            context.apply_adapters()
            sequence.forget(open_prompt_cache())

        adapters.on_change = use_adapters
        notes = (*_repair_notes(repairs, model), *offload_notes, *plan.notes, *sampling_notes)
        return LoadedModel(name, model, context, sequence, sampling, plan, costs, adapters, notes, drafter)

    def _read_ahead(self, files: Sequence[Path], report: Callable[[float], None]) -> None:
        """Read the files into the page cache; llama.cpp would do the same, but in small pages and without progress."""

        def report_file(fraction: float, index: int) -> None:
            report(_READING_SHARE * (index + fraction) / len(files))
            if self._cancelled.is_set():
                raise LoadCancelled

        for index, file in enumerate(files):
            read_ahead(file, functools.partial(report_file, index=index))


# --- planning


def _apply_tuned_settings(request: LoadRequest, tuned: TunedSettings, machine: Machine) -> LoadRequest:
    # In a container, fewer processors than at the time of tuning may be left.
    threads = request.threads or min(tuned.threads, machine.logical_cores) or machine.cores
    n_ubatch, flash = request.n_ubatch or tuned.n_ubatch, tuned.flash_attention
    return replace(request, threads=threads, n_ubatch=n_ubatch, tuned_flash_attention=flash)


# --- loading


class OpenedModel(NamedTuple):
    """A model with its context and adapters, and the layers on GPUs, with notes on differences from the plan."""

    model: Model
    context: Context
    adapters: LoadedAdapters
    offload: GpuOffload
    notes: tuple[LoadNote, ...]


def open_model(
    path: Path,
    options: ContextOptions,
    offload: GpuOffload,
    kv_overrides: Mapping[str, float],
    on_progress: Callable[[float], bool],
    thread_adapter: ThreadAdapter | None = None,
    adapters: Sequence[AdapterSpec] = (),
    abort: AbortFlag | None = None,
) -> OpenedModel:
    """Load the model and create its context; retry with fewer layers on GPUs if they have less memory than reported."""
    requested = offload.layers
    while True:
        model = None
        try:
            model = Model(
                path,
                gpu_layers=offload.layers,
                devices=offload.devices,
                layers_by_device=[share.layers for share in offload.shares],
                kv_overrides=kv_overrides,
                on_progress=on_progress,
            )
            loaded_adapters = LoadedAdapters(model, adapters)
            context = Context(model, options, abort, thread_adapter)
            notes = tuple(_offload_notes(model, offload, requested))
            return OpenedModel(model, context, loaded_adapters, offload, notes)
        except (BadWeights, ContextNotCreated) as reason:
            if model:
                model.close()
            if not offload.layers or "alloc" not in str(reason) + getattr(reason, "reason", ""):
                raise
            offload = offload.reduced()


def _offload_notes(model: Model, offload: GpuOffload, requested: int) -> Iterator[LoadNote]:
    if offload.layers < requested:
        yield FewerGpuLayers(offload.layers, requested)
    for share in offload.shares:
        missing = share.weights - model.buffer_sizes.get(share.device.name, 0)
        if missing > share.weights * _UNSUPPORTED_SHARE + _LOG_PRECISION:
            yield WeightsNotOnGpu(share.device.name, missing)


def _open_draft(draft: DraftSpec, target: Context, offload: GpuOffload) -> DraftModel:
    """
    Load the draft model with a context like `target`, on the GPU if all of the target model is there.

    Raises
    ------
    UsageError: its vocabulary differs.
    """
    metadata = read_metadata(draft.path)
    dims, repairs = ModelDims.from_metadata(metadata), _find_repairs(draft.path, metadata)
    total = dims.n_layers + 1 if dims else ALL_LAYERS
    gpus = offload.devices if offload.layers >= offload.total else ()
    opened = open_model(
        draft.path,
        replace(target.options, n_seq_max=1, key_type="f16", value_type="f16", rope=None),
        GpuOffload(total if gpus else 0, total, gpus),
        repairs,
        lambda _fraction: True,
        target.thread_adapter,
        abort=target.abort,
    )
    model, context = opened.model, opened.context
    if model.can_truncate and target.model.can_truncate and shares_vocabulary(target.model, model):
        return DraftModel(context, len(target.model.tokenizer))
    context.close()
    model.close()
    raise UsageError(
        tr("{name} cannot draft for this model: their vocabularies differ.", name=draft.name),
        hint=tr("Use a small model of the same family, such as: --draft qwen1.5:0.5b"),
    )


# --- the file's metadata


def _find_repairs(path: Path, metadata: Mapping[str, MetadataValue]) -> dict[str, float]:
    """Return metadata that the file lacks; the whole header is read only if something seems to be missing."""
    if missing_rope_base(metadata) is None:
        return {}
    base = missing_rope_base(read_header(path).metadata)
    return {f"{metadata['general.architecture']}.rope.freq_base": base} if base is not None else {}


def _repair_notes(repairs: Mapping[str, float], model: Model) -> tuple[LoadNote, ...]:
    tokenizer = model.tokenizer
    false_end = None if tokenizer.false_end is None else tokenizer.text_of(tokenizer.false_end)
    note = FileRepaired(next(iter(repairs.values()), None), false_end, tokenizer.hides_padding)
    return (note,) if note != FileRepaired() else ()


def recommend_sampling(
    metadata: Mapping[str, MetadataValue], recommended: Mapping[str, float]
) -> tuple[Sampling, tuple[LoadNote, ...]]:
    """Merge the file's recommendation over the catalog's; values out of range are ignored, with a note."""
    in_file = {name: metadata[key] for name, key in _SAMPLING_KEYS.items() if key in metadata}
    sampling, notes = Sampling(), list[LoadNote]()
    for name, value in {**recommended, **in_file}.items():
        try:
            sampling = sampling.with_overrides({name: int(value) if name == "top_k" else float(value)})  # type: ignore[arg-type]
        except (UsageError, TypeError, ValueError, OverflowError):
            notes.append(SamplingIgnored(name, value))
    return sampling, tuple(notes)
