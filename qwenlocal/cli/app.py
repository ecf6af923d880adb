"""The commands and their options. What they do is in the modules they import when they are called."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from qwenlocal import __version__
from qwenlocal.cli.boundary import Boundary
from qwenlocal.cli.chats_app import chats_app
from qwenlocal.cli.complete import all_models, models_here

app = typer.Typer(
    cls=Boundary,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Qwen1.5 on your laptop: downloads a model once, then chats with it offline.\n\n"
    "Start here:  qwenlocal run\n\n"
    "A MODEL is a name (qwen1.5, qwen1.5:7b, codeqwen1.5, starter), a file (./x.gguf), a repository "
    "(hf:owner/repo, hf:owner/repo:q4_0, ms:owner/repo) or an address (https://…/x.gguf).",
    epilog="Exit codes: 0 done, 2 usage, 3 not found, 4 download, 5 bad weights, 6 memory or disk, 7 context full, "
    "130 interrupted, 141 closed pipe.",
)

app.add_typer(chats_app, name="chats", rich_help_panel="Chat", short_help="What was said: list, search, export.")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RateOption = Annotated[
    Optional[str],  # noqa: UP045 - typer on Python 3.10
    typer.Option("--limit-rate", metavar="RATE", help="Download at most this fast, for example 2M (bytes a second)."),
]
ContextOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("-c", "--context", metavar="N", help="Tokens of context. [default: what fits]"),
]
CoresOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("-t", "--threads", metavar="N", help="Threads. [default: one a fast core]"),
]
LayersOption = Annotated[
    str, typer.Option("-ngl", "--gpu-layers", metavar="N", help="Layers on a GPU: a number, auto or all.")
]
KvOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--kv", metavar="TYPE", help="Keep keys and values as f16, q8_0, q4_0, … [default: what fits]"),
]
FlashOption = Annotated[
    str, typer.Option("--flash-attention", metavar="on|off|auto", help="Flash attention.", show_default=False)
]
RopeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--rope", metavar="KIND", help="For contexts beyond the model's own: yarn, linear or none."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwenlocal {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The program itself."""


