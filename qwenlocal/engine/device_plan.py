"""Load plans for the memory of the machine and its GPUs together, and for two models at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.engine.context import ContextOptions
from qwenlocal.engine.gpu_offload import (
    ALL_LAYERS,
    N_UBATCH,
    GpuOffload,
    GpuRequest,
    LayerSizes,
    choose_gpus,
    plan_gpu_offload,
)
from qwenlocal.engine.llama import load_library
from qwenlocal.engine.load_plan import PREFERRED_CONTEXT, LoadPlan, LoadRequest, plan_load
from qwenlocal.engine.memory import ModelDims, estimate_memory
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.i18n import tr
from qwenlocal.weights.gguf_reader import read_metadata

_WEIGHTS_MARGIN = 1.3  # a model of unknown dimensions goes to a GPU with this many times its size free


@dataclass(frozen=True)
class DraftSpec:
    """A draft model to load: its name, its file, and the size of its weights in bytes."""

    name: str
    path: Path
    size: int


def choose_offload(
    read_sizes: Callable[[], LayerSizes], dims: ModelDims | None, size: int, request: LoadRequest, gpu: GpuRequest
) -> GpuOffload:
    """
    Put the requested number of layers on GPUs, or as many as fit.

    Without a request for GPUs, their backends are not loaded; without GPUs, `read_sizes` is not called.

    Raises
    ------
    UsageError: layers were requested, but llama.cpp has no GPU, or not the one that was named.
    """
    gpus = () if gpu.is_off else choose_gpus(load_library().list_devices(), gpu)
    if dims is None:
        fits = any(device.free > size * _WEIGHTS_MARGIN for device in gpus)
        layers = gpu.layers if gpu.layers is not None else ALL_LAYERS if fits else 0
        return GpuOffload(layers, ALL_LAYERS, gpus if layers else ())
    if not gpus:
        return GpuOffload(0, dims.n_layers + 1)
    n_ctx = request.n_ctx or min(PREFERRED_CONTEXT, request.limit_n_ctx(dims.n_ctx_train))
    options = ContextOptions(n_ctx, key_type=request.kv_type or "f16", value_type=request.kv_type or "f16")
    sizes = read_sizes()
    offload = plan_gpu_offload(dims, sizes, options, gpus, gpu.layers)
    if request.n_ctx is None and offload.layers == offload.total:
        return _extend_context(dims, sizes, options, offload, request.limit_n_ctx(dims.n_ctx_train))
    return offload


def _extend_context(
    dims: ModelDims, sizes: LayerSizes, options: ContextOptions, offload: GpuOffload, limit: int
) -> GpuOffload:
    """Double the context as long as all layers fit and the KV cache takes at most half of what the weights leave."""
    room = sum(device.free for device in offload.devices) - offload.weights
    while 2 * options.n_ctx <= limit:
        options = replace(options, n_ctx=2 * options.n_ctx)
        larger = plan_gpu_offload(dims, sizes, options, offload.devices)
        if larger.layers < larger.total or sum(share.kv_cache for share in larger.shares) > room // 2:
            break
        offload = larger
    return offload


def plan_load_with_offload(
    name: str, dims: ModelDims | None, size: int, available: int, request: LoadRequest, offload: GpuOffload
) -> LoadPlan:
    """
    Plan the part of a model that stays in the machine's memory; GPUs have fast kernels for flash attention.

    What integrated GPUs hold is in that memory, too.

    Raises
    ------
    NotEnoughMemory: it does not fit (not with `force`).
    """
    if not offload.layers:
        plan = plan_load(name, dims, size, available, request)
        if not offload.devices:
            return plan
        n_ubatch = request.n_ubatch or N_UBATCH
        return replace(plan, options=replace(plan.options, n_ubatch=n_ubatch), offload=offload)
    on_cpu = round(size * (1 - min(1.0, offload.layers / max(1, offload.total))))
    if offload.shares:
        on_cpu = max(0, size - offload.weights)
    if request.n_ctx is None and offload.n_ctx:
        request = replace(request, max_n_ctx=offload.n_ctx)
    remaining = dims and replace(dims, n_layers=max(0, dims.n_layers - offload.repeating_layers))
    shared = offload.shared_bytes
    try:
        plan = plan_load(name, remaining, on_cpu, available - shared, request)
    except NotEnoughMemory as reason:
        if not shared:
            raise
        raise NotEnoughMemory(name, reason.needed + shared, available, hint=reason.hint) from reason
    options = replace(plan.options, flash_attention=request.flash_attention, n_ubatch=request.n_ubatch or N_UBATCH)
    return replace(plan, options=options, available=available, offload=offload)


def plan_with_fallback(plan: Callable[[GpuOffload], LoadPlan], offload: GpuOffload, gpu: GpuRequest) -> LoadPlan:
    """
    Plan with `offload`, or with the processor alone if integrated GPUs, which the user did not ask for, leave no room.

    The processor can do with a smaller KV cache.

    Raises
    ------
    NotEnoughMemory: neither fits.
    """
    try:
        return plan(offload)
    except NotEnoughMemory:
        if not (gpu.is_auto and offload.shared_bytes):
            raise
        return plan(GpuOffload(0, offload.total))


def plan_load_with_draft(
    draft: DraftSpec,
    name: str,
    dims: ModelDims | None,
    size: int,
    available: int,
    request: LoadRequest,
    offload: GpuOffload,
) -> LoadPlan:
    """
    Plan with memory reserved for the draft model, whose context is as long as the target model's.

    Raises
    ------
    NotEnoughMemory: they do not fit together. UsageError: the draft model is not smaller.
    """
    if draft.size >= size:
        raise UsageError(
            tr("The draft model {name} is not smaller than {target}.", name=draft.name, target=name),
            hint=tr("Use a small model of the same family, such as: --draft qwen1.5:0.5b"),
        )
    draft_dims, plan = ModelDims.from_metadata(read_metadata(draft.path)), None
    n_ctx = request.n_ctx or PREFERRED_CONTEXT
    for _ in range(2):  # for the shortest context, then for the one that this left space for
        options = ContextOptions(n_ctx)
        draft_bytes = estimate_memory(draft_dims, draft.size, options).total if draft_dims else draft.size
        try:
            plan = plan_load_with_offload(name, dims, size, available - draft_bytes, request, offload)
        except NotEnoughMemory as reason:
            both = tr("{name} with the draft model {draft}", name=name, draft=draft.name)
            hint = tr("Leave out --draft, or use a shorter context: -c 4096")
            raise NotEnoughMemory(both, reason.needed + draft_bytes, available, hint=hint) from reason
        n_ctx = max(n_ctx, plan.options.n_ctx)
    assert plan is not None
    return replace(plan, available=available, draft_bytes=draft_bytes)
