"""Types of the options that several commands share."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from qwenlocal.cli.completion import complete_installed_models, complete_models

ModelArgument = Annotated[
    str, Argument(metavar="MODEL", help="Model to use.", autocompletion=complete_models, show_default=False)
]
InstalledModelArgument = Annotated[
    str,
    Argument(metavar="MODEL", help="Installed model.", autocompletion=complete_installed_models, show_default=False),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
YesOption = Annotated[bool, Option("-y", "--yes", help="Answer yes to questions about downloads.")]
RateOption = Annotated[
    str | None, Option("--limit-rate", metavar="RATE", help="Limit downloads to RATE bytes per second, for example 2M.")
]


def _set_huge_pages(is_on: bool) -> None:
    if not is_on:
        from qwenlocal.huge_pages import disable_huge_pages

        disable_huge_pages()


# Options of commands that load a model.
ContextOption = Annotated[
    int | None, Option("-c", "--context", metavar="N", help="Size of the context in tokens. [default: what fits]")
]
ThreadsOption = Annotated[
    int | None, Option("-t", "--threads", metavar="N", help="Use at most N threads. [default: one per fast core]")
]
GpuLayersOption = Annotated[
    str, Option("-ngl", "--gpu-layers", metavar="N", help="Number of layers on a GPU, auto or all.")
]
DeviceOption = Annotated[
    str | None,
    Option(
        "--device",
        metavar="NAME",
        help="GPU to use, or several separated by commas, or none. [default: graphics cards, or else other GPUs]",
    ),
]
KvTypeOption = Annotated[
    str | None,
    Option(
        "--kv",
        metavar="TYPE",
        help="Type of the KV cache: f16, bf16 or q8_0; smaller types damage answers. [default: what fits]",
    ),
]
FlashAttentionOption = Annotated[
    str,
    Option(
        "--flash-attention",
        metavar="on|off|auto",
        help="Turn flash attention on or off. [default: auto]",
        show_default=False,
    ),
]
RopeOption = Annotated[
    str | None,
    Option("--rope", metavar="TYPE", help="RoPE scaling for contexts beyond the trained length: yarn, linear or none."),
]
HugePagesOption = Annotated[
    bool,
    Option(
        "--huge-pages/--no-huge-pages",
        help="Keep weights and KV cache in pages of 2 MB (Linux).",
        callback=_set_huge_pages,
    ),
]
LookupOption = Annotated[
    bool, Option("--lookup/--no-lookup", help="Use prompt lookup decoding: draft tokens from earlier text.")
]
KeepCacheOption = Annotated[
    bool,
    Option("--keep-cache/--no-keep-cache", help="Save the KV cache on disk, so that the next start needs no prefill."),
]
ForceLoadOption = Annotated[bool, Option("--force", help="Load the model even if it does not seem to fit.")]

AdapterOption = Annotated[
    list[str] | None,
    Option(
        "--adapter",
        metavar="ADAPTER[:SCALE]",
        help="Use a LoRA adapter: a directory of PEFT, or a GGUF file; may be repeated.",
    ),
]

# Options of commands that write GGUF files.
EndsOption = Annotated[
    str | None,
    Option(
        "--ends",
        metavar="TYPE",
        help="Type of the embeddings and the output matrix: f16, q8_0, q6_k, … [default: q8_0 for GPTQ and AWQ, "
        "otherwise that of the mix]",
    ),
]
MixOption = Annotated[
    str,
    Option(
        "--mix",
        metavar="llama.cpp|best",
        help="Types of the tensors: llama.cpp's, or those with the smallest measured error in the same size.",
    ),
]
RequantizeOption = Annotated[
    bool, Option("--requantize", help="Allow weights that are quantized already; costs quality.")
]
TensorTypeOption = Annotated[
    list[str] | None,
    Option("--tensor-type", metavar="REGEX=TYPE", help="Override the type of tensors whose name matches REGEX."),
]
ImatrixOption = Annotated[
    str | None, Option("--imatrix", metavar="FILE", help="Importance matrix, from qwenlocal imatrix or llama-imatrix.")
]
MergeOption = Annotated[
    list[str] | None,
    Option(
        "--merge",
        metavar="ADAPTER[:SCALE]",
        help="Add a LoRA adapter (a directory of PEFT) to the weights; may be repeated.",
    ),
]
PureOption = Annotated[bool, Option("--pure", help="Quantize all tensors to the same type.")]
ForceOption = Annotated[bool, Option("--force", help="Overwrite existing files.")]
DryRunOption = Annotated[bool, Option("--dry-run", help="Show the plan, tensor by tensor; write nothing.")]
AllowNanOption = Annotated[bool, Option("--allow-nan", help="Write zeros for weights that are NaN or infinite.")]
