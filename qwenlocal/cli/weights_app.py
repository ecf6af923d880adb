"""The commands that write, check and compare GGUF files, and their options."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from qwenlocal.cli.boundary import CliApp
from qwenlocal.cli.completion import complete_installed_models, complete_models
from qwenlocal.cli.option_types import (
    AllowNanOption,
    DryRunOption,
    EndsOption,
    ForceOption,
    ImatrixOption,
    JsonOption,
    MergeOption,
    MixOption,
    PureOption,
    RateOption,
    RequantizeOption,
    TensorTypeOption,
    ThreadsOption,
)

weights_app = CliApp()


@weights_app.command(short_help="Convert a checkpoint into GGUF files.", rich_help_panel="Weights")
def convert(
    source: Annotated[
        str,
        Argument(
            metavar="SRC",
            help="Checkpoint: a directory, hf:owner/repo, a model name or a safetensors file; or a LoRA adapter.",
            autocompletion=complete_models,
        ),
    ],
    out: Annotated[
        str | None,
        Option("-o", "--out", metavar="OUT", help="File or folder to write; {type} is replaced by the type."),
    ] = None,
    types: Annotated[
        list[str] | None,
        Option(
            "--type",
            metavar="TYPE[,TYPE…]",
            help="Types to write: q4_k_m, q8_0, f16, …; the checkpoint is read once. [default: q4_k_m; lossless for "
            "GPTQ and AWQ]",
        ),
    ] = None,
    ends: EndsOption = None,
    mix: MixOption = "llama.cpp",
    tensor_type: TensorTypeOption = None,
    imatrix: ImatrixOption = None,
    merge: MergeOption = None,
    pure: PureOption = False,
    requantize: RequantizeOption = False,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    allow_nan: AllowNanOption = False,
    name: Annotated[
        str | None, Option("--name", metavar="NAME", help="Name of the model in the file. [default: from SRC]")
    ] = None,
    pre_tokenizer: Annotated[
        str | None, Option("--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer. [default: detected]")
    ] = None,
    like: Annotated[
        str | None, Option("--like", metavar="llama.cpp", help="Write the same bytes as llama.cpp's own converter.")
    ] = None,
    stream: Annotated[
        bool, Option("--stream", help="Convert a checkpoint on a hub while downloading it, without storing it.")
    ] = False,
    limit_rate: RateOption = None,
) -> None:
    """Convert a checkpoint (safetensors) into GGUF files, quantized in one pass.

    \b
    qwenlocal convert ./Qwen1.5-0.5B                         writes Qwen1.5-0.5B-q4_k_m.gguf
    qwenlocal convert hf:Qwen/Qwen1.5-1.8B --type q4_0,q8_0  writes two files, reads the checkpoint once
    qwenlocal convert ./Qwen1.5-0.5B --dry-run               shows what it would write
    qwenlocal convert ./Qwen1.5-0.5B --merge ./adapter       merges a LoRA adapter, then quantizes
    qwenlocal convert ./adapter                              writes a LoRA adapter as GGUF
    """
    from qwenlocal.cli.commands.convert import convert_checkpoint
    from qwenlocal.cli.gguf_files import WriteOptions
    from qwenlocal.cli.options import parse_rate, split_list

    convert_checkpoint(
        WriteOptions(
            source=source,
            out=out,
            types=split_list(",".join(types)) if types else (),
            ends=ends,
            mix=mix,
            tensor_types=tuple(tensor_type or ()),
            imatrix=imatrix,
            pure=pure,
            requantize=requantize,
            threads=threads,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            allow_nan=allow_nan,
        ),
        merge=tuple(merge or ()),
        name=name,
        pre_tokenizer=pre_tokenizer,
        like=like,
        limit_rate=parse_rate(limit_rate),
        stream=stream,
    )


@weights_app.command(short_help="Quantize a GGUF file.", rich_help_panel="Weights")
def quantize(
    source: Annotated[
        str, Argument(metavar="IN", help="GGUF file or model to read.", autocompletion=complete_installed_models)
    ],
    out: Annotated[str, Argument(metavar="OUT", help="File or folder to write.")],
    types: Annotated[str, Argument(metavar="TYPE[,TYPE…]", help="Types to write: q4_k_m, q8_0, f16, …")],
    ends: EndsOption = None,
    mix: MixOption = "llama.cpp",
    tensor_type: TensorTypeOption = None,
    imatrix: ImatrixOption = None,
    pure: PureOption = False,
    requantize: RequantizeOption = False,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    allow_nan: AllowNanOption = False,
) -> None:
    """Quantize a GGUF file; metadata and vocabulary are copied.

    \b
    qwenlocal quantize model-f16.gguf model-q4.gguf q4_k_m
    qwenlocal quantize model-f16.gguf model.gguf q4_0 --tensor-type 'ffn_down=q6_k'
    """
    from qwenlocal.cli.commands.quantize import quantize_file
    from qwenlocal.cli.gguf_files import WriteOptions
    from qwenlocal.cli.options import split_list

    quantize_file(
        WriteOptions(
            source=source,
            out=out,
            types=split_list(types),
            types_option="TYPE",
            ends=ends,
            mix=mix,
            tensor_types=tuple(tensor_type or ()),
            imatrix=imatrix,
            pure=pure,
            requantize=requantize,
            threads=threads,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            allow_nan=allow_nan,
        )
    )


@weights_app.command(short_help="Measure an importance matrix.", rich_help_panel="Weights")
def imatrix(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="GGUF file or installed model, if possible f16 or q8_0.",
            autocompletion=complete_installed_models,
        ),
    ],
    text: Annotated[
        str | None, Option("--text", metavar="FILE", help="Text to read. [default: one that comes with qwenlocal]")
    ] = None,
    out: Annotated[
        str | None, Option("-o", "--out", metavar="OUT", help="File to write. [default: MODEL.imatrix.gguf]")
    ] = None,
    chunks: Annotated[
        int | None, Option("--chunks", metavar="N", help="Read only the first N chunks of 512 tokens.")
    ] = None,
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how much each column of each matrix matters, for better quantization (--imatrix).

    \b
    qwenlocal imatrix ./Qwen1.5-1.8B-f16.gguf
    qwenlocal convert ./Qwen1.5-1.8B --type q3_k_m --imatrix Qwen1.5-1.8B-f16.imatrix.gguf
    """
    from qwenlocal.cli.commands.imatrix import create_imatrix
    from qwenlocal.cli.options import parse_load_request

    parse_load_request(None, threads)
    create_imatrix(model, text=text, out=out, chunks=chunks, threads=threads, force=force)


