"""
The journal of a write job, next to its first output: finished chunks, with the CRC-32 of the bytes written.

`qwenlocal.resumable` describes the format. An entry is the chunk's number, the CRC-32 over all its targets, and the
number of weights that were NaN or infinite and became zero.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal import __version__, resumable, weights
from qwenlocal.weights.write_job import CHUNK_SIZE, WriteJob

_JOURNAL_VERSION = 1


class FinishedChunk(NamedTuple):
    """The CRC-32 of what was written, and how many weights became zero."""

    crc: int
    zeroed: int


def job_identity(job: WriteJob, sources: Mapping[Path, int], *, allow_nan: bool) -> dict[str, Any]:
    """
    Return the first line of the journal, which differs as soon as the inputs, the outputs, or the conversion differ.

    `sources` are the open source files.
    """
    digest = hashlib.sha256(f"{__version__} {weights.CONVERTER_VERSION} {CHUNK_SIZE} {allow_nan}".encode())
    for output in job.outputs:
        digest.update(f"{output.path.name} {output.size}\n".encode(errors="replace") + output.header)
    states = {path: os.fstat(file) for path, file in sources.items()}
    for rows in job.ranges:
        state = states[rows.file]
        place = f"{rows.file} {state.st_size} {state.st_mtime_ns} {rows.offset} {rows.row_count} {rows.columns}"
        digest.update(place.encode(errors="replace"))
        for target in rows.targets:
            digest.update(f" {target.output} {target.offset} {target.type.name}".encode())
            if target.imatrix is not None:
                digest.update(target.imatrix.tobytes())
    return {"version": _JOURNAL_VERSION, "identity": digest.hexdigest()}


def read_finished(path: Path, identity: dict[str, Any]) -> dict[int, FinishedChunk] | None:
    """Return the finished chunks of an earlier attempt at the same job; None if there was none."""
    content = resumable.read_journal(path)
    if content is None or content.identity != identity:
        return None
    return {
        entry[0]: FinishedChunk(entry[1], entry[2])
        for entry in content.entries
        if len(entry) == 3 and all(number >= 0 for number in entry)
    }
