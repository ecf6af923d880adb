"""The source files of a job, open while it runs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import BadWeights
from qwenlocal.fileio import fingerprint_file, read_at

if TYPE_CHECKING:
    import numpy

    from qwenlocal.weights.write_job import RowChunk

_KEPT_SIZE, _KEPT_COUNT = 32 << 20, 6  # bytes of loaded segments to keep, and how many at least: two packed matrices


class SourceFiles:
    """
    Files to read from several threads. A context manager: the files are open within its block.

    Raises
    ------
    BadWeights: a file cannot be opened, or ends too early.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = sorted(set(paths))
        self._files: dict[Path, int] = {}
        self._states: dict[Path, os.stat_result] = {}  # when they were opened
        self._lock, self._seek_lock = threading.Lock(), threading.Lock()
        self._segments: OrderedDict[tuple[Path, int, int], _Segment] = OrderedDict()  # the most recently used last
        self._loaded_size = 0

    def __enter__(self) -> SourceFiles:
        try:
            for path in self._paths:
                self._files[path] = _open(path)
                self._states[path] = os.fstat(self._files[path])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._files.clear()
        self._segments.clear()
        self._loaded_size = 0

    def fingerprints(self) -> Mapping[Path, str]:
        """Return a text per file that differs if its content does."""
        return {path: fingerprint_file(file) for path, file in self._files.items()}

    def start(self, chunks: Sequence[RowChunk], finished: Collection[int]) -> Collection[int]:
        """Return all finished chunks: the files are those they were made from."""
        return finished

    def finish(self, number: int) -> None:
        """Ignore that a chunk is finished."""

    def stop(self) -> None:
        """Do nothing: reads of files end soon."""

    def check_unchanged(self) -> None:
        """
        Check that no file was overwritten meanwhile. One that was deleted or replaced is still open unchanged.

        Raises
        ------
        BadWeights: one was.
        """
        for path, before in self._states.items():
            after = os.fstat(self._files[path])
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise BadWeights(
                    path,
                    "it was changed while it was read",
                    hint="Run the same command again when no other program writes to it.",
                )

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on."""
        while buffer:
            count = read_at(self._files[path], buffer, offset, self._seek_lock)
            if not count:
                raise BadWeights(path, "it became shorter while it was read")
            buffer, offset = buffer[count:], offset + count

    def load(self, path: Path, offset: int, size: int) -> numpy.ndarray:
        """
        Return bytes of a file as uint8, which the caller must not change.

        They are kept until other segments need the memory, so that chunks that follow each other read them once.
        """
        with self._lock:
            key = path, offset, size
            segment = self._segments.pop(key, None)
            if segment is None:
                segment, self._loaded_size = _Segment(size), self._loaded_size + size
            self._segments[key] = segment
            while len(self._segments) > _KEPT_COUNT and self._loaded_size > _KEPT_SIZE:
                self._loaded_size -= self._segments.popitem(last=False)[1].size
        with segment.lock:
            if segment.data is None:
                import numpy

                data = numpy.empty(size, numpy.uint8)
                self.read(path, data.data, offset)
                segment.data = data
        return segment.data


class _Segment:
    """Bytes that one thread reads, and others wait for."""

    def __init__(self, size: int) -> None:
        self.size, self.lock = size, threading.Lock()
        self.data: numpy.ndarray | None = None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as reason:
        raise BadWeights.unreadable(path, reason) from reason
