"""
JSON schemas as grammars. A keyword that a grammar cannot follow is an error: half a schema is worse than none.

llguidance compiles them (its docs/json_schema.md) and refuses the keywords that it knows and cannot follow; those that
it does not know it passes over, so they are refused here.

Two things are made narrower than a schema says, for small models: an object with named properties has no others, unless
the schema says so or joins schemas; and white space is one blank after each colon and comma, so that the text between
two values is certain. An answer that begins with a free object may have any usual layout: without that choice, small
models begin with `{}` and are done. A free object further inside is written like the rest, and they fill it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwenlocal.engine.grammar import find_fault
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

ANY_OBJECT = '{"type": "object"}'
_FOLLOWED = frozenset(
    ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "properties",
     "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "items", "prefixItems",
     "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf")
)  # fmt: skip
_NOTES = frozenset(
    ("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly",
     "discriminator")
)  # fmt: skip
_DEFINITIONS = frozenset(("$defs", "definitions"))
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SHAPES: dict[str, Any] = {
    **dict.fromkeys(_NAMED, dict),
    **dict.fromkeys(_LISTS, list),
    "type": (str, list),
    "required": list,
    "$ref": str,
    "pattern": str,
    "minProperties": (int, float),
}
_JOINS = ("anyOf", "oneOf", "allOf", "$ref")
# A set within a set, or two of && -- ~~, which mean something in Rust's expressions and nothing in ECMA's.
_RUST_ONLY = re.compile(r"(?<!\\)\[(?:[^\]\\]|\\.)*?(?:\[|&&|--|~~)")
# In a schema's JSON, without those that have an escape of their own: llguidance drops them.
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01]|7f)")
_LOOSE_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_ONE_BLANK = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_ANY_SPACE = {"whitespace_flexible": True, "whitespace_pattern": r" |\n[ \t]{0,20}"}
_ESCAPES = {"json_allowed_escapes": '"\\bfnrt'}  # \u0061 would be another name for the property "a"


def grammar_from_schema(text: str) -> str:
    """
    Return the grammar for a JSON schema.

    Raises
    ------
    UsageError: it is no JSON, no schema, or has keywords that a grammar cannot follow; the first one is named.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise UsageError(tr("The schema is not readable JSON: {reason}.", reason=reason)) from reason
    if not isinstance(schema, dict):
        raise UsageError(
            tr("The schema must be a JSON object."), hint=tr('For example: {"type": "object", "properties": …}')
        )
    try:
        faults = list(dict.fromkeys(_faults(schema, "#")))
        if _CONTROL.search(json.dumps(schema)):
            faults.append(tr("it contains a control character"))
        if faults:
            raise _unsupported(faults[0], more=len(faults) - 1)
        schema = _with_exclusive_parts(schema, schema)
        return _compiled(schema if _joins(schema) else _narrowed(schema))
    except RecursionError as reason:
        raise _unsupported(_in_words("recursion limit")) from reason


def _compiled(schema: Any) -> str:
    from llguidance import LLMatcher

    options: Any = {**(_ANY_SPACE if _begins_free(schema) else _ONE_BLANK), **_ESCAPES}
    try:
        grammar = str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    except ValueError as error:  # half a character, which Python's JSON has and Rust's has not
        raise _unsupported(_in_words(str(error))) from error
    if reason := find_fault(grammar):
        raise _unsupported(_in_words(reason))
    return grammar


def _unsupported(fault: str, more: int = 0) -> UsageError:
    others = tr(" (and {count} more)", count=more) if more else ""
    return UsageError(
        tr("The schema is not supported: {fault}{others}.", fault=fault, others=others),
        hint=tr("Take that part out of the schema, or describe it in the prompt."),
    )


def _in_words(reason: str) -> str:
    """llguidance's reason as a part of a sentence."""
    if "recursion limit" in reason or "nested" in reason:
        return tr("it is nested too deeply")
    if "not present in a registry" in reason:
        return tr("a reference leads out of it")
    if reason.startswith("oneOf"):
        return tr("the parts of “oneOf” do not exclude each other")
    if reason.startswith("NoExtension"):
        return tr("no value satisfies it")
    if reason.startswith("Unsatisfiable schema: "):
        rest = reason.removeprefix("Unsatisfiable schema: ")
        return tr("no value satisfies it: {reason}", reason=_first_line(rest))
    return _first_line(reason)


def _first_line(text: str) -> str:
    """The first line; of an error in a regular expression the last one, which says what it is."""
    lines = text.strip().splitlines()
    return (lines[-1].removeprefix("error: ") if text.startswith("regex") else lines[0])[:200].rstrip(".")


