"""Execution of a conversion or quantization plan: check memory, then write the GGUF files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import DiskFull, NonFiniteWeights, NotEnoughMemory, NotWritable
from qwenlocal.formatting import format_percent, format_quantity
from qwenlocal.machine import this_machine
from qwenlocal.weights import write_job, write_workers

if TYPE_CHECKING:
    from qwenlocal.library.streaming.streamed_files import StreamedFiles
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.packed_proof import PackedProof
    from qwenlocal.weights.write_workers import Inspect, WriteResult


def execute_plan(
    plan: ConversionPlan,
    *,
    threads: int = 0,
    replace: bool = False,
    allow_nan: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    disk_hint: str = "",
    not_finite_hint: str = "",
    memory_hint: str = "",
    sources: StreamedFiles | None = None,
    inspect: Inspect | None = None,
) -> WriteResult:
    """
    Write the files of `plan` with `threads` threads (0: one per fast core); `report` gets bytes read and bytes in all.

    `sources` and `inspect` are those of `weights.write_workers.run_job`.

    The hints replace those of the errors, because the next step depends on the command; "" keeps the error's own.

    Raises
    ------
    NotEnoughMemory: the buffers of all threads do not fit into the memory that is available.
    Everything that `weights.write_workers.run_job` raises.
    """
    machine = this_machine()
    count = threads or machine.cores
    buffers = sources.buffer_size if sources else 0
    needed, available = write_job.memory_needed(plan.job, count) + buffers, machine.memory().available
    if needed > available:
        hint = memory_hint or "Close other programs, and try again."
        raise NotEnoughMemory("Converting", needed, available, hint=hint)
    try:
        return write_workers.run_job(
            plan.job,
            threads=count,
            replace=replace,
            allow_nan=allow_nan,
            report=report,
            sources=sources,
            inspect=inspect,
        )
    except (DiskFull, NotWritable) as error:
        error.hint = disk_hint or error.hint
        raise
    except NonFiniteWeights as error:
        error.hint = not_finite_hint or error.hint
        raise


def check_packed_weights(
    plan: ConversionPlan,
    *,
    threads: int = 0,
    report: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> Mapping[Path, PackedProof]:
    """
    Compare the files of `plan`, once they are written, with the packed weights (GPTQ, AWQ) they were made from.

    `report` gets the name of a file, and how many of how many bytes are compared. Files without packed weights are left
    out.

    Raises
    ------
    BadWeights: a weight differs, although its type can hold it.
    """
    from qwenlocal.weights.packed_proof import compare_packed_weights, unequal_weights

    proofs = {}
    for number, file in enumerate(plan.files):
        show = functools.partial(report, file.path.name)
        proof = compare_packed_weights(plan, number, threads or this_machine().cores, show)
        if proof and proof.is_exact and proof.difference != 0:
            raise unequal_weights(file.path, proof.difference)
        if proof:
            proofs[file.path] = proof
    return proofs


def describe_proof(proof: PackedProof) -> str:
    """Say how much the written weights differ from the packed ones."""
    largest = f"{proof.difference:.2g} ({format_percent(proof.steps)} of a step)" if proof.difference else "0"
    weights = format_quantity(proof.weights, "packed weight")
    text = f"Compared {weights} with the checkpoint: largest difference {largest}."
    return f"{text} An interrupted attempt compared {proof.earlier:,} more." if proof.earlier else text
