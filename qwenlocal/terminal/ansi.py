"""Terminal capabilities and escape sequences: detect support, dim text, escape control characters."""

from __future__ import annotations

import os
import re
from typing import TextIO

_CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡"}  # such as ␛ for escape


def escape_controls(text: str) -> str:
    """
    Make control characters visible, so that text from a model or a file cannot control the terminal.

    Line breaks and tabs stay: `escape_controls("\\x1b[2J")` is "␛[2J".
    """
    return _CONTROL_CHARS.sub(lambda match: _CONTROL_PICTURES.get(ord(match[0]), "\N{REPLACEMENT CHARACTER}"), text)


def supports_ansi(out: TextIO) -> bool:
    """Return True if `out` is a terminal that understands escape sequences (TERM=dumb does not)."""
    return out.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def supports_color(out: TextIO) -> bool:
    """Return True if `out` shows colors and NO_COLOR is not set (https://no-color.org)."""
    return supports_ansi(out) and not os.environ.get("NO_COLOR")


def dim(text: str, out: TextIO | None = None) -> str:
    """Dim `text`, if `out` is not given or shows colors."""
    return f"\x1b[2m{text}\x1b[0m" if out is None or supports_color(out) else text