def _faults(schema: Any, place: str) -> Iterator[str]:
    """Name the parts of a schema that llguidance would pass over, or read otherwise; `place` is a JSON pointer."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield tr("{value} at {place} is not a schema", value=json.dumps(schema)[:40], place=place)
        return
    for key in schema:
        if key not in _FOLLOWED | _NOTES:
            yield tr("the keyword “{keyword}” at {place}", keyword=key, place=place)
    for key, value in schema.items():
        names = value if key in ("type", "required") and isinstance(value, list) else ()
        if not isinstance(value, _SHAPES.get(key, object)) or not all(isinstance(name, str) for name in names):
            yield tr(
                "{value} is not a value of “{keyword}” at {place}",
                value=json.dumps(value)[:40],
                keyword=key,
                place=place,
            )
            return
    for pattern in [*([schema["pattern"]] if "pattern" in schema else []), *schema.get("patternProperties", ())]:
        if _RUST_ONLY.search(pattern) or _LOOSE_BACKSLASH.search(pattern):
            yield tr("the pattern {pattern} at {place}", pattern=json.dumps(pattern), place=place)
    least, required = schema.get("minProperties", 0), set(schema.get("required", ()))
    if least > max(1, len(required)):  # a name that comes twice would count twice
        yield tr("the keyword “{keyword}” at {place}", keyword="minProperties", place=place)
    for inner, inner_place in _inside(schema):
        yield from _faults(inner, f"{place}/{inner_place}")


def _inside(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """The schemas in a schema, each with its place: `properties/name`, `anyOf/0`, `items`."""
    for key in _NAMED:
        yield from ((inner, f"{key}/{name}") for name, inner in schema.get(key, {}).items())
    for key in _LISTS:
        yield from ((inner, f"{key}/{number}") for number, inner in enumerate(schema.get(key, ())))
    yield from ((schema[key], key) for key in ("items", "additionalProperties") if key in schema)


def _changed(schema: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """A copy with `change` made to every schema in it."""
    found = dict(schema)
    for key in found.keys() & _NAMED:
        found[key] = {name: change(inner) for name, inner in found[key].items()}
    for key in found.keys() & _LISTS:
        found[key] = [change(inner) for inner in found[key]]
    return {**found, **{key: change(found[key]) for key in ("items", "additionalProperties") if key in found}}


# --- parts of oneOf


def _with_exclusive_parts(schema: Any, root: Mapping[str, Any]) -> Any:
    """`oneOf` as `anyOf` if all parts require a property that has other values in each; llguidance compares types."""
    if not isinstance(schema, Mapping):
        return schema
    found = _changed(schema, lambda inner: _with_exclusive_parts(inner, root))
    if "oneOf" in found and "anyOf" not in found and _exclude_each_other(found["oneOf"], root):
        found["anyOf"] = found.pop("oneOf")
    return found


def _exclude_each_other(parts: list[Any], root: Mapping[str, Any]) -> bool:
    values = [_required_values(_target(part, root)) for part in parts]
    for name in set.intersection(*(set(value) for value in values)) if values else ():
        if len(frozenset[str]().union(*(value[name] for value in values))) == sum(len(value[name]) for value in values):
            return True
    return False


def _required_values(part: Any) -> dict[str, frozenset[str]]:
    """The values, as JSON, of each property that an object must have and that has only strings to choose from."""
    if not isinstance(part, Mapping) or part.get("type") != "object":
        return {}
    found = {}
    for name in part.get("required", ()):
        kind = part.get("properties", {}).get(name)
        values = ([kind["const"]] if "const" in kind else kind.get("enum")) if isinstance(kind, Mapping) else None
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            found[name] = frozenset(values)
    return found


def _target(part: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a local reference names; `part` itself if it is none."""
    if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
        return part
    found: Any = root
    for step in part["$ref"].split("/")[1:]:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


# --- what is made narrower


def _asserts(schema: Mapping[str, Any]) -> set[str]:
    return set(schema) - _NOTES - _DEFINITIONS - {"type"}


def _joins(schema: Any) -> bool:
    """Whether a value has to satisfy several schemas at once somewhere: narrowing one could leave nothing."""
    if not isinstance(schema, Mapping):
        return False
    joining = [key for key in _JOINS if key in schema]
    several = "oneOf" in joining or len(schema.get("allOf", ())) > 1
    return several or bool(joining and len(_asserts(schema)) > 1) or any(_joins(inner) for inner, _ in _inside(schema))


def _narrowed(schema: Any) -> Any:
    """Objects with named properties have no others, and are objects; arrays with described items are arrays."""
    if not isinstance(schema, Mapping):
        return schema
    found = _changed(schema, _narrowed)
    if "properties" in found:
        found.setdefault("type", "object")
        named, least = found["properties"].keys(), found.get("minProperties", 0)
        if named >= set(found.get("required", ())) and "patternProperties" not in found and least <= len(named):
            found.setdefault("additionalProperties", False)
    elif {"items", "prefixItems"} & found.keys():
        found.setdefault("type", "array")
    return found


def _begins_free(schema: Mapping[str, Any]) -> bool:
    """Whether an answer begins with an object or array whose parts are the model's own, so that `{}` would do."""
    top = _target(schema, schema)
    if isinstance(top, Mapping) and "items" in top:
        top = _target(top["items"], schema)
    return not (isinstance(top, Mapping) and {"properties", "enum", "const", *_JOINS} & top.keys())
