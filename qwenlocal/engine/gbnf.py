r"""
Grammars in llama.cpp's notation, GBNF (llama.cpp: grammars/README.md), converted to llguidance's Lark.

Literals become one terminal per character: `"ab"` is `/[\u{61}]/ /[\u{62}]/`. llguidance splits a text into the longest
terminals that match, so with whole literals `("a" | "abc") "bd"` would not accept "abd", nor `[a-z]+ "s"` "cats".
llguidance's own `gbnf_to_lark` has these faults, and reads \u00e9 as a shorter escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwenlocal.engine.grammar import find_grammar_error
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_MAX_LENGTH = 100_000  # characters; llguidance needs seconds for that many

_LEXEME = re.compile(
    r"""
      (?P<space>      (?: \s | \#[^\n]* )+ )
    | (?P<definition> [\w-]+ ) [ \t]* ::=
    | (?P<name>       [\w-]+ )
    | "(?P<literal>   (?: [^"\\] | \\. )* )"
    | \[(?P<set>      (?: [^\]\\] | \\. )+ )\]
    | (?P<quantifier> \{ \s* \d+ \s* (?: , \s* \d* \s* )? \} | [*+?] )
    | (?P<symbol>     [|().] )
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_CHARACTER = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[nrt\"\\\[\]]|[^\\]", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
# Each alternative begins with "", so that it may be empty.
_SYMBOLS = {"|": '| ""', "(": '(""', ".": r"/[\u{0}-\u{10FFFF}]/", ")": ")"}

_Lexeme = tuple[str, str, int]  # the name of its group in _LEXEME, its text, its line


def grammar_from_gbnf(text: str) -> str:
    """
    Convert GBNF, in which answers start with the rule `root`, to a grammar.

    Raises
    ------
    UsageError: the text is invalid, or no answer can match it.
    """
    if "\0" in text or not text.strip():
        raise _unreadable(tr("it is empty or contains a null character"))
    if len(text) > _MAX_LENGTH:
        raise _unreadable(tr("it is longer than {limit:,} characters", limit=_MAX_LENGTH))
    from llguidance import LLMatcher

    grammar = str(LLMatcher.grammar_from_lark(_to_lark(text)))
    if reason := find_grammar_error(grammar):
        raise _unreadable(_explain(reason))
    return grammar


def _to_lark(text: str) -> str:
    """Convert to Lark, with numbers as names of rules: GBNF's may have capitals, which are terminals in Lark."""
    lexemes = list(_split(text))
    names = {value: f"r{number}" for number, (kind, value, _) in enumerate(lexemes) if kind == "definition"}
    _check_rules(lexemes, names)
    names["root"] = "start"
    output: list[str] = []
    for kind, value, line in lexemes:
        if kind == "definition":
            output.append(f'\n{names[value]}: ""')
        elif kind == "name":
            output.append(names[value])
        elif kind == "literal":
            terminals = [f"/[{_code(unescaped)}]/" for _, unescaped in _characters(value, line)]
            output.append(f"({' '.join(terminals)})" if len(terminals) > 1 else "".join(terminals) or '""')
        elif kind == "set":
            output.append(_character_class(value, line))
        elif kind == "quantifier":
            output[-1] += re.sub(r"\s", "", value)
        else:
            output.append(_SYMBOLS[value])
    return "%llguidance {}\n" + " ".join(output) + "\n"


def _split(text: str) -> Iterator[_Lexeme]:
    """Split a grammar into lexemes, without whitespace and comments."""
    position, line = 0, 1
    while position < len(text):
        match = _LEXEME.match(text, position)
        if match is None:
            rest = text[position : position + 20].partition("\n")[0]
            raise _unreadable(tr("unexpected “{text}” on line {line}", text=rest, line=line))
        kind = str(match.lastgroup)
        if kind != "space":
            yield kind, match[kind], line
        line += match[0].count("\n")
        position = match.end()


def _check_rules(lexemes: list[_Lexeme], names: dict[str, str]) -> None:
    if "root" not in names:
        raise _unreadable(tr("it has no rule “root”"))
    depth, previous = 0, ""
    for number, (kind, value, line) in enumerate(lexemes):
        if kind == "name" and value not in names:
            raise _unreadable(tr("the rule “{name}” used on line {line} is not defined", name=value, line=line))
        if kind == "definition" and names[value] != f"r{number}":
            raise _unreadable(tr("the rule “{name}” is defined twice", name=value))
        depth += {"(": 1, ")": -1}.get(value, 0) if kind == "symbol" else 0
        if depth < 0 or (depth and (kind == "definition" or number == len(lexemes) - 1)):
            raise _unreadable(tr("unbalanced parenthesis on line {line}", line=line))
        is_misplaced = kind == "quantifier" and previous in ("definition", "quantifier", "(", "|")
        if is_misplaced or (not previous and kind != "definition"):
            raise _unreadable(tr("unexpected “{text}” on line {line}", text=value, line=line))
        previous = value if kind == "symbol" else kind


def _characters(text: str, line: int) -> list[tuple[str, str]]:
    r"""Split a literal or a set into its characters, each as written and unescaped: `\x41` and `A`."""
    written = _CHARACTER.findall(text)
    if "".join(written) != text:
        raise _unreadable(tr("unknown escape in “{text}” on line {line}", text=text, line=line))
    return [(character, _unescape(character)) for character in written]


def _unescape(character: str) -> str:
    if not character.startswith("\\"):
        return character
    kind = character[1]
    code = int(character[2:], 16) if kind in "xuU" else ord(_ESCAPES.get(kind, kind))
    return chr(code) if code < 0x110000 else "\ufffd"


def _character_class(text: str, line: int) -> str:
    """Convert a set to a regular expression: `a-z"` is `/[\\u{61}-\\u{7A}\\u{22}]/`."""
    negation, text = ("^", text[1:]) if text.startswith("^") else ("", text)
    characters = _characters(text, line)
    members = [
        "-" if written == "-" and 0 < place < len(characters) - 1 else _code(unescaped)
        for place, (written, unescaped) in enumerate(characters)
    ]
    return f"/[{negation}{''.join(members)}]/"


def _code(character: str) -> str:
    return f"\\u{{{ord(character):X}}}"


def _explain(reason: str) -> str:
    """Convert llguidance's reason to part of a sentence."""
    if reason.startswith("NoExtension"):
        return tr("no answer can match it")
    if "Too many items" in reason:
        return tr("it is too large")
    if "nested" in reason:
        return tr("it is nested too deeply")
    text = reason.partition("error: ")[2] or reason.partition(": ")[2] or reason
    return text.strip().partition("\n")[0].rstrip(".")


def _unreadable(reason: str) -> UsageError:
    return UsageError(
        tr("Cannot read the grammar: {reason}.", reason=reason),
        hint=tr("For the syntax, see grammars/README.md in llama.cpp."),
    )
