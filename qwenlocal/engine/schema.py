"""
A JSON schema as a grammar. What cannot be kept to is an error: a schema that is half obeyed is worse than none.

The conversion is llama-cpp-python's. White space is made what models are used to: where a schema names the properties,
exactly one blank behind colons and commas, so that what stands between two values is one literal; where it leaves them
open, any that a model might want. Without a choice there, small models begin with `{}` and are done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwenlocal.engine.llama import bindings
from qwenlocal.engine.pattern import grammar_pattern
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
_LITERAL = re.compile(
    r'\[(?:[^\]\\]|\\.)*\]|"(?:[^"\\]|\\.)*"(?: space)?'
)  # or a class, which may hold a quotation mark
_ONE_BLANK = {'":" space': '": "', '"," space': '", "'}
_DECIDING = (
    "$ref",
    "anyOf",
    "oneOf",
    "allOf",
    "const",
    "enum",
)  # where one of them stands, the converter sees no other
_DEFINITIONS = ("$defs", "definitions")
_ANYTHING = {"anyOf": [{"type": kind} for kind in _TYPES]}
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
    faults = list(dict.fromkeys((*_faults(schema, "the schema"), *_unjoinable(schema, schema))))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UsageProblem(
            f"The schema cannot be kept to: {faults[0]}{more}.", hint="Leave it out, or say it in words."
        )
    try:
        grammar = _converted(_rewritten(schema))
    except Exception as reason:  # whatever the converter stumbles over
        raise UsageProblem(f"The schema cannot be kept to: {reason or type(reason).__name__}.") from reason
    return "".join(_corrected(line) + "\n" for line in (*grammar.splitlines(), _ANY_SPACE))


def _converted(schema: Any) -> str:
    """By llama-cpp-python, but for literals: it forgets that a backslash means something in a grammar, too."""
    module = bindings("llama_grammar")

    class Converter(module.SchemaConverter):  # type: ignore[misc, name-defined]
        def _format_literal(self, literal: str) -> str:
            return '"' + _readable(literal).replace("\\", "\\\\").replace('"', '\\"') + '"'

    converter = Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    converter.visit(converter.resolve_refs(schema, "stdin"), "")
    return str(converter.format_grammar())


def _readable(literal: str) -> str:
    """JSON with letters as they are instead of backslashes and numbers, which models do not say by themselves."""
    try:
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        text.encode("utf-8")  # half a character is no text
    except ValueError:
        return literal
    return text


def _corrected(line: str) -> str:
    """White space as above, and no raw line breaks in strings, which the converter allows and JSON does not."""
    if line in _OPEN:
        return _OPEN[line]
    if line.startswith("space ::="):
        return 'space ::= ""'
    if line.startswith("char ::="):
        return line.replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
    return _LITERAL.sub(lambda found: _ONE_BLANK.get(found[0], found[0]), line)


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
    if pattern is not None:
        try:
            grammar_pattern(str(pattern))
        except ValueError as reason:
            yield f"the pattern in {where} is not supported: {reason}"
    yield from _beside(schema, where)
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        yield f"the reference {reference!r} in {where} leads out of the schema"
    for name, inner, place in _inside(schema):
        yield from _faults(inner, f"{place} “{name}”" if name else place)


def _beside(schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keywords that the converter does not see beside others."""
    kept = [key for key in schema if key in _KEPT and key not in _DEFINITIONS]
    deciding = [key for key in _DECIDING if key in schema]
    restated = (
        "const",
        "enum",
        *(("allOf",) if schema.get("type") == "object" else ()),
    )  # beside these, "type" is no news
    is_said_twice = bool(deciding) and deciding[0] in restated
    texts = [key for key in ("pattern", "format") if key in schema]
    lengths = [key for key in ("minLength", "maxLength") if key in schema]
    if deciding:
        pairs = [(deciding[0], key) for key in kept if key != deciding[0] and not (key == "type" and is_said_twice)]
    elif texts:
        pairs = [(texts[0], key) for key in (*texts[1:], *lengths)]
    else:
        pairs = []
    if "prefixItems" in schema:
        count = len(schema["prefixItems"]) if isinstance(schema["prefixItems"], list) else 0
        if schema.get("items", False) is not False:
            pairs.append(("prefixItems", "items"))
        least, most = schema.get("minItems", count), schema.get("maxItems", count)
        if isinstance(least, int) and isinstance(most, int) and not least <= count <= most:
            pairs.append(("prefixItems", "minItems" if "minItems" in schema else "maxItems"))
    yield from (f"“{one}” beside “{other}” in {where} is not supported" for one, other in pairs)
    if lengths and "type" not in schema and not deciding:
        yield f"“{lengths[0]}” in {where} needs “type”"
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and not any(_is_of(value, schema.get("type")) for value in values):
        yield f"no value that {where} names is of its type"
    required, named = schema.get("required", []), schema.get("properties", {})
    for name in required if isinstance(required, list) and isinstance(named, Mapping) else ():
        if not isinstance(name, str) or name not in named:
            yield f"“{name}” is required in {where}, but not among its properties"


