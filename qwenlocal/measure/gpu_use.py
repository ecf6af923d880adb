"""
Measurement of the best use of a GPU with a model: everything, long prompts only, or nothing.

A slow integrated GPU often evaluates prompts faster than the processor but decodes more slowly, because both wait for
the same memory. The measurement loads the model a few times; it is done once per model and GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qwenlocal.devices import Device
from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.device_plan import choose_offload, plan_load_with_offload
from qwenlocal.engine.gpu_offload import GpuOffload, read_layer_sizes
from qwenlocal.engine.loader import LoadOptions, open_model
from qwenlocal.engine.memory import ModelDims
from qwenlocal.engine.tuned_settings import GpuUse
from qwenlocal.errors import BadWeights, ContextNotCreated, GpuOutOfMemory, NotEnoughMemory
from qwenlocal.machine import Machine
from qwenlocal.measure.bench import decode_speed, fill_cache, prefill_speed
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.split_model import shard_paths

_PROMPT, _ANSWER = 256, 128  # tokens of a typical turn
_TRIAL, _SAMPLE = 32, 8  # tokens evaluated before the measurement, and tokens decoded for it
_CONTEXT = 512
_MIN_GAIN = 0.95  # a GPU must save a twentieth of the time; the processor leaves it to other programs


def measure_gpu_use(
    path: Path,
    size: int,
    options: LoadOptions,
    machine: Machine,
    abort: AbortFlag,
    on_start: Callable[[Sequence[Device]], object] = lambda devices: None,
) -> GpuUse | None:
    """
    Measure with the model in `path`, `size` bytes of weights; `on_start` gets the GPUs that are about to be measured.

    Returns None if there is nothing to compare: the GPUs were measured before or hold no layer, or the model does not
    fit into the memory of the machine without them.

    Raises
    ------
    BadWeights, ContextNotCreated: the model cannot be loaded. Aborted, LoadCancelled: `abort` was set.
    """
    dims, request, tuned = ModelDims.from_metadata(read_metadata(path)), options.request, options.tuned
    offload = choose_offload(lambda: read_layer_sizes(shard_paths(path)), dims, size, request, options.gpu)
    names = tuple(device.name for device in offload.devices)
    if not offload.layers or (tuned.gpu and tuned.gpu.devices == names):
        return None
    on_start(offload.devices)
    threads = request.threads or tuned.threads or machine.cores
    request = replace(request, n_ctx=_CONTEXT, threads=threads)

    def plan(offload: GpuOffload) -> ContextOptions:
        available = machine.memory().available
        return plan_load_with_offload(path.name, dims, size, available, request, offload).options

    try:
        return find_gpu_use(path, offload, plan, abort)
    except NotEnoughMemory:
        return None


def find_gpu_use(
    path: Path,
    offload: GpuOffload,
    plan: Callable[[GpuOffload], ContextOptions],
    abort: AbortFlag,
    clock: Callable[[], float] = time.monotonic,
) -> GpuUse:
    """
    Compare a turn of 256 tokens of prompt and 128 of answer on the processor, with `offload`, and with prompts on GPUs.

    `plan` gives the context options for an offload.

    Raises
    ------
    BadWeights, ContextNotCreated, NotEnoughMemory: the processor cannot run the model. Aborted, LoadCancelled: `abort`
    was set.
    """

    def measure(offload: GpuOffload, limit: float) -> float:
        opened = open_model(path, plan(offload), offload, {}, lambda _fraction: not abort, abort=abort)
        try:
            return _turn_seconds(opened.context, clock, limit)
        finally:
            opened.context.close()
            opened.model.close()

    best, use = measure(GpuOffload(0, offload.total), float("inf")) * _MIN_GAIN, "none"
    for candidate, name in ((offload, "layers"), (GpuOffload(0, offload.total, offload.devices), "prompts")):
        try:
            seconds = measure(candidate, best)
        except (BadWeights, ContextNotCreated, GpuOutOfMemory, NotEnoughMemory):
            continue  # the GPU cannot hold it
        if seconds < best:
            best, use = seconds, name
    return GpuUse(tuple(device.name for device in offload.devices), use)


def _turn_seconds(context: Context, clock: Callable[[], float], limit: float) -> float:
    """Return the seconds of a turn, or infinity if the first few tokens take longer than `limit`."""
    fill_cache(context, _TRIAL)  # the first computation compiles the GPU's programs
    context.truncate(0, 0)
    started = clock()
    fill_cache(context, _TRIAL)
    if clock() - started > limit:
        return float("inf")
    prompt = _PROMPT / prefill_speed(context, _PROMPT)
    return prompt + _ANSWER / decode_speed(context, _SAMPLE)
