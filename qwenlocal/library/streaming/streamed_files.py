"""
The source files of a conversion, read while they are downloaded; nothing of them is written to the disk.

Several connections fetch the bytes (`block_stream`). One thread takes them in order: it hashes the files, and copies
the bytes that rows need into memory of their own, where the workers wait for them. Another thread requests the parts
that are needed before they arrive (`stream_layout`). A file counts once its SHA-256 is the published one. Until then
`stream_journal` records how far all rows are written, with the state of the digest, so that a later attempt continues
there and hashes each byte that it uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qwenlocal.errors import ConflictingBytes, DigestMismatch
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import Artifact
from qwenlocal.library.streaming.block_stream import BUFFER_SIZE, BlockStream
from qwenlocal.library.streaming.file_pass import FilePass, find_usable_progress
from qwenlocal.library.streaming.part_checks import PartChecks
from qwenlocal.library.streaming.range_fetcher import RangeFetcher, Stopped
from qwenlocal.library.streaming.stream_journal import PartOfFile, StreamJournal
from qwenlocal.library.streaming.stream_layout import REQUEST_SIZE, StreamUnit, build_units, plan_requests
from qwenlocal.weights.write_workers import start_thread

if TYPE_CHECKING:
    import numpy

    from qwenlocal.weights.conversion_plan import ConversionPlan
    from qwenlocal.weights.write_job import RowChunk

_HELD_SIZE = 16 << 20  # bytes of units that wait for the workers, or two units
_AHEAD = 8  # units whose parts are requested before they are needed
_SAVE_INTERVAL = 1.0  # seconds of work that a crash may cost
_JOIN_TIMEOUT = 1.0  # seconds; a thread that waits for a server's first byte is left behind


class StreamedFiles:
    """
    The files of a plan for a checkpoint on a hub, by the paths that a download would give them; `artifacts` must have
    a SHA-256. A context manager: its journal is removed at the end of the block, and kept after an error.

    Every wait ends. Units arrive in the order in which the workers take them, so the first unfinished one always has
    memory, and its parts are requested. Bytes that do not come are a failure (`RangeFetcher`). The first failure of a
    thread ends all waits; `write_workers` calls `stop` as soon as a worker fails.
    """

    def __init__(self, plan: ConversionPlan, artifacts: Mapping[Path, Artifact]) -> None:
        self._plan = plan
        self._artifacts = dict(sorted(artifacts.items(), key=lambda item: str(item[0])))  # the order of `build_units`
        self._fetcher = RangeFetcher(self._artifacts)
        self._journal = StreamJournal(plan.job.outputs[0].path, self.fingerprints())
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._is_complete = False
        self._units: list[StreamUnit] = []
        self._unit_of: dict[int | PartOfFile, StreamUnit] = {}  # by chunk and by part
        self._held, self._held_limit = 0, _HELD_SIZE
        self._passes: dict[Path, FilePass] = {}
        self._blocks: BlockStream | None = None
        self._threads: list[threading.Thread] = []

    # --- as `write_job.JobSources`

    def __enter__(self) -> StreamedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)
        with self._changed:
            if kind is None:
                self._journal.remove()
                return
            for file in self._passes.values():
                self._save(file, is_last=True)
            self._journal.close()

    def fingerprints(self) -> Mapping[Path, str]:
        """Return the digest and the size of each file."""
        return {path: f"{artifact.sha256} {artifact.size}" for path, artifact in self._artifacts.items()}

    @property
    def download_size(self) -> int:
        """Bytes of all files."""
        return sum(artifact.size for artifact in self._artifacts.values())

    @property
    def buffer_size(self) -> int:
        """Bytes of memory for what has arrived, besides the packed matrices that every conversion loads."""
        return min(self.download_size, BUFFER_SIZE) + _HELD_SIZE + 2 * REQUEST_SIZE

    def start(self, chunks: Sequence[RowChunk], finished: Collection[int]) -> Collection[int]:
        """Begin to download what `chunks` need; return the finished ones whose bytes were hashed."""
        self._units = build_units(chunks, self._plan.assumptions)
        progress = find_usable_progress(self._journal.read(), self._artifacts, self._units, set(finished))
        checks = PartChecks(self._units, self._plan.assumptions, progress)
        for path, file in progress.items():
            units = [unit for unit in self._units if unit.path == path]
            self._passes[path] = FilePass(path, self._artifacts[path].size, file, units, checks.watched)
        self._checks = checks
        pending = [unit for unit in self._units if not unit.is_done]
        for unit in pending:
            parts = [*unit.parts, *unit.side_parts.values()]
            unit.missing, unit.unwritten = sum(part.size for part in parts), len(unit.chunks)
            self._unit_of |= dict.fromkeys((*unit.chunks, *parts), unit)
        self._held_limit = max(_HELD_SIZE, 2 * max((unit.size for unit in pending), default=0))
        self._journal.begin(progress)
        ranges = [PartOfFile(f.path, f.offset, f.size - f.offset) for f in self._passes.values() if not f.is_verified]
        self._blocks = blocks = BlockStream(ranges, self._fetcher)
        blocks.start()
        jobs: list[Callable[[], None]] = [lambda: self._take_pieces(blocks), self._request_side_parts]
        self._threads = [threading.Thread(target=self._run, args=(job,), daemon=True) for job in jobs]
        for thread in self._threads:
            start_thread(thread)
        return [chunk for unit in self._units if unit.is_done for chunk in unit.chunks]

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """
        Fill `buffer` with the bytes of a chunk of rows, once they have arrived.

        Raises
        ------
        DownloadFailed, SourceUnreachable: no source delivers them. DigestMismatch: a file is not the published one.
        UnexpectedWeights, UnsupportedCheckpoint: an assumption of the plan is wrong.
        """
        buffer[:] = self.load(path, offset, len(buffer)).data

    def load(self, path: Path, offset: int, size: int) -> numpy.ndarray:
        """
        Return a tensor of a packed matrix as uint8, once all of the matrix has arrived.

        Raises
        ------
        As `read`.
        """
        part = PartOfFile(path, offset, size)
        unit = self._unit_of[part]
        with self._changed:
            while not unit.is_ready:
                self._raise_failure()
                self._changed.wait()
            return unit.data[part]

    def finish(self, number: int) -> None:
        """Note that a chunk is written; the memory of its unit is free after the last one."""
        unit = self._unit_of[number]
        with self._changed:
            unit.unwritten -= 1
            if unit.unwritten:
                return
            unit.data.clear()
            unit.is_done = True
            self._held -= unit.size
            self._save(self._passes[unit.path])
            self._changed.notify_all()

    def stop(self) -> None:
        """Make reads in other threads end soon."""
        if not self._is_complete:
            self._fetcher.stop()
        if self._blocks:
            self._blocks.stop()
        self._fail(Stopped())

    def check_unchanged(self) -> None:
        """
        Wait until all files are hashed.

        Raises
        ------
        As `read`.
        """
        with self._changed:
            while not self._is_complete:
                self._raise_failure()
                self._changed.wait(0.1)  # Ctrl-C must end it, on Windows, too

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _run(self, job: Callable[[], None]) -> None:
        """Run a thread's job; an exception is raised in the threads that read."""
        try:
            job()
        except BaseException as failure:
            self._fail(failure)
            if isinstance(failure, ConflictingBytes):
                self._forget(failure.path)

    # --- bytes in order

    def _take_pieces(self, blocks: BlockStream) -> None:
        for path, offset, data in blocks.pieces():
            file = self._passes[path]
            for part, position, bytes_of_part in file.take(offset, data):
                self._take_part(file, part, position, bytes_of_part)
            if file.offset == file.size:
                self._verify(file)
            with self._changed:
                self._save(file)
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def _take_part(self, file: FilePass, part: PartOfFile, position: int, data: memoryview) -> None:
        unit = self._unit_of.get(part)
        if unit and part not in unit.side_parts.values():
            self._store(unit, part, position, data)
        if digest := file.watch(part, data, is_last=position + len(data) == part.size):
            with self._changed:
                self._journal.add_passed(part, self._checks.note_passed(part, digest))

    def _store(self, unit: StreamUnit, part: PartOfFile, position: int, data: memoryview) -> None:
        """Copy bytes of a unit, for which there must be memory."""
        import numpy

        with self._changed:
            if part not in unit.data:
                if part == unit.parts[0]:
                    self._wait_for_memory(unit.size)
                unit.data[part] = numpy.empty(part.size, numpy.uint8)
        unit.data[part][position : position + len(data)] = data
        self._note_arrival(unit, len(data))

    def _note_arrival(self, unit: StreamUnit, count: int) -> None:
        with self._changed:
            unit.missing -= count
            if unit.missing:
                return
        unit.check()
        with self._changed:
            unit.is_ready = True
            self._changed.notify_all()

    def _wait_for_memory(self, size: int) -> None:
        while self._held and self._held + size > self._held_limit:
            self._raise_failure()
            self._changed.wait()
        self._held += size

    def _verify(self, file: FilePass) -> None:
        """
        Compare the digest of a whole file.

        Raises
        ------
        DigestMismatch: it is not the published one; nothing that was made from the file is kept.
        """
        artifact, digest = self._artifacts[file.path], file.digest.hexdigest()
        if digest == artifact.sha256:
            file.has_right_digest = True
            return
        self._forget(file.path)
        labels = " and ".join(source.label for source in artifact.sources)
        mismatch = DigestMismatch(artifact.name, artifact.sha256 or "", digest, source=labels)
        mismatch.hint = tr(
            "The work on this file is discarded. Run the same command again, on another network if it happens again."
        )
        raise mismatch

    def _forget(self, path: Path) -> None:
        with self._changed, contextlib.suppress(OSError):  # if the disk is full, the next attempt finds the wrong bytes
            self._passes[path].is_void = True
            self._journal.forget(path)

    def _save(self, file: FilePass, *, is_last: bool = False) -> None:
        """Record how far a file is hashed and all of its rows are written."""
        snapshot = file.find_resume_point()
        if file.is_void or file.is_verified:
            return
        if file.has_right_digest and file.is_written:
            file.is_verified = True
            self._journal.add_verified(file.path, file.size)
        elif snapshot and (is_last or time.monotonic() - file.saved_at >= _SAVE_INTERVAL):
            file.saved_at = time.monotonic()
            self._journal.add_state(file.path, *snapshot)

    # --- parts that are requested on their own

    def _request_side_parts(self) -> None:
        pending = [unit for unit in self._units if not unit.is_done and unit.side_parts]
        for number, request in plan_requests(pending):
            self._wait_for_turn(pending, number)
            first, last = request[0][1], request[-1][1]
            data = b"".join(self._fetcher.read(first._replace(size=last.end - first.offset)))
            for unit, part in request:
                self._take_side_part(unit, part, data[part.offset - first.offset :][: part.size])

    def _wait_for_turn(self, pending: Sequence[StreamUnit], number: int) -> None:
        """Wait until the unit is one of the next ones that are written."""
        with self._changed:
            while number >= _AHEAD and not pending[number - _AHEAD].is_done:
                self._raise_failure()
                self._changed.wait()

    def _take_side_part(self, unit: StreamUnit, part: PartOfFile, data: bytes) -> None:
        import numpy

        sha256 = hashlib.sha256(data).digest()
        with self._changed:
            self._journal.add_requested(part, self._checks.note_requested(part, sha256))
            unit.data[part] = numpy.frombuffer(data, numpy.uint8)
        self._note_arrival(unit, part.size)
