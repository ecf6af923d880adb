"""
JSON schemas as grammars. A keyword that a grammar cannot enforce is an error: half a schema is worse than none.

llguidance compiles schemas (its docs/json_schema.md) and rejects keywords that it knows but cannot enforce. It ignores
unknown keywords, so they are rejected here.

For small models, grammars are stricter than schemas in two ways. An object with named properties has no others, unless
the schema says so or combines schemas. Whitespace is one space after each colon and comma, so that the text between two
values is forced. An answer that starts with an unconstrained object may have any usual layout: otherwise, small models
start with `{}` and stop. A nested unconstrained object has the layout of the rest, because models do fill those.

Schemas of OpenAPI 3.0 are read, too: `nullable` adds null to the types, and `discriminator` names a property that tells
the subschemas of `oneOf` apart; other keywords of OpenAPI, and those that begin with `x-`, are annotations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qwenlocal.engine.grammar import find_grammar_error
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

ANY_OBJECT = '{"type": "object"}'
_SUPPORTED = frozenset(
    ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "properties",
     "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "items", "prefixItems",
     "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf")
)  # fmt: skip
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly",
     "discriminator", "example", "xml", "externalDocs", "nullable")
)  # fmt: skip
_EXTENSION = re.compile("x-(?!guidance)")  # not x-guidance, which changes how llguidance reads a schema
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAX_COUNT = 2**31 - 1  # llguidance's regular expressions accept no more, and no answer is that long
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")
_APPLICATORS = ("anyOf", "oneOf", "allOf", "$ref")  # they apply other schemas to the same value
_NOT_ASSERTIONS = _ANNOTATIONS | {"$defs", "definitions", "type"}
_VALUE_TYPES: dict[str, Any] = {
    **dict.fromkeys(_SCHEMA_MAPS, dict),
    **dict.fromkeys(_SCHEMA_LISTS, list),
    "type": (str, list),
    "required": list,
    "$ref": str,
    "pattern": str,
    "minProperties": (int, float),
    "nullable": bool,
}
# A set within a set, or one of && -- ~~, which are operators in Rust's regular expressions but not in ECMAScript's.
_RUST_SET_OPERATOR = re.compile(r"(?<!\\)\[(?:[^\]\\]|\\.)*?(?:\[|&&|--|~~)")
# In a schema's JSON, without those that have a short escape; llguidance drops them.
_CONTROL_CHARACTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01]|7f)")
_TRAILING_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_SINGLE_SPACES = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_ANY_LAYOUT = {"whitespace_flexible": True, "whitespace_pattern": r" |\n[ \t]{0,20}"}
_ESCAPES = {"json_allowed_escapes": '"\\bfnrt'}  # \u0061 would be a second spelling of the property "a"


def grammar_from_schema(text: str) -> str:
    """
    Convert a JSON schema to a grammar.

    Raises
    ------
    UsageError: the text is not a JSON schema, or has keywords that a grammar cannot enforce; the error names the first.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise UsageError(tr("The schema is not valid JSON: {reason}.", reason=reason)) from reason
    if not isinstance(schema, dict):
        raise UsageError(
            tr("The schema must be a JSON object."), hint=tr('For example: {"type": "object", "properties": …}')
        )
    try:
        problems = list(dict.fromkeys(_find_problems(schema, "#")))
        if _CONTROL_CHARACTER.search(json.dumps(schema)):
            problems.append(tr("it contains a control character"))
        if problems:
            raise _unsupported(problems[0], more=len(problems) - 1)
        schema = _normalize(schema)
        schema = _replace_exclusive_one_of(schema, schema)
        return _compile(schema if _combines_schemas(schema) else _restrict(schema))
    except RecursionError as reason:
        raise _unsupported(_explain("recursion limit")) from reason


def _compile(schema: Any) -> str:
    from llguidance import LLMatcher

    options: Any = {**(_ANY_LAYOUT if _starts_unconstrained(schema) else _SINGLE_SPACES), **_ESCAPES}
    try:
        grammar = str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))
    except ValueError as error:  # a lone surrogate, which Python's JSON allows and Rust's does not
        raise _unsupported(_explain(str(error))) from error
    if reason := find_grammar_error(grammar):
        raise _unsupported(_explain(reason))
    return grammar


