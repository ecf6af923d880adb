"""`qwenlocal bench`: benchmark models on this machine."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.options import split_list
from qwenlocal.errors import OutOfRange, UsageError
from qwenlocal.formatting import format_bytes, format_quantity

if TYPE_CHECKING:
    from qwenlocal.engine.load_plan import LoadRequest
    from qwenlocal.measure.bench import BenchResult, Speed

_BAR_WIDTH = 40  # columns


def bench_models(
    names: Sequence[str],
    request: LoadRequest,
    *,
    full: bool,
    repetitions: int | None,
    depths: str | None,
    as_json: bool,
    plot: bool,
) -> None:
    """
    Benchmark every model; print a table for each, or one JSON list.

    Raises
    ------
    UsageError: the repetitions or depths are invalid. BadWeights: llama.cpp cannot run a model.
    """
    from qwenlocal.engine.load_plan import plan_load
    from qwenlocal.engine.memory import ModelDims
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.bench import ANSWER, FULL_PLAN, QUICK_PLAN, run_benchmarks
    from qwenlocal.terminal.progress import status_line
    from qwenlocal.weights.load_errors import check_file

    tests = FULL_PLAN if full else QUICK_PLAN
    if repetitions is not None:
        if not 1 <= repetitions <= 1000:
            raise OutOfRange("-r", 1, 1000, repetitions)
        tests = replace(tests, repetitions=repetitions)
    if depths is not None:
        tests = replace(tests, depths=_parse_depths(depths))
    app, machine = AppContext(quiet=as_json), this_machine()
    records = [(text, app.library.models.ensure_model(app.library.models.resolve(text))) for text in names]
    results = []
    for text, record in records:
        header = check_file(record.path).header
        dims = ModelDims.from_metadata(header.metadata)
        possible = [depth for depth in tests.depths if dims is None or depth + ANSWER <= dims.n_ctx_train]
        model_tests = replace(tests, depths=possible)
        bench_request = replace(
            request, rope="none", threads=request.threads or machine.cores, n_ctx=model_tests.max_tokens
        )
        plan = plan_load(text, dims, record.size, machine.memory().available, bench_request)
        with status_line(sys.stderr, delay=0) as show:
            result = run_benchmarks(
                record.path, header, plan.options, model_tests, functools.partial(_show_task, show, text)
            )
        results.append(_facts(text, result))
        if not as_json:
            _show(text, result, plot=plot)
    if as_json:
        print_json(results)


def _show_task(show: Callable[[str], None], name: str, task: str) -> None:
    show(f"{name}: {task}")


def _parse_depths(text: str) -> list[int]:
    parts = split_list(text)
    if not all(part.isdecimal() and len(part) < 8 and int(part) <= 1 << 20 for part in parts):
        raise UsageError(f"--depths must be a list of token counts, not {text}.", hint="For example: 0,512,4096")
    return sorted({*map(int, parts)} - {0})


def _show(name: str, result: BenchResult, *, plot: bool) -> None:
    options = result.options
    threads = format_quantity(options.threads, "thread")
    sys.stdout.write(
        f"{name}: {threads}, {options.key_type} keys, {options.value_type} values, flash attention "
        f"{'on' if options.flash_attention else 'off'}, {options.n_ubatch} tokens per physical batch\n"
    )
    print_table(("", "TOKENS/S"), [(test, _describe_speed(speed)) for test, speed in result.speeds.items()])
    facts = [f"load {result.load:.2f} s", f"first token {result.first_warm:.2f} s warm"]
    facts += [f"{result.first_cold:.2f} s cold"] if result.first_cold is not None else []
    facts += [f"memory {format_bytes(result.memory)}"] if result.memory is not None else []
    facts += [f"{result.joules:.2f} J per token"] if result.joules is not None else []
    sys.stdout.write(", ".join(facts) + "\n")
    sys.stdout.write("".join(f"{line}\n" for line in _describe_limits(result)))
    if plot:
        _plot(result)
    sys.stdout.write("\n")


def _describe_limits(result: BenchResult) -> Iterator[str]:
    """Tell how near the limits of the machine the model runs, and where the time of a token goes."""
    work, limits, threads = result.work, result.limits, format_quantity(result.options.threads, "thread")
    yield (
        f"decoding reads {format_bytes(work.bytes)} per token: {result.bandwidth_share:.0%} of the "
        f"{limits.bandwidth / 1e9:.1f} GB/s that {threads} can read from memory"
    )
    if limits.operations and result.operations_share:
        yield (
            f"prefilling takes {work.operations / 1e9:.2f} billion operations per token: {result.operations_share:.0%} "
            f"of the {limits.operations / 1e12:.2f} trillion per second that {threads} can do on 8-bit integers"
        )
    total, reading = 1e3 / result.decode, 1e3 * work.bytes / limits.bandwidth
    yield (
        f"time per token: {total + 1e3 * result.text_seconds:.1f} ms = reading the weights {reading:.1f} + "
        f"computing and waiting {max(0.0, total - reading):.1f} + sampling and text {1e3 * result.text_seconds:.1f}"
    )


def _describe_speed(speed: Speed) -> str:
    deviation = f" ± {speed.deviation:.2f}" if len(speed.samples) > 1 else ""
    return f"{speed.mean:.2f}{deviation}"


def _plot(result: BenchResult) -> None:
    """Draw a bar for each speed; prefill and decoding have separate scales."""
    for prefix in ("pp", "tg"):
        speeds = {test: speed.mean for test, speed in result.speeds.items() if test.startswith(prefix)}
        for test, mean in speeds.items():
            bar = "█" * max(1, round(_BAR_WIDTH * mean / max(speeds.values())))
            sys.stdout.write(f"{test:<16} {bar} {mean:.1f}\n")


def _facts(name: str, result: BenchResult) -> dict[str, Any]:
    speeds = {
        test.replace(" ", "_"): {
            "tok_s": round(speed.mean, 3),
            "stddev": round(speed.deviation, 3),
            "samples": [round(sample, 3) for sample in speed.samples],
        }
        for test, speed in result.speeds.items()
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
        "bytes_per_token": result.work.bytes,
        "bandwidth_bytes_s": round(result.limits.bandwidth),
        "bandwidth_share": round(result.bandwidth_share, 4),
        "operations_per_token": result.work.operations,
        "operations_s": result.limits.operations and round(result.limits.operations),
        "operations_share": result.operations_share and round(result.operations_share, 4),
        "threads": options.threads,
        "key_type": options.key_type,
        "value_type": options.value_type,
        "flash_attention": options.flash_attention,
        "n_ubatch": options.n_ubatch,
    }
