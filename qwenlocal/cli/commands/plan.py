"""`qwenlocal plan`: memory that a model takes by type and context, before it is downloaded or loaded."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import NotEnoughMemory, UnsupportedCheckpoint, UsageError
from qwenlocal.formatting import format_bytes
from qwenlocal.library.names import LocalCheckpointName, ModelName

if TYPE_CHECKING:
    from qwenlocal.engine.load_plan import LoadRequest
    from qwenlocal.engine.memory import ModelDims
    from qwenlocal.weights.gguf_reader import Header
    from qwenlocal.weights.quant_mix import ModelFacts

_HEADER_BYTES = 8 << 20  # the header of every Qwen model is smaller
_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
_MIN_SLOW_SHARE = 0.5  # of the matrices, from which on another type is suggested
_GIB = 2**30


@dataclass(frozen=True)
class ModelOutline:
    """A model's header and the size of its weights, installed or not."""

    name: str
    header: Header
    size: int
    is_installed: bool


def plan_model(text: str, request: LoadRequest, *, as_json: bool) -> None:
    """
    Print how the model would be loaded here, and the memory for every type and context.

    Raises
    ------
    UsageError: it is a checkpoint. UnsupportedCheckpoint: the header lacks the model's dimensions.
    """
    from qwenlocal.engine.memory import ModelDims
    from qwenlocal.machine import this_machine

    app = AppContext(quiet=as_json)
    name = app.models.parse(text)
    if isinstance(name, LocalCheckpointName):
        raise UsageError(f"{text} is a checkpoint.", hint=f"To plan its conversion: qwenlocal convert {text} --dry-run")
    with _read_outline(app, name) as model:
        dims = ModelDims.from_metadata(model.header.metadata)
        if dims is None:
            raise UnsupportedCheckpoint(
                model.name, "the header lacks the dimensions of the model", hint="Try to run it: qwenlocal run"
            )
        machine = this_machine()
        request = replace(request, threads=request.threads or machine.cores)
        available = machine.memory().available
        table = _table(model, dims, request)
        if as_json:
            print_json(_facts(model, dims, request, available, table))
        else:
            _show(model, dims, request, available, table, machine.features)


@contextmanager
def _read_outline(app: AppContext, name: ModelName) -> Iterator[ModelOutline]:
    """Read the header of the installed file, or from the first bytes of the file on a hub."""
    from qwenlocal.weights.gguf_reader import read_header
    from qwenlocal.weights.quant_mix import weights_size
    from qwenlocal.weights.split_model import read_split_model

    record = app.local.find(name)
    if record is not None:
        header = read_split_model(record.path).header
        yield ModelOutline(str(name), header, weights_size(header) or record.size, True)
        return
    with tempfile.TemporaryDirectory() as folder, app.open_puller() as puller:
        path, size = puller.download_prefix(name, Path(folder), _HEADER_BYTES)
        yield ModelOutline(str(name), read_header(path), size, False)


def _table(model: ModelOutline, dims: ModelDims, request: LoadRequest) -> dict[str, dict[int, int]]:
    """Return bytes by type and context; the file itself comes first, as "as it is", a key of the JSON output."""
    from qwenlocal.engine.context import ContextOptions
    from qwenlocal.engine.memory import estimate_memory
    from qwenlocal.weights.quant_mix import estimate_sizes

    levels = {"as it is": model.size}
    if model.header.architecture in ("qwen2", "qwen2moe"):
        levels |= estimate_sizes(model.header, _model_facts(model))
    kv_type = request.kv_type or "f16"
    flash_attention = bool(request.flash_attention) or kv_type not in ("f16", "bf16")
    contexts = [n_ctx for n_ctx in _CONTEXTS if n_ctx <= dims.n_ctx_train] or [dims.n_ctx_train]

    def total(weights: int, n_ctx: int) -> int:
        options = ContextOptions(
            n_ctx,
            n_ubatch=request.n_ubatch or 128,
            key_type=kv_type,
            value_type=kv_type,
            flash_attention=flash_attention,
        )
        return estimate_memory(dims, weights, options).total

    return {level: {n_ctx: total(weights, n_ctx) for n_ctx in contexts} for level, weights in levels.items()}


def _model_facts(model: ModelOutline) -> ModelFacts:
    from qwenlocal.engine.memory import ModelDims
    from qwenlocal.weights.quant_mix import ModelFacts

    dims = ModelDims.from_metadata(model.header.metadata)
    experts = model.header.hyperparameter("expert_count")
    gqa = (dims.n_heads or dims.n_kv_heads) // max(1, dims.n_kv_heads) if dims else 1
    layers = dims.n_layers if dims else 0
    return ModelFacts(model.header.architecture, layers, gqa, experts if isinstance(experts, int) else 0)


def _describe_plan(model: ModelOutline, dims: ModelDims, request: LoadRequest, available: int) -> str:
    from qwenlocal.engine.load_plan import plan_load
    from qwenlocal.terminal.load_notes import describe_note, describe_plan

    try:
        plan = plan_load(model.name, dims, model.size, available, request)
        return "\n".join((describe_plan(plan), *map(describe_note, plan.notes)))
    except NotEnoughMemory as error:
        return f"{error} {error.hint}"


def _show(
    model: ModelOutline,
    dims: ModelDims,
    request: LoadRequest,
    available: int,
    table: dict[str, dict[int, int]],
    features: frozenset[str],
) -> None:
    state = "installed" if model.is_installed else "not downloaded; only its header was read"
    sys.stdout.write(f"{model.name} ({state})\n{_describe_plan(model, dims, request, available)}\n\n")
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
    if share < _MIN_SLOW_SHARE or model.header.architecture not in ("qwen2", "qwen2moe"):
        return ""
    size = estimate_sizes(model.header, _model_facts(model), ["q4_0"])["q4_0"]
    return (
        f"{share:.0%} of the matrices ({', '.join(types)}) have types without fast llama.cpp kernels on this "
        f"processor. As q4_0 the model takes {format_bytes(size)} and answers faster, with a small loss of quality."
    )


def _facts(
    model: ModelOutline, dims: ModelDims, request: LoadRequest, available: int, table: dict[str, dict[int, int]]
) -> dict[str, Any]:
    from qwenlocal.engine.load_plan import plan_load

    facts: dict[str, Any] = {"name": model.name, "here": model.is_installed, "available": available, "memory": table}
    try:
        plan = plan_load(model.name, dims, model.size, available, request)
    except NotEnoughMemory as error:
        return {**facts, "plan": None, "reason": str(error)}
    memory = plan.memory
    return {
        **facts,
        "plan": {
            "n_ctx": plan.options.n_ctx,
            "key_type": plan.options.key_type,
            "value_type": plan.options.value_type,
            "flash_attention": plan.options.flash_attention,
            **(
                {"weights": memory.weights, "kv": memory.kv_cache, "compute": memory.compute, "total": memory.total}
                if memory
                else {}
            ),
        },
    }
