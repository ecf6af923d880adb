"""
The load plan: how a model is loaded into the memory that is free, and notes about it for the user.

If the preferred settings do not fit, the plan gives up what costs least first (measured: benchmarks/README.md): keys as
q8_0 lose nothing measurable and save a quarter of the KV cache; then a shorter context; then values as q8_0 as well,
which halve the speed of a CPU in long texts; then it raises `NotEnoughMemory`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from qwenlocal.engine.context import ContextOptions, RopeScaling, pad_n_ctx
from qwenlocal.engine.gpu_offload import GpuOffload
from qwenlocal.engine.memory import MemoryEstimate, ModelDims, estimate_memory
from qwenlocal.errors import InvalidChoice, NotEnoughMemory, UsageError
from qwenlocal.ggml import has_attention_kernel, tensor_type
from qwenlocal.i18n import tr

KV_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
PREFERRED_CONTEXT = 4096  # tokens; below this, keys become q8_0 before the context is shortened further
_MIN_CONTEXT = 1024
_MAX_ROPE_FACTOR = 8
_CHAT_SEQUENCES = 4  # a conversation, and three abandoned branches of it
_STEP = 1024
_N_UBATCH = 128  # on a CPU as fast as 512, with a quarter of the memory
_MIN_SUGGESTED_CONTEXT = 512


@dataclass(frozen=True)
class LoadRequest:
    """
    Settings that the user asked for; None (0 threads) leaves one to the plan. `force` skips the memory check.

    Without `n_ctx`, the plan's context has at most `max_n_ctx` tokens: a short one is created faster. Its cells can be
    divided among `n_sequences`. `tuned_flash_attention` is the faster choice for f16 keys and values, as measured by
    `qwenlocal tune`; `flash_attention` overrides it.
    """

    n_ctx: int | None = None
    kv_type: str | None = None
    flash_attention: bool | None = None
    rope: str | None = None
    threads: int = 0
    n_ubatch: int | None = None
    force: bool = False
    max_n_ctx: int | None = None
    n_sequences: int = _CHAT_SEQUENCES
    tuned_flash_attention: bool | None = None

    def limit_n_ctx(self, n_ctx_train: int) -> int:
        """Return the longest context to plan for a model that was trained with `n_ctx_train` tokens."""
        return min(n_ctx_train, self.max_n_ctx or n_ctx_train)


def check_load_request(request: LoadRequest) -> None:
    """
    Check the settings that can be checked without a model.

    Raises
    ------
    UsageError: the KV cache type is unknown or needs flash attention.
    """
    if request.kv_type is not None and request.kv_type not in KV_TYPES:
        raise InvalidChoice("--kv", KV_TYPES, request.kv_type)
    is_quantized = request.kv_type not in (None, "f16", "bf16")
    if is_quantized and request.flash_attention is False:
        raise UsageError(
            f"A KV cache of type {request.kv_type} needs flash attention.",
            hint="Omit --flash-attention off, or omit --kv.",
        )


@dataclass(frozen=True)
class ContextExtended:
    """The context of `n_ctx` tokens exceeds the training context by RoPE scaling, which can lower the quality."""

    n_ctx: int
    rope: RopeScaling


@dataclass(frozen=True)
class ContextRounded:
    """The context has `n_ctx` tokens, not the `requested` number: llama.cpp rounds up to a multiple of 256."""

    requested: int
    n_ctx: int


@dataclass(frozen=True)
class CoarseKeys:
    """
    Keys have fewer than eight bits; Qwen's have a few numbers that are far larger than the others of their block.

    Measured with 400 tokens of prose (benchmarks/LOG.md): KL divergence 0.006 with q8_0, 0.31 to 1.75 below.
    """

    kv_type: str


@dataclass(frozen=True)
class FewerGpuLayers:
    """The GPU has too little free memory: it holds `layers` layers, not `planned`."""

    layers: int
    planned: int


@dataclass(frozen=True)
class WeightsNotOnGpu:
    """A GPU cannot compute with `bytes` of the weights that were planned for it; the processor does."""

    device: str
    bytes: int


@dataclass(frozen=True)
class FileRepaired:
    """
    Faults of the model file that loading works around.

    `rope_base` is the missing RoPE base frequency. `false_end` is the spelling of an EOS token that is an ordinary
    word. `hides_padding`: typing the name of a padding token would produce it.
    """

    rope_base: float | None = None
    false_end: str | None = None
    hides_padding: bool = False


@dataclass(frozen=True)
class ChatTemplateMissing:
    """The file has no chat template, so Qwen1.5's is used."""


