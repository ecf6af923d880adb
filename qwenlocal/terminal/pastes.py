"""Long pastes: one character in the input line stands for each, shown as `[paste 1: 240 lines]`."""

from __future__ import annotations

import bisect
import itertools
import re

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput

from qwenlocal.chat.documents import Document
from qwenlocal.formatting import format_count
from qwenlocal.i18n import tr

_FOLD_LINES, _FOLD_CHARACTERS = 8, 1000  # fold a paste from this size on
# High surrogates: no text that is typed, pasted or read from a file contains one. So what looks like a label but was
# typed stays text, and the editor's keys take the character as a whole.
_FIRST, _COUNT = 0xD800, 0x400
_STAND_IN = re.compile("[\ud800-\udbff]")
_FLAG_LETTERS = {0x1F1E6 + index: chr(ord("A") + index) for index in range(26)}
# Letters of flags, skin tones, the variation selector, joiners before emoji.
_EMOJI_PART = "[\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff\ufe0f]|\u200d(?=[\u2190-\u2bff\U0001f000-\U0001faff])"
_SHOWN_DIFFERENTLY = re.compile(f"{_STAND_IN.pattern}|{_EMOJI_PART}")


class Paste(Document):
    """A long paste, which is sent without a name and a code block."""

    def to_markdown(self) -> str:
        return self.text


class PasteStore:
    """The long pastes of a chat by the characters that stand for them in the input line."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def fold(self, text: str) -> str:
        """Store a long paste and return its character; return a short one unchanged."""
        if count_lines(text) < _FOLD_LINES and len(text) < _FOLD_CHARACTERS:
            return text
        if text not in self._texts:
            if len(self._texts) == _COUNT:
                return text
            self._texts.append(text)
        return chr(_FIRST + self._texts.index(text))

    def expand(self, line: str) -> str:
        """Replace the characters in `line` by their pastes."""
        return _STAND_IN.sub(lambda match: self._text(match[0]), line)

    def collapse(self, text: str) -> str:
        """Replace the pastes in `text` by their characters: the reverse of `expand`."""
        for paste in sorted(self._texts, key=len, reverse=True):
            text = text.replace(paste, chr(_FIRST + self._texts.index(paste)))
        return text

    def find(self, text: str) -> list[Paste]:
        """Return the pastes in an expanded text."""
        characters = dict.fromkeys(_STAND_IN.findall(self.collapse(text)))
        return [Paste(_name(character), self._text(character)) for character in characters]

    def describe(self, line: str) -> str:
        """Replace the characters in `line` by labels: `look: [paste 1: 240 lines]`."""
        return _STAND_IN.sub(lambda match: self._label(match[0]), line)

    def _label(self, character: str) -> str:
        text = self._text(character)
        lines = count_lines(text)
        size = format_count(lines, "line") if lines > 1 else format_count(len(text), "character")
        return tr("[{name}: {size}]", name=_name(character), size=size)

    def _text(self, character: str) -> str:
        index = ord(character) - _FIRST
        return self._texts[index] if index < len(self._texts) else ""


def _name(character: str) -> str:
    return tr("paste {number}", number=ord(character) - _FIRST + 1)


def count_lines(text: str) -> int:
    """Count lines; a line break at the end does not begin another one."""
    return text.removesuffix("\n").count("\n") + 1


class InputDisplay(Processor):
    """
    Shows the label of a paste in the input line in place of its character, and composed emoji as their parts.

    Terminals and prompt_toolkit disagree about the width of composed emoji, so the cursor would be in the wrong place.
    """

    def __init__(self, pastes: PasteStore) -> None:
        self._pastes = pastes

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        shown: StyleAndTextTuples = []
        starts = [0]  # the display column of each source column
        for style, text, *_ in transformation_input.fragments:
            sizes = [1] * len(text)
            for match in _SHOWN_DIFFERENTLY.finditer(text):
                sizes[match.start()] = len(self._replace(match))
            starts += itertools.accumulate(sizes, initial=starts.pop())
            shown.append((style, _SHOWN_DIFFERENTLY.sub(self._replace, text)))

        def to_display(column: int) -> int:
            return starts[min(column, len(starts) - 1)] + max(0, column - len(starts) + 1)

        def to_source(column: int) -> int:
            return bisect.bisect_right(starts, column) - 1

        return Transformation(shown, to_display, to_source)

    def _replace(self, match: re.Match[str]) -> str:
        if _STAND_IN.match(match[0]):
            return self._pastes.describe(match[0])
        return _FLAG_LETTERS.get(ord(match[0]), "")
