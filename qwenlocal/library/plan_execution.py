"""Execution of a conversion or quantization plan: check memory, then write the GGUF files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
) -> WriteResult:
    """
    Write the files of `plan` with `threads` threads (0: one per fast core); `report` gets bytes read and bytes in all.

    Raises
    ------
    NotEnoughMemory: the buffers of all threads do not fit into the memory that is available.
    Everything that `weights.write_workers.run_job` raises.
    """
    machine = this_machine()
    count = threads or machine.cores
    needed, available = write_job.memory_needed(plan.job, count), machine.memory().available
    if needed > available:
        raise NotEnoughMemory("Converting", needed, available, hint="Close other programs, and try again.")
    return write_workers.run_job(plan.job, threads=count, replace=replace, allow_nan=allow_nan, report=report)


@contextlib.contextmanager
def replace_hints(*, disk: str = "", not_finite: str = "", memory: str = "") -> Iterator[None]:
    """Replace the hints of `execute_plan`'s errors: the next step depends on the command. "" keeps the error's own."""
    try:
        yield
    except (DiskFull, NotWritable) as error:
        error.hint = disk or error.hint
        raise
    except NonFiniteWeights as error:
        error.hint = not_finite or error.hint
        raise
    except NotEnoughMemory as error:
        error.hint = memory or error.hint
        raise
