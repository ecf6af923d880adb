"""
The one way bytes reach this disk: resumable, verified, from several places, shared between processes.

A file is cut in blocks. Threads take the next missing block from the best place that answers; one more thread follows
in order and computes the digest of what is there. When a place fails, the next block comes from another one, so a
download goes on in the middle of the file. See `partial.py` for what survives a crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from qwenlocal.errors import (
    CannotWrite,
    DigestMismatch,
    DiskFull,
    DownloadFailed,
    Interrupted,
    SourceUnreachable,
)
from qwenlocal.fileio import hash_blocks
from qwenlocal.i18n import tr
from qwenlocal.library.byte_source import ByteSource, RangesUnsupported
from qwenlocal.library.http import HttpClient, TransferError
from qwenlocal.library.partial_file import BLOCK, Identity, Partial, journal_of, lock_of, part_of, read_journal
from qwenlocal.paths import writable

_SPARE_DISK = 32 << 20
_SYNC_EVERY = 4  # blocks: what a power cut may cost
_LONGEST_REST = 30.0
_LAST_WAIT = 1.0  # seconds for threads to end; one that waits for a server's first byte is left behind


@dataclass(frozen=True)
class Section:
    """Bytes `start` to `end` of a file have this sha256."""

    start: int
    end: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """
    One file to fetch: its name, size, digest, and the places that have it, best first.

    `sha256` is that of the whole file, None where nobody published one; a file published in pieces has the digests of
    these as `sections`.
    """

    name: str
    size: int
    sha256: str | None
    places: Sequence[ByteSource]
    sections: Sequence[Section] = ()
    etag: str | None = None
    model: str = ""

    @property
    def identity(self) -> Identity:
        """What the journal of a partial file says of it."""
        digest = self.sha256 or "+".join(section.sha256 for section in self.sections) or None
        return Identity(self.name, self.size, digest, self.etag, self.model)


@dataclass(frozen=True)
class Fetched:
    """A whole file: its digest, and the CRC-32 of each of its blocks (empty if another process fetched it)."""

    path: Path
    sha256: str
    checksums: Sequence[int] = ()
    block: int = BLOCK


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes are here; `doing` is what takes the time, as a short word; `source` is where from."""

    name: str
    done: int
    total: int
    doing: str = "fetching"
    source: str = ""


@dataclass(frozen=True)
class DownloadPolicy:
    """How to download: connections, patience in seconds, bytes in a block."""

    connections: int = 4
    patience: float = 120.0  # after a transfer broke off, until everything is given up
    first_patience: float = 4.0  # where nothing was reached at all
    block: int = BLOCK


Report = Callable[[Progress], None]


def fetch(
    artifact: Artifact,
    target: Path,
    *,
    client: HttpClient,
    locks: Path,
    part: Path | None = None,
    report: Report = lambda _: None,
    manner: DownloadPolicy = DownloadPolicy(),
    clock: Callable[[], float] = time.monotonic,
    stop: threading.Event | None = None,
) -> Fetched:
    """
    Bring `artifact` to `target` and return it; a file that is there is left alone.

    The bytes are collected in `<part>.part` (beside the target, if nothing is said).

    `stop` set by another thread ends it like Ctrl-C. If another process is fetching the same file, wait for it and
    share its result. After Ctrl-C, a crash or a broken network, calling this again goes on where it ended.

    Raises
    ------
    DownloadFailed, SourceUnreachable: no place delivered.
    DigestMismatch: what arrived is not the published file; it was thrown away.
    DiskFull, CannotWrite: there is no room, or no permission.
    Interrupted: Ctrl-C; what is here is kept.
    """
    base = part or target
    for folder in (target.parent, base.parent):
        writable(folder)
    with _exclusive(artifact, base, writable(locks), report):
        if target.exists() and (found := _finished(artifact, target)):
            return found
        _check_room(artifact, base, manner.block)
        partial = Partial(base, artifact.identity, block=manner.block)
        try:
            download = _Download(artifact, partial, client, manner, clock)
            try:
                sha256 = download.run(report, stop or threading.Event())
            except KeyboardInterrupt:
                share = partial.done / max(1, artifact.size)
                kept = tr(
                    "{share:.0%} of {name} is kept; the same command goes on from there.",
                    share=share,
                    name=artifact.name,
                )
                raise Interrupted(kept) from None
            checksums = partial.checksums
            partial.publish(target)
            return Fetched(target, sha256, checksums, manner.block)
        finally:
            partial.close()
            for place in artifact.places:
                place.close()


def _finished(artifact: Artifact, target: Path) -> Fetched | None:
    """What lies at `target`, if it is the file: another process brought it, or was killed before it said so."""
    if target.stat().st_size != artifact.size:
        return None
    sha256, checksums = hash_blocks(target, BLOCK)
    if sha256 != artifact.sha256:  # None, too: of the same size, but nobody can say whether it is the same file
        return None
    return Fetched(target, sha256, checksums)


