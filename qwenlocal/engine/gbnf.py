r"""
Grammars in llama.cpp's notation, GBNF (llama.cpp: grammars/README.md), translated into llguidance's Lark.

Literals become one terminal a character: `"ab"` is `/[\u{61}]/ /[\u{62}]/`. llguidance cuts a text into the longest
terminals that match, so that `("a" | "abc") "bd"` would not take "abd", nor `[a-z]+ "s"` "cats", if they were kept
whole; llguidance's own `gbnf_to_lark` does that, and reads \u00e9 as a shorter escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwenlocal.engine.grammar import find_fault
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_PART = re.compile(
    r"""
      (?P<space> (?: \s | \#[^\n]* )+ )
    | (?P<rule>  [\w-]+ ) [ \t]* ::=
    | (?P<name>  [\w-]+ )
    | "(?P<text> (?: [^"\\] | \\. )* )"
    | \[(?P<set> (?: [^\]\\] | \\. )+ )\]
    | (?P<count> \{ \s* \d+ \s* (?: , \s* \d* \s* )? \} | [*+?] )
    | (?P<mark>  [|().] )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_CHARACTER = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[nrt\"\\\[\]]|[^\\]", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_ANY = r"/[\u{0}-\u{10FFFF}]/"


def grammar_from_gbnf(text: str) -> str:
    """
    Return the grammar for GBNF; its first rule to be used is `root`.

    Raises
    ------
    UsageError: it cannot be read, or nothing follows it.
    """
    if "\0" in text or not text.strip():
        raise _unreadable(tr("it is empty, or has a zero byte in it"))
    from llguidance import LLMatcher

    grammar = str(LLMatcher.grammar_from_lark(_lark(text)))
    if reason := find_fault(grammar):
        raise _unreadable(_in_words(reason))
    return grammar


def _lark(text: str) -> str:
    """Lark numbers its rules: GBNF's names may have capitals, which are terminals there."""
    parts = list(_parts(text))
    names = {value: f"r{number}" for number, (kind, value, _) in enumerate(parts) if kind == "rule"}
    _check_rules(parts, names)
    names["root"] = "start"
    found: list[str] = []
    for kind, value, line in parts:
        if kind == "rule":
            found.append(f'\n{names[value]}: ""')  # every alternative begins with "", so that it may be empty
        elif kind == "name":
            found.append(names[value])
        elif kind == "text":
            letters = [f"/[{_code(letter)}]/" for letter in _characters(value, line)]
            found.append(f"({' '.join(letters)})" if len(letters) > 1 else "".join(letters) or '""')
        elif kind == "set":
            found.append(_set(value, line))
        elif kind == "count":
            found[-1] += re.sub(r"\s", "", value)
        else:
            found.append({"|": '| ""', "(": '(""', ".": _ANY}.get(value, value))
    return "%llguidance {}\n" + " ".join(found) + "\n"


def _parts(text: str) -> Iterator[tuple[str, str, int]]:
    """The parts of a grammar: kind, value, line; without white space and comments."""
    position = 0
    while position < len(text):
        match, line = _PART.match(text, position), text.count("\n", 0, position) + 1
        if match is None:
            near = text[position : position + 20].partition("\n")[0]
            raise _unreadable(tr("unexpected “{text}” in line {line}", text=near, line=line))
        kind = str(match.lastgroup)
        if kind != "space":
            yield kind, match[kind], line
        position = match.end()


def _check_rules(parts: list[tuple[str, str, int]], names: dict[str, str]) -> None:
    if "root" not in names:
        raise _unreadable(tr("it has no rule “root”"))
    depth, before = 0, ""
    for number, (kind, value, line) in enumerate(parts):
        if kind == "name" and value not in names:
            raise _unreadable(tr("the rule “{name}” in line {line} is not defined", name=value, line=line))
        if kind == "rule" and names[value] != f"r{number}":
            raise _unreadable(tr("the rule “{name}” is defined twice", name=value))
        depth += {"(": 1, ")": -1}.get(value, 0) if kind == "mark" else 0
        if depth < 0 or (depth and kind == "rule") or (depth and number == len(parts) - 1):
            raise _unreadable(tr("a parenthesis in line {line} has no partner", line=line))
        if (kind == "count" and before in ("", "rule", "count", "(", "|")) or (not before and kind != "rule"):
            raise _unreadable(tr("unexpected “{text}” in line {line}", text=value, line=line))
        before = value if kind == "mark" else kind


def _characters(text: str, line: int) -> list[str]:
    """The characters of a literal or a set, escapes resolved."""
    units = _CHARACTER.findall(text)
    if "".join(units) != text:
        raise _unreadable(tr("an escape in “{text}” in line {line} is unknown", text=text, line=line))
    return [_resolved(unit) for unit in units]


def _resolved(unit: str) -> str:
    if not unit.startswith("\\"):
        return unit
    code = int(unit[2:], 16) if unit[1] in "xuU" else ord(_ESCAPES.get(unit[1], unit[1]))
    return chr(code) if code < 0x110000 else "\ufffd"


def _set(text: str, line: int) -> str:
    """A set as a class of a regular expression: `a-z"` is `/[\\u{61}-\\u{7A}\\u{22}]/`."""
    negated, text = ("^", text[1:]) if text.startswith("^") else ("", text)
    letters, units = _characters(text, line), _CHARACTER.findall(text)
    inner = "".join(
        "-" if unit == "-" and 0 < place < len(units) - 1 else _code(letter)
        for place, (unit, letter) in enumerate(zip(units, letters, strict=True))
    )
    return f"/[{negated}{inner}]/"


def _code(letter: str) -> str:
    return f"\\u{{{ord(letter):X}}}"


def _in_words(reason: str) -> str:
    if reason.startswith("NoExtension"):
        return tr("no answer can follow it")
    if "nested" in reason:
        return tr("it is nested too deeply")
    text = reason.partition("error: ")[2] or reason.partition(": ")[2] or reason
    return text.strip().partition("\n")[0].rstrip(".")


def _unreadable(reason: str) -> UsageError:
    return UsageError(
        tr("The grammar cannot be read: {reason}.", reason=reason),
        hint=tr("How to write a grammar: llama.cpp, grammars/README.md"),
    )
