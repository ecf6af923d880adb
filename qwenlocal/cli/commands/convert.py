"""`qwenlocal convert`: convert a checkpoint into GGUF files."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import WriteOptions, choose_targets, read_options, write_or_show
from qwenlocal.errors import DownloadFailed, UsageError
from qwenlocal.formatting import format_bytes
from qwenlocal.library.checkpoint_converter import download_cost
from qwenlocal.library.local_models import LocalCheckpoint

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.file_types import FileType


def convert_checkpoint(
    options: WriteOptions, *, name: str | None, pre_tokenizer: str | None, like: str | None, limit_rate: int
) -> None:
    """Convert a checkpoint; with `--dry-run`, only show the plan."""
    from qwenlocal.weights.conversion import ConversionOptions

    if like not in (None, "llama.cpp"):
        raise UsageError(f"--like must be llama.cpp, not {like}.")
    gc.disable()  # there are no reference cycles here, and scanning a vocabulary's 300,000 strings takes 0.2 s
    types, overrides, imatrix = read_options(options)
    app = AppContext(quiet=options.as_json, limit_rate=limit_rate)
    with app.library.checkpoints.find(app.library.models.parse(options.source)) as checkpoint:
        name = name or checkpoint.name
        targets = choose_targets(options, name, types)
        plan_options = ConversionOptions(name, checkpoint.repo, pre_tokenizer, like is not None, overrides, imatrix)
        plan = _plan(app, checkpoint, targets, plan_options, options)
    write_or_show(app, plan, options)


def _plan(
    app: AppContext,
    checkpoint: LocalCheckpoint | HubCheckpoint,
    targets: Sequence[tuple[Path, FileType]],
    plan_options: ConversionOptions,
    options: WriteOptions,
) -> ConversionPlan:
    """Return the plan, once the weights are on this disk; for a dry run the headers are enough."""
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.conversion import plan_conversion

    if not isinstance(checkpoint, LocalCheckpoint):
        outline = checkpoint.read_outline()
        preview = plan_conversion(outline, targets, plan_options) if outline else None
        if options.dry_run:
            if preview is None:
                raise DownloadFailed(
                    f"{checkpoint.resolved.origin} sends whole files only, so the headers of {checkpoint.name} "
                    "cannot be read before the download.",
                    hint="Run the command without --dry-run; the download is kept.",
                )
            size = format_bytes(checkpoint.missing_size)
            app.say(f"{size} to download first; only the headers were downloaded now.")
            return preview
        if preview:
            app.say(download_cost(checkpoint, preview))
        checkpoint = checkpoint.download(reserve=sum(file.size for file in preview.files) if preview else 0)
    return plan_conversion(Checkpoint.open(checkpoint.path), targets, plan_options)
