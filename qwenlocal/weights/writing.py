"""
Carrying out a plan: rows are read in order, turned into each output's type by several threads, and written in place.

Every byte's place is known beforehand, so the threads need not wait for each other, and the result is the same however
many there are. Files grow under the name `<file>.part`; a journal beside the first of them notes which slabs of rows
are done, with a CRC-32 of what was written. Whoever is interrupted, even by `kill -9`, goes on from there. Only a whole
file gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal import __version__, ggml
from qwenlocal.errors import (
    BadWeights,
    DiskFull,
    FileInUse,
    Interrupted,
    NonFiniteWeights,
    NotWritable,
    OutputExists,
    QwenlocalError,
)
from qwenlocal.fileio import read_at, start_writeback, write_at
from qwenlocal.ggml import TensorType
from qwenlocal.paths import ensure_writable
from qwenlocal.weights import edition

if TYPE_CHECKING:
    import numpy

SLAB = 1 << 19  # numbers handled at once: 2 MiB of float32, which stay in a core's cache
_PROCESS = 100 << 20  # bytes, measured: Python, numpy and Qwen's 151,936 tokens while they are read
_JOURNAL_VERSION = 1
_TO_DISK = 64 << 20  # bytes between two requests to bring to the disk what is written
_PATIENCE = 0.5  # seconds for a lock: `qwenlocal list` holds it for a moment to see whether somebody else does


_LARGE = 16384.0  # numbers below this fit into every type


class _Bits(NamedTuple):
    """A float's bits without its sign: where the exponent is `full`, it is NaN or infinite; `large` is `_LARGE`."""

    width: int
    full: int
    large: int

    def largest(self, data: numpy.ndarray) -> int:
        """The largest magnitude in `data`: that of the largest as signed numbers are, or as unsigned ones are."""
        if not data.size:
            return 0
        negative, positive = (int(data.view(f"{kind}{self.width}").max()) for kind in "ui")
        return max(negative & ((1 << (8 * self.width - 1)) - 1), positive)


_BITS = {"f32": _Bits(4, 0x7F800000, 0x46800000), "bf16": _Bits(2, 0x7F80, 0x4680), "f16": _Bits(2, 0x7C00, 0x7400)}


class Target(NamedTuple):
    """Where rows go: the number of the output, the byte in it, their type there, and the importance of each column."""

    output: int
    offset: int
    type: TensorType
    importance: numpy.ndarray | None = None


@dataclass(frozen=True)
class Strip:
    """Rows of one tensor that lie together in a file, and where they go. Read once, whatever the number of targets."""

    name: str
    file: Path
    offset: int
    type: TensorType
    rows: int
    columns: int
    targets: Sequence[Target]


@dataclass(frozen=True)
class Output:
    """A file to be written: its beginning, and its size altogether."""

    path: Path
    header: bytes
    size: int


@dataclass(frozen=True)
class Job:
    """Everything to be read and written."""

    outputs: Sequence[Output]
    strips: Sequence[Strip]

    @property
    def read_bytes(self) -> int:
        """Bytes to be read."""
        return sum(strip.rows * strip.type.row_bytes(strip.columns) for strip in self.strips)


class Written(NamedTuple):
    """What was done: how many weights were NaN or infinite and became zero, and bytes that were there already."""

    not_finite: int
    resumed: int


Report = Callable[[int, int], object]


class _Slab(NamedTuple):
    strip: Strip
    first: int
    rows: int


def part_of(path: Path) -> Path:
    """The name under which a file grows."""
    return path.with_name(path.name + ".part")


def journal_of(path: Path) -> Path:
    """The journal of the files that grow together, beside the first one."""
    return path.with_name(path.name + ".part.journal")


def memory_needed(job: Job, threads: int) -> int:
    """
    Bytes that carrying out `job` takes: for each thread a slab as it is read, as float32, and as written.

    A 7B to Q8_0 on two threads: 2 x (1.0 + 2.1 + 0.6) MB, and 100 MB for Python and the vocabulary.
    """
    most = max((_slab_rows(strip) * strip.columns for strip in job.strips), default=0)
    widest = max((strip.type.type_size / strip.type.block_size for strip in job.strips), default=0)
    written = max(
        (target.type.type_size / target.type.block_size for strip in job.strips for target in strip.targets), default=0
    )
    return _PROCESS + int(threads * most * (widest + 4 + written))


