"""`qwenlocal quality`: measure perplexity, the divergence from a base, and the loss of each quantization level."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.errors import Interrupted, NotWritable, OutOfRange, UsageError
from qwenlocal.formatting import format_bytes, format_model_name, format_quantity, join_sentences
from qwenlocal.i18n import tr
from qwenlocal.paths import parse_path
from qwenlocal.text_encoding import read_text

if TYPE_CHECKING:
    from qwenlocal.cli.quality_levels import LevelReport
    from qwenlocal.measure.kl_divergence import Divergence
    from qwenlocal.measure.perplexity import Estimate
    from qwenlocal.measure.quality import ModelFile, Quality, QualityMeter, QualityTest
    from qwenlocal.weights.file_types import FileType

_MAX_TEXT = 1 << 28  # bytes
_MAX_CHUNKS = 1_000_000
_GIB = 2**30


@dataclass(frozen=True)
class QualityOptions:
    """The options of a measurement that do not depend on the model."""

    text: str | None
    n_ctx: int
    chunks: int | None
    threads: int | None
    plot: str | None
    as_json: bool


def measure_quality(
    model: str, *, base: str | None, levels: Sequence[str], imatrix: str | None, options: QualityOptions
) -> None:
    """
    Measure a model, compared with a base if there is one, or the `levels` made from it with the matrix `imatrix`.

    Raises
    ------
    UsageError: options contradict each other. Everything that measuring raises.
    """
    if levels and base:
        raise UsageError(
            tr("--base and --levels cannot be combined: levels are compared with MODEL."), hint=tr("Leave out --base.")
        )
    if imatrix and not levels:
        raise UsageError(tr("--imatrix needs --levels."), hint=tr("Add --levels TYPE,TYPE…, or leave out --imatrix."))
    if options.plot and not base and not levels:
        raise UsageError(tr("--plot needs a base or levels."), hint=tr("Add --base MODEL or --levels TYPE,TYPE…"))
    if levels:
        _measure_levels(model, levels, imatrix, options)
    else:
        _measure_model(model, base, options)


def _measure_model(model: str, base: str | None, options: QualityOptions) -> None:
    """
    Measure a model, compared with a base if there is one.

    Raises
    ------
    UsageError: the text is too short, or the base has another vocabulary. BadWeights: llama.cpp cannot run a model.
    Interrupted: Ctrl-C, after the results so far are printed.
    """
    from qwenlocal.cli.quality_run import run_steps
    from qwenlocal.measure.quality import QualityMeter, check_vocabularies

    text, plot = _check_options(options)
    app = AppContext(quiet=options.as_json)
    file, reference = _find_model(app, model), _find_model(app, base) if base else None
    if reference:
        check_vocabularies(file, reference)
    test = _prepare_test(file, text, options)
    meter, base_meter = QualityMeter(file.name), QualityMeter(base or "")
    if reference:
        is_complete = run_steps(test, file.name, lambda: test.compare(file, reference, meter, base_meter))
    else:
        is_complete = run_steps(test, file.name, lambda: test.measure(file, meter))
    if meter.tokens:
        _report(test, file, reference, meter, options)
        if plot:
            _draw_quantiles(plot, file, meter)
    elif base_meter.tokens and reference:
        _report(test, reference, None, base_meter, options)
    if not is_complete:
        raise Interrupted(_describe_part(meter.windows or base_meter.windows, test))


def _measure_levels(model: str, levels: Sequence[str], imatrix: str | None, options: QualityOptions) -> None:
    """
    Make levels of a model, and measure each of them against it.

    Raises
    ------
    UsageError: the text is too short, there is no such level, or the model is quantized already.
    Interrupted: Ctrl-C, after the results so far are printed.
    """
    from qwenlocal.cli.gguf_files import WriteOptions, read_options
    from qwenlocal.cli.quality_levels import measure_levels, plan_levels
    from qwenlocal.cli.quality_run import interrupt_on_signals

    text, plot = _check_options(options)
    types, overrides, matrix = read_options(WriteOptions(model, None, levels, "--levels", imatrix=imatrix))
    app = AppContext(quiet=options.as_json)
    reports: list[LevelReport] = []
    interrupt = None
    try:
        with interrupt_on_signals(), plan_levels(app, model, types, overrides, matrix) as plans:
            test = _prepare_test(plans.outline, text, options)
            measure_levels(test, plans, reports)
    except (KeyboardInterrupt, Interrupted) as error:
        if not reports:
            raise Interrupted from error
        interrupt = error
    _report_levels(test, model, reports, options)
    if plot:
        _draw_levels(plot, model, reports)
    if interrupt:
        raise Interrupted(_describe_unmeasured(test, types, reports)) from interrupt


def _describe_part(windows: int, test: QualityTest) -> str:
    return tr("{windows} of {total} windows were evaluated.", windows=windows, total=len(test.windows))


def _describe_unmeasured(test: QualityTest, types: Sequence[FileType], reports: Sequence[LevelReport]) -> str:
    """Say which of the levels were not measured, or only on a part of the text."""
    last, missing = reports[-1].meter, [type.name for type in types[len(reports) - 1 :]]
    part = f"{last.name}: {_describe_part(last.windows, test)}" if last.windows < len(test.windows) else ""
    return join_sentences(part, tr("Not measured: {names}.", names=", ".join(missing)) if missing else "")


# --- options


def _check_options(options: QualityOptions) -> tuple[str, Path | None]:
    """Return the text and the file of the plot, before anything takes time."""
    if options.chunks is not None and not 1 <= options.chunks <= _MAX_CHUNKS:
        raise OutOfRange("--chunks", 1, _MAX_CHUNKS, options.chunks)
    plot = parse_path(options.plot) if options.plot else None
    if plot and plot.suffix.lower() != ".svg":
        raise UsageError(tr("--plot writes an SVG file, not {name}.", name=plot.name), hint="--plot quality.svg")
    if plot and not plot.absolute().parent.is_dir():
        raise NotWritable(plot.parent, tr("it does not exist"), hint=tr("Name a folder that exists: --plot FILE"))
    return _read_evaluation_text(options.text), plot


def _read_evaluation_text(option: str | None) -> str:
    if option is None:
        raise UsageError(tr("There is no text to measure on."), hint=tr("Name a text file: --text FILE"))
    return read_text(parse_path(option), limit=_MAX_TEXT)


def _find_model(app: AppContext, text: str) -> ModelFile:
    from qwenlocal.measure.quality import ModelFile

    record = app.library.models.ensure_model(app.library.models.resolve(text))
    return ModelFile(format_model_name(text), record.path, record.size)


def _prepare_test(file: ModelFile, text: str, options: QualityOptions) -> QualityTest:
    from qwenlocal.engine.context import AbortFlag
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.quality import prepare_test

    machine = this_machine()
    available = machine.memory().available
    threads = options.threads or machine.cores
    return prepare_test(file, text, options.n_ctx, options.chunks, threads, available, AbortFlag())


# --- one model


def _report(
    test: QualityTest, file: ModelFile, base: ModelFile | None, meter: QualityMeter, options: QualityOptions
) -> None:
    quality = meter.result()
    if options.as_json:
        print_json(
            {
                "model": file.name,
                **({"base": base.name} if base else {}),
                **_test_facts(test),
                **_quality_facts(quality),
            }
        )
        return
    sys.stdout.write(f"{file.name}: {_describe_test(quality, test)}\n")
    rows = [("perplexity", _describe(quality.perplexity, 4))]
    if quality.divergence and base:
        rows += _describe_divergence(quality.divergence, base.name)
    print_table(("", "VALUE"), rows)


def _describe_test(quality: Quality, test: QualityTest) -> str:
    windows = format_quantity(quality.windows, "window")
    return f"{windows} of {test.n_ctx:,} tokens, {format_quantity(quality.tokens, 'token')} predicted"


def _describe_divergence(divergence: Divergence, base: str) -> list[tuple[str, str]]:
    quantiles = [(f"KL divergence, {name}", f"{value:.5f}") for name, value in divergence.kl_quantiles.items()]
    return [
        (f"perplexity of {base}", _describe(divergence.base_perplexity, 4)),
        ("ln(PPL / PPL of the base)", _describe(divergence.log_ratio, 5)),
        ("KL divergence, mean", _describe(divergence.kl, 5)),
        *quantiles,
        ("same most likely token", _describe_share(divergence.same_top)),
        ("RMS change of probability", _describe_share(divergence.rms_delta_p)),
    ]


def _describe(estimate: Estimate, digits: int) -> str:
    value = round(estimate.value, digits) + 0.0  # never "-0.00000"
    return f"{value:.{digits}f} ± {estimate.error:.{digits}f}"


def _describe_share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.2f} ± {100 * estimate.error:.2f} %"


def _test_facts(test: QualityTest) -> dict[str, Any]:
    return {"context": test.n_ctx, "planned_windows": len(test.windows)}


def _quality_facts(quality: Quality) -> dict[str, Any]:
    facts = {"windows": quality.windows, "tokens": quality.tokens}
    estimates = {"perplexity": quality.perplexity, "nll": quality.nll}
    if quality.divergence is None:
        return {**facts, **_estimate_facts(estimates)}
    divergence = quality.divergence
    estimates["base_perplexity"] = divergence.base_perplexity
    estimates["log_ratio"] = divergence.log_ratio
    estimates["kl"] = divergence.kl
    estimates["same_top"] = divergence.same_top
    estimates["rms_delta_p"] = divergence.rms_delta_p
    return {**facts, **_estimate_facts(estimates), "kl_quantiles": dict(divergence.kl_quantiles)}


def _estimate_facts(estimates: dict[str, Estimate]) -> dict[str, float]:
    values = {name: estimate.value for name, estimate in estimates.items()}
    return {**values, **{f"{name}_error": estimate.error for name, estimate in estimates.items()}}


def _draw_quantiles(plot: Path, file: ModelFile, meter: QualityMeter) -> None:
    from qwenlocal.cli.quality_chart import draw_quantiles

    divergence = meter.result().divergence
    assert divergence is not None
    title = f"KL divergence of {file.name}"
    _write_plot(plot, draw_quantiles(title, {"mean": divergence.kl.value, **divergence.kl_quantiles}))


# --- levels


def _report_levels(test: QualityTest, model: str, reports: Sequence[LevelReport], options: QualityOptions) -> None:
    name = format_model_name(model)
    if options.as_json:
        print_json({"model": name, **_test_facts(test), "levels": [_level_facts(report) for report in reports]})
        return
    sys.stdout.write(f"{name}: {_describe_test(reports[0].meter.result(), test)}\n")
    header = ("LEVEL", "SIZE", "MEMORY", "PREFILL", "DECODE", "PERPLEXITY", "KL MEAN", "KL 99%", "KL MAX", "SAME TOP")
    print_table(header, [_level_row(report) for report in reports])
    sys.stdout.write(
        "memory with a context of 4,096 tokens; prefill and decode in tokens/s; KL divergence from the first row\n"
    )


def _level_row(report: LevelReport) -> tuple[str, ...]:
    quality, speed = report.meter.result(), report.speed
    memory = "" if report.memory is None else f"{report.memory / _GIB:.2f} GiB"
    speeds = (f"{speed.prefill:.1f}", f"{speed.decode:.1f}") if speed else ("", "")
    cells = (report.name, format_bytes(report.size), memory, *speeds, _describe(quality.perplexity, 3))
    if quality.divergence is None:
        return (*cells, "", "", "", "")
    kl, quantiles = quality.divergence.kl, quality.divergence.kl_quantiles
    same_top = f"{100 * quality.divergence.same_top.value:.1f} %"
    return (*cells, _describe(kl, 5), f"{quantiles['99%']:.4f}", f"{quantiles['maximum']:.3f}", same_top)


def _level_facts(report: LevelReport) -> dict[str, Any]:
    speed = report.speed
    return {
        "level": report.name,
        "size": report.size,
        "memory": report.memory,
        "prefill_tok_s": speed and round(speed.prefill, 3),
        "decode_tok_s": speed and round(speed.decode, 3),
        **_quality_facts(report.meter.result()),
    }


def _draw_levels(plot: Path, model: str, reports: Sequence[LevelReport]) -> None:
    from qwenlocal.cli.quality_chart import LevelPoint, draw_levels

    points = [
        LevelPoint(report.name, report.size, divergence.kl.value)
        for report in reports
        if (divergence := report.meter.result().divergence)
    ]
    if points:  # not if Ctrl-C came before any level was compared
        _write_plot(plot, draw_levels(f"Levels of {format_model_name(model)}", points))


def _write_plot(path: Path, svg: str) -> None:
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise NotWritable(
            path.parent, error.strerror or str(error), hint=tr("Choose another file: --plot FILE")
        ) from error
