"""`qwenlocal convert`: convert a checkpoint into GGUF files."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import WriteOptions, choose_targets, read_options, write_or_show
from qwenlocal.errors import DownloadFailed, UsageError
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.checkpoint_converter import plan_checkpoint
from qwenlocal.library.local_models import LocalCheckpoint
from qwenlocal.library.names import LocalCheckpointName, ModelName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint
    from qwenlocal.library.streaming.checkpoint_stream import CheckpointStream
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.file_types import FileType


def convert_checkpoint(
    options: WriteOptions,
    *,
    name: str | None,
    pre_tokenizer: str | None,
    like: str | None,
    limit_rate: int,
    stream: bool,
) -> None:
    """Convert a checkpoint; with `--dry-run`, only show the plan."""
    from qwenlocal.weights.conversion import ConversionOptions, default_file_type

    if like not in (None, "llama.cpp"):
        raise UsageError(f"--like must be llama.cpp, not {like}.")
    gc.disable()  # there are no reference cycles here, and scanning a vocabulary's 300,000 strings takes 0.2 s
    types, overrides, imatrix = read_options(options)
    app = AppContext(quiet=options.as_json, limit_rate=limit_rate)
    source_name = app.library.models.parse(options.source)
    if stream:
        _check_stream(source_name, {"--mix best": overrides.best})
    opened: CheckpointStream | None = None
    with app.library.checkpoints.find(source_name) as checkpoint:
        name = name or checkpoint.name
        targets = choose_targets(options, name, types or [default_file_type(checkpoint.folder)])
        plan_options = ConversionOptions(
            name, checkpoint.repo, pre_tokenizer, like is not None, overrides, imatrix, options.requantize
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
        raise UsageError(f"--stream is for checkpoints on a hub, but {name} is on this disk.", hint="Leave it out.")
    if given := [option for option, is_given in refused.items() if is_given]:
        raise UsageError(f"--stream cannot be used with {' and '.join(given)}.", hint="Leave out --stream.")


def _open_stream(
    app: AppContext, checkpoint: HubCheckpoint, targets: Sequence[tuple[Path, FileType]], options: ConversionOptions
) -> CheckpointStream:
    from qwenlocal.library.streaming.checkpoint_stream import open_stream

    stream = open_stream(checkpoint, targets, options)
    files = ", ".join(f"{file.type.name} {format_bytes(file.size)}" for file in stream.plan.files)
    size = format_bytes(stream.files.download_size)
    app.say(f"{checkpoint.name} is a checkpoint: {size} to download, converted on the way; only {files} is kept.")
    if license := checkpoint.resolved.license:
        app.say(tr("License: {license}", license=license))
    return stream


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
