"""
A JSON schema as a grammar. What cannot be kept to is an error: a schema that is half obeyed is worse than none.

The conversion is llama-cpp-python's. White space is made what models are used to: where a schema names the properties,
exactly one blank behind colons and commas, so that what stands between two values is one literal; where it leaves them
open, any that a model might want. Without a choice there, small models begin with `{}` and are done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qwenlocal.engine.llama import import_bindings
from qwenlocal.engine.pattern import grammar_pattern
from qwenlocal.engine.schema_faults import DEFINITIONS, KEPT, LISTS, NAMED, TYPES, faults, is_of
from qwenlocal.errors import UsageError

ANY_OBJECT = '{"type": "object"}'
_OPEN = {  # rules of values that the schema leaves open: as the converter writes them, and with any white space
    'object ::= "{" space ( string ":" space value ("," space string ":" space value)* )? "}" space':
    'object ::= "{" any-space ( string any-space ":" any-space value '
    '(any-space "," any-space string any-space ":" any-space value)* any-space )? "}"',
    'array ::= "[" space ( value ("," space value)* )? "]" space':
    'array ::= "[" any-space ( value (any-space "," any-space value)* any-space )? "]"',
}  # fmt: skip
# A class, which may hold a quotation mark, or a literal.
_LITERAL = re.compile(r'\[(?:[^\]\\]|\\.)*\]|"(?:[^"\\]|\\.)*"(?: space)?')
_ONE_BLANK = {'":" space': '": "', '"," space': '", "'}
_ANYTHING = {"anyOf": [{"type": kind} for kind in TYPES]}
_ANY_SPACE = r'any-space ::= | " " | "\n" [ \t]{0,20}'


def grammar_of_schema(text: str) -> str:
    """
    The GBNF of a JSON schema: `grammar_of_schema('{"const": 1}')` has `root ::= "1" space`, and space is nothing.

    Raises
    ------
    UsageError: it is no JSON, no schema, or has keywords that cannot be kept to.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise UsageError(f"The schema is not readable JSON: {reason}.") from reason
    if not isinstance(schema, dict):
        raise UsageError("The schema must be a JSON object.", hint='For example: {"type": "object", "properties": …}')
    found = _all_faults(schema)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(f"The schema cannot be kept to: {found[0]}{more}.", hint="Leave it out, or say it in words.")
    try:
        grammar = _converted(_rewritten(schema))
    except RecursionError as reason:
        raise _too_deep() from reason
    except Exception as reason:  # whatever the converter stumbles over
        raise UsageError(f"The schema cannot be kept to: {reason or type(reason).__name__}.") from reason
    return "".join(_corrected(line) + "\n" for line in (*grammar.splitlines(), _ANY_SPACE))


def _all_faults(schema: Mapping[str, Any]) -> list[str]:
    try:
        return faults(schema)
    except RecursionError as reason:
        raise _too_deep() from reason


def _too_deep() -> UsageError:
    return UsageError("The schema cannot be kept to: it is nested too deeply.", hint="Put parts of it into “$defs”.")


def _converted(schema: Any) -> str:
    """By llama-cpp-python, but for literals: it forgets that a backslash means something in a grammar, too."""
    module = import_bindings("llama_grammar")

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


def _rewritten(schema: Any) -> Any:
    """The same in words that the converter keeps: types as alternatives, `allOf` of one part as that part."""
    if schema is True:
        return _ANYTHING
    if not isinstance(schema, Mapping):
        return schema
    if not (KEPT - {*DEFINITIONS}) & schema.keys():
        return {**schema, **_ANYTHING}
    found = {key: _rewritten_in(key, value) for key, value in schema.items()}
    if isinstance(found.get("allOf"), list) and len(found["allOf"]) == 1 and isinstance(found["allOf"][0], Mapping):
        found |= found.pop("allOf")[0]
    if "enum" in found or "const" in found:
        kinds = found.pop("type", None)
        if isinstance(found.get("enum"), list):
            found["enum"] = [value for value in found["enum"] if is_of(value, kinds)]
    kinds = found.get("type")
    if not isinstance(kinds, list):
        return _with_items(found)
    common = {key: value for key, value in found.items() if key not in DEFINITIONS}
    definitions = {key: value for key, value in found.items() if key in DEFINITIONS}
    return {"anyOf": [_with_items({**common, "type": kind}) for kind in kinds], **definitions}


def _with_items(schema: dict[str, Any]) -> dict[str, Any]:
    """The converter counts only items that something is said of."""
    counts = {"minItems", "maxItems"} & schema.keys() and not {"items", "prefixItems"} & schema.keys()
    return {**schema, "items": _ANYTHING} if counts and schema.get("type") == "array" else schema


def _rewritten_in(key: str, value: Any) -> Any:
    if key in NAMED and isinstance(value, Mapping):
        return {name: _rewritten(inner) for name, inner in value.items()}
    if key in LISTS and isinstance(value, list):
        return [_rewritten(inner) for inner in value]
    if key == "items" or (key == "additionalProperties" and not isinstance(value, bool)):
        return _rewritten(value)
    return grammar_pattern(value) if key == "pattern" and isinstance(value, str) else value
