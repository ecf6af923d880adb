"""Byte sources of a file to download: the protocol, and the HTTP implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwenlocal.library.http import HttpClient, TransferError


class ByteSource(Protocol):
    """A source of the bytes of one file. `sequential` sources can only be read from the first byte to the last."""

    label: str
    sequential: bool

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """
        Yield bytes `start` to `end` (exclusive), in order, in chunks of any length.

        Raises
        ------
        TransferError: the source fails, for now or for good.
        RangesUnsupported: the source only sends whole files; read (0, size) instead.
        """
        ...

    def buffered(self) -> int:
        """Return the bytes fetched already but not yet read, for the progress display."""
        ...

    def stop(self) -> None:
        """Make a read in another thread end soon."""
        ...

    def close(self) -> None:
        """Release what is kept for later reads."""
        ...


class RangesUnsupported(Exception):
    """The source only sends whole files."""


@dataclass(frozen=True)
class UrlSegment:
    """Bytes `start` to `end` of a file, which are the whole content of `url`."""

    url: str
    start: int
    end: int


class HttpSource:
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
        self.label, self._client, self._segments, self._headers, self._etag = label, client, segments, headers, etag
        self.sequential = False

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for segment in self._segments:
            first, last = max(start, segment.start), min(end, segment.end)
            if first < last:
                yield from self._read_segment(segment, first - segment.start, last - segment.start)

    def _read_segment(self, segment: UrlSegment, start: int, end: int) -> Iterator[bytes]:
        size = segment.end - segment.start
        ranged = not self.sequential
        if not ranged and end - start < size:
            raise RangesUnsupported  # another thread has just found out
        headers = {**self._headers, **({"If-Range": self._etag} if self._etag and ranged else {})}
        response = self._client.open(
            segment.url, headers=headers, start=start if ranged else 0, end=end if ranged else None
        )
        try:
            self._check_unchanged(response.size, response.etag, size)
            if response.body.status == 200 and end - start < size:
                raise RangesUnsupported
            if response.start != (start if ranged else 0):
                raise TransferError("the server sent another range than requested", retryable=False)
            remaining, skip = end - start, start - response.start
            for chunk in self._client.read(response):
                data = chunk[skip:] if skip else chunk
                skip = max(0, skip - len(chunk))
                if data:
                    yield data[:remaining]
                    remaining -= len(data[:remaining])
                if not remaining:
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

    def buffered(self) -> int:
        return 0

    def stop(self) -> None:
        """Do nothing: closing the client's connections ends every read."""

    def close(self) -> None:
        """Do nothing: no data is kept."""
