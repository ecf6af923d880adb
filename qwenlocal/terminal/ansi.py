"""Text on a terminal that cannot harm it: escape sequences of a model or a file are shown, not obeyed."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from typing import TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_PICTURES = 0x2400  # Unicode's visible pictures of the control characters: ␛ for escape


def harmless(text: str) -> str:
    """
    `text` with control characters made visible; line breaks and tabs stay: `harmless("\\x1b[2J")` is "␛[2J".
    """
    return _CONTROL.sub(lambda match: _picture(match[0]), text)


def obeys(out: TextIO) -> bool:
    """Whether `out` is a terminal that obeys escape sequences, and not a typewriter (TERM=dumb)."""
    return out.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def has_colours(out: TextIO) -> bool:
    """Whether `out` shows colours, and nobody asked for none (https://no-color.org)."""
    return obeys(out) and not os.environ.get("NO_COLOR")


def dimmed(text: str, out: TextIO) -> str:
    """`text` in grey, where there are colours."""
    return f"\x1b[2m{text}\x1b[0m" if has_colours(out) else text


def padded(text: str, width: int) -> str:
    """`text` with spaces behind it, `width` columns wide; Chinese takes two columns a letter."""
    from wcwidth import wcswidth  # 50 ms, which commands that need no columns are spared

    return text + " " * (width - wcswidth(text))


def wrapped(text: str, out: TextIO) -> str:
    """`text` broken between words at the width of a terminal; as it is for anything else."""
    if not out.isatty():
        return text
    width = max(20, shutil.get_terminal_size().columns)
    lines = (
        textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True) or [""]
        for line in text.split("\n")
    )
    return "\n".join(part for line in lines for part in line)


def _picture(character: str) -> str:
    code = ord(character)
    if code == 0x7F:
        return chr(0x2421)
    return chr(_PICTURES + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def width_of(line: str) -> int:
    """How many columns a line takes; colours take none, Chinese letters two."""
    text = _ESCAPES.sub("", line)
    if text.isascii():
        return len(text)
    import wcwidth

    width: int = wcwidth.wcswidth(text)
    return width if width >= 0 else len(text)
