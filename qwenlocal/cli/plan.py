"""`qwenlocal plan`: how much memory a model takes in every level and context, before it is fetched or loaded."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.values import bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import CannotExpress, NotEnoughMemory, UsageProblem
from qwenlocal.library.names import LocalCheckpointName, Name

if TYPE_CHECKING:
    from qwenlocal.engine.shape import Shape
    from qwenlocal.engine.wanted import Wanted
    from qwenlocal.weights.header import Header
    from qwenlocal.weights.mix import ModelFacts

FRONT = 8 << 20  # bytes in which the header of any Qwen model ends
_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
_MOSTLY_SLOW = 0.5
_GIB = 2**30


@dataclass(frozen=True)
class Known:
    """A model's header, and the bytes of its files, whether they are here or not."""

    name: str
    header: Header
    size: int
    is_here: bool


def plan_model(text: str, wanted: Wanted, *, as_json: bool) -> None:
    """Print how the model would be loaded, and what every level and context would take."""
    from qwenlocal.engine.shape import Shape
    from qwenlocal.machine import this_machine

    program = Program(quiet=as_json)
    name = program.parse(text)
    if isinstance(name, LocalCheckpointName):
        raise UsageProblem(f"{text} is a checkpoint.", hint=f"What it would become: qwenlocal convert {text} --dry-run")
    with _known(program, name) as known:
        shape = Shape.of(known.header.metadata)
        if shape is None:
            raise CannotExpress(
                known.name, "its header does not state its shape", hint="It can be tried: qwenlocal run"
            )
        machine = this_machine()
        wanted = replace(wanted, threads=wanted.threads or machine.cores)
        available = machine.memory().available
        table = _table(known, shape, wanted)
        if as_json:
            print_json(_as_json(known, shape, wanted, available, table))
        else:
            _show(known, shape, wanted, available, table, machine.features)


@contextmanager
def _known(program: Program, name: Name) -> Iterator[Known]:
    """The header, of the file here or of the beginning of one that is elsewhere."""
    from qwenlocal.weights.header import read_header
    from qwenlocal.weights.levels import weights_of
    from qwenlocal.weights.parts import read_parts

    record = program.local.here(name)
    if record is not None:
        header = read_parts(record.path).header
        yield Known(str(name), header, weights_of(header) or record.size, True)
        return
    with tempfile.TemporaryDirectory() as folder, program.puller() as puller:
        path, size = puller.front(name, Path(folder), FRONT)
        yield Known(str(name), read_header(path), size, False)


def _table(known: Known, shape: Shape, wanted: Wanted) -> dict[str, dict[int, int]]:
    """Bytes by level and context; the file's own level first, under “as it is”."""
    from qwenlocal.engine.context import ContextOptions
    from qwenlocal.engine.memory import memory_needed
    from qwenlocal.weights.levels import sizes_of_levels

    levels = {"as it is": known.size}
    if known.header.architecture in ("qwen2", "qwen2moe"):
        levels |= sizes_of_levels(known.header, _facts(known))
    flash = bool(wanted.flash_attention)
    kind = wanted.kv_type or "f16"
    contexts = [n_ctx for n_ctx in _CONTEXTS if n_ctx <= shape.n_ctx_train] or [shape.n_ctx_train]

    def total(weights: int, n_ctx: int) -> int:
        flash_too = flash or kind not in ("f16", "bf16")
        options = ContextOptions(
            n_ctx, n_ubatch=wanted.together or 128, key_type=kind, value_type=kind, flash_attention=flash_too
        )
        return memory_needed(shape, weights, options).total

    return {level: {n_ctx: total(weights, n_ctx) for n_ctx in contexts} for level, weights in levels.items()}


def _facts(known: Known) -> ModelFacts:
    from qwenlocal.engine.shape import Shape
    from qwenlocal.weights.mix import ModelFacts

    shape = Shape.of(known.header.metadata)
    experts = known.header.hyperparameter("expert_count")
    gqa = (shape.heads or shape.kv_heads) // max(1, shape.kv_heads) if shape else 1
    layers = shape.layers if shape else 0
    return ModelFacts(known.header.architecture, layers, gqa, experts if isinstance(experts, int) else 0)


def _chosen(known: Known, shape: Shape, wanted: Wanted, available: int) -> str:
    from qwenlocal.engine.load_plan import choose_plan

    try:
        plan = choose_plan(known.name, shape, known.size, available, wanted)
        return "\n".join((plan.sentence(), *plan.notes))
    except NotEnoughMemory as reason:
        return f"{reason} {reason.hint}"


def _show(
    known: Known,
    shape: Shape,
    wanted: Wanted,
    available: int,
    table: dict[str, dict[int, int]],
    features: frozenset[str],
) -> None:
    where = "here" if known.is_here else "not here yet; only the beginning of its file was read"
    sys.stdout.write(f"{known.name} ({where})\n{_chosen(known, shape, wanted, available)}\n\n")
    contexts = list(next(iter(table.values())))
    rows = [
        (level, *(f"{size / _GIB:.1f} GiB{'' if size <= available else ' *'}" for size in sizes.values()))
        for level, sizes in table.items()
    ]
    if advice := _advice(known, features):
        sys.stdout.write(advice + "\n\n")
    print_table(("LEVEL", *(f"{n_ctx:,} TOKENS" for n_ctx in contexts)), rows)
    if any(size > available for sizes in table.values() for size in sizes.values()):
        sys.stdout.write(f"\n* does not fit: {available / _GIB:.1f} GiB are free\n")


def _advice(known: Known, features: frozenset[str]) -> str:
    """What would be faster, where most of the weights are in types for which this processor has no fast way."""
    from qwenlocal.weights.levels import sizes_of_levels, slow_types

    share, kinds = slow_types(known.header, features)
    if share < _MOSTLY_SLOW or known.header.architecture not in ("qwen2", "qwen2moe"):
        return ""
    size = sizes_of_levels(known.header, _facts(known), ["q4_0"])["q4_0"]
    return (
        f"{share:.0%} of its matrices ({', '.join(kinds)}) are in types for which llama.cpp has no fast way on this "
        f"processor. As q4_0 it would be {bytes_for_people(size)} and answer faster, for a small loss."
    )


def _as_json(
    known: Known, shape: Shape, wanted: Wanted, available: int, table: dict[str, dict[int, int]]
) -> dict[str, Any]:
    from qwenlocal.engine.load_plan import choose_plan

    found: dict[str, Any] = {"name": known.name, "here": known.is_here, "available": available, "memory": table}
    try:
        plan = choose_plan(known.name, shape, known.size, available, wanted)
    except NotEnoughMemory as reason:
        return {**found, "plan": None, "reason": str(reason)}
    need = plan.need
    return {
        **found,
        "plan": {
            "n_ctx": plan.options.n_ctx,
            "key_type": plan.options.key_type,
            "value_type": plan.options.value_type,
            "flash_attention": plan.options.flash_attention,
            **({"weights": need.weights, "kv": need.kv, "compute": need.compute, "total": need.total} if need else {}),
        },
    }
