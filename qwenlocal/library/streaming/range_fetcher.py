"""Byte ranges of remote files, from the first of their sources that delivers, with retries."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.library.artifact import Artifact, DownloadPolicy
from qwenlocal.library.byte_source import RangesUnsupported
from qwenlocal.library.failover import SourceSelector
from qwenlocal.library.http import TransferError
from qwenlocal.library.streaming.stream_journal import PartOfFile

if TYPE_CHECKING:
    import numpy

_MAX_WAIT = 0.5  # seconds between two looks at `stop`


class Stopped(Exception):
    """The transfer was stopped by another thread."""


class RangeFetcher:
    """Reads ranges of files by their local paths; for several threads."""

    def __init__(self, artifacts: Mapping[Path, Artifact]) -> None:
        self._artifacts = artifacts
        self._selectors: dict[Path, SourceSelector] = {}  # created when a file is begun: they measure time
        self._lock, self._is_stopped = threading.Lock(), threading.Event()

    def read(self, part: PartOfFile) -> Iterator[bytes]:
        """
        Yield the bytes of a part; after a failure, continue from the last one.

        Raises
        ------
        DownloadFailed, SourceUnreachable: no source delivers.
        Stopped: `stop` was called.
        """
        selector, start = self._selector(part.path), part.offset
        while start < part.end:
            if self._is_stopped.is_set():
                raise Stopped
            state, wait = selector.select()
            if state is None:
                self._is_stopped.wait(min(wait, _MAX_WAIT))
                continue
            try:
                for data in state.source.read(start, part.end):
                    selector.record_arrival(state, len(data))
                    start += len(data)
                    yield data
            except RangesUnsupported:
                selector.record_failure(state, TransferError("it only sends whole files", retryable=False))
            except TransferError as error:
                if not self._is_stopped.is_set():
                    selector.record_failure(state, error)

    def stop(self) -> None:
        """Make reads in other threads end soon."""
        self._is_stopped.set()
        for artifact in self._artifacts.values():
            for source in artifact.sources:
                source.stop()

    def _selector(self, path: Path) -> SourceSelector:
        with self._lock:
            if path not in self._selectors:
                artifact = self._artifacts[path]
                self._selectors[path] = SourceSelector(artifact.name, artifact.sources, DownloadPolicy())
            return self._selectors[path]


class RemoteSamples:
    """A reader of weights for a few small ranges of files on a hub."""

    def __init__(self, fetcher: RangeFetcher) -> None:
        self._fetcher = fetcher

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """
        Fill `buffer` with the bytes of a file from `offset` on.

        Raises
        ------
        DownloadFailed, SourceUnreachable: no source delivers.
        """
        end = 0
        for data in self._fetcher.read(PartOfFile(path, offset, len(buffer))):
            buffer[end : end + len(data)] = data
            end += len(data)

    def load(self, path: Path, offset: int, size: int) -> numpy.ndarray:
        """Return bytes of a file as uint8."""
        import numpy

        data = numpy.empty(size, numpy.uint8)
        self.read(path, data.data, offset)
        return data