@app.command(short_help="Chat with a model, or ask it one thing.", rich_help_panel="Chat")
def run(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="What to run, and what to ask. Without a prompt: a chat.",
            autocompletion=all_models,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", metavar="MODEL", help="What to run, as an option.", autocompletion=all_models),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("-f", "--file", metavar="FILE", help="Take the prompt from a file; with -i, the system prompt."),
    ] = None,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="Chat, even with -f.")] = False,
    system: Annotated[Optional[str], typer.Option("--system", metavar="TEXT", help="Who the model shall be.")] = None,  # noqa: UP045
    limit: Annotated[
        int | None, typer.Option("-n", "--max-tokens", metavar="N", help="At most N tokens an answer.")
    ] = None,
    n_ctx: ContextOption = None,
    threads: CoresOption = None,
    gpu_layers: LayersOption = "auto",
    kv_type: KvOption = None,
    flash_attention: FlashOption = "auto",
    rope: RopeOption = None,
    lookup: Annotated[
        bool, typer.Option("--lookup/--no-lookup", help="Check several tokens at once where the text repeats itself.")
    ] = True,
    draft: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--draft",
            metavar="MODEL",
            help="A small model that guesses what comes next; kept where ten seconds of trying say that it pays.",
            autocompletion=all_models,
        ),
    ] = None,
    keep_cache: Annotated[
        bool,
        typer.Option("--keep-cache/--no-keep-cache", help="Keep what was read on disk, so that coming back is quick."),
    ] = True,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="TEXT", help="The prompt, with places: 'Translate to {lang}: {input}'."),
    ] = None,
    var: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--var", metavar="NAME=TEXT", help="What fills a place of --template."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="FILE", help="Answer every line: a text, or JSON with prompt or messages."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where answers of --batch go; goes on where it ended."),
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Go on with the last chat.")] = False,
    resume: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--resume", metavar="[CHAT]", help="Go on with a chat by its number, or pick one."),
    ] = None,
    journal: Annotated[
        bool, typer.Option("--journal/--no-journal", help="Keep what is said in a chat, on this machine.")
    ] = True,
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="Lay answers out on a terminal, or show them as they are.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Load it even if it does not seem to fit.")] = False,
    temperature: Annotated[Optional[float], typer.Option("--temp", metavar="X", help="Randomness; 0 is none.")] = None,  # noqa: UP045
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", help="Choose among the N likeliest tokens; 0 is all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="X", help="Choose among tokens of this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", metavar="X", help="Drop tokens below this share of the likeliest.")
    ] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option("--repeat-penalty", metavar="X", help="Penalty on repeating; 1 is none.")
    ] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", metavar="N", help="Makes random choices repeatable.")] = None,  # noqa: UP045
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End the answer at this text; may be given again."),
    ] = None,
    overflow: Annotated[
        str,
        typer.Option(
            "--overflow",
            metavar="HOW",
            help="When the context is full: shift (leave out old turns), summarise them, or stop.",
        ),
    ] = "shift",
    as_json: Annotated[bool, typer.Option("--json", help="Answer with a JSON object.")] = False,
    schema: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--schema", metavar="FILE", help="Answer with JSON that keeps to this JSON schema."),
    ] = None,
    grammar: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--grammar", metavar="FILE", help="Answer in this grammar (GBNF)."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text as it stands.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="On stderr: how it was loaded, and numbers after each answer.")
    ] = False,
    limit_rate: RateOption = None,
    _cml: Annotated[bool, typer.Option("-cml", "--chatml", hidden=True)] = False,
    _color: Annotated[bool, typer.Option("--color", hidden=True)] = False,
) -> None:
    """Chat with a model, or ask it one thing; downloads it first if it is not here.

    The first word is the model; a single argument with spaces in it is a prompt for the default one.

    \b
    qwenlocal run                                    chat with the default model
    qwenlocal run qwen1.5:7b                         chat with another one
    qwenlocal run qwen1.5 "Why is the sky blue?"     one answer on standard output
    qwenlocal run qwen1.5 "Sum this up:" < text.txt  with piped text
    """
    from qwenlocal.cli.asked import Asked
    from qwenlocal.cli.loading import grammar_from, wanted
    from qwenlocal.cli.run import run_model
    from qwenlocal.cli.values import rate, values_from

    run_model(
        Asked(
            words=tuple(words or ()),
            model=model,
            file=file,
            interactive=interactive,
            system=system,
            limit=limit,
            wanted=wanted(n_ctx, threads, kv_type, flash_attention, rope, force=force),
            gpu_layers=gpu_layers,
            lookup=lookup,
            draft=draft,
            keep_cache=keep_cache,
            grammar=grammar_from(as_json, schema, grammar),
            overflow=overflow,
            sampling={
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repeat_penalty": repeat_penalty,
                "seed": seed,
            },
            stops=tuple(stop or ()),
            raw=raw,
            template=template,
            values=values_from(var or ()),
            batch=batch,
            output=output,
            resume="last" if go_on else resume,
            journal=journal,
            markdown=markdown,
            stats=stats,
            limit_rate=rate(limit_rate),
        )
    )


@app.command(short_help="Download a model.", rich_help_panel="Models")
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What to fetch.", autocompletion=all_models)],
    limit_rate: RateOption = None,
) -> None:
    """Download a model, or go on where a download ended."""
    from qwenlocal.cli.models import pull_model
    from qwenlocal.cli.values import rate

    pull_model(model, limit_rate=rate(limit_rate))