def carry_out(
    job: Job, *, threads: int, replace: bool = False, allow_nan: bool = False, report: Report = lambda done, all: None
) -> Written:
    """
    Write the files of `job`. `report` gets bytes read and bytes to be read.

    Raises
    ------
    OutputExists: a file is there, and `replace` was not said.
    DiskFull, NotWritable: there is no room, or no permission. What was done is kept.
    NonFiniteWeights: a weight is NaN or infinite (not with `allow_nan`).
    BadWeights: a weight is too large for its type.
    Interrupted: Ctrl-C; the same call goes on from there.
    """
    import filelock

    for output in job.outputs:
        ensure_writable(output.path.parent)
    _refuse_existing(job, replace=replace)
    locks = sorted(part_of(output.path).with_suffix(".part.lock") for output in job.outputs)
    lock = locks[0]
    try:
        with contextlib.ExitStack() as held:
            for lock in locks:
                held.enter_context(filelock.FileLock(lock, timeout=_PATIENCE))
                held.callback(_unlink, lock)
            _refuse_existing(job, replace=replace)  # whoever had the lock until now may have written it
            return _Run(job, allow_nan=allow_nan, report=report).carry_out(threads)
    except filelock.Timeout as busy:
        if not lock.exists():  # nobody has it, it cannot be made
            raise NotWritable(lock.parent, "no files can be made there") from busy
        raise FileInUse(job.outputs[0].path) from busy
    except OSError as reason:
        raise _failure(lock.parent, reason, 0) from reason


def _refuse_existing(job: Job, *, replace: bool) -> None:
    for output in job.outputs:
        if not replace and os.path.lexists(output.path):
            raise OutputExists(output.path)


