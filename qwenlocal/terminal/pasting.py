"""Large pastes into the input line, in a time that grows as they do."""

from __future__ import annotations

from prompt_toolkit.input import Input
from prompt_toolkit.input.vt100_parser import Vt100Parser

_END = "\x1b[201~"


class PasteParser(Vt100Parser):
    """
    prompt_toolkit's parser looks through all of a paste for its end whenever a kilobyte more of it comes, which takes
    5 s for 4 MB; this one looks at what is new.
    """

    def reset(self, request: bool = False) -> None:
        super().reset(request)
        self._pieces: list[str] = []
        self._tail = ""

    def feed(self, data: str) -> None:
        if not self._in_bracketed_paste:
            super().feed(data)
            return
        self._pieces.append(data)
        recent = self._tail + data
        self._tail = recent[1 - len(_END) :]
        if _END in recent:
            whole, self._pieces, self._tail = "".join(self._pieces), [], ""
            super().feed(whole)


def takes_large_pastes(line_input: Input) -> Input:
    """`line_input`, quick with them where it is a terminal's."""
    old = getattr(line_input, "vt100_parser", None)
    if isinstance(old, Vt100Parser):
        line_input.vt100_parser = PasteParser(old.feed_key_callback)  # type: ignore[attr-defined]
    return line_input
