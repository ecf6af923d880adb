"""
Downloads: resumable, verified, from several sources, shared between processes.

A file is split into blocks. Threads fetch the next missing block from the best available source, and one more thread
hashes the blocks in order. When a source fails, the rest of the block comes from the next one; every byte that has
arrived is kept. See `partial_file.py` for crash safety and `failover.py` for the choice of sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from qwenlocal.errors import DigestMismatch, DiskFull, Interrupted, NotWritable
from qwenlocal.fileio import hash_blocks
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import Artifact, DownloadedFile, DownloadPolicy, ReportProgress, Section
from qwenlocal.library.byte_source import RangesUnsupported
from qwenlocal.library.failover import SourceSelector, SourceState
from qwenlocal.library.http import TransferError
from qwenlocal.library.partial_file import PartialFile, lock_path, read_download_journal
from qwenlocal.paths import ensure_writable
from qwenlocal.progress import TaskProgress
from qwenlocal.resumable import journal_path, part_path

_DISK_RESERVE = 32 << 20
_RECORD_INTERVAL = 1.0  # seconds of transfer that a crash may cost
_SYNC_EVERY = 64 << 20  # bytes that a power cut may cost
_JOIN_TIMEOUT = 1.0  # seconds; a thread that waits for a server's first byte is left behind


def download_artifact(
    artifact: Artifact,
    target: Path,
    *,
    locks: Path,
    part: Path | None = None,
    report: ReportProgress = lambda _: None,
    policy: DownloadPolicy = DownloadPolicy(),
    stop: threading.Event | None = None,
) -> DownloadedFile:
    """
    Download `artifact` to `target`; a verified file that is already there is returned as it is.

    The bytes are collected in `<part>.part` (default: next to the target). If another process is downloading the same
    file, wait for it and share its result. After Ctrl-C, a crash or a network failure, the same call resumes. Setting
    `stop` in another thread works like Ctrl-C.

    Raises
    ------
    DownloadFailed, SourceUnreachable: no source delivered the file.
    DigestMismatch: the bytes are not the published file; they were deleted.
    DiskFull, NotWritable: there is no space, or no permission.
    Interrupted: Ctrl-C; what has arrived is kept.
    """
    base = part or target
    for folder in (target.parent, base.parent):
        ensure_writable(folder)
    with _exclusive_lock(artifact, base, ensure_writable(locks), report):
        if target.exists() and (complete := _verify_existing(artifact, target, policy.block_size)):
            return complete
        _check_disk_space(artifact, base)
        partial = PartialFile(base, artifact.identity, block_size=policy.block_size)
        try:
            download = _Download(artifact, partial, policy)
            try:
                sha256 = download.run(report, stop or threading.Event())
            except KeyboardInterrupt:
                hint = tr(
                    "{share:.0%} of {name} is kept. To continue, run the same command again.",
                    share=download.arrived() / max(1, artifact.size),
                    name=artifact.name,
                )
                raise Interrupted(hint) from None
            checksums = partial.checksums
            partial.publish(target)
            return DownloadedFile(target, sha256, checksums)
        finally:
            partial.close()


def _verify_existing(artifact: Artifact, target: Path, block_size: int) -> DownloadedFile | None:
    """Return the file at `target` if it has the artifact's digest: another process may have finished it meanwhile."""
    if target.stat().st_size != artifact.size:
        return None
    sha256, checksums = hash_blocks(target, block_size)
    if sha256 != artifact.sha256:  # also if that is None: the same size alone does not identify the file
        return None
    return DownloadedFile(target, sha256, checksums)


def _check_disk_space(artifact: Artifact, base: Path) -> None:
    journal = read_download_journal(journal_path(base))
    present = journal.done if journal and part_path(base).exists() else 0
    needed, free = max(0, artifact.size - present) + _DISK_RESERVE, shutil.disk_usage(base.parent).free
    if free < needed:
        raise DiskFull(base.parent, needed, free)


@contextlib.contextmanager
def _exclusive_lock(artifact: Artifact, base: Path, locks: Path, report: ReportProgress) -> Iterator[None]:
    """Hold the lock for `base`; while another process holds it, report that process's progress."""
    lock = filelock.FileLock(lock_path(base, locks))
    while True:
        try:
            lock.acquire(timeout=0.3)
            break
        except filelock.Timeout:
            journal = read_download_journal(journal_path(base))
            done = min(journal.done, artifact.size) if journal else 0
            report(TaskProgress(artifact.name, done, artifact.size, "waiting for another qwenlocal"))
        except OSError as reason:
            raise NotWritable(locks, reason.strerror or str(reason)) from reason
    try:
        yield
    finally:
        lock.release()


