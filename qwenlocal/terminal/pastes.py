"""Long pastes: one character in the input line stands for each, shown as `[paste 1: 240 lines]`."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput

_FOLD_LINES, _FOLD_CHARACTERS = 8, 1000  # fold a paste from this size on
# High surrogates: no text that is typed, pasted or read from a file contains one. So what looks like a label but was
# typed stays text, and the editor's keys take the character as a whole.
_FIRST, _COUNT = 0xD800, 0x400
_STAND_IN = re.compile("[\ud800-\udbff]")


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

    def find(self, text: str) -> Mapping[str, str]:
        """Return the pastes in an expanded text by their names, such as "paste 1"."""
        characters = dict.fromkeys(_STAND_IN.findall(self.collapse(text)))
        return {f"paste {ord(character) - _FIRST + 1}": self._text(character) for character in characters}

    def describe(self, line: str) -> str:
        """Replace the characters in `line` by labels: `look: [paste 1: 240 lines]`."""
        return _STAND_IN.sub(lambda match: self._label(match[0]), line)

    def _label(self, character: str) -> str:
        text = self._text(character)
        lines = count_lines(text)
        size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
        return f"[paste {ord(character) - _FIRST + 1}: {size}]"

    def _text(self, character: str) -> str:
        index = ord(character) - _FIRST
        return self._texts[index] if index < len(self._texts) else ""


def count_lines(text: str) -> int:
    """Count lines; a line break at the end does not begin another one."""
    return text.removesuffix("\n").count("\n") + 1


class PasteLabels(Processor):
    """Shows the label of a paste in the input line in place of its character."""

    def __init__(self, pastes: PasteStore) -> None:
        self._pastes = pastes

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        shown: StyleAndTextTuples = []
        starts = [0]  # the display column of each source column
        for style, text, *_ in transformation_input.fragments:
            label = self._pastes.describe(text)
            shown.append((style, label))
            if label == text:
                starts.extend(range(starts[-1] + 1, starts[-1] + len(text) + 1))
            else:
                for character in text:
                    starts.append(starts[-1] + len(self._pastes.describe(character)))

        def to_display(column: int) -> int:
            return starts[min(column, len(starts) - 1)] + max(0, column - len(starts) + 1)

        def to_source(column: int) -> int:
            return bisect.bisect_right(starts, column) - 1

        return Transformation(shown, to_display, to_source)
