"""
The execution of a write job: several threads read chunks of rows in order, convert them, and write them in place.

Files grow as `<file>.part`, and a journal records the finished chunks. An interrupted job, even after `kill -9`,
continues from there. A file gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import (
    BadCheckpoint,
    DiskFull,
    FileInUse,
    Interrupted,
    NonFiniteWeights,
    NotWritable,
    OutputExists,
    QwenlocalError,
    UnexpectedWeights,
    UnsupportedCheckpoint,
)
from qwenlocal.fileio import read_at, start_writeback, write_all, write_error
from qwenlocal.paths import ensure_writable
from qwenlocal.resumable import JournalAppender, journal_path, part_path, write_journal
from qwenlocal.weights.row_source import SourceReader
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.worker_buffers import WorkerBuffers
from qwenlocal.weights.write_job import (
    FinishedChunk,
    JobSources,
    RowChunk,
    RowTarget,
    WriteJob,
    job_identity,
    read_finished,
    split_into_chunks,
)

_WRITEBACK_SIZE = 64 << 20  # bytes written between two requests to start writeback
_FINAL_ERRORS = (BadCheckpoint, NonFiniteWeights, UnexpectedWeights, UnsupportedCheckpoint)
_LOCK_TIMEOUT = 0.5  # seconds: `qwenlocal list` holds a lock for a moment to see if it is in use

Report = Callable[[int, int], object]
Inspect = Callable[[RowChunk, RowTarget, memoryview, SourceReader], object]


class WriteResult(NamedTuple):
    """The number of weights that were NaN or infinite and became zero, and the bytes read by an earlier attempt."""

    non_finite: int
    resumed: int


def run_job(
    job: WriteJob,
    *,
    threads: int,
    replace: bool = False,
    allow_nan: bool = False,
    report: Report = lambda done, total: None,
    sources: JobSources | None = None,
    inspect: Inspect | None = None,
) -> WriteResult:
    """
    Write the files of `job`. `report` gets bytes read and bytes to read.

    The rows are read from `sources`, by default from files on this disk. `inspect` gets each chunk, one of its targets,
    the bytes for it, and the reader of the rows.

    Raises
    ------
    OutputExists: a file exists (not with `replace`).
    DiskFull, NotWritable: there is no space or no permission. Finished chunks are kept.
    FileInUse: another process is writing one of the files.
    NonFiniteWeights: a weight is NaN or infinite (not with `allow_nan`).
    BadWeights: a source cannot be read, or a weight is too large for its type.
    Everything that `sources` and `inspect` raise.
    Interrupted: Ctrl-C. The same call continues.
    """
    import filelock

    for output in job.outputs:
        ensure_writable(output.path.parent)
    _refuse_existing(job, replace=replace)
    locks = sorted(part_path(output.path).with_suffix(".part.lock") for output in job.outputs)
    lock = locks[0]
    try:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(filelock.FileLock(lock, timeout=_LOCK_TIMEOUT))
                stack.callback(_unlink, lock)
            _refuse_existing(job, replace=replace)  # the process that had the lock may have written it
            sources = sources or SourceFiles(path for rows in job.ranges for path in rows.source.files)
            return _JobRun(job, sources, allow_nan=allow_nan, report=report, inspect=inspect).run(threads)
    except filelock.Timeout as busy:
        if not lock.exists():  # nobody holds it: it cannot be created
            raise NotWritable(lock.parent, "no files can be created there") from busy
        raise FileInUse(job.outputs[0].path) from busy
    except OSError as reason:
        raise write_error(lock.parent, reason, 0) from reason


def _refuse_existing(job: WriteJob, *, replace: bool) -> None:
    for output in job.outputs:
        if not replace and os.path.lexists(output.path):
            raise OutputExists(output.path)


class _JobRun:
    """One attempt at a job: the open files, the finished chunks, and the state that the threads share."""

    def __init__(
        self, job: WriteJob, sources: JobSources, *, allow_nan: bool, report: Report, inspect: Inspect | None
    ) -> None:
        self._job, self._sources, self._allow_nan = job, sources, allow_nan
        self._report, self._inspect = report, inspect
        self._folder, self._journal_path = job.outputs[0].path.parent, journal_path(job.outputs[0].path)
        self._chunks = list(split_into_chunks(job))
        self._lock, self._seek_lock = threading.Lock(), threading.Lock()
        self._finished: dict[int, FinishedChunk] = {}
        self._read = self._written = self._flushed = 0  # bytes
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._files: list[int] = []

    def run(self, threads: int) -> WriteResult:
        with contextlib.ExitStack() as stack:
            try:
                self._open(stack)
                resumed = self._read
                self._run_workers(threads)
                self._sources.check_unchanged()
                self._publish(stack)
            except OSError as reason:
                raise write_error(self._folder, reason, self._missing_size()) from reason
            except _FINAL_ERRORS:  # the next attempt would fail, too: finished chunks are of no use
                self._discard(stack)
                raise
            except KeyboardInterrupt as stop:
                raise Interrupted("Finished work is kept. Run the same command again to continue.") from stop
        return WriteResult(sum(chunk.zeroed for chunk in self._finished.values()), resumed)

    # --- opening and closing

    def _open(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(self._sources)
        identity = job_identity(self._job, self._sources.fingerprints(), allow_nan=self._allow_nan)
        finished = read_finished(self._journal_path, identity)
        self._check_disk_space()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | (0 if finished is not None else os.O_TRUNC)
        for output in self._job.outputs:
            file = os.open(part_path(output.path), flags, 0o644)
            stack.callback(os.close, file)
            self._files.append(file)
            os.ftruncate(file, output.size)
            self._write(len(self._files) - 1, memoryview(output.header), 0)
        self._clear_gaps()
        self._resume(finished or {})
        write_journal(self._journal_path, identity, ((number, *chunk) for number, chunk in self._finished.items()))
        self._journal = JournalAppender(self._journal_path)
        stack.callback(self._journal.close)

    def _clear_gaps(self) -> None:
        """Write zeros between the tensors, whatever an earlier attempt left there."""
        ends = [len(output.header) for output in self._job.outputs]
        spans = [
            (target.output, target.offset, rows.row_count * target.type.row_bytes(rows.columns))
            for rows in self._job.ranges
            for target in rows.targets
        ]
        spans += [(number, output.size, 0) for number, output in enumerate(self._job.outputs)]
        for output, offset, size in sorted(spans):
            if offset > ends[output]:
                self._write(output, memoryview(bytes(offset - ends[output])), ends[output])
            ends[output] = offset + size

    def _check_disk_space(self) -> None:
        """Check the free space; the files of an earlier attempt have theirs already."""
        allocated = 0
        for output in self._job.outputs:
            with contextlib.suppress(OSError):
                state = part_path(output.path).stat()
                allocated += getattr(state, "st_blocks", 0) * 512
        needed = sum(output.size for output in self._job.outputs) - allocated
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise DiskFull(self._folder, needed, free)

    def _resume(self, finished: Mapping[int, FinishedChunk]) -> None:
        """Skip the chunks whose bytes on the disk still have the CRC-32 in the journal."""
        intact = [
            number
            for number, chunk in finished.items()
            if number < len(self._chunks) and self._crc_on_disk(self._chunks[number]) == chunk.crc
        ]
        for number in self._sources.start(self._chunks, intact):
            self._finished[number] = finished[number]
            self._read += self._chunks[number].read_size

    def _crc_on_disk(self, chunk: RowChunk) -> int:
        crc = 0
        for target in chunk.range.targets:
            buffer = memoryview(bytearray(chunk.target_size(target)))
            self._read_output(target.output, buffer, chunk.target_offset(target))
            crc = zlib.crc32(buffer, crc)
        return crc

    def _publish(self, opened: contextlib.ExitStack) -> None:
        """Flush the complete files to the disk, close them, and give them their names."""
        for file in self._files:
            getattr(os, "fdatasync", os.fsync)(file)
        opened.close()
        for output in self._job.outputs:
            part_path(output.path).replace(output.path)
        self._journal_path.unlink(missing_ok=True)

    def _discard(self, opened: contextlib.ExitStack) -> None:
        opened.close()
        for output in self._job.outputs:
            part_path(output.path).unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def _missing_size(self) -> int:
        """Return the bytes that are still to be written."""
        return sum(chunk.write_size for number, chunk in enumerate(self._chunks) if number not in self._finished)

    # --- the threads

    def _run_workers(self, threads: int) -> None:
        pending = iter([number for number in range(len(self._chunks)) if number not in self._finished])
        workers = [threading.Thread(target=self._work, args=(pending,), daemon=True) for _ in range(max(1, threads))]
        total = self._job.read_bytes
        try:
            for worker in workers:
                start_thread(worker)
            for worker in workers:
                while worker.is_alive() and not self._is_stopped:
                    worker.join(0.1)
                    self._report(self._read, total)
                    self._start_writeback()
        finally:  # no thread may write to a file that is closed
            self._is_stopped = True
            if len(self._finished) < len(self._chunks):
                self._sources.stop()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        if self._failure:
            raise self._failure
        self._report(total, total)

    def _start_writeback(self) -> None:
        """Let the disk write while the threads compute; otherwise the final fdatasync waits for everything."""
        if self._written - self._flushed >= _WRITEBACK_SIZE:
            self._flushed = self._written
            for file in self._files:
                start_writeback(file)

    def _work(self, pending: Iterator[int]) -> None:
        try:
            buffers = WorkerBuffers(self._job, allow_nan=self._allow_nan)
            while not self._is_stopped:
                with self._lock:
                    number = next(pending, None)
                if number is None:
                    return
                self._convert_chunk(number, buffers)
        except BaseException as failure:
            with self._lock:
                self._failure = self._failure or failure
            self._is_stopped = True

    def _convert_chunk(self, number: int, buffers: WorkerBuffers) -> None:
        chunk = self._chunks[number]
        data = buffers.source(chunk.source_size)
        chunk.range.source.read(chunk.first, data, self._sources)
        buffers.load(chunk)
        crc = 0
        for target in chunk.range.targets:
            result = buffers.convert(chunk, target)
            crc = zlib.crc32(result, crc)
            if self._inspect:
                self._inspect(chunk, target, result, self._sources)
            self._write(target.output, result, chunk.target_offset(target))
        with self._lock:
            self._finished[number] = FinishedChunk(crc, buffers.zeroed)
            self._read += chunk.read_size
            self._written += chunk.write_size
            self._journal.append(number, crc, buffers.zeroed)
        self._sources.finish(number)

    def _read_output(self, output: int, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = read_at(self._files[output], buffer, offset, self._seek_lock)
            if not count:
                return  # it has the size of the finished file, unless another program cut it
            buffer, offset = buffer[count:], offset + count

    def _write(self, output: int, data: memoryview, offset: int) -> None:
        write_all(self._files[output], data, offset, self._seek_lock)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps a file that another process has open
        path.unlink(missing_ok=True)


def start_thread(thread: threading.Thread) -> None:
    """
    Start a thread.

    Raises
    ------
    QwenlocalError: the system allows no more.
    """
    try:
        thread.start()
    except RuntimeError as reason:
        raise QwenlocalError(
            "This system does not allow more threads.", hint="Use one thread: -t 1. Finished work is kept."
        ) from reason
