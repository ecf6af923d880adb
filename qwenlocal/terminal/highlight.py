"""Syntax highlighting in the terminal's own 16 colors, so that its light or dark scheme applies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pygments.lexer import Lexer

_LOOKBACK = 60  # lines lexed again before each new one, so that most multi-line strings and comments are recognized
_COLORS = (  # (prefix of the token type, SGR code); the first match applies
    ("Comment", "90"),
    ("Keyword", "35"),
    ("Name.Function", "34"),
    ("Name.Class", "34"),
    ("Name.Decorator", "33"),
    ("Name.Builtin", "36"),
    ("Name.Tag", "35"),
    ("Name.Attribute", "33"),
    ("Literal.String", "32"),
    ("Literal.Number", "36"),
    ("Generic.Deleted", "31"),
    ("Generic.Inserted", "32"),
    ("Generic.Heading", "1"),
)


class Highlighter:
    """Highlights one code block line by line; `language` is the info string of its fence."""

    def __init__(self, language: str, *, color: bool) -> None:
        self._lexer = _find_lexer(language.strip().split(" ")[0].lower()) if color and language.strip() else None
        self._previous: list[str] = []

    def highlight_line(self, text: str) -> str:
        """Highlight the next complete line and remember it as context for the following ones."""
        highlighted = self.preview_line(text)
        self._previous = [*self._previous[-_LOOKBACK:], text]
        return highlighted

    def preview_line(self, text: str) -> str:
        """Highlight a line that may still grow."""
        if self._lexer is None or not text.strip():
            return text
        return _highlight(self._lexer, [*self._previous, text])[-1]


def _highlight(lexer: Lexer, lines: Sequence[str]) -> list[str]:
    highlighted, line = [], ""
    for token_type, value in lexer.get_tokens("\n".join(lines) + "\n"):
        code = _color_code(token_type)
        for index, part in enumerate(value.split("\n")):
            if index:
                highlighted.append(line)
                line = ""
            if part:
                line += f"\x1b[{code}m{part}\x1b[0m" if code else part
    return highlighted[: len(lines)]


@functools.cache
def _color_code(token_type: Any) -> str:
    name = str(token_type).removeprefix("Token.")
    return next((code for prefix, code in _COLORS if name.startswith(prefix)), "")


@functools.cache
def _find_lexer(language: str) -> Lexer | None:
    """Return the lexer for a language; None if Pygments has none."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
