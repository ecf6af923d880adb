"""Descriptions of load plans and their notes for the user."""

from __future__ import annotations

from collections.abc import Iterator

from qwenlocal.engine.context import pad_n_ctx
from qwenlocal.engine.gpu_offload import GpuOffload
from qwenlocal.engine.load_plan import (
    ChatTemplateMissing,
    CoarseKeys,
    ContextExtended,
    ContextRounded,
    FewerGpuLayers,
    FileRepaired,
    LoadNote,
    LoadPlan,
    SamplingIgnored,
    WeightsNotOnGpu,
)
from qwenlocal.formatting import format_bytes, shorten
from qwenlocal.huge_pages import measure_huge_pages
from qwenlocal.i18n import tr


def describe_load(plan: LoadPlan) -> str:
    """Describe the memory use of a plan that was followed: "… of 9.1 GiB free, 97% in huge pages"."""
    memory = measure_huge_pages()
    if memory is None or not memory.huge:
        return describe_plan(plan)
    return describe_plan(plan) + tr(", {share:.0%} in huge pages", share=memory.huge / memory.resident)


def describe_plan(plan: LoadPlan) -> str:
    """
    Describe the memory use of a plan.

    For example: `weights 4.4 + KV 1.5 (4,096 tokens, q8_0 keys, f16 values) + compute 0.3 of 9.1 GiB free`.
    """
    n_ctx = pad_n_ctx(plan.options.n_ctx)
    if plan.memory is None:
        return tr("context of {count:,} tokens; memory use unknown", count=n_ctx)
    memory = plan.memory
    key_type, value_type = plan.options.key_type, plan.options.value_type
    types = key_type if key_type == value_type else f"{key_type} keys, {value_type} values"
    kv_cache = _to_gib(memory.kv_cache)
    parts = [
        tr("weights {size}", size=_to_gib(memory.weights)),
        tr("KV {size} ({count:,} tokens, {types})", size=kv_cache, count=n_ctx, types=types),
        tr("compute {size}", size=_to_gib(memory.compute + memory.overhead)),
    ]
    if plan.draft_bytes:
        parts.append(tr("draft model {size}", size=_to_gib(plan.draft_bytes)))
    on_cpu = " + ".join(parts) + " " + tr("of {available:.1f} GiB free", available=plan.available / 2**30)
    return ", ".join((on_cpu, *_describe_offload(plan.offload)))


def _describe_offload(offload: GpuOffload) -> Iterator[str]:
    for share in offload.shares:
        yield tr(
            "{count} of {total} layers on {device} ({size} GiB)",
            count=share.layers,
            total=offload.total,
            device=share.device.name,
            size=_to_gib(share.weights + share.kv_cache),
        )
    names = ", ".join(device.name for device in offload.devices)
    if names and not offload.layers:
        yield tr("long prompts on {device}", device=names)
    if offload.layers and not offload.shares:
        yield tr("{count} of {total} layers on {device}", count=offload.layers, total=offload.total, device=names)


def _to_gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def describe_note(note: LoadNote) -> str:
    """Describe a note about a load in one or two sentences."""
    match note:
        case ContextExtended(n_ctx, rope):
            return tr(
                "The context of {n_ctx:,} tokens exceeds the {n_ctx_train:,} that this model was trained with. RoPE "
                "scaling ({kind}, factor {factor:.2g}) extends it; answers may be worse, even to short texts.",
                n_ctx=n_ctx,
                n_ctx_train=rope.original,
                kind=rope.kind,
                factor=rope.factor,
            )
        case ContextRounded(requested, n_ctx):
            return tr(
                "The context has {n_ctx:,} tokens instead of {requested:,}, rounded up to a multiple of 256.",
                n_ctx=n_ctx,
                requested=requested,
            )
        case CoarseKeys(kv_type):
            return tr(
                "A KV cache of type {kv_type} is too coarse for Qwen models; answers may be nonsense. Use --kv q8_0, "
                "which loses almost nothing.",
                kv_type=kv_type,
            )
        case FewerGpuLayers(layers, planned):
            return tr(
                "The GPU has too little free memory: it holds {layers} of {planned} planned layers.",
                layers=layers,
                planned=planned,
            )
        case WeightsNotOnGpu(device, size):
            return tr(
                "{device} does not support {size} of the weights planned for it; they stay on the processor.",
                device=device,
                size=format_bytes(size),
            )
        case FileRepaired():
            repairs = "; ".join(_describe_repairs(note))
            return tr(
                "Repaired while loading: {repairs}. To repair the file: qwenlocal inspect FILE --fix", repairs=repairs
            )
        case ChatTemplateMissing():
            return tr("The file has no chat template; using Qwen1.5's.")
        case SamplingIgnored(name, value):
            return f"Ignored an invalid sampling setting in the file: {name} = {shorten(repr(value))}."


def _describe_repairs(note: FileRepaired) -> list[str]:
    repairs: list[str] = []
    if note.rope_base is not None:
        repairs.append(tr("missing RoPE base frequency set to {value:,.0f}", value=note.rope_base))
    if note.false_end is not None:
        repairs.append(f"“{note.false_end}” no longer ends answers")
    if note.hides_padding:
        repairs.append(tr("names of padding tokens are treated as text"))
    return repairs
