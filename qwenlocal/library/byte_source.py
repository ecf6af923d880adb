"""Where the bytes of a file can be had: the protocol, and the plain case of a web server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwenlocal.library.http import HttpClient, TransferError


class ByteSource(Protocol):
    """Somewhere a file's bytes can be had."""

    label: str
    sequential: bool  # True: only from the first byte to the last

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """
        Bytes `start` to `end` (not included), in order, in pieces of any length.

        Raises
        ------
        TransferError: this place does not deliver now, or at all.
        RangesUnsupported: it only sends whole files; ask for (0, size) instead.
        """
        ...

    def ahead(self) -> int:
        """Bytes it holds fetched already but has not handed out, for the progress shown."""
        ...

    def stop(self) -> None:
        """End a read that runs in another thread, soon."""
        ...

    def close(self) -> None:
        """Drop what it keeps for later reads."""
        ...


class RangesUnsupported(Exception):
    """The place sends whole files only."""


@dataclass(frozen=True)
class UrlSegment:
    """Bytes `start` to `end` of a file, being the whole content of `url`."""

    url: str
    start: int
    end: int


class HttpSource:
    """A file that a web server has, whole or in several pieces that follow each other."""

    def __init__(
        self,
        label: str,
        client: HttpClient,
        pieces: Sequence[UrlSegment],
        *,
        headers: Mapping[str, str] = {},
        etag: str = "",
    ) -> None:
        self.label, self._client, self._pieces, self._headers, self._etag = label, client, pieces, headers, etag
        self.sequential = False

    def read(self, start: int, end: int) -> Iterator[bytes]:
        for piece in self._pieces:
            first, last = max(start, piece.start), min(end, piece.end)
            if first < last:
                yield from self._read_piece(piece, first - piece.start, last - piece.start)

    def _read_piece(self, piece: UrlSegment, start: int, end: int) -> Iterator[bytes]:
        whole = piece.end - piece.start
        ranged = not self.sequential
        if not ranged and end - start < whole:
            raise RangesUnsupported  # another thread has just found that out
        headers = {**self._headers, **({"If-Range": self._etag} if self._etag and ranged else {})}
        opened = self._client.open(
            piece.url, headers=headers, start=start if ranged else 0, end=end if ranged else None
        )
        try:
            self._check(opened.size, opened.etag, whole)
            if opened.body.status == 200 and end - start < whole:
                raise RangesUnsupported
            if opened.start != (start if ranged else 0):
                raise TransferError("the server sent other bytes than were asked for", retryable=False)
            left, skip = end - start, start - opened.start
            for chunk in self._client.read(opened):
                data = chunk[skip:] if skip else chunk
                skip = max(0, skip - len(chunk))
                if data:
                    yield data[:left]
                    left -= len(data[:left])
                if not left:
                    return
            raise TransferError("the connection ended early", retryable=True)
        finally:
            self._client.close(opened.body)

    def _check(self, size: int | None, etag: str | None, whole: int) -> None:
        if size is not None and size != whole:
            raise TransferError(
                f"the file has {size:,} bytes there instead of {whole:,}: it was changed", retryable=False
            )
        if self._etag and etag and etag != self._etag:
            raise TransferError("the file was changed on the server meanwhile", retryable=False)

    def ahead(self) -> int:
        return 0

    def stop(self) -> None:
        """Nothing to do: closing the client's connections ends every read."""

    def close(self) -> None:
        """Nothing is kept."""
