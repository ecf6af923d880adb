"""
A JSON schema as a grammar. What cannot be kept to is an error: a schema that is half obeyed is worse than none.

The conversion is llama-cpp-python's. White space is made what models are used to: where a schema names the properties,
exactly one blank behind colons and commas, so that what stands between two values is one literal; where it leaves them
open, any that a model might want. Without a choice there, small models begin with `{}` and are done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qwenlocal.engine.llama import bindings
from qwenlocal.errors import UsageProblem

_KEPT = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum",
     "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "pattern", "format")
)  # fmt: skip
_NOTES = frozenset(("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"))
_FORMATS = ("date", "time", "date-time", "uuid")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_NAMED = ("properties", "$defs", "definitions")  # their keys are names, no keywords
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
ANY_OBJECT = '{"type": "object"}'
_OPEN = {  # rules of values that the schema leaves open: as the converter writes them, and with any white space
    'object ::= "{" space ( string ":" space value ("," space string ":" space value)* )? "}" space':
    'object ::= "{" any-space ( string any-space ":" any-space value '
    '(any-space "," any-space string any-space ":" any-space value)* any-space )? "}"',
    'array ::= "[" space ( value ("," space value)* )? "]" space':
    'array ::= "[" any-space ( value (any-space "," any-space value)* any-space )? "]"',
}  # fmt: skip
_ANY_SPACE = r'any-space ::= | " " | "\n" [ \t]{0,20}'


def grammar_of_schema(text: str) -> str:
    """
    The GBNF of a JSON schema: `grammar_of_schema('{"const": 1}')` has `root ::= "1" space`, and space is nothing.

    Raises
    ------
    UsageProblem: it is no JSON, no schema, or has keywords that cannot be kept to.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise UsageProblem(f"The schema is not readable JSON: {reason}.") from reason
    if not isinstance(schema, dict):
        raise UsageProblem("The schema must be a JSON object.", hint='For example: {"type": "object", "properties": …}')
    faults = list(dict.fromkeys(_faults(schema, "the schema")))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UsageProblem(
            f"The schema cannot be kept to: {faults[0]}{more}.", hint="Leave it out, or say it in words."
        )
    try:
        grammar: str = bindings("llama_grammar").json_schema_to_gbnf(text)
    except Exception as reason:  # whatever the converter stumbles over
        raise UsageProblem(f"The schema cannot be kept to: {reason or type(reason).__name__}.") from reason
    return "".join(_corrected(line) + "\n" for line in (*grammar.splitlines(), _ANY_SPACE))


def _corrected(line: str) -> str:
    """White space as above, and no raw line breaks in strings, which the converter allows and JSON does not."""
    if line in _OPEN:
        return _OPEN[line]
    if line.startswith("space ::="):
        return 'space ::= ""'
    if line.startswith("char ::="):
        return line.replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
    return line.replace('":" space', '": "').replace('"," space', '", "')


def _faults(schema: Any, where: str) -> Iterator[str]:
    """What a schema asks for that a grammar does not keep, in words."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield f"{where} is {schema!r}, no schema"
        return
    for key in schema:
        if key not in _KEPT | _NOTES:
            yield f"“{key}” in {where} is not supported"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            yield f"{where} has the unknown type {kind!r}"
    if schema.get("format", "date") not in _FORMATS:
        yield f"the format {schema['format']!r} in {where} is not supported"
    pattern = schema.get("pattern")
    if pattern is not None and not (isinstance(pattern, str) and pattern.startswith("^") and pattern.endswith("$")):
        yield f"the pattern in {where} must begin with ^ and end with $"
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        yield f"the reference {reference!r} in {where} leads out of the schema"
    for name, inner, place in _inside(schema):
        yield from _faults(inner, f"{place} “{name}”" if name else place)


def _inside(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key in _NAMED:
        found = schema.get(key)
        if isinstance(found, Mapping):
            yield from (
                (name, inner, "the property" if key == "properties" else "the definition")
                for name, inner in found.items()
            )
    for key in _LISTS:
        found = schema.get(key)
        if isinstance(found, list):
            yield from (("", inner, f"a part of {key}") for inner in found)
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield "", schema[key], key
