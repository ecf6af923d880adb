"""Execution of a conversion or quantization plan: check memory, then write the GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qwenlocal.errors import DiskFull, NonFiniteWeights, NotEnoughMemory, NotWritable
from qwenlocal.machine import this_machine
from qwenlocal.weights import write_job, write_workers

if TYPE_CHECKING:
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.write_workers import WriteResult


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
) -> WriteResult:
    """
    Write the files of `plan` with `threads` threads (0: one per fast core); `report` gets bytes read and bytes in all.

    The hints replace those of the errors, because the next step depends on the command; "" keeps the error's own.

    Raises
    ------
    NotEnoughMemory: the buffers of all threads do not fit into the memory that is available.
    Everything that `weights.write_workers.run_job` raises.
    """
    machine = this_machine()
    count = threads or machine.cores
    needed, available = write_job.memory_needed(plan.job, count), machine.memory().available
    if needed > available:
        hint = memory_hint or "Close other programs, and try again."
        raise NotEnoughMemory("Converting", needed, available, hint=hint)
    try:
        return write_workers.run_job(plan.job, threads=count, replace=replace, allow_nan=allow_nan, report=report)
    except (DiskFull, NotWritable) as error:
        error.hint = disk_hint or error.hint
        raise
    except NonFiniteWeights as error:
        error.hint = not_finite_hint or error.hint
        raise
