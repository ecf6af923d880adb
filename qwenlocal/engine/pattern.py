r"""
Regular expressions of a JSON schema, so that the converter to GBNF takes them, and what it makes of them is JSON.

The converter copies most of an expression as it stands. GBNF has no \d, and knows nothing of the string that it is in:
there a quotation mark, a backslash and a line break are not allowed as they are.
"""

from __future__ import annotations

import re

_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}
_NOT_RAW = r'"\\\x7F\x00-\x1F'  # what a string of JSON has only behind a backslash, as a part of a class
_TAKEN = "[]()|{}*+?"  # the converter knows these behind a backslash
_IN_CLASS = re.compile(r"\\.|[^\\]", re.DOTALL)
_UNIT = re.compile(r"\\(.)|\[(\^?)((?:[^\]\\]|\\.)*)\]|(.)", re.DOTALL)


def grammar_pattern(pattern: str) -> str:
    r"""
    `grammar_pattern(r"^\d{3}[^a]\.$")` is `^([0-9]{3}[^"\\\x7F\x00-\x1Fa][\x2E])$`: in brackets, for a choice in it
    would otherwise take the quotation marks along.

    Raises
    ------
    ValueError: there is something in it that a grammar cannot say; which, is the message.
    """
    if re.search(r"\(\?|(?<!\\)[*+?}][?+]", pattern):
        raise ValueError("(?…) and greed that is asked for")
    if not (pattern.startswith("^") and pattern.endswith("$")):
        raise ValueError("it must begin with ^ and end with $")
    units = list(_UNIT.finditer(pattern[1:-1]))
    if "".join(match[0] for match in units) != pattern[1:-1]:
        raise ValueError("a bracket or a backslash too many")
    return f"^({''.join(map(_unit, units))})$"


def _unit(match: re.Match[str]) -> str:
    escaped, negated, inner, plain = match.groups()
    if inner is not None:
        if '"' in inner and not negated:
            raise ValueError("a quotation mark within [ ]")
        units = "".join(_in_class(unit) for unit in _IN_CLASS.findall(inner))
        return f"[^{_NOT_RAW}{units}]" if negated else f"[{units}]"
    if escaped is None:
        if plain in '"^$\\':
            raise ValueError(f"{plain} in the middle")
        return f"[^{_NOT_RAW}]" if plain == "." else plain
    if escaped in _TAKEN:
        return f"\\{escaped}"
    return "[" + _in_class("\\" + escaped) + "]"


def _in_class(unit: str) -> str:
    """What stands for a letter or an escape within [ ]."""
    if not unit.startswith("\\"):
        return unit
    letter = unit[1]
    if letter in _CLASSES:
        return _CLASSES[letter]
    if letter.isalnum() or not letter.isascii() or letter in '"\\':
        raise ValueError(f"“{unit}”")
    return f"\\x{ord(letter):02X}"
