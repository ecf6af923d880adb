"""The commands and their options. The implementations are in `cli.commands`, imported when called."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from qwenlocal import __version__
from qwenlocal.cli.boundary import CliApp, ErrorBoundary
from qwenlocal.cli.chats_app import chats_app
from qwenlocal.cli.completion import complete_models
from qwenlocal.cli.machine_app import machine_app
from qwenlocal.cli.option_types import (
    AdapterOption,
    ContextOption,
    DeviceOption,
    FlashAttentionOption,
    ForceLoadOption,
    GpuLayersOption,
    HugePagesOption,
    InstalledModelArgument,
    JsonOption,
    KeepCacheOption,
    KvTypeOption,
    LookupOption,
    ModelArgument,
    RateOption,
    RopeOption,
    ThreadsOption,
    YesOption,
)
from qwenlocal.cli.weights_app import weights_app

app = CliApp(
    cls=ErrorBoundary,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Qwen1.5 on your laptop: downloads a model once, then chats with it offline.\n\n"
    "Start here:  qwenlocal run\n\n"
    "A MODEL is a name (qwen1.5, qwen1.5:7b, codeqwen1.5, starter), a file (./x.gguf), a repository "
    "(hf:owner/repo, hf:owner/repo:q4_0, ms:owner/repo) or a URL (https://…/x.gguf).",
    epilog="Exit codes: 0 success, 1 files differ (diff), 2 usage, 3 not found, 4 download, "
    "5 damaged or unusable file, 6 memory or disk, 7 context full, 8 incomplete answer, 130 interrupted, "
    "141 closed pipe.",
)

app.add_typer(chats_app, name="chats", rich_help_panel="Chat", short_help="List, search and export saved chats.")


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"qwenlocal {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command(short_help="Chat with a model, or ask it one question.", rich_help_panel="Chat")
def run(
    context: typer.Context,
    positional: Annotated[
        list[str] | None,
        Argument(
            metavar="[MODEL] [PROMPT]",
            help="Model to run, and prompt to answer; without a prompt, a chat opens.",
            autocompletion=complete_models,
        ),
    ] = None,
    model: Annotated[
        str | None, Option("-m", "--model", metavar="MODEL", help="Model to run.", autocompletion=complete_models)
    ] = None,
    url: Annotated[
        str | None,
        Option("--url", metavar="URL", help="Use an engine with an OpenAI-compatible API: http://HOST:PORT/v1."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        Option("--api-key-env", metavar="VARIABLE", help="Environment variable with the API key of that engine."),
    ] = None,
    server: Annotated[
        bool | None,
        Option(
            "--server/--no-server",
            help="Use the model that `qwenlocal serve` has loaded, or load it here. [default: use it if it is loaded]",
        ),
    ] = None,
    file: Annotated[
        str | None,
        Option(
            "-f", "--file", metavar="FILE", help="Append FILE to the prompt; with -i or --batch, the system prompt."
        ),
    ] = None,
    interactive: Annotated[bool, Option("-i", "--interactive", help="Open a chat even if there is a prompt.")] = False,
    system: Annotated[str | None, Option("--system", metavar="TEXT", help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, Option("-n", "--max-tokens", metavar="N", help="Limit answers to N tokens. [default: no limit]")
    ] = None,
    n_ctx: ContextOption = None,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = "auto",
    device: DeviceOption = None,
    kv_type: KvTypeOption = None,
    flash_attention: FlashAttentionOption = "auto",
    rope: RopeOption = None,
    lookup: LookupOption = True,
    draft: Annotated[
        str | None,
        Option(
            "--draft",
            metavar="MODEL",
            help="Draft model for speculative decoding; switched off if it is slower here.",
            autocompletion=complete_models,
        ),
    ] = None,
    adapter: AdapterOption = None,
    keep_cache: KeepCacheOption = True,
    template: Annotated[
        str | None,
        Option(
            "--template", metavar="TEXT", help="Prompt with placeholders, for example 'Translate to {lang}: {input}'."
        ),
    ] = None,
    var: Annotated[
        list[str] | None, Option("--var", metavar="NAME=TEXT", help="Set a placeholder of --template; may be repeated.")
    ] = None,
    batch: Annotated[
        str | None,
        Option("--batch", metavar="FILE", help="Answer every line of FILE: text, or JSON with a prompt or messages."),
    ] = None,
    output: Annotated[
        str | None,
        Option(
            "-o", "--output", metavar="FILE", help="Append the answers of --batch to FILE; continues an earlier run."
        ),
    ] = None,
    continue_last: Annotated[bool, Option("--continue", help="Continue the last chat.")] = False,
    resume: Annotated[
        str | None,
        Option("--resume", metavar="[CHAT]", help="Continue a chat by number; without a number, choose one."),
    ] = None,
    journal: Annotated[bool, Option("--journal/--no-journal", help="Save the chat on this machine.")] = True,
    markdown: Annotated[
        bool, Option("--markdown/--no-markdown", help="Render Markdown in a chat, or print plain text.")
    ] = True,
    force: ForceLoadOption = False,
    temperature: Annotated[
        float | None,
        Option("--temp", metavar="X", help="Temperature; 0 always takes the most likely token. [default: the model's]"),
    ] = None,
    top_k: Annotated[
        int | None,
        Option(
            "--top-k", metavar="N", help="Sample from the N most likely tokens; 0 means all. [default: the model's]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        Option(
            "--top-p",
            metavar="X",
            help="Nucleus sampling: keep the smallest set of tokens with total probability X. [default: the model's]",
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        Option(
            "--min-p",
            metavar="X",
            help="Drop tokens less likely than X times the most likely one. [default: the model's]",
        ),
    ] = None,
    repeat_penalty: Annotated[
        float | None,
        Option("--repeat-penalty", metavar="X", help="Penalize repeated tokens; 1 means off. [default: the model's]"),
    ] = None,
    seed: Annotated[
        int | None, Option("--seed", metavar="N", help="Seed of the random numbers. [default: random]")
    ] = None,
    stop: Annotated[
        list[str] | None, Option("--stop", metavar="TEXT", help="End the answer before TEXT; may be repeated.")
    ] = None,
    overflow: Annotated[
        str,
        Option(
            "--overflow",
            metavar="MODE",
            help="When the context is full: shift (leave out old turns), summarize (them first), or stop.",
        ),
    ] = "shift",
    as_json: Annotated[bool, Option("--json", help="Answer with a JSON object.")] = False,
    schema: Annotated[
        str | None, Option("--schema", metavar="FILE", help="Answer with JSON that follows the JSON schema in FILE.")
    ] = None,
    grammar: Annotated[
        str | None, Option("--grammar", metavar="FILE", help="Answer with text that follows the GBNF grammar in FILE.")
    ] = None,
    raw: Annotated[bool, Option("--raw", help="Continue the text without a chat template.")] = False,
    _huge_pages: HugePagesOption = True,
    stats: Annotated[
        bool, Option("--stats", help="Print the load plan and the speed of each answer on stderr.")
    ] = False,
    limit_rate: RateOption = None,
    yes: YesOption = False,
    _cml: Annotated[bool, Option("-cml", "--chatml", hidden=True)] = False,
    _color: Annotated[bool, Option("--color", hidden=True)] = False,
) -> None:
    """Chat with a model, or ask it one question; downloads the model first if necessary.

    The first argument is the model; a single argument with spaces is a prompt for the default model.

    \b
    qwenlocal run                                    chat with the default model
    qwenlocal run qwen1.5:7b                         chat with another one
    qwenlocal run qwen1.5 "Why is the sky blue?"     print one answer
    qwenlocal run qwen1.5 "Sum this up:" < text.txt  append text from a pipe to the prompt
    """
    from qwenlocal.chat.context_window import OVERFLOW_ALIASES
    from qwenlocal.cli.commands.run import run_model
    from qwenlocal.cli.context import AppContext
    from qwenlocal.cli.options import (
        RunOptions,
        parse_answer_format,
        parse_gpu_request,
        parse_load_request,
        parse_rate,
        parse_variables,
    )
    from qwenlocal.library.adapters import parse_adapter

    run_model(
        RunOptions(
            positional=tuple(positional or ()),
            model=model,
            url=url,
            api_key_env=api_key_env,
            server=server,
            file=file,
            interactive=interactive,
            system=system,
            max_tokens=max_tokens,
            load_request=parse_load_request(n_ctx, threads, kv_type, flash_attention, rope, force=force),
            gpu=parse_gpu_request(gpu_layers, device),
            lookup=lookup,
            draft=draft,
            keep_cache=keep_cache,
            answer_format=parse_answer_format(as_json, schema, grammar),
            overflow=OVERFLOW_ALIASES.get(overflow, overflow),
            sampling={
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repeat_penalty": repeat_penalty,
                "seed": seed,
            },
            stop=tuple(stop or ()),
            raw=raw,
            template=template,
            variables=parse_variables(var or ()),
            batch=batch,
            output=output,
            resume="last" if continue_last else resume,
            journal=journal,
            markdown=markdown,
            stats=stats,
            adapters=tuple(map(parse_adapter, adapter or ())),
        ),
        AppContext(limit_rate=parse_rate(limit_rate), assume_yes=yes),
        context.obj,
    )


@app.command(short_help="Serve models to other programs over HTTP.", rich_help_panel="Chat")
def serve(
    models: Annotated[
        list[str] | None,
        Argument(
            metavar="[MODEL]...",
            help="Models to serve, the default one first; other installed models are loaded on request.",
            autocompletion=complete_models,
        ),
    ] = None,
    host: Annotated[str, Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", metavar="N", help="Port to listen on; 0 for any free one.")] = 8000,
    parallel: Annotated[
        str, Option("--parallel", metavar="N", help="Number of requests that a model answers at the same time.")
    ] = "auto",
    max_waiting: Annotated[
        int, Option("--max-waiting", metavar="N", min=0, help="Let N requests wait for a model; others get 503.")
    ] = 64,
    keep_alive: Annotated[
        str,
        Option("--keep-alive", metavar="TIME", help="Unload a model after TIME without a request (30s, 5m, forever)."),
    ] = "5m",
    api_key: Annotated[
        list[str] | None, Option("--api-key", metavar="KEY", help="Require a key; may be repeated.")
    ] = None,
    api_key_file: Annotated[
        str | None, Option("--api-key-file", metavar="FILE", help="Require one of the keys in FILE, one per line.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Option("--allow-host", metavar="NAME", help="Accept requests for the host NAME; may be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option("--allow-origin", metavar="URL", help="Accept requests from web pages at URL; may be repeated."),
    ] = None,
    tls_cert: Annotated[str | None, Option("--tls-cert", metavar="FILE", help="Certificate for HTTPS (PEM).")] = None,
    tls_key: Annotated[str | None, Option("--tls-key", metavar="FILE", help="Key of the certificate (PEM).")] = None,
    open_page: Annotated[bool, Option("--open", help="Open the web page.")] = False,
    n_ctx: ContextOption = None,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = "auto",
    device: DeviceOption = None,
    kv_type: KvTypeOption = None,
    flash_attention: FlashAttentionOption = "auto",
    rope: RopeOption = None,
    lookup: LookupOption = True,
    adapter: AdapterOption = None,
    keep_cache: KeepCacheOption = True,
    force: ForceLoadOption = False,
    _huge_pages: HugePagesOption = True,
    limit_rate: RateOption = None,
    yes: YesOption = False,
) -> None:
    """Serve models over the OpenAI, Anthropic and Ollama APIs.

    \b
    qwenlocal serve                                  serve the default model
    qwenlocal serve qwen1.5:7b --port 9000           another model, another port
    """
    from qwenlocal.cli.commands.serve import ServeOptions, serve_models
    from qwenlocal.cli.context import AppContext
    from qwenlocal.cli.options import parse_gpu_request, parse_load_request, parse_rate
    from qwenlocal.library.adapters import parse_adapter

    serve_models(
        ServeOptions(
            models=tuple(models or ()),
            host=host,
            port=port,
            parallel=parallel,
            max_waiting=max_waiting,
            keep_alive=keep_alive,
            api_keys=tuple(api_key or ()),
            api_key_file=api_key_file,
            allowed_hosts=tuple(allow_host or ()),
            cors_origins=tuple(allow_origin or ()),
            certificate=tls_cert,
            key=tls_key,
            opens_page=open_page,
            load_request=parse_load_request(n_ctx, threads, kv_type, flash_attention, rope, force=force),
            gpu=parse_gpu_request(gpu_layers, device),
            lookup=lookup,
            keep_cache=keep_cache,
            adapters=tuple(map(parse_adapter, adapter or ())),
        ),
        AppContext(limit_rate=parse_rate(limit_rate), assume_yes=yes),
    )


@app.command(short_help="Download a model.", rich_help_panel="Models")
def pull(model: ModelArgument, limit_rate: RateOption = None, yes: YesOption = False) -> None:
    """Download a model, or continue its download."""
    from qwenlocal.cli.commands.pull import pull_model
    from qwenlocal.cli.options import parse_rate

    pull_model(model, limit_rate=parse_rate(limit_rate), assume_yes=yes)


@app.command("list", short_help="List installed models.", rich_help_panel="Models")
def list_(
    include_available: Annotated[bool, Option("--all", "-a", help="Include models that can be downloaded.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List installed models and unfinished downloads."""
    from qwenlocal.cli.commands.list import list_models

    list_models(include_available=include_available, as_json=as_json)