@weights_app.command(short_help="Show and check a GGUF file.", rich_help_panel="Weights")
def inspect(
    model: Annotated[
        str, Argument(metavar="FILE", help="GGUF file or installed model.", autocompletion=complete_installed_models)
    ],
    tensors: Annotated[bool, Option("--tensors", help="List all tensors.")] = False,
    quick: Annotated[bool, Option("--quick", help="Check the header only, not the weights.")] = False,
    fix: Annotated[bool, Option("--fix", help="Repair the file in place, or write a repaired copy (-o).")] = False,
    out: Annotated[
        str | None, Option("-o", "--out", metavar="OUT", help="File for the repaired copy of --fix.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show and check a GGUF file. Exits with 5 if it finds a serious problem that is not repaired."""
    from qwenlocal.cli.commands.inspect import inspect_file

    inspect_file(model, as_json=as_json, quick=quick, fix=fix, out=out, tensors=tensors)


@weights_app.command(short_help="Compare two GGUF files.", rich_help_panel="Weights")
def diff(
    left: Annotated[str, Argument(metavar="A", help="First GGUF file.", autocompletion=complete_installed_models)],
    right: Annotated[str, Argument(metavar="B", help="Second GGUF file.", autocompletion=complete_installed_models)],
    as_json: JsonOption = False,
) -> None:
    """Compare two GGUF files: metadata, tensors, types and weights. Exits with 1 if they differ."""
    from qwenlocal.cli.commands.diff import diff_files

    diff_files(left, right, as_json=as_json)


@weights_app.command(short_help="Measure the quality of a model.", rich_help_panel="Weights")
def quality(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL", help="Model to measure; with --levels, also a checkpoint.", autocompletion=complete_models
        ),
    ],
    base: Annotated[
        str | None,
        Option(
            "--base",
            metavar="MODEL",
            help="Compare with this model, for example the same one as f16.",
            autocompletion=complete_models,
        ),
    ] = None,
    levels: Annotated[
        str | None,
        Option("--levels", metavar="TYPE[,TYPE…]", help="Quantize to each of these types, and compare with MODEL."),
    ] = None,
    text: Annotated[str | None, Option("--text", metavar="FILE", help="Text to measure on.")] = None,
    n_ctx: Annotated[
        int, Option("-c", "--context", metavar="N", help="Tokens per window. [default: 512]", show_default=False)
    ] = 512,
    chunks: Annotated[
        int | None, Option("--chunks", metavar="N", help="Evaluate at most N windows. [default: all]")
    ] = None,
    imatrix: ImatrixOption = None,
    plot: Annotated[str | None, Option("--plot", metavar="FILE", help="Write a chart as SVG.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity and KL divergence, by the definitions of llama-perplexity.

    \b
    qwenlocal quality qwen1.5:0.5b --text wiki.txt                       perplexity
    qwenlocal quality model-q4_k_m.gguf --base model-f16.gguf --text wiki.txt
    qwenlocal quality ./Qwen1.5-0.5B --levels q4_0,q4_k_m,q8_0 --text wiki.txt --chunks 20
    """
    from qwenlocal.cli.commands.quality import QualityOptions, measure_quality
    from qwenlocal.cli.options import parse_load_request, split_list

    parse_load_request(None, threads)
    options = QualityOptions(text, n_ctx, chunks, threads, plot, as_json)
    measure_quality(model, base=base, levels=split_list(levels) if levels else (), imatrix=imatrix, options=options)