class _Run:
    """One attempt: the open files, what is done, and what the threads share."""

    def __init__(self, job: Job, *, allow_nan: bool, report: Report) -> None:
        self._job, self._allow_nan, self._report = job, allow_nan, report
        self._slabs = list(_slabs(job))
        self._lock, self._seeking = threading.Lock(), threading.Lock()
        self._done: dict[int, tuple[int, int]] = {}  # slab: CRC-32 of what was written, numbers that became zero
        self._read = self._written = self._asked = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._files: list[int] = []
        self._sources: dict[Path, int] = {}

    def carry_out(self, threads: int) -> Written:
        folder = self._job.outputs[0].path.parent
        with contextlib.ExitStack() as stack:
            try:
                self._open(stack)
                resumed = self._read
                self._work(threads)
                self._publish(stack)
            except OSError as reason:
                raise _failure(folder, reason, self._missing()) from reason
            except NonFiniteWeights:  # it would be met again: what was done is of no use
                self._discard(stack)
                raise
            except KeyboardInterrupt as stop:
                raise Interrupted("What was done is kept: the same command goes on from there.") from stop
        return Written(sum(zeroed for _, zeroed in self._done.values()), resumed)

    # --- opening and closing

    def _open(self, stack: contextlib.ExitStack) -> None:
        identity, journal = _identity(self._job, self._allow_nan), journal_of(self._job.outputs[0].path)
        known = _read_journal(journal, identity)
        self._check_room()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | (0 if known is not None else os.O_TRUNC)
        for output in self._job.outputs:
            file = os.open(part_of(output.path), flags, 0o644)
            stack.callback(os.close, file)
            self._files.append(file)
            os.ftruncate(file, output.size)
            self._write(len(self._files) - 1, memoryview(output.header), 0)
        self._clear_gaps()
        for path in {strip.file for strip in self._job.strips}:
            self._sources[path] = _open_source(path)
            stack.callback(os.close, self._sources[path])
        self._resume(known or {})
        lines = [f"{number} {crc} {zeroed}\n" for number, (crc, zeroed) in self._done.items()]
        journal.write_text(json.dumps({"version": _JOURNAL_VERSION, "identity": identity}) + "\n" + "".join(lines))
        self._journal = stack.enter_context(journal.open("a", encoding="ascii"))

    def _clear_gaps(self) -> None:
        """Between the tensors are zeros, whatever an earlier attempt left there."""
        ends = [len(output.header) for output in self._job.outputs]
        placed = [(t.output, t.offset, _target_bytes(s, t)) for s in self._job.strips for t in s.targets]
        sizes = [(number, output.size, 0) for number, output in enumerate(self._job.outputs)]
        for output, offset, size in sorted([*placed, *sizes]):
            if offset > ends[output]:
                self._write(output, memoryview(bytes(offset - ends[output])), ends[output])
            ends[output] = offset + size

    def _check_room(self) -> None:
        """What an earlier attempt left takes its room already, whether it is used or thrown away."""
        folder = self._job.outputs[0].path.parent
        there = 0
        for output in self._job.outputs:
            with contextlib.suppress(OSError):
                state = part_of(output.path).stat()
                there += getattr(state, "st_blocks", 0) * 512
        needed = sum(output.size for output in self._job.outputs) - there
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DiskFull(folder, needed, free)

    def _resume(self, known: Mapping[int, tuple[int, int]]) -> None:
        """Slabs whose bytes are still those that the journal speaks of need not be made again."""
        for number, (crc, zeroed) in known.items():
            if number < len(self._slabs) and self._crc_on_disk(self._slabs[number]) == crc:
                self._done[number] = (crc, zeroed)
                self._read += _source_bytes(self._slabs[number])

    def _crc_on_disk(self, slab: _Slab) -> int:
        crc = 0
        for target in slab.strip.targets:
            width = target.type.row_bytes(slab.strip.columns)
            buffer = memoryview(bytearray(slab.rows * width))
            self._fill(self._files[target.output], buffer, target.offset + slab.first * width)
            crc = zlib.crc32(buffer, crc)
        return crc

    def _publish(self, opened: contextlib.ExitStack) -> None:
        """All is written: to the disk itself with it, then give the files, closed, their names."""
        for file in self._files:
            getattr(os, "fdatasync", os.fsync)(file)
        opened.close()
        for output in self._job.outputs:
            part_of(output.path).replace(output.path)
        journal_of(self._job.outputs[0].path).unlink(missing_ok=True)

    def _discard(self, opened: contextlib.ExitStack) -> None:
        opened.close()
        for output in self._job.outputs:
            part_of(output.path).unlink(missing_ok=True)
        journal_of(self._job.outputs[0].path).unlink(missing_ok=True)

    def _missing(self) -> int:
        """Bytes that are still to be written."""
        left = (slab for number, slab in enumerate(self._slabs) if number not in self._done)
        return sum(slab.rows * t.type.row_bytes(slab.strip.columns) for slab in left for t in slab.strip.targets)

    # --- the work

    def _work(self, threads: int) -> None:
        todo = iter([number for number in range(len(self._slabs)) if number not in self._done])
        workers = [threading.Thread(target=self._worker, args=(todo,), daemon=True) for _ in range(max(1, threads))]
        total = self._job.read_bytes
        try:
            for worker in workers:
                _start(worker)
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1)
                    self._report(self._read, total)
                    self._hurry()
        finally:  # whatever happens, nobody writes to a file that is closed
            self._stopped = True
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        if self._failure:
            raise self._failure
        self._report(total, total)

    def _hurry(self) -> None:
        """The disk begins with what is written while there is work, or all of it would be waited for at the end."""
        if self._written - self._asked >= _TO_DISK:
            self._asked = self._written
            for file in self._files:
                start_writeback(file)

    def _worker(self, todo: Iterator[int]) -> None:
        try:
            desk = _Desk(self._job, allow_nan=self._allow_nan)
            while not self._stopped:
                with self._lock:
                    number = next(todo, None)
                if number is None:
                    return
                self._turn(number, desk)
        except BaseException as failure:
            with self._lock:
                self._failure = self._failure or failure
            self._stopped = True

    def _turn(self, number: int, desk: _Desk) -> None:
        slab, strip = self._slabs[number], self._slabs[number].strip
        data = desk.source(_source_bytes(slab))
        offset = strip.offset + slab.first * strip.type.row_bytes(strip.columns)
        self._fill(self._sources[strip.file], data, offset)
        desk.take(slab)
        crc = 0
        for target in strip.targets:
            result = desk.turn(slab, target)
            crc = zlib.crc32(result, crc)
            self._write(target.output, result, target.offset + slab.first * target.type.row_bytes(strip.columns))
        with self._lock:
            self._done[number] = (crc, desk.zeroed)
            self._read += len(data)
            self._written += sum(slab.rows * t.type.row_bytes(strip.columns) for t in strip.targets)
            self._journal.write(f"{number} {crc} {desk.zeroed}\n")
            self._journal.flush()

    def _fill(self, file: int, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = read_at(file, buffer, offset, self._seeking)
            if not count:
                raise BadWeights("the source", "a file became shorter while it was read")
            buffer, offset = buffer[count:], offset + count

    def _write(self, output: int, data: memoryview, offset: int) -> None:
        while data:
            count = write_at(self._files[output], data, offset, self._seeking)
            data, offset = data[count:], offset + count


class _Desk:
    """
    A thread's own buffers, for one slab at a time: as read, as float32, as written.

    `zeroed` counts the slab's numbers that were NaN or infinite.
    """

    def __init__(self, job: Job, *, allow_nan: bool) -> None:
        import numpy

        numbers = max((_slab_rows(strip) * strip.columns for strip in job.strips), default=0)
        read = max((_slab_rows(s) * s.type.row_bytes(s.columns) for s in job.strips), default=0)
        types = [(s, t.type) for s in job.strips for t in s.targets]
        write = max((_slab_rows(s) * kind.row_bytes(s.columns) for s, kind in types), default=0)
        self._numpy = numpy
        self._read, self._written = numpy.empty(read, numpy.uint8), numpy.empty(write, numpy.uint8)
        self._floats = numpy.empty(numbers, numpy.float32)
        self._allow_nan, self.zeroed = allow_nan, 0
        self._has_large = False  # whether the slab has numbers that may be too large for a type

    def source(self, size: int) -> memoryview:
        """Where `size` bytes are to be read to."""
        return memoryview(self._read.data)[:size]

    def take(self, slab: _Slab) -> None:
        """Check what was read, and make float32 of it where somebody wants that."""
        strip, count = slab.strip, slab.rows * slab.strip.columns
        self.zeroed = 0
        if all(_is_quick(strip.type, target) for target in strip.targets):
            return  # `turn` reads the numbers as they are, and checks them on the way
        data, floats = self._read[: _source_bytes(slab)], self._floats[:count]
        plain = strip.type.name in _BITS
        if plain:
            self._check(slab, data, strip.type.name)
        if any(target.type != strip.type for target in strip.targets):
            ggml.dequantize(strip.type, data.ctypes.data, floats.ctypes.data, count)
            if not plain:
                self._check(slab, floats, "f32")

    def _check(self, slab: _Slab, data: numpy.ndarray, kind: str) -> None:
        known = _BITS[kind]
        largest = known.largest(data)
        self._has_large = largest >= known.large
        if largest < known.full:
            return
        bits = data.view(f"u{known.width}")
        wrong = (bits & known.full) == known.full
        if not self._allow_nan:
            row = slab.first + int(self._numpy.flatnonzero(wrong)[0]) // slab.strip.columns
            raise NonFiniteWeights(slab.strip.file, slab.strip.name, row)
        self.zeroed = int(wrong.sum())
        bits[wrong] = 0

    def turn(self, slab: _Slab, target: Target) -> memoryview:
        """The slab as `target` wants it; good until the next call."""
        strip = slab.strip
        size = slab.rows * target.type.row_bytes(strip.columns)
        if target.type == strip.type:
            return memoryview(self._read.data)[:size]
        result = self._written[:size]
        if _is_quick(strip.type, target):
            self._quantize_as_read(slab, target.type, result)
        else:
            weights = target.importance.ctypes.data if target.importance is not None else 0
            address = result.ctypes.data
            ggml.quantize(target.type, self._floats.ctypes.data, address, slab.rows, strip.columns, weights)
        self._check_result(slab, target, result)
        return memoryview(result.data)

    def _quantize_as_read(self, slab: _Slab, kind: TensorType, result: numpy.ndarray) -> None:
        strip, count = slab.strip, slab.rows * slab.strip.columns
        most = ggml.quantize_fast(strip.type, self._read.ctypes.data, kind, result.ctypes.data, count)
        if most == math.inf:
            self._check(slab, self._read[: _source_bytes(slab)], strip.type.name)
            most = ggml.quantize_fast(strip.type, self._read.ctypes.data, kind, result.ctypes.data, count)
        self._has_large = most is None or most >= _LARGE

    def _check_result(self, slab: _Slab, target: Target, result: numpy.ndarray) -> None:
        if not self._is_finite(target.type, result, slab.rows * slab.strip.columns):
            raise BadWeights(
                slab.strip.file,
                f"“{slab.strip.name}” has weights that are too large for {target.type.name}",
                hint="Take bf16 or f32, which reach as far as the original.",
            )

    def _is_finite(self, kind: TensorType, result: numpy.ndarray, count: int) -> bool:
        """ggml's own check is quick, but writes to stderr where it finds something; so it is asked of small numbers."""
        if known := _BITS.get(kind.name):
            return known.largest(result) < known.full
        if not self._has_large:
            return ggml.has_finite_scales(kind, result.ctypes.data, result.size)
        found = self._numpy.empty(count, self._numpy.float32)
        ggml.dequantize(kind, result.ctypes.data, found.ctypes.data, count)
        return bool(self._numpy.isfinite(found).all())


def _is_quick(source: TensorType, target: Target) -> bool:
    """Whether our own quantizers take the numbers as they are read."""
    is_plain = target.importance is None or ggml.ignores_imatrix(target.type)
    return is_plain and ggml.can_quantize_fast(source, target.type)


def _slab_rows(strip: Strip) -> int:
    return min(strip.rows, max(1, SLAB // max(1, strip.columns)))


def _slabs(job: Job) -> Iterator[_Slab]:
    """In the order in which the rows lie on the disk."""
    for strip in sorted(job.strips, key=lambda strip: (str(strip.file), strip.offset)):
        step = _slab_rows(strip)
        for first in range(0, strip.rows, max(1, step)):
            yield _Slab(strip, first, min(step, strip.rows - first))


def _source_bytes(slab: _Slab) -> int:
    return slab.rows * slab.strip.type.row_bytes(slab.strip.columns)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows keeps a file that somebody has open
        path.unlink(missing_ok=True)


def _target_bytes(strip: Strip, target: Target) -> int:
    return strip.rows * target.type.row_bytes(strip.columns)


def _open_source(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as reason:
        raise BadWeights(path, f"cannot read it ({reason.strerror})") from reason


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as reason:
        raise BadWeights(path, f"cannot read it ({reason.strerror})") from reason


def _identity(job: Job, allow_nan: bool) -> str:
    """Differs as soon as another input, another output or another way between them is meant."""
    digest = hashlib.sha256(f"{__version__} {edition.EDITION} {SLAB} {allow_nan}".encode())
    for output in job.outputs:
        digest.update(f"{output.path.name} {output.size}\n".encode(errors="replace") + output.header)
    states = {path: _state(path) for path in {strip.file for strip in job.strips}}
    for s in job.strips:
        state = states[s.file]
        digest.update(
            f"{s.file} {state.st_size} {state.st_mtime_ns} {s.offset} {s.rows} {s.columns}".encode(errors="replace")
        )
        for target in s.targets:
            digest.update(f" {target.output} {target.offset} {target.type.name}".encode())
            if target.importance is not None:
                digest.update(target.importance.tobytes())
    return digest.hexdigest()


def _read_journal(path: Path, identity: str) -> dict[int, tuple[int, int]] | None:
    """What an earlier attempt at the very same has done; None where there was none. A torn line counts as not there."""
    try:
        first, *lines = path.read_text(encoding="ascii", errors="replace").split("\n")
        found = json.loads(first)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or (found.get("version"), found.get("identity")) != (_JOURNAL_VERSION, identity):
        return None
    done = {}
    for line in lines[:-1]:
        fields = line.split(" ")
        if len(fields) == 3 and all(field.isdigit() and len(field) < 16 for field in fields):
            done[int(fields[0])] = (int(fields[1]), int(fields[2]))
    return done


def _start(worker: threading.Thread) -> None:
    try:
        worker.start()
    except RuntimeError as reason:
        raise QwenlocalError(
            "This system lets the program start no more threads.", hint="Take fewer: -t 1. What was done is kept."
        ) from reason


def _failure(folder: Path, reason: OSError, missing: int) -> QwenlocalError:
    if reason.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return DiskFull(folder, missing, shutil.disk_usage(folder).free)
    if reason.errno == errno.EFBIG:
        return NotWritable(folder, "files of this size are not allowed there")
    return NotWritable(folder, reason.strerror or str(reason))