@app.command("list", short_help="The models that are here.", rich_help_panel="Models")
def list_(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also the models that could be fetched.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The models that are here, and those on their way."""
    from qwenlocal.cli.models import list_models

    list_models(everything=everything, as_json=as_json)


@app.command(short_help="What a model is.", rich_help_panel="Models")
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Which model.", autocompletion=all_models)],
    as_json: JsonOption = False,
) -> None:
    """What a model is: size, origin, licence, shape, template."""
    from qwenlocal.cli.models import show_model

    show_model(model, as_json=as_json)


@app.command(short_help="Remove a model.", rich_help_panel="Models")
def rm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Which model.", autocompletion=models_here)],
) -> None:
    """Remove a model, or a download that was not finished; frees what nothing else uses."""
    from qwenlocal.cli.models import remove_model

    remove_model(model)


@app.command(short_help="Check every byte of a model.", rich_help_panel="Models")
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Which model.", autocompletion=models_here)],
    no_repair: Annotated[bool, typer.Option("--no-repair", help="Only look; fetch nothing.")] = False,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--against", metavar="SRC", help="Compare with the checkpoint that it was made from."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a model and compare; fetches again just what is damaged.

    With --against: compare weights, token ids and logits with those of the checkpoint.
    """
    if against is not None:
        from qwenlocal.cli.against import verify_against

        if no_repair:
            raise typer.BadParameter("--no-repair and --against do not go together; --against changes nothing.")
        verify_against(model, against, as_json=as_json)
        return
    from qwenlocal.cli.models import verify_model

    verify_model(model, repair=not no_repair, as_json=as_json)


TypesOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--type",
        metavar="TYPE[,TYPE…]",
        help="What to write: q4_k_m, q8_0, f16, …; several from one reading. [default: q4_k_m]",
    ),
]
TensorTypeOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--tensor-type", metavar="EXPRESSION=TYPE", help="Another type for tensors with such names."),
]
ImatrixOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--imatrix", metavar="FILE", help="An importance matrix, as llama-imatrix measures it."),
]
PureOption = Annotated[bool, typer.Option("--pure", help="The same type for all, without the mix.")]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("-t", "--threads", metavar="N", help="Threads. [default: one a fast core]"),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, tensor by tensor.")]
NanOption = Annotated[bool, typer.Option("--allow-nan", help="Write zeros for weights that are NaN or infinite.")]


@app.command(short_help="Make a GGUF file of a checkpoint.", rich_help_panel="Weights")
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A directory, hf:owner/repo, a name, or a safetensors file.", autocompletion=all_models
        ),
    ],
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-o", "--out", metavar="OUT", help="A file or folder; {type} in it stands for the type."),
    ] = None,
    types: TypesOption = None,
    tensor_type: TensorTypeOption = None,
    imatrix: ImatrixOption = None,
    pure: PureOption = False,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    allow_nan: NanOption = False,
    name: Annotated[Optional[str], typer.Option("--name", metavar="NAME", help="What the model is called.")] = None,  # noqa: UP045
    pre: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--pre", metavar="NAME", help="llama.cpp's name for how text is cut into words."),
    ] = None,
    like: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--like", metavar="llama.cpp", help="Write just what llama.cpp's own converter would."),
    ] = None,
    limit_rate: RateOption = None,
) -> None:
    """Make a GGUF file of a checkpoint (safetensors), quantized on the way.

    \b
    qwenlocal convert ./Qwen1.5-0.5B                         writes Qwen1.5-0.5B-q4_k_m.gguf
    qwenlocal convert hf:Qwen/Qwen1.5-1.8B --type q4_0,q8_0  two files from one reading
    qwenlocal convert ./Qwen1.5-0.5B --dry-run               only says what it would write
    """
    from qwenlocal.cli.convert import AboutCheckpoint, Asked, convert_checkpoint
    from qwenlocal.cli.values import listed, rate

    convert_checkpoint(
        Asked(
            source=source,
            out=out,
            types=listed(",".join(types or ["q4_k_m"])),
            tensor_types=tuple(tensor_type or ()),
            imatrix=imatrix,
            pure=pure,
            threads=threads,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            allow_nan=allow_nan,
        ),
        AboutCheckpoint(pre, name, like, rate(limit_rate)),
    )


