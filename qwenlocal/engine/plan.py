"""
Does it fit, and how: context, how keys and values are kept, layers on a graphics card.

What is conceded first is what measuring says costs least (benchmarks/README.md): keys as q8_0 cost nothing that could
be measured and save a quarter of the cache; then the context becomes shorter; then values as q8_0 as well, which needs
flash attention and halves the speed of a processor in long texts; then it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwenlocal.engine.context import ContextOptions, RopeScaling, rounded_up
from qwenlocal.engine.memory import Need, memory_needed
from qwenlocal.engine.shape import Shape
from qwenlocal.engine.wanted import Wanted, check_wanted
from qwenlocal.errors import NotEnoughMemory, UsageProblem
from qwenlocal.ggml import Device, tensor_type
from qwenlocal.language import tr

ENOUGH = 4096  # tokens; below this, keys are kept as q8_0 before the context becomes shorter still
LEAST_CONTEXT = 1024
UNKNOWN_CONTEXT = 4096  # for models whose file does not state its shape
MOST_STRETCH = 8  # times the context that a model was trained for
_PARKED = 3  # ends of a conversation that are kept beside it
_STEP = 1024
_TOGETHER = 128  # tokens computed together; as quick as 512 on a processor, for a quarter of the memory
_DEVICE_MARGIN = 512 << 20  # bytes left free on a graphics card, for what it computes with and for others
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """
    A context that fits, what it needs, and the bytes that were free; `need` is None for models of unknown shape.

    `draft` bytes are for a draft model, all of it.
    """

    options: ContextOptions
    need: Need | None
    available: int
    notes: tuple[str, ...] = ()
    draft: int = 0

    def sentence(self) -> str:
        """`weights 4.4 + KV 1.5 (4,096 tokens, q8_0 keys, f16 values) + compute 0.3 of 9.1 GiB free`."""
        if self.need is None:
            return tr("{count:,} tokens; how much memory they take is not known", count=self.options.n_ctx)
        how = _kept(self.options)
        sizes = (self.need.weights, self.need.kv, self.need.compute + self.need.ourselves)
        weights, kv, rest = (f"{size / _GIB:.1f}" for size in sizes)
        parts = [
            tr("weights {size}", size=weights),
            tr("KV {size} ({count:,} tokens, {how})", size=kv, count=self.options.n_ctx, how=how),
            tr("compute {size}", size=rest),
        ]
        if self.draft:
            parts.append(tr("draft model {size}", size=f"{self.draft / _GIB:.1f}"))
        return " + ".join(parts) + " " + tr("of {available:.1f} GiB free", available=self.available / _GIB)


def _kept(options: ContextOptions) -> str:
    if options.key_type == options.value_type:
        return options.key_type
    return f"{options.key_type} keys, {options.value_type} values"


def choose_plan(what: str, shape: Shape | None, weights: int, available: int, wanted: Wanted = Wanted()) -> Plan:
    """
    How to load `what`, of `weights` bytes, where `available` bytes are free.

    The context is what was asked for, or as large as the model was trained for, as long as the cache takes no more than
    half of what the weights leave.

    Raises
    ------
    NotEnoughMemory: not even the least fits, or not what was asked for (not with `force`).
    UsageProblem: keys and values cannot be kept so, or the context is longer than a model can be stretched to.
    """
    check_wanted(wanted)
    if shape is None:
        return Plan(replace(_all_ways(wanted)[0], n_ctx=wanted.n_ctx or UNKNOWN_CONTEXT), None, available)
    rope, notes = _stretched(shape, wanted)
    for options in _candidates(shape, weights, available, wanted):
        need = memory_needed(shape, weights, options)
        if need.total <= available or wanted.force:
            return Plan(replace(options, rope=rope), need, available, (*notes, *_coarse(wanted)))
    raise _too_large(what, shape, weights, available, wanted)


def _candidates(shape: Shape, weights: int, available: int, wanted: Wanted) -> Iterator[ContextOptions]:
    """From the best to the least."""
    ways = _ways(shape, wanted)
    if wanted.n_ctx:
        yield from (replace(way, n_ctx=wanted.n_ctx) for way in ways)
        return
    room = available - weights
    sizes = [(way, _largest(shape, weights, room, way)) for way in ways]
    for enough in (min(ENOUGH, shape.n_ctx_train), min(LEAST_CONTEXT, shape.n_ctx_train)):
        yield from (replace(way, n_ctx=size) for way, size in sizes if size >= enough)
    yield from (replace(way, n_ctx=min(LEAST_CONTEXT, shape.n_ctx_train)) for way in ways)


def _ways(shape: Shape, wanted: Wanted) -> list[ContextOptions]:
    """
    How keys and values can be kept, the one that costs least first.

    Raises
    ------
    UsageProblem: the model's heads are no multiple of the blocks of the type that was asked for.
    """
    ways = _all_ways(wanted)
    fitting = [way for way in ways if not shape.head_width % tensor_type(way.key_type).block]
    if not fitting:
        raise UsageProblem(
            tr(
                "Keys cannot be kept as {kv_type}: this model's heads are {head_width} wide, no multiple of {block}.",
                kv_type=wanted.kv_type,
                head_width=shape.head_width,
                block=tensor_type(ways[0].key_type).block,
            ),
            hint=tr("Leave --kv away."),
        )
    return fitting


def _all_ways(wanted: Wanted) -> list[ContextOptions]:
    base = ContextOptions(
        0,
        threads=wanted.threads,
        batch_threads=wanted.threads,
        n_ubatch=wanted.together or _TOGETHER,
        sequences=1 + _PARKED,
        flash_attention=wanted.flash_attention or False,
    )
    if wanted.kv_type is not None:
        flash = wanted.flash_attention if wanted.kv_type in ("f16", "bf16") else True
        return [replace(base, key_type=wanted.kv_type, value_type=wanted.kv_type, flash_attention=flash or False)]
    small = replace(base, key_type="q8_0")
    if wanted.flash_attention is False:
        return [base, small]
    return [base, small, replace(small, value_type="q8_0", flash_attention=True)]


def _largest(shape: Shape, weights: int, room: int, way: ContextOptions) -> int:
    """The most tokens whose cache takes half of what the weights leave, in thousands of 1,024."""
    per_token = shape.kv_bytes(1, way.key_type, way.value_type)
    size = min(shape.n_ctx_train, room // 2 // max(1, per_token) // _STEP * _STEP)
    while size > 0 and memory_needed(shape, weights, replace(way, n_ctx=size)).total - weights > room:
        size -= _STEP
    return max(0, size)


def _stretched(shape: Shape, wanted: Wanted) -> tuple[RopeScaling | None, tuple[str, ...]]:
    """What is needed for more tokens than a model was trained with; said, since it has a price."""
    if not wanted.n_ctx or wanted.n_ctx <= shape.n_ctx_train or wanted.rope == "none":
        return None, ()
    factor = wanted.n_ctx / shape.n_ctx_train
    if factor > MOST_STRETCH:
        raise UsageProblem(
            tr(
                "{n_ctx:,} tokens are {factor:.0f} times what this model was trained with ({n_ctx_train:,}); "
                "{most} times can be tried.",
                n_ctx=wanted.n_ctx,
                factor=factor,
                n_ctx_train=shape.n_ctx_train,
                most=MOST_STRETCH,
            ),
            hint=tr("At most: -c {most}", most=shape.n_ctx_train * MOST_STRETCH),
        )
    kind = wanted.rope or "yarn"
    note = tr(
        "{n_ctx:,} tokens are more than the {n_ctx_train:,} that this model was trained with: positions are squeezed "
        "({kind}, factor {factor:.2g}). It may answer worse, about short texts too.",
        n_ctx=wanted.n_ctx,
        n_ctx_train=shape.n_ctx_train,
        kind=kind,
        factor=factor,
    )
    return RopeScaling(kind, factor, shape.n_ctx_train), (note,)


def _coarse(wanted: Wanted) -> tuple[str, ...]:
    """
    Keys of less than eight bits: Qwen's have a few numbers that are far larger than the others of their block.

    Measured on the starter's 400 tokens of prose (benchmarks/LOG.md): KL 0.006 with q8_0, 0.31 to 1.75 below.
    """
    if wanted.kv_type in (None, "f16", "bf16", "q8_0"):
        return ()
    return (
        tr(
            "Keys kept as {kv_type} are too coarse for Qwen models: answers may be nonsense. --kv q8_0 costs next to "
            "nothing.",
            kv_type=wanted.kv_type,
        ),
    )


def _too_large(what: str, shape: Shape, weights: int, available: int, wanted: Wanted) -> NotEnoughMemory:
    n_ctx = wanted.n_ctx or min(LEAST_CONTEXT, shape.n_ctx_train)
    smallest = replace(_ways(shape, wanted)[-1], n_ctx=n_ctx)
    needed = memory_needed(shape, weights, smallest).total
    if wanted.n_ctx:
        fits = max(_largest_at_all(shape, weights, available, way) for way in _ways(shape, wanted))
        named = f"{what} with a context of {wanted.n_ctx:,} tokens"
        if fits >= 512:
            return NotEnoughMemory(
                named, needed, available, hint=tr("At most -c {fits} fits. To try all the same: --force", fits=fits)
            )
    else:
        named = what
    return NotEnoughMemory(
        named,
        needed,
        available,
        hint=tr("Close other programs, or take a smaller file (qwenlocal plan NAME). To try all the same: --force"),
    )


def _largest_at_all(shape: Shape, weights: int, available: int, way: ContextOptions) -> int:
    """The most tokens that fit at all, in steps of 256."""
    least, most = 0, rounded_up(shape.n_ctx_train * MOST_STRETCH) // 256
    while least < most:
        middle = (least + most + 1) // 2
        fits = memory_needed(shape, weights, replace(way, n_ctx=middle * 256)).total <= available
        least, most = (middle, most) if fits else (least, middle - 1)
    return least * 256


@dataclass(frozen=True)
class Offload:
    """Layers of a model that go to graphics cards; the output layer counts as one."""

    layers: int
    of: int

    def fewer(self) -> Offload:
        """After a card had less room than it said: a quarter less."""
        return Offload(self.layers * 3 // 4, self.of)


def choose_offload(shape: Shape, weights: int, options: ContextOptions, devices: Sequence[Device]) -> Offload:
    """
    As many layers as the graphics cards have room for, each with its part of the weights and of the cache.

    Embeddings stay with the processor; they are counted among the layers all the same, so that there is some to spare.
    A 7B (4.2 GiB, 32 layers) with 4,096 tokens on a card with 4 GiB free: 18 of 33.
    """
    units = shape.layers + 1
    each = weights / units + shape.kv_bytes(rounded_up(options.n_ctx), options.key_type, options.value_type) / units
    room = sum(max(0, device.free - _DEVICE_MARGIN) for device in devices if device.is_gpu)
    return Offload(min(units, int(room / each)), units)
