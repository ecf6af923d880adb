"""`qwenlocal convert`: convert a checkpoint into GGUF files."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import WriteOptions, choose_targets, read_options, write_or_show
from qwenlocal.errors import DownloadFailed, UsageError
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.adapters import find_adapter_folder, parse_adapter
from qwenlocal.library.checkpoint_converter import plan_checkpoint
from qwenlocal.library.local_models import LocalCheckpoint
from qwenlocal.library.names import LocalCheckpointName, ModelName, PathName
from qwenlocal.weights.adapter import adapter_folder, is_adapter, read_adapter
from qwenlocal.weights.other_formats import merge_command

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint
    from qwenlocal.library.streaming.checkpoint_stream import CheckpointStream
    from qwenlocal.weights.adapter_merge import WeightedAdapter
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.file_types import FileType


def convert_checkpoint(
    options: WriteOptions,
    *,
    merge: Sequence[str],
    name: str | None,
    pre_tokenizer: str | None,
    like: str | None,
    limit_rate: int,
    stream: bool,
) -> None:
    """Convert a checkpoint or an adapter; with `--dry-run`, only show the plan."""
    from qwenlocal.weights.conversion import ConversionOptions, default_file_type

    if like not in (None, "llama.cpp"):
        raise UsageError(f"--like must be llama.cpp, not {like}.")
    gc.disable()  # there are no reference cycles here, and scanning a vocabulary's 300,000 strings takes 0.2 s
    if merge:  # read by numpy's library when it is loaded; our own threads divide the work, two to three times as fast
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    types, overrides, imatrix = read_options(options)
    app = AppContext(quiet=options.as_json, limit_rate=limit_rate)
    source = Path(os.path.expanduser(options.source))
    if is_adapter(source):
        given = {"--merge": merge, "--name": name, "--pre": pre_tokenizer, "--like": like, "--stream": stream}
        _convert_adapter(app, source, options, types, [option for option, value in given.items() if value])
        return
    source_name = app.library.models.parse(options.source)
    if stream:
        _check_stream(source_name, {"--merge": bool(merge), "--mix best": overrides.best})
    merges = read_merges(merge)
    opened: CheckpointStream | None = None
    with app.library.checkpoints.find(source_name) as checkpoint:
        name = name or checkpoint.name
        targets = choose_targets(options, name, types or [default_file_type(checkpoint.folder)])
        plan_options = ConversionOptions(
            name, checkpoint.repo, pre_tokenizer, like is not None, overrides, imatrix, options.requantize, merges
        )
        if stream and not isinstance(checkpoint, LocalCheckpoint):
            opened = _open_stream(app, checkpoint, targets, plan_options)
            plan = opened.plan
        elif options.dry_run and not isinstance(checkpoint, LocalCheckpoint):
            plan = _preview(app, checkpoint, targets, plan_options)
        else:
            plan = plan_checkpoint(checkpoint, targets, plan_options, app.say)
    write_or_show(app, plan, options, opened)
    if opened and not options.dry_run:
        opened.checkpoint.discard_documents()


def _check_stream(name: ModelName, refused: Mapping[str, bool]) -> None:
    """
    Check that a conversion can be streamed; `refused` tells which other options are given that cannot be.

    Raises
    ------
    UsageError: it cannot.
    """
    if isinstance(name, (PathName, LocalCheckpointName)):
        raise UsageError(
            tr("--stream is for checkpoints on a hub, but {name} is on this disk.", name=name),
            hint=tr("Leave out --stream."),
        )
    if given := [option for option, is_given in refused.items() if is_given]:
        raise UsageError(
            tr("--stream cannot be used with {options}.", options=" and ".join(given)), hint=tr("Leave out --stream.")
        )


def _open_stream(
    app: AppContext, checkpoint: HubCheckpoint, targets: Sequence[tuple[Path, FileType]], options: ConversionOptions
) -> CheckpointStream:
    from qwenlocal.library.streaming.checkpoint_stream import open_stream

    stream = open_stream(checkpoint, targets, options)
    files = ", ".join(f"{file.type.name} {format_bytes(file.size)}" for file in stream.plan.files)
    size = format_bytes(stream.files.download_size)
    app.say(
        tr(
            "{name} is a checkpoint: {size} to download and convert in one pass. Only the result is stored ({files}).",
            name=checkpoint.name,
            size=size,
            files=files,
        )
    )
    if license := checkpoint.resolved.license:
        app.say(tr("License: {license}", license=license))
    return stream


def read_merges(texts: Sequence[str]) -> list[WeightedAdapter]:
    """
    Read the adapters of `--merge`.

    Raises
    ------
    UsageError: one is not the folder of an adapter, or its scale is invalid.
    BadCheckpoint, UnsupportedCheckpoint: one cannot be used.
    """
    from qwenlocal.weights.adapter_merge import WeightedAdapter

    merges = []
    for text in texts:
        request = parse_adapter(text, "--merge")
        if request.is_gguf:
            raise UsageError(
                f"{request.path} is a GGUF file; only directories of PEFT can be merged.",
                hint="To use it as it is: qwenlocal run MODEL --adapter FILE",
            )
        merges.append(WeightedAdapter(read_adapter(find_adapter_folder(request.path)), request.scale))
    return merges


def _convert_adapter(
    app: AppContext, source: Path, options: WriteOptions, types: Sequence[FileType], refused: Sequence[str]
) -> None:
    from qwenlocal.weights.adapter_file import default_adapter_type, plan_adapter

    given = {
        "--ends": options.ends,
        "--tensor-type": options.tensor_types,
        "--imatrix": options.imatrix,
        "--mix": options.mix != "llama.cpp",
        "--pure": options.pure,
        "--requantize": options.requantize,
    }
    if refused := [*refused, *(option for option, value in given.items() if value)]:
        raise UsageError(
            f"{' and '.join(refused)} cannot be used with an adapter, and {options.source} is one.",
            hint=f"To merge it into its base model: {merge_command(options.source)}",
        )
    adapter = read_adapter(adapter_folder(source))
    targets = choose_targets(options, adapter.folder.resolve().name, types or [default_adapter_type()])
    write_or_show(app, plan_adapter(adapter, targets), options)


def _preview(
    app: AppContext, checkpoint: HubCheckpoint, targets: Sequence[tuple[Path, FileType]], options: ConversionOptions
) -> ConversionPlan:
    """Return the plan without downloading the weights: the headers are enough."""
    from qwenlocal.weights.conversion import plan_conversion

    outline = checkpoint.read_outline()
    if outline is None:
        raise DownloadFailed(
            f"{checkpoint.resolved.origin} sends whole files only, so the headers of {checkpoint.name} "
            "cannot be read before the download.",
            hint="Run the command without --dry-run; the download is kept.",
        )
    preview = plan_conversion(outline, targets, options)
    size = format_bytes(checkpoint.missing_size)
    app.say(f"{size} to download first; only the headers were downloaded now.")
    return preview
