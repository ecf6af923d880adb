"""The bytes of several remote files, one after the other: fetched in blocks by several connections, taken in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qwenlocal.library.artifact import DownloadPolicy
from qwenlocal.library.streaming.range_fetcher import RangeFetcher, Stopped
from qwenlocal.library.streaming.stream_journal import PartOfFile
from qwenlocal.weights.write_workers import start_thread

_BLOCK_SIZE = 8 << 20
_MAX_BLOCKS = 8  # that are being fetched, or have arrived and are not taken
BUFFER_SIZE = _MAX_BLOCKS * _BLOCK_SIZE


class StreamPiece(NamedTuple):
    """Bytes of a file from `offset` on; `data` is valid until the next piece is taken."""

    path: Path
    offset: int
    data: memoryview


class _Block:
    """A range that one thread fetches, what has arrived of it, and why no more will."""

    def __init__(self, span: PartOfFile, buffer: memoryview) -> None:
        self.span, self.buffer, self.arrived = span, buffer, 0
        self.failure: BaseException | None = None


class BlockStream:
    """Fetches `ranges` in order by several threads. Blocks are fetched ahead until their memory is used up."""

    def __init__(self, ranges: Sequence[PartOfFile], fetcher: RangeFetcher) -> None:
        self._spans = [block for span in ranges for block in _split(span)]
        self._fetcher, self._changed = fetcher, threading.Condition()
        self._blocks: dict[int, _Block] = {}  # by number; claimed and not taken
        self._spare: list[memoryview] = []
        self._next = 0
        self._has_failed = self._is_stopped = False

    def start(self) -> None:
        """Begin to fetch."""
        # All memory is requested here: a thread that ends without it would leave `pieces` waiting.
        self._spare = [memoryview(bytearray(_BLOCK_SIZE)) for _ in self._spans[:_MAX_BLOCKS]]
        for _ in self._spans[: DownloadPolicy.connections]:
            start_thread(threading.Thread(target=self._fetch_blocks, daemon=True))

    def stop(self) -> None:
        """End all threads, and the wait for the next piece, with `Stopped`; call it after the fetcher's."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def pieces(self) -> Iterator[StreamPiece]:
        """
        Yield all bytes in order, as they arrive; those before a failure, too.

        Raises
        ------
        Everything that `RangeFetcher.read` raises.
        """
        for number, span in enumerate(self._spans):
            position = 0
            while position < span.size:
                block, arrived = self._wait_for_bytes(number, position)
                yield StreamPiece(span.path, span.offset + position, block.buffer[position:arrived])
                position = arrived
            with self._changed:
                self._spare.append(self._blocks.pop(number).buffer)
                self._changed.notify_all()

    def _wait_for_bytes(self, number: int, position: int) -> tuple[_Block, int]:
        """Return a block once more than `position` bytes of it have arrived, and how many."""
        with self._changed:
            while True:
                if self._is_stopped:
                    raise Stopped
                block = self._blocks.get(number)
                if block and block.arrived > position:
                    return block, block.arrived
                if block and block.failure:
                    raise block.failure
                self._changed.wait()

    def _fetch_blocks(self) -> None:
        while block := self._claim():
            try:
                for data in self._fetcher.read(block.span):
                    block.buffer[block.arrived : block.arrived + len(data)] = data
                    with self._changed:
                        block.arrived += len(data)
                        self._changed.notify_all()
            except BaseException as failure:
                with self._changed:
                    block.failure, self._has_failed = failure, True
                    self._changed.notify_all()

    def _claim(self) -> _Block | None:
        """Return the next block, once there is memory for it; None after the last one, a failure, or `stop`."""
        with self._changed:
            while not self._is_stopped and not self._has_failed and self._next < len(self._spans):
                if self._spare:
                    number, self._next = self._next, self._next + 1
                    self._blocks[number] = _Block(self._spans[number], self._spare.pop())
                    return self._blocks[number]
                self._changed.wait()
        return None


def _split(span: PartOfFile) -> Iterator[PartOfFile]:
    """Split a range into blocks that begin at multiples of their size."""
    start = span.offset
    while start < span.end:
        end = min(span.end, (start // _BLOCK_SIZE + 1) * _BLOCK_SIZE)
        yield PartOfFile(span.path, start, end - start)
        start = end