@dataclass(frozen=True)
class SamplingIgnored:
    """The file recommends `value` for the sampling parameter `name`, which is invalid."""

    name: str
    value: object


LoadNote = (
    ContextExtended
    | ContextRounded
    | CoarseKeys
    | FewerGpuLayers
    | WeightsNotOnGpu
    | FileRepaired
    | ChatTemplateMissing
    | SamplingIgnored
)


@dataclass(frozen=True)
class LoadPlan:
    """
    Context options that fit into `available` bytes, and the memory they need; None if the dimensions are unknown.

    `draft_bytes` is the memory of a draft model, `offload` what GPUs hold.
    """

    options: ContextOptions
    memory: MemoryEstimate | None
    available: int
    notes: tuple[LoadNote, ...] = ()
    draft_bytes: int = 0
    offload: GpuOffload = field(default_factory=lambda: GpuOffload(0, 0))


def plan_load(
    name: str, dims: ModelDims | None, weights: int, available: int, request: LoadRequest = LoadRequest()
) -> LoadPlan:
    """
    Plan how to load the model `name` with `weights` bytes of weights into `available` bytes.

    The context is the requested one, or else the training context, as far as the KV cache takes at most half of the
    memory that the weights leave.

    Raises
    ------
    NotEnoughMemory: neither the request nor the minimum fits (not with `force`).
    UsageError: the KV cache type does not suit the model, or the context is too long for RoPE scaling.
    """
    check_load_request(request)
    if dims is None:
        notes = tuple(_notes(request, None))
        return LoadPlan(
            replace(_all_layouts(request, has_kernel=False)[0], n_ctx=request.n_ctx or PREFERRED_CONTEXT),
            None,
            available,
            notes,
        )
    rope = _rope_scaling(dims, request)
    for options in _candidates(dims, weights, available, request):
        memory = estimate_memory(dims, weights, options)
        if memory.total <= available or request.force:
            return LoadPlan(replace(options, rope=rope), memory, available, tuple(_notes(request, rope)))
    raise _not_enough_memory(name, dims, weights, available, request)


def _notes(request: LoadRequest, rope: RopeScaling | None) -> Iterator[LoadNote]:
    if rope is not None and request.n_ctx:
        yield ContextExtended(request.n_ctx, rope)
    if request.n_ctx and pad_n_ctx(request.n_ctx) != request.n_ctx:
        yield ContextRounded(request.n_ctx, pad_n_ctx(request.n_ctx))
    if request.kv_type not in (None, "f16", "bf16", "q8_0"):
        yield CoarseKeys(request.kv_type)


def _candidates(dims: ModelDims, weights: int, available: int, request: LoadRequest) -> Iterator[ContextOptions]:
    """Yield context options from the best to the smallest."""
    layouts = _layouts(dims, request)
    if request.n_ctx:
        yield from (replace(layout, n_ctx=request.n_ctx) for layout in layouts)
        return
    room, limit = available - weights, request.limit_n_ctx(dims.n_ctx_train)
    sizes = [(layout, _comfortable_context(dims, weights, room, layout, limit)) for layout in layouts]
    for minimum in (min(PREFERRED_CONTEXT, limit), min(_MIN_CONTEXT, limit)):
        yield from (replace(layout, n_ctx=size) for layout, size in sizes if size >= minimum)
    yield from (replace(layout, n_ctx=min(_MIN_CONTEXT, limit)) for layout in layouts)


def _layouts(dims: ModelDims, request: LoadRequest) -> list[ContextOptions]:
    """
    List the KV cache layouts that suit the model, the best first.

    Raises
    ------
    UsageError: the head size is not a multiple of the requested type's block size.
    """
    layouts = _all_layouts(request, has_kernel=has_attention_kernel(dims.head_dim))
    if suitable := [layout for layout in layouts if not dims.head_dim % tensor_type(layout.key_type).block_size]:
        return suitable
    raise UsageError(
        tr(
            "The KV cache cannot be {kv_type}: this model's head size, {head_dim}, is not a multiple of {block_size}.",
            kv_type=request.kv_type,
            head_dim=dims.head_dim,
            block_size=tensor_type(layouts[0].key_type).block_size,
        ),
        hint=tr("Omit --kv."),
    )


