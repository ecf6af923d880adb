"""Types of the options that several commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from qwenlocal.cli.completion import complete_installed_models, complete_models

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model to use.", autocompletion=complete_models, show_default=False)
]
InstalledModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Installed model.", autocompletion=complete_installed_models, show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
YesOption = Annotated[bool, typer.Option("-y", "--yes", help="Answer yes to questions about downloads.")]
RateOption = Annotated[
    Optional[str],  # noqa: UP045 - typer on Python 3.10
    typer.Option("--limit-rate", metavar="RATE", help="Limit downloads to RATE bytes per second, for example 2M."),
]

# Options of commands that load a model.
ContextOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("-c", "--context", metavar="N", help="Size of the context in tokens. [default: what fits]"),
]
ThreadsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("-t", "--threads", metavar="N", help="Number of threads. [default: one per fast core]"),
]
GpuLayersOption = Annotated[
    str,
    typer.Option("-ngl", "--gpu-layers", metavar="N", help="Number of layers on a GPU, auto or all."),
]
KvTypeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--kv", metavar="TYPE", help="Type of the KV cache: f16, q8_0, q4_0, … [default: what fits]"),
]
FlashAttentionOption = Annotated[
    str,
    typer.Option(
        "--flash-attention",
        metavar="on|off|auto",
        help="Turn flash attention on or off. [default: auto]",
        show_default=False,
    ),
]
RopeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--rope", metavar="TYPE", help="RoPE scaling for contexts beyond the trained length: yarn, linear or none."
    ),
]

# Options of commands that write GGUF files.
TensorTypeOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help="Override the type of tensors whose name matches REGEX."),
]
ImatrixOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--imatrix", metavar="FILE", help="Importance matrix from llama-imatrix."),
]
PureOption = Annotated[bool, typer.Option("--pure", help="Quantize all tensors to the same type.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan, tensor by tensor; write nothing.")]
AllowNanOption = Annotated[bool, typer.Option("--allow-nan", help="Write zeros for weights that are NaN or infinite.")]
