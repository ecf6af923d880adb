"""The plan of a conversion whose checkpoint is downloaded at the same time, and not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import DownloadFailed
from qwenlocal.i18n import tr
from qwenlocal.library.streaming.range_fetcher import RangeFetcher, RemoteSamples
from qwenlocal.library.streaming.streamed_files import StreamedFiles
from qwenlocal.weights.conversion import plan_conversion
from qwenlocal.weights.packed_proof import StreamedProofs

if TYPE_CHECKING:
    from qwenlocal.library.puller import HubCheckpoint
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.file_types import FileType


@dataclass(frozen=True)
class CheckpointStream:
    """A conversion plan, the remote files that it reads, and the comparison of packed weights."""

    checkpoint: HubCheckpoint
    plan: ConversionPlan
    files: StreamedFiles
    proofs: StreamedProofs


def open_stream(
    checkpoint: HubCheckpoint, targets: Sequence[tuple[Path, FileType]], options: ConversionOptions
) -> CheckpointStream:
    """
    Plan a conversion from the headers of the weights, and a few samples of them.

    Raises
    ------
    DownloadFailed: the hub only sends whole files, or publishes no digest of one.
    Everything that `plan_conversion` raises.
    """
    outline = checkpoint.read_outline()
    if outline is None:
        raise DownloadFailed(
            tr(
                "{origin} sends whole files only, so {name} cannot be streamed.",
                origin=checkpoint.resolved.origin,
                name=checkpoint.name,
            ),
            hint=tr("Convert it without --stream."),
        )
    artifacts = {checkpoint.folder / request.artifact.name: request.artifact for request in checkpoint.weights}
    for artifact in artifacts.values():
        if artifact.sha256 is None:
            raise DownloadFailed(
                tr(
                    "{origin} publishes no SHA-256 of {name}, so it cannot be checked while it is streamed.",
                    origin=checkpoint.resolved.origin,
                    name=artifact.name,
                ),
                hint=tr("Convert it without --stream."),
            )
    samples = RemoteSamples(RangeFetcher(artifacts))
    plan = plan_conversion(replace(outline, samples=samples), targets, options)
    return CheckpointStream(checkpoint, plan, StreamedFiles(plan, artifacts), StreamedProofs(plan))
