"""`qwenlocal tune`: measure the fastest settings for a model on this machine, and save them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import OutOfRange
from qwenlocal.formatting import format_quantity

if TYPE_CHECKING:
    from qwenlocal.engine.tuned_settings import GpuUse


def tune_model(text: str, *, seconds: float, as_json: bool) -> None:
    """
    Measure settings for about `seconds`, and save the fastest for `run`.

    Raises
    ------
    UsageError: `seconds` is out of range. BadWeights: llama.cpp cannot run the model. NotWritable: the settings cannot
    be saved.
    """
    from qwenlocal.engine.context import AbortFlag
    from qwenlocal.engine.loader import LoadOptions
    from qwenlocal.engine.prompt_cache import fingerprint_model
    from qwenlocal.engine.tuned_settings import write_tuned_settings
    from qwenlocal.machine import power_source, this_machine
    from qwenlocal.measure.gpu_use import measure_gpu_use
    from qwenlocal.measure.tune import thread_counts, tune
    from qwenlocal.terminal.progress import status_line
    from qwenlocal.weights.load_errors import check_file

    if not 1 <= seconds <= 3600:
        raise OutOfRange("--seconds", 1, 3600, seconds)
    app = AppContext(quiet=as_json)
    record, machine = app.library.models.ensure_model(app.library.models.resolve(text)), this_machine()
    check_file(record.path)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > machine.cores / 2:
        app.say("Other programs keep this machine busy, so the results may not hold when it is idle.")
    counts = thread_counts(machine.cores, machine.logical_cores)
    with status_line(sys.stderr, delay=0) as show:
        settings = tune(record.path, counts, seconds=seconds, report=lambda task: show(f"measuring {task}"))
        show("measuring the GPU")
        options = LoadOptions(tuned=replace(settings, gpu=None))
        settings = replace(settings, gpu=measure_gpu_use(record.path, record.size, options, machine, AbortFlag()))
    power = power_source()
    write_tuned_settings(app.library.folders.tuned, fingerprint_model(record.path), power, settings)
    if as_json:
        print_json({"model": text, "power": power, **settings.to_json()})
        return
    costs = ", ".join(f"{count}: {cost:.1f}" for count, cost in settings.costs.items())
    threads = format_quantity(settings.threads, "thread")
    flash = "on" if settings.flash_attention else "off"
    sys.stdout.write(
        f"{text}, on {'AC' if power == 'mains' else 'battery'} power: {threads}, flash attention {flash}, "
        f"{settings.n_ubatch} tokens per physical batch\n"
        f"cost of decoding several tokens at once, relative to one: {costs}\n"
        f"{_describe_gpu(settings.gpu)}"
        "Saved; qwenlocal run uses these settings from now on.\n"
    )


def _describe_gpu(gpu: GpuUse | None) -> str:
    if gpu is None:
        return ""
    uses = {"layers": "used for as many layers as fit", "prompts": "used for long prompts", "none": "not used"}
    return f"{', '.join(gpu.devices)}: {uses[gpu.use]}, because that is fastest\n"