def _unsupported(problem: str, more: int = 0) -> UsageError:
    others = tr(" (and {count} more)", count=more) if more else ""
    return UsageError(
        tr("The schema is not supported: {problem}{others}.", problem=problem, others=others),
        hint=tr("Remove that part from the schema, or describe it in the prompt."),
    )


def _explain(reason: str) -> str:
    """Convert llguidance's reason to part of a sentence."""
    if "recursion limit" in reason or "nested" in reason:
        return tr("it is nested too deeply")
    if "Too many items" in reason:
        return tr("it is too large")
    if "not present in a registry" in reason:
        return tr("a reference points outside the schema")
    if reason.startswith("oneOf"):
        return tr("the subschemas of “oneOf” are not mutually exclusive")
    if reason.startswith("NoExtension"):
        return tr("no value satisfies it")
    if reason.startswith(("Unable to determine if regex is empty", "fuel exhausted")):
        return tr("its patterns and ranges are too complex")
    rest = reason.removeprefix("Unsatisfiable schema: ")
    lines = rest.strip().splitlines()
    # The last line of an error in a regular expression names the error.
    line = lines[-1].removeprefix("error: ") if rest.startswith("regex") else lines[0]
    line = line[:200].rstrip(".")
    return line if rest == reason else tr("no value satisfies it: {reason}", reason=line)


def _find_problems(schema: Any, pointer: str) -> Iterator[str]:
    """Describe the parts of a schema that llguidance ignores or misreads; `pointer` is the schema's JSON pointer."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield tr("{value} at {place} is not a schema", value=json.dumps(schema)[:40], place=pointer)
        return
    for key in schema:
        if key not in _SUPPORTED | _ANNOTATIONS and not _EXTENSION.match(key):
            yield tr("the keyword “{keyword}” at {place}", keyword=key, place=pointer)
    for key, value in schema.items():
        names = value if key in ("type", "required") and isinstance(value, list) else ()
        if not isinstance(value, _VALUE_TYPES.get(key, object)) or not all(isinstance(name, str) for name in names):
            text = json.dumps(value)[:40]
            yield tr("{value} is not a valid “{keyword}” at {place}", value=text, keyword=key, place=pointer)
            return
    for pattern in [*([schema["pattern"]] if "pattern" in schema else []), *schema.get("patternProperties", ())]:
        if _RUST_SET_OPERATOR.search(pattern) or _TRAILING_BACKSLASH.search(pattern):
            yield tr("the pattern {pattern} at {place}", pattern=json.dumps(pattern), place=pointer)
    # A property that occurs twice would count twice.
    if schema.get("minProperties", 0) > max(1, len(set(schema.get("required", ())))):
        yield tr("the keyword “{keyword}” at {place}", keyword="minProperties", place=pointer)
    for subschema, path in _subschemas(schema):
        yield from _find_problems(subschema, f"{pointer}/{path}")


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield the schemas in a schema, each with its path: `properties/name`, `anyOf/0`, `items`."""
    for key in _SCHEMA_MAPS:
        yield from ((subschema, f"{key}/{name}") for name, subschema in schema.get(key, {}).items())
    for key in _SCHEMA_LISTS:
        yield from ((subschema, f"{key}/{number}") for number, subschema in enumerate(schema.get(key, ())))
    yield from ((schema[key], key) for key in _SCHEMAS if key in schema)


