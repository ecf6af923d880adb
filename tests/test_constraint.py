"""Answers that keep to a grammar or a JSON schema, on models that would say anything else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.engine.constraint import Constraint
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.schema import ANY_OBJECT, grammar_of_schema
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import USUAL_COSTS, CostCurve, Speculation
from qwenlocal.errors import UsageError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "level": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags", "level"],
    "additionalProperties": False,
}


@pytest.fixture
def context(random_model: Path) -> Iterator[Context]:
    found = Context(Model(random_model), ContextOptions(1024, threads=1, flash_attention=False))
    yield found
    found.close()
    found.model.close()


def said(context: Context, grammar: str, limit: int = 300, **sampling: Any) -> str:
    """What a random model says within a grammar."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 4, **sampling}
    sequence = TokenSequence(context, speculation=Speculation(CostCurve(dict.fromkeys(USUAL_COSTS, 1.0))))
    vocabulary, data = context.model.tokenizer, b""
    for step in sequence.generate([1, 2, 3, 4], Sampling(**options, grammar=grammar), limit=limit):
        if isinstance(step, int):
            if vocabulary.is_end(step):
                return data.decode("utf-8", errors="replace")
            data += vocabulary.piece(step)
    return data.decode("utf-8", errors="replace")


def check(value: Any) -> None:
    assert set(value) == {"name", "age", "tags", "level"}
    name = value["name"]  # bytes that are no UTF-8, which only a model of single bytes says, count otherwise
    assert isinstance(name, str)
    assert "\ufffd" in name or len(name) <= 8
    assert isinstance(value["age"], int)
    assert value["level"] in (True, False, None)
    assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"red", "green"}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_model_would_say_it_says_what_the_schema_allows(seed: int, context: Context) -> None:
    check(json.loads(said(context, grammar_of_schema(json.dumps(PERSON)), seed=seed)))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 20, "top_p": 0.8}, {"repeat_penalty": 1.3}])
def test_so_it_does_with_other_ways_to_choose(sampling: dict[str, Any], context: Context) -> None:
    check(json.loads(said(context, grammar_of_schema(json.dumps(PERSON)), **sampling)))


def test_a_grammar_of_ones_own_is_kept_to(context: Context) -> None:
    assert re.fullmatch(r"(yes|no)[!?]{3}", said(context, 'root ::= ("yes" | "no") [!?] [!?] [!?]'))


def test_where_there_is_no_choice_nothing_is_chosen(context: Context) -> None:
    constraint = Constraint('root ::= "abc" ("d" | "e") "fgh"', context.model.tokenizer)
    assert constraint.forced() == b"abc"
    for token in context.model.tokenizer.tokenize("abc", special=False):
        constraint.accept(token)
    assert constraint.forced() == b""
    constraint.accept(context.model.tokenizer.tokenize("e", special=False)[0])
    assert constraint.forced() == b"fgh"
    constraint.close()


def test_characters_of_several_bytes_are_forced_whole(context: Context) -> None:
    constraint = Constraint('root ::= "né中" [a-b]', context.model.tokenizer)
    assert constraint.forced().decode() == "né中"
    constraint.close()


def test_a_literal_that_tokens_do_not_spell_as_it_is_comes_all_the_same(context: Context) -> None:
    """Qwen's tokenizer composes accents; the grammar wants them apart."""
    apart = "e\u0301galite\u0301"
    constraint = Constraint(f'root ::= "{apart}" [ab]', context.model.tokenizer)
    assert constraint.forced().decode() == apart
    assert constraint.forced_tokens() == []
    constraint.close()
    assert said(context, f'root ::= "{apart}" [ab]')[:-1] == apart


