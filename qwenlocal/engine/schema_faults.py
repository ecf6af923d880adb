"""What of a JSON schema a grammar does not keep to, in words; and where in a schema other schemas stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwenlocal.engine.pattern import grammar_pattern

KEPT = frozenset(
    ("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum",
     "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "pattern", "format")
)  # fmt: skip
_NOTES = frozenset(("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"))
_FORMATS = ("date", "time", "date-time", "uuid")
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
NAMED = ("properties", "$defs", "definitions")  # their keys are names, no keywords
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
DEFINITIONS = ("$defs", "definitions")
# Where one of them stands, the converter sees no other keyword.
_DECIDING = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")


def faults(schema: Mapping[str, Any]) -> list[str]:
    """`faults({"type": "string", "pattern": "a"})` is one: its pattern must begin with ^ and end with $."""
    return list(dict.fromkeys((*_faults(schema, "the schema"), *_unjoinable(schema, schema))))


def _faults(schema: Any, where: str) -> Iterator[str]:
    """What a schema asks for that a grammar does not keep, in words."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield f"{where} is {schema!r}, no schema"
        return
    for key in schema:
        if key not in KEPT | _NOTES:
            yield f"“{key}” in {where} is not supported"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
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
    kept = [key for key in schema if key in KEPT and key not in DEFINITIONS]
    deciding = [key for key in _DECIDING if key in schema]
    is_object = schema.get("type") == "object"
    is_said_twice = deciding[:1] in (["const"], ["enum"]) or (deciding[:1] == ["allOf"] and is_object)
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
    if isinstance(values, list) and not any(is_of(value, schema.get("type")) for value in values):
        yield f"no value that {where} names is of its type"
    required, named = schema.get("required", []), schema.get("properties", {})
    for name in required if isinstance(required, list) and isinstance(named, Mapping) else ():
        if not isinstance(name, str) or name not in named:
            yield f"“{name}” is required in {where}, but not among its properties"


def is_of(value: Any, kinds: Any) -> bool:
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


def _inside(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key in NAMED:
        found = schema.get(key)
        if isinstance(found, Mapping):
            yield from (
                (name, inner, "the property" if key == "properties" else "the definition")
                for name, inner in found.items()
            )
    for key in LISTS:
        found = schema.get(key)
        if isinstance(found, list):
            yield from (("", inner, f"a part of {key}") for inner in found)
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield "", schema[key], key