@dataclass
class _SharedState:
    """The state shared by the threads of one pass, under one condition."""

    claimed: set[int] = field(default_factory=set)  # blocks that a thread is fetching
    condition: threading.Condition = field(default_factory=threading.Condition)
    stop: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    digests: list[str] | None = None  # of each section, the last of which is the whole file, once all is hashed


class _Download:
    """The download of one file in this process."""

    def __init__(self, artifact: Artifact, partial: PartialFile, policy: DownloadPolicy) -> None:
        self._artifact, self._partial, self._policy = artifact, partial, policy
        self._selector = SourceSelector(artifact.name, artifact.sources, policy)
        self._sections = [*artifact.sections, Section(0, artifact.size, artifact.sha256 or "")]
        self._from_earlier_run = set(partial.begun())
        self._senders: dict[int, set[SourceState]] = {n: set() for n in range(partial.count)}  # of blocks, in this run
        self._shared = _SharedState()
        self._streaming = threading.Lock()
        self._reported = 0

    def run(self, report: ReportProgress, stop: threading.Event) -> str:
        """Download all missing blocks and return the SHA-256 of the file."""
        while True:
            digests = self._run_pass(report, stop)
            wrong = [(s, d) for s, d in zip(self._sections, digests, strict=True) if s.sha256 not in ("", d)]
            if not wrong:
                return digests[-1]
            self._forget_doubtful_blocks([section for section, _ in wrong], wrong[0][1])

    def _forget_doubtful_blocks(self, wrong: Sequence[Section], first_digest: str) -> None:
        """
        Mark blocks of wrong sections as missing: those of an earlier run first, then all from one source at a time.

        Raises
        ------
        DigestMismatch: each source was tried alone.
        """
        blocks = [n for n in range(self._partial.count) if any(_overlaps(self._partial.span(n), s) for s in wrong)]
        doubtful = [n for n in blocks if n in self._from_earlier_run]
        if not doubtful:
            senders = {state for n in blocks for state in self._senders[n]}
            sole_source = self._selector.select_sole_source(senders)
            if sole_source is None:
                self._partial.discard()
                labels = " and ".join(state.source.label for state in self._selector.states if state in senders)
                raise DigestMismatch(self._artifact.name, wrong[0].sha256, first_digest, source=labels)
            doubtful = [n for n in blocks if self._senders[n] != {sole_source}]
        for number in doubtful:
            self._partial.forget(number)
            self._from_earlier_run.discard(number)
            self._senders[number].clear()
        self._shared = _SharedState()

    def _run_pass(self, report: ReportProgress, stop: threading.Event) -> list[str]:
        """Run the threads until every block is hashed; return the digests of the sections."""
        shared = self._shared
        workers = min(self._policy.connections, max(1, len(self._partial.missing())))
        jobs = [*[self._fetch_blocks] * workers, self._hash_blocks, self._record_periodically]
        threads = [threading.Thread(target=self._run_job, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            while True:
                with shared.condition:
                    shared.condition.wait(0.1)
                    failure, digests = shared.failure, shared.digests
                report(self._progress())
                if stop.is_set():
                    raise KeyboardInterrupt
                if failure is not None:
                    raise failure
                if digests is not None:
                    return digests
        finally:
            shared.stop.set()
            with shared.condition:
                shared.condition.notify_all()
            if shared.digests is None:
                for source in self._artifact.sources:
                    source.stop()
            deadline = time.monotonic() + _JOIN_TIMEOUT
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def arrived(self) -> int:
        """Return the bytes that have arrived, including those that a source keeps."""
        buffered = max((state.source.buffered() for state in self._enabled_states()), default=0)
        return min(self._artifact.size, self._partial.done + buffered)

    def _enabled_states(self) -> list[SourceState]:
        return [state for state in self._selector.states if not state.disabled]

    def _progress(self) -> TaskProgress:
        done = self._partial.done
        self._reported = max(self._reported, self.arrived())  # never less than before, even if a block was damaged
        phase = "checking" if done == self._artifact.size else "downloading"
        label = next((state.source.label for state in self._enabled_states()), "")
        return TaskProgress(self._artifact.name, self._reported, self._artifact.size, phase, label)

    def _run_job(self, job: Callable[[], None]) -> None:
        """Run a thread's job; an exception is raised in the thread that called `download_artifact`."""
        try:
            job()
        except BaseException as reason:
            with self._shared.condition:
                self._shared.failure = self._shared.failure or reason
                self._shared.stop.set()
                self._shared.condition.notify_all()

    # --- fetching

    def _fetch_blocks(self) -> None:
        claimed = self._shared.claimed
        while (number := self._claim_block()) is not None:
            try:
                self._try_block(number)
            finally:
                claimed.discard(number)

    def _claim_block(self) -> int | None:
        """Return the first missing block that no thread is fetching; None when all are hashed or the download stops."""
        shared = self._shared
        with shared.condition:
            while not shared.stop.is_set() and shared.digests is None:
                for number in self._partial.missing():
                    if number not in shared.claimed:
                        shared.claimed.add(number)
                        return number
                shared.condition.wait(0.2)
        return None

    def _try_block(self, number: int) -> None:
        """Try to fetch a block from the best source; wait if none is ready."""
        if self._partial.has(number):
            return
        state, wait = self._selector.select()
        if state is None:
            self._shared.stop.wait(min(wait, 0.5))
            return
        try:
            if state.source.sequential:
                self._stream(state)
            else:
                self._read_source(state, *self._partial.rest(number))
        except RangesUnsupported:
            state.source.sequential = True
        except TransferError as error:
            if not self._shared.stop.is_set():
                self._selector.record_failure(state, error)

    def _stream(self, state: SourceState) -> None:
        """Read a source without range support from the first byte to the last, in one thread."""
        if not self._streaming.acquire(timeout=0.5):
            return
        try:
            if self._partial.missing():  # another thread has not read it meanwhile
                self._read_source(state, 0, self._artifact.size)
        finally:
            self._streaming.release()

    def _read_source(self, state: SourceState, start: int, end: int) -> None:
        """Keep the bytes `start` to `end` of a source as they arrive."""
        for data in state.source.read(start, end):
            if self._shared.stop.is_set():
                raise TransferError("stopped", retryable=True)
            extended = self._partial.write(start, data)
            start += len(data)
            if extended:
                self._selector.record_arrival(state, len(data))
            for number in extended:
                self._senders[number].add(state)
                if self._partial.has(number):
                    with self._shared.condition:
                        self._shared.condition.notify_all()

    # --- hashing and recording

    def _hash_blocks(self) -> None:
        """Hash the sections, in order, as the blocks arrive."""
        digests = [hashlib.sha256() for _ in self._sections]
        for number in range(self._partial.count):
            if not self._wait_for_block(number):
                return
            offset, _ = self._partial.span(number)
            for data in self._partial.read(number):
                for section, digest in zip(self._sections, digests, strict=True):
                    digest.update(data[max(0, section.start - offset) : max(0, section.end - offset)])
                offset += len(data)
        with self._shared.condition:
            self._shared.digests = [digest.hexdigest() for digest in digests]
            self._shared.condition.notify_all()

    def _wait_for_block(self, number: int) -> bool:
        """Wait for a block; one from an earlier run counts only if its checksum matches. False if stopped."""
        shared = self._shared
        while True:
            with shared.condition:
                while not self._partial.has(number):
                    if shared.stop.is_set():
                        return False
                    shared.condition.wait(0.2)
            if shared.stop.is_set():
                return False
            if number not in self._from_earlier_run or self._partial.is_intact(number):
                return True
            self._from_earlier_run.discard(number)
            self._partial.forget(number)
            with shared.condition:
                shared.condition.notify_all()

    def _record_periodically(self) -> None:
        """Record what has arrived, and flush it to the disk now and then, so that a crash costs little."""
        shared, synced = self._shared, self._partial.done
        while not shared.stop.wait(_RECORD_INTERVAL):
            self._partial.record()
            if self._partial.done - synced >= _SYNC_EVERY:
                self._partial.sync()
                synced = self._partial.done


def _overlaps(span: tuple[int, int], section: Section) -> bool:
    return span[0] < section.end and section.start < span[1]
