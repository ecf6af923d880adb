"""Text in a terminal's width: wrap lines between words, shorten one-line texts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import TextIO

from qwenlocal.formatting import display_width

MIN_WIDTH = 20  # columns; text for a narrower terminal is wrapped as for this one
# Chinese and Japanese text breaks between characters, except before closing and after opening punctuation.
_WIDE = "\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
_CLOSING, _OPENING = "、。〉》」』】〕！），．：；？］｝”’…", "〈《「『【〔（［｛“‘"
BREAK_POINTS = re.compile(
    f"(?<=[{_WIDE}])(?<![{_OPENING}])(?=[{_WIDE}\\w])(?![{_CLOSING}])|(?<=[^\\W_])(?=[{_WIDE}])(?![{_CLOSING}])"
)
_COLUMN_GAP = re.compile(r"(?<=\S) {2,}(?=\S)")


def terminal_width() -> int:
    """Return the number of columns of the terminal, at least `MIN_WIDTH`."""
    return max(MIN_WIDTH, shutil.get_terminal_size().columns)


def wrap(text: str, out: TextIO) -> str:
    """Wrap `text` between words at the width of a terminal; return it unchanged for any other output."""
    if not out.isatty():
        return text
    width = terminal_width()
    return "\n".join(row for line in text.split("\n") for row in wrap_line(line, width))


def wrap_line(line: str, width: int) -> list[str]:
    """
    Wrap a line at `width` columns; words that are longer stay whole.

    In a line with columns, which are two spaces or more apart, the last column is continued below itself. If that
    leaves it less than half of the width, the columns move together, and the rows below the first are indented by four
    spaces.
    """
    if display_width(line) <= width:
        return [line]
    gaps = list(_COLUMN_GAP.finditer(line))
    indent = len(line) - len(line.lstrip(" "))
    hanging = display_width(line[: gaps[-1].end()]) if gaps else indent
    if hanging > width // 2:
        line, hanging = line[:indent][:2] + _COLUMN_GAP.sub("  ", line[indent:]), 4
    rows, row = [], ""
    for word in (part for chunk in re.findall(r"\s*\S+", line) for part in BREAK_POINTS.split(chunk)):
        if row.strip() and display_width(row + word) > width:
            rows.append(row)
            word = word.lstrip()
            row = " " * min(hanging, max(0, width - display_width(word))) + word
        else:
            row += word
    return [*rows, row]


def join_fitting(parts: Sequence[str], separator: str, width: int) -> str:
    """Join as many of the first `parts` as fit into `width` columns; shorten the first one if it does not fit."""
    count = len(parts)
    while count > 1 and display_width(separator.join(parts[:count])) > width:
        count -= 1
    text = separator.join(parts[:count])
    return text if display_width(text) <= width else wrap_line(text, width - 1)[0] + "…"
