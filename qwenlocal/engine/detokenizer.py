"""Incremental detokenization: token bytes to whole characters, with stop strings that may span tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalDetokenizer:
    """
    A decoder that turns the bytes of tokens into text as soon as the text is certain.

    It holds back the bytes of an incomplete character, and text that may be the beginning of a stop string. The work
    per token depends on the lengths of the token and the stop strings, not on the length of the answer.
    `IncrementalDetokenizer(["END"])`: `feed(b"an E")` returns "an ", `feed(b"NDX")` returns "" and `matched_stop` is
    "END".
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._pending = ""
        self.matched_stop: str | None = None

    def feed(self, data: bytes) -> str:
        """Add the bytes of a token and return the text that is now certain; "" after a stop string."""
        if self.matched_stop is not None:
            return ""
        return self._release(self._pending + self._decoder.decode(data))

    def finish(self) -> str:
        """Return the pending text; an incomplete character becomes U+FFFD."""
        if self.matched_stop is not None:
            return ""
        text = self._release(self._pending + self._decoder.decode(b"", final=True))
        text, self._pending = text + self._pending, ""
        return text

    def _release(self, text: str) -> str:
        matches = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            at, self.matched_stop = min(matches)
            self._pending = ""
            return text[:at]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`: `_overlap("an E", "END")` is 1."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