def _map_subschemas(schema: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Copy a schema with `convert` applied to every schema in it."""
    copy = dict(schema)
    for key, value in schema.items():
        if key in _SCHEMA_MAPS:
            copy[key] = {name: convert(subschema) for name, subschema in value.items()}
        elif key in _SCHEMA_LISTS:
            copy[key] = [convert(subschema) for subschema in value]
        elif key in _SCHEMAS:
            copy[key] = convert(value)
    return copy


def _normalize(schema: Any) -> Any:
    """
    Replace what llguidance does not know: `nullable`, and counts such as 3.0 or beyond its range.

    `{"type": "string", "nullable": true, "maxLength": 9e18}` becomes `{"type": ["string", "null"], "maxLength":
    2147483647}`.
    """
    if not isinstance(schema, Mapping):
        return schema
    copy = _map_subschemas(schema, _normalize)
    if copy.pop("nullable", False) and "type" in copy:
        types = [copy["type"]] if isinstance(copy["type"], str) else copy["type"]
        copy["type"] = [*types, *(["null"] if "null" not in types else [])]
    for key in copy.keys() & set(_COUNTS):
        value = copy[key]
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            copy[key] = min(int(value), _MAX_COUNT)
    return copy


# --- oneOf


def _replace_exclusive_one_of(schema: Any, root: Mapping[str, Any]) -> Any:
    """
    Replace `oneOf` by `anyOf` if a required property has other values in each subschema.

    llguidance only recognizes subschemas as mutually exclusive if their types differ. The property that `discriminator`
    names becomes required: without it, no reader could tell the subschemas apart.
    """
    if not isinstance(schema, Mapping):
        return schema
    copy = _map_subschemas(schema, lambda subschema: _replace_exclusive_one_of(subschema, root))
    if "oneOf" not in copy or "anyOf" in copy:
        return copy
    discriminator = copy.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, Mapping) else None
    subschemas = [_require(_resolve_reference(one, root), name) for one in copy["oneOf"]]
    if _are_exclusive(subschemas, root):
        copy["anyOf"] = subschemas
        del copy["oneOf"]
    return copy


def _require(schema: Any, name: object) -> Any:
    """Make the property `name` of an object required, if it has one."""
    if not isinstance(schema, Mapping) or name not in list(schema.get("properties", {})):
        return schema
    return {**schema, "required": list(dict.fromkeys([*schema.get("required", ()), name]))}


def _are_exclusive(schemas: list[Any], root: Mapping[str, Any]) -> bool:
    tags = [_required_strings(_resolve_reference(schema, root)) for schema in schemas]
    for name in set.intersection(*map(set, tags)) if tags else ():
        values = [value for tag in tags for value in tag[name]]
        if len(values) == len(set(values)):
            return True
    return False


def _required_strings(schema: Any) -> dict[str, frozenset[str]]:
    """Return the possible values of each property that an object must have and that can only be one of some strings."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        return {}
    strings = {}
    for name in schema.get("required", ()):
        property_ = schema.get("properties", {}).get(name)
        if isinstance(property_, Mapping):
            values = [property_["const"]] if "const" in property_ else property_.get("enum")
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                strings[name] = frozenset(values)
    return strings


def _resolve_reference(schema: Any, root: Mapping[str, Any]) -> Any:
    """Return the schema that a local reference points to; `schema` itself if it is not a reference."""
    if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
        return schema
    target: Any = root
    for step in schema["$ref"].split("/")[1:]:
        target = target.get(step) if isinstance(target, Mapping) else None
    return target


# --- stricter grammars


def _combines_schemas(schema: Any) -> bool:
    """Return True if some value must satisfy several schemas at once: restricting one could leave no value."""
    if not isinstance(schema, Mapping):
        return False
    applicators = [key for key in _APPLICATORS if key in schema]
    return (
        "oneOf" in applicators
        or len(schema.get("allOf", ())) > 1
        or bool(applicators and len(schema.keys() - _NOT_ASSERTIONS) > 1)
        or any(_combines_schemas(subschema) for subschema, _ in _subschemas(schema))
    )


def _restrict(schema: Any) -> Any:
    """Make values with named properties objects without other ones, and values with described items arrays."""
    if not isinstance(schema, Mapping):
        return schema
    copy = _map_subschemas(schema, _restrict)
    if "properties" in copy:
        copy.setdefault("type", "object")
        names, minimum = copy["properties"].keys(), copy.get("minProperties", 0)
        if names >= set(copy.get("required", ())) and "patternProperties" not in copy and minimum <= len(names):
            copy.setdefault("additionalProperties", False)
    elif {"items", "prefixItems"} & copy.keys():
        copy.setdefault("type", "array")
    return copy


def _starts_unconstrained(schema: Mapping[str, Any]) -> bool:
    """Return True if an answer starts with an object or array of any content, so that `{}` would satisfy the schema."""
    first = _resolve_reference(schema, schema)
    if isinstance(first, Mapping) and "items" in first:
        first = _resolve_reference(first["items"], schema)
    return not (isinstance(first, Mapping) and {"properties", "enum", "const", *_APPLICATORS} & first.keys())
