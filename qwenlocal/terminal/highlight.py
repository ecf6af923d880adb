"""Code in colours: a terminal's own sixteen, so that its owner's light or dark scheme holds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pygments.lexer import Lexer

_WINDOW = 60  # lines before the last that are looked at again: what a text string or comment spans, mostly
_COLOURS = (  # the first that a token's type is in; SGR numbers
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
    """Colours lines of one piece of code, in the order in which they come; `language` is what stands at its fence."""

    def __init__(self, language: str, *, colour: bool) -> None:
        self._lexer = _lexer(language.strip().split(" ")[0].lower()) if colour and language.strip() else None
        self._before: list[str] = []

    def line(self, text: str) -> str:
        """The next whole line, which is remembered."""
        shown = self.peek(text)
        self._before = [*self._before[-_WINDOW:], text]
        return shown

    def peek(self, text: str) -> str:
        """A line that may not be whole yet."""
        if self._lexer is None or not text.strip():
            return text
        lines = _coloured(self._lexer, [*self._before, text])
        return lines[-1]


def _coloured(lexer: Lexer, lines: Sequence[str]) -> list[str]:
    found, line = [], ""
    for kind, value in lexer.get_tokens("\n".join(lines) + "\n"):
        code = _colour(kind)
        for place, part in enumerate(value.split("\n")):
            if place:
                found.append(line)
                line = ""
            if part:
                line += f"\x1b[{code}m{part}\x1b[0m" if code else part
    return found[: len(lines)]


@functools.cache
def _colour(kind: Any) -> str:
    name = str(kind).removeprefix("Token.")
    return next((code for prefix, code in _COLOURS if name.startswith(prefix)), "")


@functools.cache
def _lexer(language: str) -> Lexer | None:
    """None for languages that Pygments does not know."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