def _check_room(artifact: Artifact, base: Path, block: int) -> None:
    journal = read_journal(journal_of(base))
    here = len(journal[2]) * block if journal and part_of(base).exists() else 0
    needed, free = max(0, artifact.size - here) + _SPARE_DISK, shutil.disk_usage(base.parent).free
    if free < needed:
        raise DiskFull(base.parent, needed, free)


@contextlib.contextmanager
def _exclusive(artifact: Artifact, base: Path, locks: Path, report: Report) -> Iterator[None]:
    """Hold the lock for `base`; while another process has it, show that one's progress."""
    lock = filelock.FileLock(lock_of(base, locks))
    while True:
        try:
            lock.acquire(timeout=0.3)
            break
        except filelock.Timeout:
            journal = read_journal(journal_of(base))
            done = sum(journal[1] for _ in journal[2]) if journal else 0
            report(Progress(artifact.name, min(done, artifact.size), artifact.size, "waiting for another qwenlocal"))
        except OSError as reason:
            raise CannotWrite(locks, reason.strerror or str(reason)) from reason
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Standing:
    """How a place did so far."""

    place: ByteSource
    failures: int = 0
    rests_until: float = 0.0
    dead: str = ""
    last: TransferError | None = None
    alone: bool = False  # was trusted with everything once
    set_aside: bool = False  # is dead only because another is being tried alone


class _Places:
    """Which place to ask next; knows when to wait and when to give up."""

    def __init__(
        self, name: str, places: Sequence[ByteSource], manner: DownloadPolicy, clock: Callable[[], float]
    ) -> None:
        self._name, self._manner, self._clock = name, manner, clock
        self.standings = [_Standing(place) for place in places]
        self._lock = threading.Lock()
        self._last_success: float | None = None
        self._started = clock()

    def pick(self) -> tuple[_Standing | None, float]:
        """
        A place to ask now, or None and how long to wait.

        Raises
        ------
        DownloadFailed, SourceUnreachable: no place is left to ask, or none answered for too long.
        """
        with self._lock:
            now = self._clock()
            alive = [standing for standing in self.standings if not standing.dead]
            ready = [standing for standing in alive if standing.rests_until <= now]
            if ready:
                return ready[0], 0.0
            if not alive:
                raise self._failure()
            wait = min(standing.rests_until for standing in alive) - now
            quiet = now - (self._started if self._last_success is None else self._last_success)
            if quiet + wait > self._patience(alive):
                raise self._failure()
            return None, wait

    def _patience(self, alive: Sequence[_Standing]) -> float:
        nobody = self._last_success is None and all(s.last is not None and s.last.unreachable for s in alive)
        return self._manner.first_patience if nobody else self._manner.patience

    def success(self, standing: _Standing) -> None:
        with self._lock:
            standing.failures, self._last_success = 0, self._clock()

    def trouble(self, standing: _Standing, trouble: TransferError) -> None:
        with self._lock:
            standing.last = trouble
            if not trouble.retryable:
                standing.dead = str(trouble)
                return
            if self._clock() < standing.rests_until and not trouble.retry_after:
                return  # several threads notice the same failure; it counts once
            standing.failures += 1
            rest = trouble.retry_after or min(_LONGEST_REST, 0.5 * 2 ** (standing.failures - 1))
            standing.rests_until = max(standing.rests_until, self._clock() + rest)

    def _failure(self) -> DownloadFailed:
        reasons = [f"{s.place.label}: {s.dead or s.last or 'not asked'}" for s in self.standings]
        unreachable = all(s.last is not None and s.last.unreachable for s in self.standings)
        if self._last_success is None and unreachable:
            return SourceUnreachable(self._name, reasons)
        busy = [s.last.retry_after for s in self.standings if s.last and s.last.retry_after]
        hint = (
            tr("Try again in {seconds:.0f} s.", seconds=max(busy))
            if busy
            else tr("What is here is kept; the same command goes on from there.")
        )
        return DownloadFailed(
            f"{self._name} could not be fetched ({'; '.join(reasons) or 'no place has it'}).", hint=hint
        )


@dataclass
class _Tally:
    """What the threads tell each other, under one condition."""

    queue: deque[int]
    condition: threading.Condition = field(default_factory=threading.Condition)
    stop: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    in_flight: dict[int, int] = field(default_factory=dict)  # block: bytes of it received
    source: dict[int, _Standing] = field(default_factory=dict)  # block: who sent it, in this run
    hashed: int = 0
    digests: list[str] | None = None  # of the sections, then of the file; once all is hashed

    def received(self, number: int, count: int) -> None:
        with self.condition:
            self.in_flight[number] = count

    def fail(self, reason: BaseException) -> None:
        with self.condition:
            self.failure = self.failure or reason
            self.stop.set()
            self.condition.notify_all()


