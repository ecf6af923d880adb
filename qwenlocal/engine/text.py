"""Token bytes to text: whole characters only, and stop strings that may begin in one token and end in another."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """
    Turns the bytes of tokens into text as it becomes certain.

    Bytes of an unfinished character wait for the rest; text that could be the start of a stop string waits until it is
    clear that it is not. The work for a token depends on the lengths of the token and of the stop strings, not on how
    much was said before. `TextStream(["END"])`: `feed(b"an E")` gives "an ", `feed(b"NDX")` gives "" and
    `stopped` is "END".
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped: str | None = None

    def feed(self, data: bytes) -> str:
        """The text that is certain after these bytes; nothing more once a stop string was met."""
        if self.stopped is not None:
            return ""
        return self._release(self._held + self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, at the end: an unfinished character as U+FFFD, an unfinished stop string as it is."""
        if self.stopped is not None:
            return ""
        text = self._release(self._held + self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`: `_overlap("an E", "END")` is 1."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
