"""Byte sources of a file to download: the base class, and the HTTP implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwenlocal.library.http import HttpClient, TransferError


class ByteSource(ABC):
    """A source of the bytes of one file, read by several threads."""

    sequential = False  # True if it can only be read from the first byte to the last

    def __init__(self, label: str) -> None:
        self.label = label

    @abstractmethod
    def read(self, start: int, end: int) -> Iterator[bytes]:
        """
        Yield bytes `start` to `end` (exclusive), in order, in chunks of any length.

        Raises
        ------
        TransferError: the source fails, for now or for good.
        RangesUnsupported: the source only sends whole files; read (0, size) instead.
        """

    def buffered(self) -> int:
        """Return the bytes fetched already but not yet read, for the progress display."""
        return 0

    def stop(self) -> None:  # noqa: B027
        """Make reads in other threads end soon."""


class RangesUnsupported(Exception):
    """The source only sends whole files."""


def split_range(sizes: Iterable[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the numbers of the consecutive segments that bytes `start` to `end` fall into, and the range in each."""
    offset = 0
    for number, size in enumerate(sizes):
        first, last = max(0, start - offset), min(size, end - offset)
        if first < last:
            yield number, first, last
        offset += size


@dataclass(frozen=True)
class UrlSegment:
    """The content of `url`, which is `size` bytes of a file."""

    url: str
    size: int


class HttpSource(ByteSource):
    """A file on a web server, whole or in consecutive segments."""

    def __init__(
        self,
        label: str,
        client: HttpClient,
        segments: Sequence[UrlSegment],
        *,
        headers: Mapping[str, str] = {},
        etag: str = "",
    ) -> None:
        super().__init__(label)
        self._client, self._segments, self._headers, self._etag = client, segments, headers, etag

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for number, first, last in split_range((segment.size for segment in self._segments), start, end):
            yield from self._read_segment(self._segments[number], first, last)

    def stop(self) -> None:
        self._client.close_all()

    def _read_segment(self, segment: UrlSegment, start: int, end: int) -> Iterator[bytes]:
        size, ranged = segment.size, not self.sequential
        if not ranged and end - start < size:
            raise RangesUnsupported  # another thread has just found out
        headers = {**self._headers, **({"If-Range": self._etag} if self._etag and ranged else {})}
        response = self._client.open(segment.url, headers=headers, start=start, end=end if ranged else None)
        try:
            self._check_unchanged(response.size, response.etag, size)
            if response.body.status == 200 and end - start < size:
                raise RangesUnsupported
            if response.start != start:
                raise TransferError("the server sent a different range than requested", retryable=False)
            remaining = end - start
            for chunk in self._client.read(response):
                yield chunk[:remaining]
                remaining -= len(chunk)
                if remaining <= 0:
                    return
            raise TransferError("the connection ended early", retryable=True)
        finally:
            self._client.close(response.body)

    def _check_unchanged(self, size: int | None, etag: str | None, expected_size: int) -> None:
        if size is not None and size != expected_size:
            raise TransferError(
                f"the file on the server has changed: it has {size:,} bytes instead of {expected_size:,}",
                retryable=False,
            )
        if self._etag and etag and etag != self._etag:
            raise TransferError("the file on the server has changed during the download", retryable=False)