@app.command(short_help="Show details of a model.", rich_help_panel="Models")
def show(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a model's size, origin, license, dimensions and chat template."""
    from qwenlocal.cli.commands.show import show_model

    show_model(model, as_json=as_json)


@app.command(short_help="Remove a model.", rich_help_panel="Models")
def rm(model: InstalledModelArgument) -> None:
    """Remove a model or an unfinished download; files that other models use stay."""
    from qwenlocal.cli.commands.rm import remove_model

    remove_model(model)


@app.command(short_help="Verify a model, and repair it.", rich_help_panel="Models")
def verify(
    model: InstalledModelArgument,
    no_repair: Annotated[bool, Option("--no-repair", help="Report damage; download nothing.")] = False,
    against: Annotated[
        str | None,
        Option("--against", metavar="SRC", help="Compare with the checkpoint SRC that it was converted from."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify every byte of a model, and download only damaged parts again.

    With --against: compare weights, token ids and logits with those of the checkpoint.
    """
    if against is not None:
        from qwenlocal.cli.commands.verify_checkpoint import verify_checkpoint

        if no_repair:
            raise typer.BadParameter("--no-repair cannot be combined with --against, which repairs nothing.")
        verify_checkpoint(model, against, as_json=as_json)
        return
    from qwenlocal.cli.commands.verify import verify_model

    verify_model(model, repair=not no_repair, as_json=as_json)


app.registered_commands += [*weights_app.registered_commands, *machine_app.registered_commands]
