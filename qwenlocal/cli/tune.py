"""`qwenlocal tune`: measure settings for a model on this machine, and remember them."""

from __future__ import annotations

import os
import sys

from qwenlocal.cli.values import print_json
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import CannotWrite, UsageProblem


def tune_model(text: str, *, seconds: float, as_json: bool) -> None:
    """Measure for about `seconds`, and write down what is quickest."""
    from dataclasses import asdict

    from qwenlocal.engine.saved import digest_of
    from qwenlocal.engine.tuned import write_tuned
    from qwenlocal.machine import power_source, this_machine
    from qwenlocal.measure.tune import thread_counts, tune
    from qwenlocal.terminal.status import StatusLine

    if not 1 <= seconds <= 3600:
        raise UsageProblem(f"--seconds must lie between 1 and 3,600; it is {seconds:g}.")
    program = Program(quiet=as_json)
    record, machine = program.have(program.parse(text)), this_machine()
    line = StatusLine(sys.stderr, patience=0)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > machine.cores / 2:
        program.say("Something else keeps this machine busy; what is measured now may not hold when it is idle.")
    counts = thread_counts(machine.cores, os.cpu_count() or 1)
    found = tune(record.path, counts, seconds=seconds, report=lambda what: line.show(f"measuring {what}"))
    line.clear()
    power, folder = power_source(), program.folders.tuned
    try:
        write_tuned(folder, digest_of(record.path), power, found)
    except OSError as reason:
        raise CannotWrite(folder, reason.strerror or str(reason)) from reason
    if as_json:
        print_json({"model": text, "power": power, **asdict(found)})
        return
    costs = ", ".join(f"{count}: {cost:.1f}" for count, cost in found.costs.items())
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    flash = "on" if found.flash_attention else "off"
    sys.stdout.write(
        f"{text}, on {power}: {threads}, flash attention {flash}, {found.together} tokens at once when reading\n"
        f"decoding several tokens at once takes, relative to one: {costs}\n"
        "Remembered; run uses it from now on.\n"
    )
