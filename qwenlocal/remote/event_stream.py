"""Server-sent events, as https://html.spec.whatwg.org/multipage/server-sent-events.html defines them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MAX_EVENT_SIZE = 16 << 20  # bytes
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventTooLarge(ValueError):
    """An event has more than `MAX_EVENT_SIZE` bytes."""


def parse_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """
    Yield the data of each event; comments and other fields are skipped, and so is an event without its empty line.

    `list(parse_events([b": ping\\n\\ndata: a\\nda", b"ta: b\\r\\n\\r\\n"]))` is ["a\\nb"].

    Raises
    ------
    EventTooLarge: an event is too long to be an answer.
    """
    data: list[bytes] = []
    for line in _split_lines(chunks):
        if sum(map(len, data)) + len(line) > MAX_EVENT_SIZE:
            raise EventTooLarge
        name, _, value = line.partition(b":")
        if line and name == b"data":
            data.append(value.removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data).decode("utf-8", errors="replace")
            data = []


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield complete lines, which end with LF, CR or CRLF. A byte order mark at the start is removed."""
    parts: list[bytes] = []  # of the line that has not ended
    size, has_started, after_cr = 0, False, False
    for chunk in chunks:
        if not has_started and chunk:
            chunk, has_started = chunk.removeprefix(b"\xef\xbb\xbf"), True
        if after_cr and chunk:  # the CR before ended a line already
            chunk, after_cr = chunk.removeprefix(b"\n"), False
        *lines, rest = _LINE_END.split(chunk)
        after_cr = after_cr or chunk.endswith(b"\r")
        for line in lines:
            yield b"".join(parts) + line
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_EVENT_SIZE:
            raise EventTooLarge