def test_literals_are_computed_together(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    usual = Context.decode

    def counting(self: Context, batch: Any, **options: Any) -> list[int]:
        batches.append(sum(len(ids) for _, ids in batch))
        return usual(self, batch, **options)

    monkeypatch.setattr(Context, "decode", counting)
    text = said(context, 'root ::= "a long literal comes first, " [xy] " and another one after it."')
    assert re.fullmatch("a long literal comes first, [xy] and another one after it.", text)
    assert max(batches[1:]) > 20
    assert len(batches) < 8


def test_an_answer_that_was_cut_goes_on_within_its_grammar(context: Context) -> None:
    grammar = 'root ::= "[" [a-c] [d-f] [g-i] "]"'
    begun = said(context, grammar, limit=2)
    ids = tuple(context.model.tokenizer.tokenize(begun, special=False))
    assert re.fullmatch(r"[d-f][g-i]\]", said(context, grammar, begun=ids))
    with pytest.raises(UsageError, match="does not keep to the grammar"):
        said(context, grammar, begun=ids[::-1])


def test_an_answer_is_not_longer_than_asked_even_where_literals_are(context: Context) -> None:
    assert said(context, 'root ::= "a long literal"', limit=6) == "a long"


def accepts(context: Context, grammar: str, text: str) -> bool:
    """Whether a grammar lets a text be said, byte by byte."""
    constraint = Constraint(grammar, context.model.tokenizer)
    try:
        for byte in text.encode("ascii"):
            token = context.model.tokenizer.tokenize(chr(byte), special=False)[0]
            if not constraint.allows(token):
                return False
            constraint.accept(token)
        return any(constraint.allows(end) for end in context.model.tokenizer.ends())
    finally:
        constraint.close()


def test_what_a_schema_leaves_open_may_be_laid_out_in_any_way(context: Context) -> None:
    for layout in ({"indent": None}, {"indent": 2}, {"indent": 4}, {"separators": (",", ":")}):
        text = json.dumps({"a": [1, {"b": None}, "x"], "c": {"d": -2.5, "e": []}, "f": True}, **layout)
        assert accepts(context, grammar_of_schema(ANY_OBJECT), text), text
    assert accepts(context, grammar_of_schema(ANY_OBJECT), '{ "colours": ["red", "blue"] }')
    assert not accepts(context, grammar_of_schema(ANY_OBJECT), '{"a" 1}')
    assert not accepts(context, grammar_of_schema(ANY_OBJECT), '{"a": 1,}')


def test_what_a_schema_names_has_one_blank_behind_colons_and_commas(context: Context) -> None:
    grammar = grammar_of_schema(
        '{"properties": {"a": {"type": "integer"}, "b": {"type": "object"}}, "required": ["a", "b"]}'
    )
    assert accepts(context, grammar, '{"a": 1, "b": {\n  "c": 2\n}}')
    assert not accepts(context, grammar, '{"a":1, "b": {}}')
    assert not accepts(context, grammar, '{ "a": 1, "b": {}}')


def test_a_property_may_be_called_like_a_rule_of_ours(context: Context) -> None:
    nested = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    schema = {"type": "object", "properties": {"ws": nested, "space": nested}, "required": ["ws", "space"]}
    assert accepts(context, grammar_of_schema(json.dumps(schema)), '{"ws": {"x": 1}, "space": {"x": 1}}')


# --- what cannot be kept to


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not readable JSON"),
        ("[1]", "must be a JSON object"),
        ('{"type": "objekt"}', "unknown type 'objekt'"),
        ('{"type": "object", "minProperties": 2}', "“minProperties” in the schema is not supported"),
        ('{"properties": {"a": {"type": "number", "multipleOf": 2}}}', "“multipleOf” in the property “a”"),
        ('{"items": {"not": {}}}', "“not” in items"),
        ('{"type": "string", "format": "email"}', "the format 'email'"),
        ('{"type": "string", "pattern": "abc"}', "must begin with ^"),
        ('{"$ref": "https://example.org/x.json"}', "leads out of the schema"),
        ('{"$ref": "#/$defs/missing"}', "cannot be kept to"),
        ('{"anyOf": [3]}', "no schema"),
        ('{"items": ' * 500 + "{}" + "}" * 500, "nested too deeply"),
        ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "joins more than objects"),
        ('{"allOf": [{"properties": {"a": {}}}, {"properties": {"a": {}}}]}', "has a property twice"),
        ('{"properties": {"kind": {}}, "anyOf": [{"type": "object"}]}', "“anyOf” beside “properties”"),
        ('{"type": ["object"], "anyOf": [{"type": "object"}]}', "“anyOf” beside “type”"),
        ('{"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}', "“prefixItems” beside “items”"),
        ('{"prefixItems": [{"type": "string"}], "minItems": 2}', "“prefixItems” beside “minItems”"),
        ('{"type": "string", "format": "date", "maxLength": 3}', "“format” beside “maxLength”"),
        ('{"maxLength": 3}', "“maxLength” in the schema needs “type”"),
        ('{"type": "object", "required": ["a"]}', "“a” is required in the schema, but not among its properties"),
        ('{"enum": [1], "const": 1}', "“const” beside “enum”"),
        ('{"enum": [1], "type": "string"}', "no value that the schema names is of its type"),
        (r'{"type": "string", "pattern": "^\\bword$"}', "“\\b”"),
        ('{"type": "string", "pattern": "^(?=a)$"}', "(?…)"),
        ('{"type": "string", "pattern": "^a+?$"}', "greed"),
        ('{"type": "string", "pattern": "^a$|^b$"}', "$ in the middle"),
        (r'{"type": "string", "pattern": "^a\\$"}', "in the middle"),
        ('{"type": "string", "pattern": "^[a$"}', "bracket"),
        ('{"type": "string", "pattern": 3}', "must begin with ^"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(schema: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        grammar_of_schema(schema)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "kept", "others"),
    [
        ({"properties": {"c": {"allOf": [{"$ref": "#/$defs/C"}]}}, "required": ["c"], "type": "object",
          "$defs": {"C": {"enum": ["red", "blue"], "type": "string"}}},
         ['{"c": "red"}'], ['{"c": {}}', '{"c": "green"}']),
        ({"type": ["string", "null"], "maxLength": 3}, ['"abc"', "null"], ['"abcd"', "1"]),
        ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"', '"ab"']),
        ({"type": "object", "allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]},
         ['{"a": 1, "b": 2}'], ['{"a": 1}']),
        ({"const": 'say ":" space, "," space'}, [json.dumps('say ":" space, "," space')], ['"say"']),
        ({"type": "array", "minItems": 2, "maxItems": 2}, ["[1, true]"], ["[1]", "[1, 2, 3]"]),
        ({"type": "integer", "enum": [1, 2.5, 3.0, "x", True, None]}, ["1", "3.0"], ["2.5", '"x"', "true", "null"]),
        ({"title": "anything"}, ["1", "{}", "null"], []),
        ({"properties": {'a"b': {"const": "x\\y\n"}}, "required": ['a"b']}, [r'{"a\"b": "x\\y\n"}'], ['{"a"b": 1}']),
        ({"prefixItems": [{"type": "string"}, {"const": 1}], "items": False}, ['["a", 1]'], ["[1, 1]", '["a"]']),
        ({"properties": {"x": {}}, "required": ["x"]}, ['{"x": 1}', '{"x": null}'], ["{}"]),
        ({"type": "string", "pattern": r"^\d{3}-\w+\.[^a]$"}, ['"123-ab.c"'],
         ['"123-ab.a"', '"12-a.b"', '"123-ab."', '"123-abxc"']),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"b"'], ['"a', 'b"', '"ab"']),
        ({"type": "string", "pattern": r"^\$(\(\d\)|x)?$"}, ['"$"', '"$(1)"', '"$x"'], ['"(1)"']),
        ({"type": "string", "pattern": "^.*$"}, ['"a b"', '""'], ['"a"b"', '"a\n"', '"a\\"']),
    ],
)  # fmt: skip
def test_what_stands_beside_something_else_is_kept_to(
    schema: dict[str, Any], kept: list[str], others: list[str], context: Context
) -> None:
    grammar = grammar_of_schema(json.dumps(schema))
    assert [text for text in kept if not accepts(context, grammar, text)] == []
    assert [text for text in others if accepts(context, grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ('root ::= "a', "unexpected end of input"),
        ("other ::= [a-z]", "does not contain a 'root' symbol"),
        ("root ::= missing", "Undefined rule identifier 'missing'"),
        ("(((", "expecting name"),
        ('root ::= root "a" | "b"', "left recursion"),
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused_in_one_sentence(
    grammar: str, reason: str, context: Context, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=f"The grammar cannot be read: .*{reason}"):
        Constraint(grammar, context.model.tokenizer)
    assert capfd.readouterr().err == ""


def test_what_others_say_meanwhile_is_not_lost(context: Context, capfd: pytest.CaptureFixture[str]) -> None:
    class Vocabulary:
        @property
        def handle(self) -> Any:
            os.write(2, b"a status line")
            return context.model.tokenizer.handle

        def __getattr__(self, name: str) -> Any:
            return getattr(context.model.tokenizer, name)

    Constraint('root ::= "a"', cast(Any, Vocabulary())).close()
    assert capfd.readouterr().err == "a status line"


KEYWORDS = ("type", "properties", "items", "enum", "anyOf", "$ref", "const", "x", "pattern", "allOf", "required",
            "minItems", "additionalProperties", "prefixItems", "maxItems", "minLength", "format", "$defs")  # fmt: skip
SIMPLE = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)


@given(st.recursive(SIMPLE, nested, max_leaves=8))
def test_whatever_stands_in_a_schema_it_is_a_grammar_or_one_sentence(schema: Any) -> None:
    try:
        assert "root ::=" in grammar_of_schema(json.dumps(schema))
    except UsageError as refused:
        assert str(refused).startswith("The schema")


TYPES = st.sampled_from(("object", "array", "string", "number", "integer", "boolean", "null"))
VALUES = st.sampled_from(("x", 'y"q', "a\\b", "é", 1, 2.5, None, True, [1], {"k": "v"}))
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
    "enum": st.lists(VALUES, min_size=1, max_size=3), "const": VALUES, "title": st.just("t"),
    "minLength": st.integers(0, 3), "maxLength": st.integers(2, 5), "format": st.sampled_from(("date", "uuid")),
    "pattern": st.sampled_from((r"^\d+$", "^a|b$", "^[^x]{2}$", r"^(ab|c)*\.$", "^.$")),
    "minItems": st.integers(0, 2), "maxItems": st.integers(1, 3),
    "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
}  # fmt: skip


def with_parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(inner, min_size=1, max_size=2)
    named = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    return some_of({**PLAIN, "properties": named, "items": inner, "additionalProperties": inner | st.booleans(),
                    "prefixItems": parts, "anyOf": parts, "allOf": parts})  # fmt: skip


@st.composite
def some_of(draw: st.DrawFn, keywords: Mapping[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """A schema of few keywords, since most that are thrown together exclude each other."""
    chosen = draw(st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True))
    return {key: draw(keywords[key]) for key in chosen}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(some_of(PLAIN), with_parts, max_leaves=5), seed=st.integers(0, 9))
def test_what_is_said_is_what_a_schema_allows_or_the_schema_is_refused(
    schema: dict[str, Any], seed: int, context: Context
) -> None:
    try:
        grammar = grammar_of_schema(json.dumps(schema))
    except UsageError:
        return
    text = said(context, grammar, limit=250, seed=seed)
    if "\ufffd" in text or not said_whole(context, grammar, text):
        return  # bytes that are no text, or it was cut at the limit
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def said_whole(context: Context, grammar: str, text: str) -> bool:
    """Whether an answer within a grammar may end where it does."""
    constraint = Constraint(grammar, context.model.tokenizer)
    try:
        constraint.catch_up(context.model.tokenizer.tokenize(text, special=False))
        return bool(constraint.allowed(context.model.tokenizer.ends()))
    finally:
        constraint.close()


# --- the command


def test_run_answers_as_the_schema_says(random_model: Path, invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(PERSON))
    result = invoke("run", str(random_model), "Hi", "--schema", "s.json", "--seed", "2", "-n", "300")
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--schema", "missing.json"], 3, "The file missing.json cannot be read"),
        (["--schema", "bad.json"], 2, "not readable JSON"),
        (["--grammar", "bad.json"], 2, "The grammar cannot be read"),
        (["--json", "--schema", "bad.json"], 2, "exclude each other"),
    ],
)
def test_run_says_what_is_wrong_with_a_schema_or_grammar(
    options: list[str], code: int, message: str, random_model: Path, invoke: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{nonsense")
    result = invoke("run", str(random_model), "Hi", *options)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