class _Download:
    """One file being fetched in this process."""

    def __init__(
        self,
        artifact: Artifact,
        partial: Partial,
        client: HttpClient,
        manner: DownloadPolicy,
        clock: Callable[[], float],
    ) -> None:
        self._artifact, self._partial, self._client, self._manner = artifact, partial, client, manner
        self._places = _Places(artifact.name, artifact.places, manner, clock)
        self._sections = list(artifact.sections)
        if artifact.sha256:
            self._sections = [Section(0, artifact.size, artifact.sha256)]
        self._known = {number for number in range(partial.count) if partial.has(number)}  # by an earlier run
        self._tally = _Tally(deque(partial.missing()))
        self._streaming = threading.Lock()
        self._shown = 0

    def run(self, report: Report, stop: threading.Event) -> str:
        """Fetch what is missing and return the sha256 of the whole."""
        while True:
            *digests, whole = self._round(report, stop)
            wrong = [(s, digest) for s, digest in zip(self._sections, digests, strict=True) if digest != s.sha256]
            if not wrong:
                return whole
            self._mend([section for section, _ in wrong], wrong[0][1])

    def _mend(self, wrong: Sequence[Section], first_digest: str) -> None:
        """Forget what does not fit and ask again, one place at a time; give up where each was tried alone."""
        blocks = [n for n in range(self._partial.count) if any(_overlaps(self._partial.span(n), s) for s in wrong)]
        doubtful = [n for n in blocks if n in self._known]
        if not doubtful:
            senders = [self._tally.source[n] for n in blocks]
            alone = self._next_alone(senders)
            if alone is None:
                self._partial.discard()
                labels = " and ".join(dict.fromkeys(standing.place.label for standing in senders))
                raise DigestMismatch(self._artifact.name, wrong[0].sha256, first_digest, source=labels)
            doubtful = [n for n in blocks if self._tally.source[n] is not alone]
        for number in doubtful:
            self._partial.forget(number)
            self._known.discard(number)
        self._tally = _Tally(deque(doubtful), source=self._tally.source)

    def _next_alone(self, senders: Sequence[_Standing]) -> _Standing | None:
        """
        The place to be trusted with all of it next, the others being set aside; None when each was.

        Several may have sent what does not fit, and it cannot be known which of them lied.
        """
        standings = self._places.standings
        if all(sender is senders[0] for sender in senders):
            senders[0].alone = True
        chosen = next((s for s in standings if not s.alone and (not s.dead or s.set_aside)), None)
        if chosen is None:
            return None
        for standing in standings:
            if not standing.dead:
                standing.dead, standing.set_aside = "set aside: what it sent may not be the published file", True
        chosen.alone, chosen.dead, chosen.set_aside = True, "", False
        return chosen

    def _round(self, report: Report, stop: threading.Event) -> list[str]:
        tally = self._tally
        workers = min(self._manner.connections, max(1, len(tally.queue)))
        threads = [threading.Thread(target=self._guard, args=(self._work,), daemon=True) for _ in range(workers)]
        threads.append(threading.Thread(target=self._guard, args=(self._hash,), daemon=True))
        threads.append(threading.Thread(target=self._guard, args=(self._sync,), daemon=True))
        for thread in threads:
            thread.start()
        try:
            while True:
                with tally.condition:
                    tally.condition.wait(0.1)
                    failure, digests = tally.failure, tally.digests
                report(self._progress())
                if stop.is_set():
                    raise KeyboardInterrupt
                if failure is not None:
                    raise failure
                if digests is not None:
                    return digests
        finally:
            tally.stop.set()
            with tally.condition:
                tally.condition.notify_all()
            if tally.digests is None:
                self._client.close_all()
                for place in self._artifact.places:
                    place.stop()
            deadline = time.monotonic() + _LAST_WAIT
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _progress(self) -> Progress:
        with self._tally.condition:
            under_way = sum(self._tally.in_flight.values())
        done = self._partial.done
        ahead = max((s.place.ahead() for s in self._places.standings if not s.dead), default=0)
        # A block is on its way until it is done, and for a moment neither.
        self._shown = shown = max(self._shown, min(self._artifact.size, done + max(under_way, ahead)))
        current = next((s.place.label for s in self._places.standings if not s.dead), "")
        doing = "checking" if done == self._artifact.size else "fetching"
        return Progress(self._artifact.name, shown, self._artifact.size, doing, current)

    def _guard(self, job: Callable[[], None]) -> None:
        """Run a thread's job; what goes wrong is raised in the thread that called `fetch`."""
        try:
            job()
        except BaseException as reason:  # handed on, not handled
            self._tally.fail(reason)

    # --- fetching

    def _work(self) -> None:
        while (number := self._take()) is not None:
            try:
                done = self._attempt(number)
            except BaseException:
                self._give_back(number)
                raise
            if not done:
                self._give_back(number)

    def _take(self) -> int | None:
        """The next block to fetch; None when all are hashed, or somebody said stop."""
        tally = self._tally
        with tally.condition:
            while not tally.queue:
                if tally.stop.is_set() or tally.digests is not None:
                    return None
                tally.condition.wait(0.2)
            return None if tally.stop.is_set() else tally.queue.popleft()

    def _give_back(self, number: int) -> None:
        with self._tally.condition:
            self._tally.in_flight.pop(number, None)
            if not self._partial.has(number):
                self._tally.queue.appendleft(number)

    def _attempt(self, number: int) -> bool:
        """Try to get a block; False where it must be tried again."""
        if self._partial.has(number):
            return True
        standing, wait = self._places.pick()
        if standing is None:
            self._tally.stop.wait(min(wait, 0.5))
            return False
        try:
            if standing.place.sequential:
                return self._stream(standing)
            self._fetch(standing, number)
        except RangesUnsupported:
            standing.place.sequential = True
            return False
        except TransferError as trouble:
            if self._tally.stop.is_set():
                return False
            self._places.trouble(standing, trouble)
            return False
        self._places.success(standing)
        return True

    def _fetch(self, standing: _Standing, number: int) -> None:
        start, end = self._partial.span(number)
        crc, at = 0, start
        for data in standing.place.read(start, end):
            if self._tally.stop.is_set():
                raise TransferError("stopped", retryable=True)
            self._partial.write(at, data)
            crc = zlib.crc32(data, crc)
            at += len(data)
            self._tally.received(number, at - start)
        self._finish(standing, number, crc)

    def _finish(self, standing: _Standing, number: int, crc: int) -> None:
        self._partial.complete(number, crc)
        with self._tally.condition:
            self._tally.in_flight.pop(number, None)
            self._tally.source[number] = standing
            self._tally.condition.notify_all()

    def _stream(self, standing: _Standing) -> bool:
        """From a place that only sends whole files: read it once, keeping the blocks that are missing."""
        if not self._streaming.acquire(timeout=0.5):
            return False
        try:
            number, crc, at, wanted = 0, 0, 0, not self._partial.has(0)
            for chunk in standing.place.read(0, self._artifact.size):
                data = memoryview(chunk)
                while data:
                    if self._tally.stop.is_set():
                        return False
                    start, end = self._partial.span(number)
                    part, data = data[: end - at], data[end - at :]
                    if wanted:
                        self._partial.write(at, part)
                        self._tally.received(number, at + len(part) - start)
                    crc, at = zlib.crc32(part, crc), at + len(part)
                    if at == end:
                        if wanted:
                            self._finish(standing, number, crc)
                            self._places.success(standing)
                        number, crc = number + 1, 0
                        wanted = not self._partial.has(number)
        finally:
            self._streaming.release()
        return True

    # --- following

    def _hash(self) -> None:
        """The digest of each section and of the whole, in order, as the blocks come in."""
        whole = hashlib.sha256()
        covers_all = bool(self._artifact.sha256)
        digests = [whole] if covers_all else [hashlib.sha256() for _ in self._sections]
        for number in range(self._partial.count):
            if not self._wait_for(number):
                return
            at, _ = self._partial.span(number)
            for data in self._partial.read(number):
                whole.update(data)
                if not covers_all:
                    for section, digest in zip(self._sections, digests, strict=True):
                        digest.update(data[max(0, section.start - at) : max(0, section.end - at)])
                at += len(data)
        with self._tally.condition:
            self._tally.digests = [digest.hexdigest() for digest in (*digests, whole)]
            self._tally.condition.notify_all()

    def _wait_for(self, number: int) -> bool:
        """Wait until a block is there; one from an earlier run is believed only if its checksum fits."""
        tally = self._tally
        while True:
            with tally.condition:
                while not self._partial.has(number):
                    if tally.stop.is_set():
                        return False
                    tally.condition.wait(0.2)
            if tally.stop.is_set():
                return False
            if number not in self._known or self._partial.intact(number):
                return True
            self._known.discard(number)
            self._partial.forget(number)
            with tally.condition:
                tally.queue.appendleft(number)
                tally.condition.notify_all()

    def _sync(self) -> None:
        """Every few blocks, wait for the disk itself, so that a power cut costs little."""
        tally, synced = self._tally, 0
        while True:
            with tally.condition:
                tally.condition.wait(0.2)
                finished = len(tally.source)
                if tally.stop.is_set() or tally.digests is not None:
                    return
            if finished - synced >= _SYNC_EVERY:
                self._partial.sync()
                synced = finished


def _overlaps(span: tuple[int, int], section: Section) -> bool:
    return span[0] < section.end and section.start < span[1]
