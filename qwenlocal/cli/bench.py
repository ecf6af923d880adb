"""`qwenlocal bench`: how fast models are here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.values import bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import UsageProblem

if TYPE_CHECKING:
    from qwenlocal.engine.wanted import Wanted
    from qwenlocal.measure.bench import Result
    from qwenlocal.terminal.status import StatusLine

_BAR = 40


def bench_models(
    names: Sequence[str], wanted: Wanted, *, repetitions: int, depths: str, as_json: bool, plot: bool
) -> None:
    """Measure every model, and print a table for each, or one JSON list."""
    from qwenlocal.engine.plan import choose_plan
    from qwenlocal.engine.shape import Shape
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.bench import ANSWER, measure
    from qwenlocal.terminal.status import StatusLine
    from qwenlocal.weights.header import read_metadata

    if not 1 <= repetitions <= 1000:
        raise UsageProblem(f"-r must lie between 1 and 1,000; it is {repetitions}.")
    asked = _depths(depths)
    program, machine = Program(quiet=as_json), this_machine()
    records = [(text, program.have(program.parse(text))) for text in names]
    found = []
    for text, record in records:
        shape = Shape.of(read_metadata(record.path))
        most = max((depth for depth in asked if shape is None or depth + ANSWER <= shape.n_ctx_train), default=0)
        within = replace(
            wanted, rope="none", threads=wanted.threads or machine.cores, n_ctx=max(most, 512) + ANSWER + 8
        )
        plan = choose_plan(text, shape, record.size, machine.memory().available, within)
        line = StatusLine(sys.stderr, patience=0)
        fitting = [depth for depth in asked if depth <= most]
        result = measure(
            record.path,
            plan.options,
            repetitions=repetitions,
            depths=fitting,
            report=functools.partial(_say, line, text),
        )
        line.clear()
        found.append(_as_json(text, result))
        if not as_json:
            _show(text, result, plot=plot)
    if as_json:
        print_json(found)


def _say(line: StatusLine, name: str, what: str) -> None:
    line.show(f"{name}: {what}")


def _depths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) < 8 and int(part) <= 1 << 20 for part in parts):
        raise UsageProblem(f"--depths is a list of numbers of tokens; it is {text}.", hint="For example: 0,512,4096")
    return sorted({0, *map(int, parts)})


def _show(name: str, result: Result, *, plot: bool) -> None:
    options = result.options
    sys.stdout.write(
        f"{name}: {options.threads} threads, {options.key_type} keys, {options.value_type} values, flash attention "
        f"{'on' if options.flash_attention else 'off'}, {options.n_ubatch} tokens at once\n"
    )
    rows = [(what, f"{speed.mean:.2f} ± {speed.deviation:.2f}") for what, speed in result.speeds.items()]
    print_table(("", "TOKENS/S"), rows)
    times = {"load": result.load, "first token, warm": result.first_warm, "first token, cold": result.first_cold}
    said = [f"{what} {seconds:.2f} s" for what, seconds in times.items() if seconds is not None]
    said += [f"memory {bytes_for_people(result.memory)}"] if result.memory is not None else []
    said += [f"{result.joules:.2f} J a token"] if result.joules is not None else []
    sys.stdout.write(", ".join(said) + "\n")
    if plot:
        _plot(result)
    sys.stdout.write("\n")


def _plot(result: Result) -> None:
    """A bar for each speed; reading and decoding have a scale of their own."""
    for prefix in ("pp", "tg"):
        speeds = {what: speed.mean for what, speed in result.speeds.items() if what.startswith(prefix)}
        for what, mean in speeds.items():
            bar = "█" * max(1, round(_BAR * mean / max(speeds.values())))
            sys.stdout.write(f"{what:<16} {bar} {mean:.1f}\n")


def _as_json(name: str, result: Result) -> dict[str, Any]:
    speeds = {
        what.replace(" ", "_"): {
            "tok_s": round(speed.mean, 3),
            "stddev": round(speed.deviation, 3),
            "samples": [round(sample, 3) for sample in speed.samples],
        }
        for what, speed in result.speeds.items()
    }
    options = result.options
    return {
        "model": name,
        **speeds,
        "load_s": round(result.load, 4),
        "first_token_warm_s": round(result.first_warm, 4),
        "first_token_cold_s": None if result.first_cold is None else round(result.first_cold, 4),
        "memory_bytes": result.memory,
        "joules_per_token": result.joules,
        "threads": options.threads,
        "key_type": options.key_type,
        "value_type": options.value_type,
        "flash_attention": options.flash_attention,
        "n_ubatch": options.n_ubatch,
    }