@app.command(short_help="Make a smaller GGUF file of another one.", rich_help_panel="Weights")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A GGUF file, or a model by name.", autocompletion=models_here)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write, or a folder.")],
    types: Annotated[str, typer.Argument(metavar="TYPE[,TYPE…]", help="q4_k_m, q8_0, f16, …")],
    tensor_type: TensorTypeOption = None,
    imatrix: ImatrixOption = None,
    pure: PureOption = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Even of weights that are quantized already.")
    ] = False,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    allow_nan: NanOption = False,
) -> None:
    """Make a GGUF file with other types of another one; everything else in it stays.

    \b
    qwenlocal quantize model-f16.gguf model-q4.gguf q4_k_m
    qwenlocal quantize model-f16.gguf model.gguf q4_0 --tensor-type 'ffn_down=q6_k'
    """
    from qwenlocal.cli.convert import Asked, quantize_file
    from qwenlocal.cli.values import listed

    quantize_file(
        Asked(
            source=source,
            out=out,
            types=listed(types),
            tensor_types=tuple(tensor_type or ()),
            imatrix=imatrix,
            pure=pure,
            threads=threads,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            allow_nan=allow_nan,
        ),
        again=requantize,
    )


@app.command(short_help="Look into a GGUF file, and put it right.", rich_help_panel="Weights")
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="FILE", help="A GGUF file, or a model by name.", autocompletion=models_here)
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only the header; do not read the weights.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Put right what can be, in place or in a copy (-o).")] = False,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-o", "--out", metavar="OUT", help="Where --fix writes a repaired copy."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a GGUF file says of itself, and what is wrong with it. Exit code 5 where anything is, and stays so."""
    from qwenlocal.cli.inspect import inspect_file

    inspect_file(model, as_json=as_json, quick=quick, fix=fix, out=out, tensors=tensors)


@app.command(short_help="What two GGUF files have not in common.", rich_help_panel="Weights")
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="A GGUF file.", autocompletion=models_here)],
    right: Annotated[str, typer.Argument(metavar="B", help="Another one.", autocompletion=models_here)],
    as_json: JsonOption = False,
) -> None:
    """What two GGUF files have not in common: keys, tensors, types, numbers. Exit code 1 where that is anything."""
    from qwenlocal.cli.inspect import diff_files

    diff_files(left, right, as_json=as_json)


@app.command(short_help="How fast models are here.", rich_help_panel="This machine")
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Which models.", autocompletion=models_here)],
    threads: CoresOption = None,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", metavar="N", help="How often each.")] = 5,
    depths: Annotated[
        str, typer.Option("--depths", metavar="N,…", help="Decode behind so many tokens.")
    ] = "0,512,4096",
    kv_type: KvOption = None,
    flash_attention: FlashOption = "auto",
    ubatch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--ubatch", metavar="N", help="Tokens computed together."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw bars.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How fast models are here: pp512 and tg128 as llama-bench defines them, and what people feel."""
    from qwenlocal.cli.bench import bench_models
    from qwenlocal.cli.loading import wanted

    asked = wanted(None, threads, kv_type, flash_attention, None, ubatch)
    bench_models(models, asked, repetitions=repetitions, depths=depths, as_json=as_json, plot=plot)


@app.command(short_help="Find the quickest settings.", rich_help_panel="This machine")
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Which model.", autocompletion=models_here)],
    seconds: Annotated[float, typer.Option("--seconds", metavar="N", help="Measure for about so long.")] = 20.0,
    as_json: JsonOption = False,
) -> None:
    """Find the quickest settings for a model on this machine by trying them, and remember them.

    Threads, flash attention, tokens computed at once; one set for mains and one for the battery.
    """
    from qwenlocal.cli.tune import tune_model

    tune_model(model, seconds=seconds, as_json=as_json)


@app.command(short_help="How much memory a model takes.", rich_help_panel="This machine")
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Which model; it need not be here.", autocompletion=all_models)
    ],
    n_ctx: ContextOption = None,
    kv_type: KvOption = None,
    flash_attention: FlashOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """How much memory a model takes in every level and context, and how it would be loaded here.

    Of a model that is not here, the first 8 MiB are read.
    """
    from qwenlocal.cli.loading import wanted
    from qwenlocal.cli.plan import plan_model

    plan_model(model, wanted(n_ctx, None, kv_type, flash_attention), as_json=as_json)


@app.command(short_help="Look at this machine, and say what to do.", rich_help_panel="This machine")
def doctor(
    as_json: JsonOption = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the network.")] = False,
) -> None:
    """Look at processor, memory, devices, folders and sources, and say what to do."""
    from qwenlocal.cli.doctor import examine

    examine(as_json=as_json, offline=offline)
