"""`qwenlocal plan`: memory that a model takes by type and context, before it is downloaded or loaded."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.formatting import format_bytes
from qwenlocal.library.names import LocalCheckpointName

if TYPE_CHECKING:
    from qwenlocal.api.model_outline import ModelOutline
    from qwenlocal.engine.gpu_offload import GpuRequest
    from qwenlocal.engine.load_plan import LoadPlan, LoadRequest

_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
_MIN_SLOW_SHARE = 0.5  # of the matrices, from which on another type is suggested
_GIB = 2**30


def plan_model(text: str, request: LoadRequest, gpu: GpuRequest, *, as_json: bool) -> None:
    """
    Print how the model would be loaded here, and the memory for every type and context.

    Raises
    ------
    UsageError: it is a checkpoint. UnsupportedCheckpoint: the header lacks the model's dimensions.
    """
    from qwenlocal.api.model_outline import plan_outline, read_outline
    from qwenlocal.machine import this_machine

    app = AppContext(quiet=as_json)
    name = app.library.models.resolve(text)
    if isinstance(name, LocalCheckpointName):
        raise UsageError(
            f"{text} is a checkpoint.", hint=f"To plan its conversion: qwenlocal convert {shlex.quote(text)} --dry-run"
        )
    model, machine = read_outline(app.library, name), this_machine()
    request = replace(request, threads=request.threads or machine.cores)
    available = machine.memory().available
    plan: LoadPlan | NotEnoughMemory
    try:
        plan = plan_outline(model, app.library.folders, available, request, gpu)
    except NotEnoughMemory as error:
        plan = error
    table = _memory_by_type(model, request)
    if as_json:
        print_json(_facts(model, plan, available, table))
    else:
        _show(model, plan, available, table, machine.features)


def _memory_by_type(model: ModelOutline, request: LoadRequest) -> dict[str, dict[int, int]]:
    """Return bytes by type and context; the file itself comes first, as "as it is", a key of the JSON output."""
    from qwenlocal.engine.context import ContextOptions
    from qwenlocal.engine.memory import estimate_memory
    from qwenlocal.weights.quant_mix import estimate_sizes

    levels = {"as it is": model.size, **(estimate_sizes(model.header) if model.has_known_mixes else {})}
    kv_type = request.kv_type or "f16"
    flash_attention = bool(request.flash_attention) or kv_type not in ("f16", "bf16")
    n_ctx_train = model.dims.n_ctx_train
    contexts = [n_ctx for n_ctx in _CONTEXTS if n_ctx <= n_ctx_train] or [n_ctx_train]

    def total(weights: int, n_ctx: int) -> int:
        options = ContextOptions(
            n_ctx,
            n_ubatch=request.n_ubatch or 128,
            key_type=kv_type,
            value_type=kv_type,
            flash_attention=flash_attention,
        )
        return estimate_memory(model.dims, weights, options).total

    return {level: {n_ctx: total(weights, n_ctx) for n_ctx in contexts} for level, weights in levels.items()}


def _show(
    model: ModelOutline,
    plan: LoadPlan | NotEnoughMemory,
    available: int,
    table: dict[str, dict[int, int]],
    features: frozenset[str],
) -> None:
    from qwenlocal.terminal.load_notes import describe_note, describe_plan

    if isinstance(plan, NotEnoughMemory):
        description = f"{plan} {plan.hint}"
    else:
        description = "\n".join((describe_plan(plan), *map(describe_note, plan.notes)))
    state = "installed" if model.path is not None else "not downloaded; only its header was read"
    sys.stdout.write(f"{model.name} ({state})\n{description}\n\n")
    contexts = list(next(iter(table.values())))
    rows = [
        (level, *(f"{size / _GIB:.1f} GiB{'' if size <= available else ' *'}" for size in sizes.values()))
        for level, sizes in table.items()
    ]
    if advice := _advice(model, features):
        sys.stdout.write(advice + "\n\n")
    print_table(("TYPE", *(f"{n_ctx:,} TOKENS" for n_ctx in contexts)), rows)
    if any(size > available for sizes in table.values() for size in sizes.values()):
        sys.stdout.write(f"\n* does not fit: {available / _GIB:.1f} GiB are available\n")


def _advice(model: ModelOutline, features: frozenset[str]) -> str:
    """Suggest a faster type if llama.cpp has no fast kernels on this processor for most of the weights."""
    from qwenlocal.weights.quant_mix import estimate_sizes, find_slow_types

    share, types = find_slow_types(model.header, features)
    if share < _MIN_SLOW_SHARE or not model.has_known_mixes:
        return ""
    size = estimate_sizes(model.header, ["q4_0"])["q4_0"]
    return (
        f"{share:.0%} of the matrices ({', '.join(types)}) have types without fast llama.cpp kernels on this "
        f"processor. As q4_0 the model takes {format_bytes(size)} and answers faster, with a small loss of quality."
    )


def _facts(
    model: ModelOutline, plan: LoadPlan | NotEnoughMemory, available: int, table: dict[str, dict[int, int]]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": model.name,
        "here": model.path is not None,
        "available": available,
        "memory": table,
    }
    if isinstance(plan, NotEnoughMemory):
        return {**facts, "plan": None, "reason": str(plan)}
    options, memory = plan.options, plan.memory
    assert memory is not None  # the dimensions are known
    return {
        **facts,
        "plan": {
            "n_ctx": options.n_ctx,
            "key_type": options.key_type,
            "value_type": options.value_type,
            "flash_attention": options.flash_attention,
            "weights": memory.weights,
            "kv": memory.kv_cache,
            "compute": memory.compute,
            "total": memory.total,
            "gpu_layers": plan.offload.layers,
            "devices": [
                {"name": share.device.name, "layers": share.layers, "weights": share.weights, "kv": share.kv_cache}
                for share in plan.offload.shares
            ],
        },
    }