def _all_layouts(request: LoadRequest, *, has_kernel: bool) -> list[ContextOptions]:
    """List all layouts; flash attention is slower without our kernel, which needs keys and values as f16."""
    base = ContextOptions(
        0,
        threads=request.threads,
        batch_threads=request.threads,
        n_ubatch=request.n_ubatch or _N_UBATCH,
        n_seq_max=request.n_sequences,
        flash_attention=request.flash_attention or False,
    )
    choices = (request.flash_attention, request.tuned_flash_attention, has_kernel)
    halves = replace(base, flash_attention=next(choice for choice in choices if choice is not None))
    if request.kv_type == "f16":
        return [halves]
    if request.kv_type is not None:
        flash = request.flash_attention if request.kv_type == "bf16" else True
        return [replace(base, key_type=request.kv_type, value_type=request.kv_type, flash_attention=flash or False)]
    q8_keys = replace(base, key_type="q8_0")
    if request.flash_attention is False:
        return [halves, q8_keys]
    return [halves, q8_keys, replace(q8_keys, value_type="q8_0", flash_attention=True)]


def _comfortable_context(dims: ModelDims, weights: int, room: int, layout: ContextOptions, limit: int) -> int:
    """Return the longest context up to `limit`, in steps of 1,024, whose KV cache takes half of `room`, or 0."""
    per_token = dims.kv_cache_bytes(1, layout.key_type, layout.value_type)
    size = min(limit, room // 2 // max(1, per_token) // _STEP * _STEP)
    while size > 0 and estimate_memory(dims, weights, replace(layout, n_ctx=size)).total - weights > room:
        size -= _STEP
    return max(0, size)


def _rope_scaling(dims: ModelDims, request: LoadRequest) -> RopeScaling | None:
    """
    Choose the RoPE scaling for a context that is longer than the training context; None if it is not.

    Raises
    ------
    UsageError: the context is too long.
    """
    if not request.n_ctx or request.n_ctx <= dims.n_ctx_train or request.rope == "none":
        return None
    factor = request.n_ctx / dims.n_ctx_train
    if factor > _MAX_ROPE_FACTOR:
        raise UsageError(
            tr(
                "A context of {n_ctx:,} tokens is {factor:.0f} times the {n_ctx_train:,} that this model was trained "
                "with; at most {max_factor} times are supported.",
                n_ctx=request.n_ctx,
                factor=factor,
                n_ctx_train=dims.n_ctx_train,
                max_factor=_MAX_ROPE_FACTOR,
            ),
            hint=tr("Use at most -c {max_n_ctx}", max_n_ctx=dims.n_ctx_train * _MAX_ROPE_FACTOR),
        )
    return RopeScaling(request.rope or "yarn", factor, dims.n_ctx_train)


def _not_enough_memory(
    name: str, dims: ModelDims, weights: int, available: int, request: LoadRequest
) -> NotEnoughMemory:
    hint = tr("Close other programs, or use a smaller file (qwenlocal plan NAME). To try anyway: --force")
    n_ctx, layouts = request.n_ctx or min(_MIN_CONTEXT, dims.n_ctx_train), _layouts(dims, request)
    needed = estimate_memory(dims, weights, replace(layouts[-1], n_ctx=n_ctx)).total
    if request.n_ctx:
        name = f"{name} with a context of {request.n_ctx:,} tokens"
        fits = max(_max_context(dims, weights, available, layout) for layout in layouts)
        if fits >= _MIN_SUGGESTED_CONTEXT:
            hint = tr("At most -c {fits} fits. To try anyway: --force", fits=fits)
    return NotEnoughMemory(name, needed, available, hint=hint)


def _max_context(dims: ModelDims, weights: int, available: int, layout: ContextOptions) -> int:
    """Return the longest context that fits, in steps of 256."""
    sizes = range(0, pad_n_ctx(dims.n_ctx_train * _MAX_ROPE_FACTOR) + 1, 256)

    def needed(n_ctx: int) -> int:
        return estimate_memory(dims, weights, replace(layout, n_ctx=n_ctx)).total

    return sizes[max(0, bisect.bisect_right(sizes, available, key=needed) - 1)]