def _is_of(value: Any, kinds: Any) -> bool:
    """Whether a JSON value is of a type, or of one of several; of any, where no type is named."""
    if kinds is None:
        return True
    if isinstance(value, bool) or value is None:
        own = ["boolean" if isinstance(value, bool) else "null"]
    elif isinstance(value, (int, float)):
        own = ["number", "integer"] if isinstance(value, int) or value.is_integer() else ["number"]
    else:
        own = ["string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"]
    return any(kind in own for kind in (kinds if isinstance(kinds, list) else [kinds]))


def _unjoinable(schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """Parts of `allOf` that are more than lists of properties: the converter joins those only."""
    if not isinstance(schema, Mapping):
        return
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(parts) > 1:
        found = [_target(part, root) for part in parts]
        if not all(isinstance(part, Mapping) and _lists_properties(part) for part in found):
            yield "“allOf” joins more than objects with properties"
        elif len(set().union(*(part["properties"] for part in found))) < sum(len(part["properties"]) for part in found):
            yield "“allOf” has a property twice"
    for _, inner, _ in _inside(schema):
        yield from _unjoinable(inner, root)


def _lists_properties(part: Mapping[str, Any]) -> bool:
    known = {"type", "properties", "required", "additionalProperties", *_NOTES}
    return set(part) <= known and part.get("type", "object") == "object" and isinstance(part.get("properties"), Mapping)


def _target(part: Any, root: Mapping[str, Any]) -> Any:
    """What a part refers to; itself, where it does not."""
    if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
        return part
    found: Any = root
    for step in part["$ref"].split("/")[1:]:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _rewritten(schema: Any) -> Any:
    """The same in words that the converter keeps: types as alternatives, `allOf` of one part as that part."""
    if schema is True:
        return _ANYTHING
    if not isinstance(schema, Mapping):
        return schema
    if not (_KEPT - {*_DEFINITIONS}) & schema.keys():
        return {**schema, **_ANYTHING}
    found = {key: _rewritten_in(key, value) for key, value in schema.items()}
    if isinstance(found.get("allOf"), list) and len(found["allOf"]) == 1 and isinstance(found["allOf"][0], Mapping):
        found |= found.pop("allOf")[0]
    if "enum" in found or "const" in found:
        kinds = found.pop("type", None)
        if isinstance(found.get("enum"), list):
            found["enum"] = [value for value in found["enum"] if _is_of(value, kinds)]
    kinds = found.get("type")
    if not isinstance(kinds, list):
        return _with_items(found)
    common = {key: value for key, value in found.items() if key not in _DEFINITIONS}
    definitions = {key: value for key, value in found.items() if key in _DEFINITIONS}
    return {"anyOf": [_with_items({**common, "type": kind}) for kind in kinds], **definitions}


def _with_items(schema: dict[str, Any]) -> dict[str, Any]:
    """The converter counts only items that something is said of."""
    counts = {"minItems", "maxItems"} & schema.keys() and not {"items", "prefixItems"} & schema.keys()
    return {**schema, "items": _ANYTHING} if counts and schema.get("type") == "array" else schema


def _rewritten_in(key: str, value: Any) -> Any:
    if key in _NAMED and isinstance(value, Mapping):
        return {name: _rewritten(inner) for name, inner in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_rewritten(inner) for inner in value]
    if key == "items" or (key == "additionalProperties" and not isinstance(value, bool)):
        return _rewritten(value)
    return grammar_pattern(value) if key == "pattern" and isinstance(value, str) else value


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
