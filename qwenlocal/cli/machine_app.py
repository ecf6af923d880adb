"""The commands that measure this machine and plan for it, and their options."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from qwenlocal.cli.boundary import CliApp
from qwenlocal.cli.completion import complete_installed_models
from qwenlocal.cli.option_types import (
    ContextOption,
    DeviceOption,
    FlashAttentionOption,
    GpuLayersOption,
    HugePagesOption,
    InstalledModelArgument,
    JsonOption,
    KvTypeOption,
    ModelArgument,
    ThreadsOption,
)

machine_app = CliApp()


@machine_app.command(short_help="Benchmark models.", rich_help_panel="This machine")
def bench(
    models: Annotated[
        list[str], Argument(metavar="MODEL…", help="Models to benchmark.", autocompletion=complete_installed_models)
    ],
    threads: ThreadsOption = None,
    full: Annotated[
        bool, Option("--full", help="Run all tests in full: five times, cold start, 512 and 4,096 tokens of context.")
    ] = False,
    repetitions: Annotated[
        int | None, Option("-r", "--repetitions", metavar="N", help="Repeat each test N times.")
    ] = None,
    depths: Annotated[
        str | None, Option("--depths", metavar="N,…", help="Also measure decoding after N tokens of context.")
    ] = None,
    kv_type: KvTypeOption = None,
    flash_attention: FlashAttentionOption = "auto",
    ubatch: Annotated[int | None, Option("--ubatch", metavar="N", help="Size of the physical batch in tokens.")] = None,
    _huge_pages: HugePagesOption = True,
    plot: Annotated[bool, Option("--plot", help="Draw a bar chart.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Benchmark models in a minute: pp512 and tg128 as in llama-bench, first token, and the machine's limits."""
    from qwenlocal.cli.commands.bench import bench_models
    from qwenlocal.cli.options import parse_load_request

    request = parse_load_request(None, threads, kv_type, flash_attention, None, ubatch)
    bench_models(models, request, full=full, repetitions=repetitions, depths=depths, as_json=as_json, plot=plot)


@machine_app.command(short_help="Find the fastest settings.", rich_help_panel="This machine")
def tune(
    model: InstalledModelArgument,
    seconds: Annotated[
        float, Option("--seconds", metavar="N", help="Measure for about N seconds. [default: 20]", show_default=False)
    ] = 20.0,
    as_json: JsonOption = False,
) -> None:
    """Find and save the fastest settings for a model on this machine.

    Measures threads, flash attention and the size of the physical batch, separately for AC and battery power.
    """
    from qwenlocal.cli.commands.tune import tune_model

    tune_model(model, seconds=seconds, as_json=as_json)


@machine_app.command(short_help="Estimate the memory of a model.", rich_help_panel="This machine")
def plan(
    model: ModelArgument,
    n_ctx: ContextOption = None,
    gpu_layers: GpuLayersOption = "auto",
    device: DeviceOption = None,
    kv_type: KvTypeOption = None,
    flash_attention: FlashAttentionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Estimate the memory of a model for every type and context, and plan how it would be loaded here.

    If the model is not installed, only the first 8 MiB of its file are downloaded.
    """
    from qwenlocal.cli.commands.plan import plan_model
    from qwenlocal.cli.options import parse_gpu_request, parse_load_request

    request = parse_load_request(n_ctx, None, kv_type, flash_attention)
    plan_model(model, request, parse_gpu_request(gpu_layers, device), as_json=as_json)


@machine_app.command(short_help="Check this machine.", rich_help_panel="This machine")
def doctor(
    as_json: JsonOption = False,
    offline: Annotated[bool, Option("--offline", help="Skip the checks that use the network.")] = False,
) -> None:
    """Check processor, memory, devices, folders and sources, and give advice."""
    from qwenlocal.cli.commands.doctor import check_machine

    check_machine(as_json=as_json, offline=offline)
