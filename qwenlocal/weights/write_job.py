"""
The job of writing GGUF files: which rows are read, and at which byte of which file they go in which type.

Every offset is known before the work starts, so threads need not wait for each other, and the result does not depend
on their number. The work is divided into chunks of rows. A journal next to the first output lists the finished ones;
`qwenlocal.resumable` describes its format. An entry is the chunk's number, the CRC-32 over all its targets, and the
number of weights that were NaN or infinite and became zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qwenlocal import __version__, resumable, weights
from qwenlocal.ggml import TensorType
from qwenlocal.weights.row_source import CHUNK_SIZE, RowSource, SourceReader

if TYPE_CHECKING:
    from types import TracebackType

    import numpy

_JOURNAL_VERSION = 1
_PROCESS_SIZE = 100 << 20  # bytes, measured: Python, numpy, and Qwen's 151,936 tokens while they are read


class RowTarget(NamedTuple):
    """The destination of rows: the index of the output, the byte offset in it, their type, and column weights."""

    output: int
    offset: int
    type: TensorType
    imatrix: numpy.ndarray | None = None


@dataclass(frozen=True)
class RowRange:
    """Rows of one tensor, and their targets; read once for all targets."""

    name: str
    source: RowSource
    targets: Sequence[RowTarget]

    @property
    def type(self) -> TensorType:
        """The type of the rows in the source."""
        return self.source.type

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return self.source.row_count

    @property
    def columns(self) -> int:
        """Values per row."""
        return self.source.columns

    @property
    def is_copied(self) -> bool:
        """True if all targets get the rows as they are in the source."""
        return all(target.type == self.type for target in self.targets)


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its header, and its total size in bytes."""

    path: Path
    header: bytes
    size: int


@dataclass(frozen=True)
class WriteJob:
    """Everything to read and write."""

    outputs: Sequence[OutputFile]
    ranges: Sequence[RowRange]

    @property
    def read_bytes(self) -> int:
        """Bytes to read."""
        return sum(rows.source.read_size for rows in self.ranges)


class RowChunk(NamedTuple):
    """`row_count` rows of a range from `first` on: the unit of work and of the journal."""

    range: RowRange
    first: int
    row_count: int

    @property
    def source_size(self) -> int:
        """Bytes of the rows, in the type of the source."""
        return self.row_count * self.range.type.row_bytes(self.range.columns)

    @property
    def read_size(self) -> int:
        """Bytes that the rows take in the files that are read, to the byte for whole ranges."""
        return self.range.source.read_size * self.row_count // max(1, self.range.row_count)

    def target_offset(self, target: RowTarget) -> int:
        """Return the byte offset of the rows in the output."""
        return target.offset + self.first * target.type.row_bytes(self.range.columns)

    def target_size(self, target: RowTarget) -> int:
        """Return the bytes to write to `target`."""
        return self.row_count * target.type.row_bytes(self.range.columns)

    @property
    def write_size(self) -> int:
        """Bytes to write to all targets together."""
        return sum(map(self.target_size, self.range.targets))


class JobSources(SourceReader, Protocol):
    """The source files of a job. A context manager: they can be read within its block."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def fingerprints(self) -> Mapping[Path, str]:
        """Return a text per file that differs if its content does."""

    def start(self, chunks: Sequence[RowChunk], finished: Collection[int]) -> Collection[int]:
        """Prepare to read `chunks` in order; return those of the `finished` ones that need not be written again."""

    def finish(self, number: int) -> None:
        """Note that a chunk is written and recorded, so that its rows are not read again."""

    def stop(self) -> None:
        """Make reads in other threads end soon."""

    def check_unchanged(self) -> None:
        """
        Check, once all chunks are written, that all bytes came from the files that `fingerprints` describes.

        Raises
        ------
        BadWeights, DownloadFailed: some did not.
        """


def split_into_chunks(job: WriteJob) -> Iterator[RowChunk]:
    """Yield all chunks in the order in which the rows lie on the disk."""
    for rows in sorted(job.ranges, key=lambda rows: (str(rows.source.file), rows.source.offset)):
        step = rows.source.chunk_rows
        for first in range(0, rows.row_count, max(1, step)):
            yield RowChunk(rows, first, min(step, rows.row_count - first))


def buffer_sizes(job: WriteJob) -> tuple[int, int, int]:
    """Return what the largest chunks take: bytes as read, values as float32, bytes as written for one target."""
    chunks = [RowChunk(rows, 0, rows.source.chunk_rows) for rows in job.ranges]
    read = max((chunk.source_size for chunk in chunks), default=0)
    values = max((chunk.row_count * chunk.range.columns for chunk in chunks if not chunk.range.is_copied), default=0)
    written = max((chunk.target_size(target) for chunk in chunks for target in chunk.range.targets), default=0)
    return read, values, written


def memory_needed(job: WriteJob, threads: int) -> int:
    """
    Compute the bytes of memory that `job` takes: per thread a chunk as read, as float32, and as written.

    A 7B to Q8_0 with two threads: 2 x (1.0 + 2.1 + 0.6) MB, and 100 MB for Python and the vocabulary. Packed weights
    are loaded one matrix at a time, the next one before the threads have finished the last.
    """
    read, values, written = buffer_sizes(job)
    shared = max((rows.source.shared_size for rows in job.ranges), default=0)
    return _PROCESS_SIZE + 2 * shared + threads * (read + 4 * values + written)


# --- the journal


class FinishedChunk(NamedTuple):
    """The CRC-32 of the written data, and how many weights became zero."""

    crc: int
    zeroed: int


def job_identity(job: WriteJob, fingerprints: Mapping[Path, str], *, allow_nan: bool) -> dict[str, Any]:
    """
    Return the first line of the journal, which differs as soon as the inputs, the outputs, or the conversion differ.

    `fingerprints` are those of the source files.
    """
    digest = hashlib.sha256(f"{__version__} {weights.CONVERTER_VERSION} {CHUNK_SIZE} {allow_nan}".encode())
    for output in job.outputs:
        digest.update(f"{output.path.name} {output.size}\n".encode(errors="replace") + output.header)
    for rows in job.ranges:
        digest.update(rows.source.identify(fingerprints).encode(errors="replace"))
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
