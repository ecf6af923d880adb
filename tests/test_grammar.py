"""Answers that follow a grammar or a JSON schema, from models with random weights."""

from __future__ import annotations

import collections
import decimal
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy
import pytest
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from terminal import Open, start_chat

from qwenlocal.engine.batching import BatchGenerator, BatchRequest
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.gbnf import grammar_from_gbnf
from qwenlocal.engine.grammar import GrammarMatcher
from qwenlocal.engine.grammar import is_complete as is_complete_text
from qwenlocal.engine.json_schema import ANY_OBJECT, grammar_from_schema
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import DEFAULT_COSTS, CostCurve, Speculation
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
    context = Context(Model(random_model), ContextOptions(1024, threads=1, flash_attention=False))
    yield context
    context.close()
    context.model.close()


def answer(context: Context, grammar: str, limit: int = 300, **sampling: Any) -> str:
    """Generate an answer that follows a grammar."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 4, **sampling}
    sequence = TokenSequence(context, speculation=Speculation(CostCurve(dict.fromkeys(DEFAULT_COSTS, 1.0))))
    tokenizer, data = context.model.tokenizer, b""
    for step in sequence.generate([1, 2, 3, 4], Sampling(**options, grammar=grammar), limit=limit):
        if isinstance(step, int):
            if tokenizer.is_end(step):
                return data.decode("utf-8", errors="replace")
            data += tokenizer.piece(step)
    return data.decode("utf-8", errors="replace")


def gbnf_answer(context: Context, text: str, limit: int = 300, **sampling: Any) -> str:
    return answer(context, grammar_from_gbnf(text), limit, **sampling)


def check_person(value: Any) -> None:
    assert set(value) == {"name", "age", "tags", "level"}
    name = value["name"]
    assert isinstance(name, str)
    assert "\ufffd" in name or len(name) <= 8  # a model of single bytes also generates invalid UTF-8
    assert isinstance(value["age"], int)
    assert value["level"] in (True, False, None)
    assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"red", "green"}


@pytest.mark.parametrize("seed", range(12))
def test_an_answer_follows_the_schema(seed: int, context: Context) -> None:
    check_person(json.loads(answer(context, grammar_from_schema(json.dumps(PERSON)), seed=seed)))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 20, "top_p": 0.8}, {"repeat_penalty": 1.3}])
def test_an_answer_follows_the_schema_with_all_sampling_methods(sampling: dict[str, Any], context: Context) -> None:
    check_person(json.loads(answer(context, grammar_from_schema(json.dumps(PERSON)), **sampling)))


def test_an_answer_follows_a_gbnf_grammar(context: Context) -> None:
    assert re.fullmatch(r"(yes|no)[!?]{3}", gbnf_answer(context, 'root ::= ("yes" | "no") [!?] [!?] [!?]'))


def test_the_same_seed_gives_the_same_answer(context: Context) -> None:
    grammar = grammar_from_schema(json.dumps(PERSON))
    assert answer(context, grammar, seed=8) == answer(context, grammar, seed=8)


def test_a_grammar_keeps_the_relative_probabilities_of_allowed_tokens(context: Context) -> None:
    """Without top-k and top-p, they are the model's probabilities of "a", "b" and "c", divided by their sum."""
    row = context.decode([(0, [1, 2, 3, 4])])[0]
    ids = [context.model.tokenizer.tokenize(character, special=False)[0] for character in "abc"]
    scores = [math.exp(context.logits(row)[token]) for token in ids]
    context.truncate(0, 0)
    grammar = grammar_from_gbnf("root ::= [abc] [x]")
    counts = collections.Counter(answer(context, grammar, seed=seed, limit=1) for seed in range(400))
    for character, score in zip("abc", scores, strict=True):
        assert abs(counts[character] / 400 - score / sum(scores)) < 0.08


def test_literals_are_forced_except_for_a_last_token_that_may_become_another(context: Context) -> None:
    matcher, tokenize = create_matcher(context, 'root ::= "abc" ("d" | "e") "fgh"'), context.model.tokenizer.tokenize
    assert matcher.forced_tokens() == tokenize("abc", special=False)[:-1]
    for token in tokenize("abc", special=False):
        matcher.accept(token)
    assert matcher.forced_tokens() == []
    matcher.accept(tokenize("e", special=False)[0])
    assert matcher.forced_tokens() == tokenize("fgh", special=False)


@pytest.mark.parametrize("text", ["né中", "e\u0301galite\u0301", "😀"])
def test_characters_of_several_bytes_are_forced_unchanged(text: str, context: Context) -> None:
    """Combining accents are not normalized, unlike in prompts."""
    forced = create_matcher(context, f'root ::= "{text}"').forced_tokens()
    assert b"".join(map(context.model.tokenizer.piece, forced)).decode() == text
    assert gbnf_answer(context, f'root ::= "{text}" [ab]')[:-1] == text


def test_forced_text_is_computed_in_one_batch(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    decode = Context.decode

    def count_tokens(self: Context, batch: Any, **options: Any) -> list[int]:
        batches.append(sum(len(ids) for _, ids in batch))
        return decode(self, batch, **options)

    monkeypatch.setattr(Context, "decode", count_tokens)
    text = gbnf_answer(context, 'root ::= "a long literal comes first, " [xy] " and another one after it."')
    assert re.fullmatch("a long literal comes first, [xy] and another one after it.", text)
    assert max(batches[1:]) > 20
    assert len(batches) < 8


def test_a_cut_answer_continues_within_its_grammar(context: Context) -> None:
    grammar = grammar_from_gbnf('root ::= "[" [a-c] [d-f] [g-i] "]"')
    prefix = answer(context, grammar, limit=2)
    ids = tuple(context.model.tokenizer.tokenize(prefix, special=False))
    assert re.fullmatch(r"[d-f][g-i]\]", answer(context, grammar, answer_prefix=ids))
    with pytest.raises(UsageError, match="does not follow the grammar"):
        answer(context, grammar, answer_prefix=ids[::-1])


def test_continuing_a_complete_answer_adds_nothing(context: Context) -> None:
    prefix = tuple(context.model.tokenizer.tokenize("abc", special=False))
    assert gbnf_answer(context, 'root ::= "abc"', answer_prefix=prefix) == ""


def test_the_token_limit_includes_forced_text(context: Context) -> None:
    assert gbnf_answer(context, 'root ::= "a long literal"', limit=6) == "a long"


def test_batched_answers_follow_the_grammar(random_model: Path) -> None:
    model = Model(random_model)
    context = Context(model, ContextOptions(2048, threads=1, n_seq_max=4, flash_attention=False))
    sampling = Sampling(temperature=1.0, seed=3, grammar=grammar_from_schema(json.dumps(PERSON)))
    requests = [BatchRequest(key, [1, 2, key + 3], sampling, 300) for key in range(6)]
    results = list(BatchGenerator(context).generate(requests, model.tokenizer.is_end))
    assert sorted(result.key for result in results) == list(range(6))
    for result in results:
        assert result.hit_eos
        check_person(json.loads(b"".join(map(model.tokenizer.piece, result.ids)).decode("utf-8", errors="replace")))
    context.close()
    model.close()


def test_end_tokens_are_the_only_control_tokens_that_a_grammar_allows(context: Context) -> None:
    tokenizer, matcher = context.model.tokenizer, create_matcher(context, "root ::= .*")
    scores = numpy.zeros(len(tokenizer), numpy.float32)
    matcher.apply_mask(scores, len(tokenizer), 1.0)
    allowed = set(numpy.flatnonzero(scores == 0).tolist())
    assert {token for token in range(len(tokenizer)) if tokenizer.is_control(token)} & allowed == {
        token for token in range(len(tokenizer)) if tokenizer.is_end(token)
    }
    assert set(tokenizer.tokenize("a\n<|im_end|>", special=False)) <= allowed


def test_the_mask_agrees_with_checks_of_single_tokens(context: Context) -> None:
    tokenizer, grammar = context.model.tokenizer, grammar_from_schema(json.dumps(PERSON))
    matcher = GrammarMatcher(grammar, tokenizer)
    for token in tokenizer.tokenize(json.dumps({"name": "Bo é", "age": -3}, ensure_ascii=False)[:-1], special=False):
        scores = numpy.zeros(len(tokenizer), numpy.float32)
        matcher.apply_mask(scores, len(tokenizer), 1.0)
        assert [bool(score == 0) for score in scores] == [matcher.allows(other) for other in range(len(tokenizer))]
        matcher.accept(token)


def test_a_mask_keeps_the_most_probable_tokens_that_are_allowed(context: Context) -> None:
    tokenizer, matcher = context.model.tokenizer, create_matcher(context, "root ::= [a-z]+")
    scores = numpy.random.default_rng(1).normal(size=len(tokenizer)).astype(numpy.float32)
    before = scores.copy()
    matcher.apply_mask(scores, 5, 1.0)
    ranked = sorted(filter(matcher.allows, range(len(tokenizer))), key=lambda token: -before[token])
    assert sorted(numpy.flatnonzero(scores > -numpy.inf).tolist()) == sorted(ranked[:5])
    assert all(scores[token] == before[token] for token in ranked[:5])


def test_a_mask_leaves_out_allowed_tokens_of_negligible_probability(context: Context) -> None:
    tokenizer, matcher = context.model.tokenizer, create_matcher(context, "root ::= [ab]+")
    a, b = (tokenizer.tokenize(letter, special=False)[0] for letter in "ab")
    for temperature, kept in ((0.5, {a}), (1.0, {a}), (2.0, {a, b})):
        scores = numpy.full(len(tokenizer), -100.0, numpy.float32)
        scores[a], scores[b] = 15.0, 4.0
        matcher.apply_mask(scores, 20, temperature)
        assert set(numpy.flatnonzero(scores > -numpy.inf).tolist()) == kept


def test_a_mask_finds_allowed_tokens_wherever_they_rank(context: Context) -> None:
    tokenizer, matcher = context.model.tokenizer, create_matcher(context, 'root ::= "é" | "z"')
    scores = numpy.zeros(len(tokenizer), numpy.float32)
    wanted = [token for token in range(len(tokenizer)) if matcher.allows(token)]
    scores[wanted] = -50.0
    matcher.apply_mask(scores, 20, 1.0)
    assert numpy.flatnonzero(scores > -numpy.inf).tolist() == wanted


def create_matcher(context: Context, text: str) -> GrammarMatcher:
    return GrammarMatcher(grammar_from_gbnf(text), context.model.tokenizer)


def accepts(context: Context, grammar: str, text: str) -> bool:
    """Return True if a text follows a grammar, checked byte by byte."""
    matcher, tokenizer = GrammarMatcher(grammar, context.model.tokenizer), context.model.tokenizer
    pieces = [tokenizer.piece(token) for token in range(len(tokenizer))]
    for byte in text.encode():
        token = pieces.index(bytes([byte]))
        if not matcher.allows(token):
            return False
        matcher.accept(token)
    return any(matcher.allows(end) for end in tokenizer.ends())


def test_an_unconstrained_object_may_have_any_usual_layout(context: Context) -> None:
    for layout in ({"indent": None}, {"indent": 2}, {"indent": 4}, {"separators": (",", ":")}):
        text = json.dumps({"a": [1, {"b": None}, "x"], "c": {"d": -2.5, "e": []}, "f": True}, **layout)
        assert accepts(context, grammar_from_schema(ANY_OBJECT), text), text
    assert accepts(context, grammar_from_schema(ANY_OBJECT), '{ "colours": ["red", "blue"] }')
    assert not accepts(context, grammar_from_schema(ANY_OBJECT), '{"a" 1}')
    assert not accepts(context, grammar_from_schema(ANY_OBJECT), '{"a": 1,}')
    assert not accepts(context, grammar_from_schema(ANY_OBJECT), '{\n\n\n"a": 1}')  # whitespace is limited


def test_named_properties_have_one_space_after_colons_and_commas(context: Context) -> None:
    grammar = grammar_from_schema(
        '{"properties": {"a": {"type": "integer"}, "b": {"items": {"type": "null"}}}, "required": ["a", "b"]}'
    )
    assert accepts(context, grammar, '{"a": 1, "b": [null, null]}')
    assert not accepts(context, grammar, '{"a":1, "b": []}')
    assert not accepts(context, grammar, '{ "a": 1, "b": []}')
    assert not accepts(context, grammar, '{"a": 1, "b": []}\n')


def test_a_nested_unconstrained_object_has_the_layout_of_the_rest(context: Context) -> None:
    grammar = grammar_from_schema(
        '{"properties": {"a": {"type": "integer"}, "b": {"type": "object"}}, "required": ["a", "b"]}'
    )
    assert accepts(context, grammar, '{"a": 1, "b": {"c": [2, {"d": null}]}}')
    assert not accepts(context, grammar, '{"a": 1, "b": {\n  "c": 2\n}}')
    assert not accepts(context, grammar, '{"a": 1, "b": 2}')


@pytest.mark.parametrize(
    "schema",
    [{"type": "array"}, {}, {"type": "array", "items": {"type": "object"}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}],
)
def test_an_answer_that_starts_with_an_unconstrained_value_may_have_any_usual_layout(
    schema: dict[str, Any], context: Context
) -> None:
    assert accepts(context, grammar_from_schema(json.dumps(schema)), '[{"a":1},\n  { "b": 2 }\n]')


def test_an_object_with_named_properties_has_no_others_unless_the_schema_allows_them(context: Context) -> None:
    named = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert not accepts(context, grammar_from_schema(json.dumps(named)), '{"a": 1, "b": 2}')
    more = {**named, "additionalProperties": {"type": "integer"}}
    assert accepts(context, grammar_from_schema(json.dumps(more)), '{"a": 1, "b": 2}')
    joined = {"allOf": [named, {"properties": {"b": {"type": "integer"}}}]}
    assert accepts(context, grammar_from_schema(json.dumps(joined)), '{"a": 1, "b": 2}')


def test_property_names_cannot_be_escaped(context: Context) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert not accepts(context, grammar_from_schema(json.dumps(schema)), '{"\\u0061": "x"}')
    assert not accepts(context, grammar_from_schema(json.dumps(schema)), '{"b": 1, "a": "x"}')


def test_chinese_in_a_schema_is_not_escaped(context: Context) -> None:
    schema = {"properties": {"颜色": {"enum": ["红", "绿"]}}, "required": ["颜色"]}
    grammar = grammar_from_schema(json.dumps(schema))
    assert accepts(context, grammar, '{"颜色": "红"}')
    assert not accepts(context, grammar, json.dumps({"颜色": "红"}))
    assert answer(context, grammar).startswith('{"颜色": "')


def test_a_property_may_have_the_name_of_a_keyword(context: Context) -> None:
    nested = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    schema = {"type": "object", "properties": {"ws": nested, "not": nested}, "required": ["ws", "not"]}
    assert accepts(context, grammar_from_schema(json.dumps(schema)), '{"ws": {"x": 1}, "not": {"x": 1}}')


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= ("a" | "abc") "bd"', ["abd", "abcbd"], ["ab", "abc"]),
        ('root ::= word "s"\nword ::= [a-z]+', ["cats", "ss"], ["s", "cat"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", "ab"]),
        ('root ::= "" | "x" root', ["", "xxx"], ["y"]),
        ("root ::= | [ab] ( | [cd] )", ["", "a", "bd"], ["c", "acd"]),
        (r'root ::= "\u00e9ab\x41\U0001F600" [\]\[\\/-]', ["éabA😀]", "éabA😀/", "éabA😀-"], ["éabA😀x"]),
        ('root ::= [^"\\n] .', ["ab", "a\n", "中文"], ['"a', "\na"]),
        ("root ::= [a-c-] [x^&&]", ["-x", "b^", "a&"], ["d^"]),
        ('root ::= "ab"{2} [0-9]{1, 2} "c"{2,}', ["abab1cc", "abab12ccc"], ["ab1cc", "abab123cc", "abab1c"]),
        ('# comment "x\nroot ::= (   # another\n  "a"\n  | B-2 )\r\nB-2 ::=\n  "b"', ["a", "b"], ["c"]),
        ('root ::= x\nx ::= y "!"\ny ::= "a" | x "b"', ["a!", "a!b!"], ["ab"]),
        ('root ::= Foo foo\nFoo ::= "F"\nfoo ::= "f"', ["Ff"], ["ff"]),
    ],
)
def test_gbnf_is_read_as_in_llama_cpp(grammar: str, good: list[str], bad: list[str], context: Context) -> None:
    converted = grammar_from_gbnf(grammar)
    assert [text for text in good if not accepts(context, converted, text)] == []
    assert [text for text in bad if accepts(context, converted, text)] == []


# --- rejected schemas and grammars


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"type": "objekt"}', "Invalid type: objekt"),
        ('{"type": "object", "uniqueItems": true}', "the keyword “uniqueItems” at #"),
        ('{"properties": {"a": {"type": "number", "minimun": 2}}}', "“minimun” at #/properties/a"),
        ('{"items": {"not": {}}}', "“not” at #/items"),
        ('{"$defs": {"a": {"if": {}}}, "$ref": "#/$defs/a"}', "“if” at #/$defs/a"),
        ('{"not": {}, "if": {}}', "(and 1 more)"),
        ('{"type": "string", "nullable": "yes"}', '"yes" is not a valid “nullable”'),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "“x-guidance”"),
        ('{"type": "string", "format": "foo"}', "Unknown format: foo"),
        ('{"$ref": "https://example.org/x.json"}', "points outside the schema"),
        ('{"$ref": "#/$defs/missing"}', "/$defs/missing"),
        ('{"anyOf": [3]}', "3 at #/anyOf/0 is not a schema"),
        ('{"type": ["string", 3]}', '["string", 3] is not a valid “type”'),
        ('{"properties": {"a": {"required": "b"}}}', '"b" is not a valid “required”'),
        ('{"items": [{}]}', "[{}] at #/items is not a schema"),
        ('{"items": ' * 500 + "{}" + "}" * 500, "nested too deeply"),
        ('{"items": {"const": 1}, "minItems": 100000}', "it is too large"),
        ('{"items": ' * 100000 + "{}" + "}" * 100000, "The schema"),
        ('{"allOf": [{"type": "string"}, {"type": "integer"}]}', "no value satisfies it: incompatible types"),
        ('{"enum": [1], "type": "string"}', "no value satisfies it"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "minimum (5) is greater than maximum (3)"),
        ('{"$ref": "#"}', "no value satisfies it"),
        ('{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "“oneOf” are not mutually exclusive"),
        ('{"oneOf": [{}, {}]}', "“oneOf” are not mutually exclusive"),
        ('{"type": "object", "minProperties": 2}', "“minProperties”"),
        (r'{"type": "string", "pattern": "^\\bword$"}', "not supported"),
        (
            '{"type": "string", "pattern": "^(?=a)$"}',
            "look-around, including look-ahead and look-behind, is not supported",
        ),
        ('{"type": "string", "pattern": "^[a$"}', "unclosed character class"),
        (json.dumps({"allOf": [{"pattern": f"a{{{number}}}"} for number in range(9)]}), "ranges are too complex"),
        (r'{"type": "string", "pattern": "a\\"}', "the pattern"),
        ('{"type": "string", "pattern": "[[a]b]"}', "the pattern"),
        ('{"type": "string", "pattern": "[a-z&&b]"}', "the pattern"),
        ('{"type": "string", "pattern": 3}', "3 is not a valid “pattern”"),
        (r'{"const": "a\u0000b"}', "control character"),
        ('{"const": "a\x7fb"}', "control character"),
        (r'{"const": "\ud800"}', "end of hex escape"),
    ],
)
def test_an_unsupported_schema_is_rejected_in_one_sentence(schema: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        grammar_from_schema(schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    ['{"items": ' * 100 + "{}" + "}" * 100, r'{"type": "string", "pattern": "^[^\\u0000-\\u001f]$"}'],
    ids=["nested", "control characters in a class"],
)
def test_an_unusual_schema_is_accepted(schema: str) -> None:
    assert grammar_from_schema(schema)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"c": {"allOf": [{"$ref": "#/$defs/C"}]}}, "required": ["c"], "type": "object",
          "$defs": {"C": {"enum": ["red", "blue"], "type": "string"}}},
         ['{"c": "red"}'], ['{"c": {}}', '{"c": "green"}']),
        ({"type": ["string", "null"], "maxLength": 3}, ['"abc"', "null"], ['"abcd"', "1"]),
        ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"', '"ab"']),
        ({"type": "object", "allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]},
                                      {"properties": {"b": {"const": 2}}, "required": ["b"]}]},
         ['{"a": 1, "b": 2}'], ['{"a": 1}', '{"a": 1, "b": 3}']),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"a": {"minimum": 3}}}],
          "type": "object", "required": ["a"]}, ['{"a": 3}'], ['{"a": 2}', "{}"]),
        ({"const": 'say ":" space, "," space'}, [json.dumps('say ":" space, "," space')], ['"say"']),
        ({"type": "array", "minItems": 2, "maxItems": 2}, ["[1, true]"], ["[1]", "[1, 2, 3]"]),
        ({"type": "integer", "enum": [1, 2.5, 3.0, "x", True, None]}, ["1", "3"], ["2.5", '"x"', "true", "null"]),
        ({"title": "anything"}, ["1", "{}", "null"], []),
        ({"properties": {'a"b': {"const": "x\\y\n"}}, "required": ['a"b']}, [r'{"a\"b": "x\\y\n"}'], ['{"a"b": 1}']),
        ({"prefixItems": [{"type": "string"}, {"const": 1}], "items": False, "minItems": 2},
         ['["a", 1]'], ["[1, 1]", '["a"]', '["a", 1, 1]']),
        ({"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, ['["a", 1, 2]'], ['["a", "b"]']),
        ({"properties": {"x": {}}, "required": ["x"]}, ['{"x": 1}', '{"x": null}'], ["{}", "1"]),
        ({"type": "object", "required": ["a"]}, ['{"a": 1}', '{"a": 1, "b": 2}'], ["{}", '{"b": 1}']),
        ({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
         ['{"n_a": 1}', "{}"], ['{"n_a": "x"}', '{"m": 1}']),
        ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
        ({"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 1}, ['{"a": null}', "{}"],
         ['{"a": null, "b": null}', '{"a": 1}']),
        ({"maxLength": 3}, ['"abc"', "5"], ['"abcd"']),
        ({"properties": {"kind": {}}, "type": "object", "anyOf": [{"required": ["kind"]}]}, ['{"kind": 1}'], ["{}"]),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ['"a"', "1"], ["null", "1.5"]),
        ({"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"},
          "$defs": {"Cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
                    "Dog": {"type": "object", "required": ["kind", "age"],
                            "properties": {"kind": {"enum": ["dog", "wolf"]}, "age": {"type": "integer"}}}}},
         ['{"kind": "cat"}', '{"kind": "wolf", "age": 3}'], ['{"kind": "dog"}', '{"kind": "cow"}']),
        ({"$defs": {"tree": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref":
          "#/$defs/tree"}}}, "required": ["children"]}}, "$ref": "#/$defs/tree"},
         ['{"children": [{"children": []}]}'], ['{"children": [1]}']),
        ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, ["-3", "0", "11"], ["-4", "12", "1.5"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, ["0.1", "1.5"], ["0", "0.0", "1.6", "-1"]),
        ({"type": "integer", "multipleOf": 7}, ["0", "7", "-14"], ["8", "1"]),
        ({"type": "number", "multipleOf": 0.01}, ["0.25", "3"], ["0.255"]),
        ({"type": "string", "format": "email"}, ['"a@example.org"'], ['"a"']),
        ({"type": "string", "format": "date", "maxLength": 10}, ['"2024-02-29"'], ['"2024-02-31"', '"x"']),
        ({"type": "string", "pattern": "abc", "maxLength": 4}, ['"abc"', '"xabc"'], ['"ab"', '"xxabc"']),
        ({"type": "string", "pattern": r"^\d{3}-\w+\.[^a]$"}, ['"123-ab.c"'],
         ['"123-ab.a"', '"12-a.b"', '"123-ab."', '"123-abxc"', '"١٢٣-a.b"']),
        ({"type": "string", "pattern": "^(a|b)$"}, ['"a"', '"b"'], ['"a', 'b"', '"ab"']),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"b"', '"ab"', '"axx"'], ['"a', '"xa"']),
        ({"type": "string", "pattern": "^a+?$"}, ['"a"', '"aa"'], ['"b"']),
        ({"type": "string", "pattern": r"^\$(\(\d\)|x)?$"}, ['"$"', '"$(1)"', '"$x"'], ['"(1)"']),
        ({"type": "string", "pattern": "^.*$"}, ['"a b"', '""', r'"a\""'], ['"a"b"', '"a\n"', r'"a\n"']),
    ],
)  # fmt: skip
def test_all_keywords_of_a_schema_are_enforced(
    schema: dict[str, Any], good: list[str], bad: list[str], context: Context
) -> None:
    grammar = grammar_from_schema(json.dumps(schema))
    assert [text for text in good if not accepts(context, grammar, text)] == []
    assert [text for text in bad if accepts(context, grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ('root ::= "a\0"', "a null character"),
        ("root ::= " + '"a" ' * 30_000, "longer than 100,000 characters"),
        ('root ::= "a', 'unexpected “"a” on line 1'),
        ("other ::= [a-z]", "it has no rule “root”"),
        ("root ::= missing", "the rule “missing” used on line 1 is not defined"),
        ('root ::= "a"\nroot ::= "b"', "the rule “root” is defined twice"),
        ("(((", "it has no rule “root”"),
        ('root ::= ("a"', "unbalanced parenthesis on line 1"),
        ('root ::= "a")\nb ::= "c"', "unbalanced parenthesis on line 1"),
        ('root ::= ("a"\nb ::= "c")', "unbalanced parenthesis on line 2"),
        ("root ::= * [a]", "unexpected “*” on line 1"),
        ('"a" root ::= [a]', "unexpected “a” on line 1"),
        ("root ::= [a]\n\nother ::= <think>", "unexpected “<think>” on line 3"),
        (r'root ::= "\q"', r"unknown escape in “\q” on line 1"),
        ("root ::= [z-a]", "invalid character class range"),
        ('root ::= "a"{3,2}', "range end must be >= start"),
        ('root ::= "a"{99999999999}', "number too large"),
        (f"root ::= {'(' * 5000}[a]{')' * 5000}", "nested too deeply"),
        ('root ::= "a"{1000000}', "it is too large"),
        ('root ::= root "a"', "no answer can match it"),
    ],
)
def test_an_invalid_grammar_is_rejected_in_one_sentence(
    grammar: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=f"Cannot (read|use) the grammar: .*{re.escape(reason)}") as caught:
        grammar_from_gbnf(grammar)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_dead_end_in_a_grammar_is_an_error_of_one_sentence(
    context: Context, capfd: pytest.CaptureFixture[str]
) -> None:
    grammar = grammar_from_gbnf(r'root ::= "a" [^\U00000000-\U0010FFFF]')
    with pytest.raises(UsageError, match="allows no token of the model"):
        answer(context, grammar)
    assert capfd.readouterr() == ("", "")


def test_a_grammar_in_another_format_is_rejected(context: Context) -> None:
    with pytest.raises(UsageError, match="Cannot use the grammar"):
        GrammarMatcher('root ::= "a"', context.model.tokenizer)


@given(st.text(st.sampled_from('root::= \n"a|()[]*+?{2,}^-.\\xu#'), max_size=30))
def test_any_text_is_a_grammar_or_a_usage_error(text: str) -> None:
    try:
        grammar_from_gbnf("root ::= " + text)
    except UsageError as error:
        assert str(error).startswith(("Cannot read the grammar", "Cannot use the grammar"))


KEYWORDS = ("type", "properties", "items", "enum", "anyOf", "$ref", "const", "x", "pattern", "allOf", "required",
            "minItems", "additionalProperties", "prefixItems", "maxItems", "minLength", "format", "$defs",
            "oneOf", "minimum", "maximum", "multipleOf", "patternProperties", "minProperties")  # fmt: skip
SIMPLE = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)


@given(st.recursive(SIMPLE, nested, max_leaves=8))
def test_any_json_is_a_schema_or_a_usage_error(schema: Any) -> None:
    try:
        assert grammar_from_schema(json.dumps(schema))
    except UsageError as error:
        assert str(error).startswith("The schema")


TYPES = st.sampled_from(("object", "array", "string", "number", "integer", "boolean", "null"))
VALUES = st.sampled_from(("x", 'y"q', "a\\b", "é", 1, 2.5, None, True, [1], {"k": "v"}))
PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
    "enum": st.lists(VALUES, min_size=1, max_size=3), "const": VALUES, "title": st.just("t"),
    "minLength": st.integers(0, 3), "maxLength": st.integers(2, 5), "format": st.sampled_from(("date", "uuid")),
    "pattern": st.sampled_from((r"^\d+$", "^a|b$", "^[^x]{2}$", r"^(ab|c)*\.$", "^.$")),
    "minItems": st.integers(0, 2), "maxItems": st.integers(1, 3),
    "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
    "minimum": st.integers(-9, 3), "exclusiveMaximum": st.integers(3, 200), "multipleOf": st.sampled_from((2, 7, 0.5)),
    "minProperties": st.integers(0, 2), "maxProperties": st.integers(1, 3),
}  # fmt: skip


def with_parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(inner, min_size=1, max_size=2)
    named = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    patterns = st.dictionaries(st.sampled_from(("^a", "b$")), inner, max_size=1)
    return some_of({**PLAIN, "properties": named, "items": inner, "additionalProperties": inner | st.booleans(),
                    "prefixItems": parts, "anyOf": parts, "allOf": parts, "oneOf": parts,
                    "patternProperties": patterns})  # fmt: skip


@st.composite
def some_of(draw: st.DrawFn, keywords: Mapping[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """Draw a schema of at most three keywords; most combinations of more are contradictory."""
    chosen = draw(st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True))
    return {key: draw(keywords[key]) for key in chosen}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(some_of(PLAIN), with_parts, max_leaves=5), seed=st.integers(0, 9))
def test_an_answer_satisfies_its_schema_or_the_schema_is_rejected(
    schema: dict[str, Any], seed: int, context: Context
) -> None:
    try:
        grammar = grammar_from_schema(json.dumps(schema))
    except UsageError:
        return
    text = answer(context, grammar, limit=250, seed=seed)
    if "\ufffd" in text or not is_complete(context, grammar, text):
        return  # invalid UTF-8, or cut at the limit
    exact = json.loads(json.dumps(schema), parse_float=parse_exactly)
    jsonschema.Draft202012Validator(exact).validate(json.loads(text, parse_float=parse_exactly))


def parse_exactly(text: str) -> decimal.Decimal | float:
    """Parse a decimal number without rounding, so that 0.7 is a multiple of 0.1; infinity if it is too large."""
    try:
        return decimal.Decimal(text)
    except decimal.InvalidOperation:
        return float(text)


def is_complete(context: Context, grammar: str, text: str) -> bool:
    """Return True if an answer may end after `text`."""
    matcher = GrammarMatcher(grammar, context.model.tokenizer)
    matcher.accept_prefix(context.model.tokenizer.tokenize_bytes(text.encode()))
    return any(matcher.allows(end) for end in context.model.tokenizer.ends())


# --- the command


def test_run_prints_json_that_follows_the_schema(random_model: Path, invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(PERSON))
    result = invoke("run", str(random_model), "Hi", "--schema", "s.json", "--seed", "2", "-n", "300")
    assert result.returncode == 0, result.stderr
    check_person(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--schema", "missing.json"], 3, "There is no file missing.json"),
        (["--schema", "bad.json"], 2, "not valid JSON"),
        (["--grammar", "bad.json"], 2, "Cannot read the grammar"),
        (["--json", "--schema", "bad.json"], 2, "cannot be combined"),
    ],
)
def test_run_checks_a_schema_or_grammar_before_loading(
    options: list[str], code: int, message: str, invoke: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{nonsense")
    result = invoke("run", "./missing.gguf", "Hi", *options)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "reason", "hint"),
    [
        (["--schema", "s.json", "-n", "8"], "it was cut after 8 tokens.", "-n 256"),
        (["--schema", "s.json", "-n", "1"], "it was cut after 1 token.", "-n 256"),
        (["--json", "-n", "1"], "it was cut after 1 token", "-n 256"),
        (["--grammar", "long.gbnf", "-n", "9"], "it was cut after 9 tokens", "-n 256"),
        (["--grammar", "endless.gbnf", "-c", "256"], "the context of 256 tokens is full.", "-c 512"),
        (["--schema", "s.json", "--stop", "name"], "a stop string ended it.", "Omit --stop"),
        (["--raw", "--schema", "s.json", "-n", "8"], "it was cut after 8 tokens", "-n 256"),
    ],
)
def test_run_says_that_an_answer_was_cut_before_it_followed_its_grammar(
    options: list[str], reason: str, hint: str, random_model: Path, invoke: Run, tmp_path: Path
) -> None:
    write_structures(tmp_path)
    result = invoke("run", str(random_model), "Hi", *options)
    assert (result.returncode, f"The answer is incomplete: {reason}" in result.stderr) == (8, True), result.stderr
    assert hint in result.stderr


def write_structures(folder: Path) -> None:
    (folder / "s.json").write_text(json.dumps(PERSON))
    (folder / "long.gbnf").write_text('root ::= "0123456789"')
    (folder / "endless.gbnf").write_text('root ::= [a]{9000} "b"')


@pytest.mark.parametrize(
    "options",
    [["--grammar", "ten.gbnf", "-n", "10"], ["--grammar", "ten.gbnf", "--stop", "x"], ["-n", "2"], ["--stop", "a"]],
)
def test_a_cut_answer_that_follows_its_grammar_or_has_none_is_a_success(
    options: list[str], random_model: Path, invoke: Run, tmp_path: Path
) -> None:
    (tmp_path / "ten.gbnf").write_text('root ::= "0123456789" ("x" [a-z]*)?')
    result = invoke("run", str(random_model), "Hi", "--seed", "1", *options)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_batch_marks_answers_that_were_cut(random_model: Path, invoke: Run, tmp_path: Path) -> None:
    write_structures(tmp_path)
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    command = ("run", str(random_model), "--batch", "in.txt", "--schema", "s.json", "--seed", "2")
    cut = invoke(*command, "-n", "8")
    assert [json.loads(line)["complete"] for line in cut.stdout.splitlines()] == [False, False]
    assert (cut.returncode, "Incomplete: 2 of 2 answers." in cut.stderr) == (8, True)
    whole = invoke(*command, "-n", "300")
    assert [json.loads(line)["complete"] for line in whole.stdout.splitlines()] == [True, True]
    assert whole.returncode == 0
    free = invoke("run", str(random_model), "--batch", "in.txt", "-n", "8")
    assert (free.returncode, "complete" in free.stdout) == (0, False)


def test_a_batch_says_how_many_answers_the_full_context_cut(endless_model: Path, invoke: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    result = invoke("run", str(endless_model), "--batch", "in.txt", "-c", "256")
    assert result.returncode == 0
    assert "Cut because the context of 256 tokens is full: 2 of 2 answers." in result.stderr


def test_a_chat_notes_that_an_answer_does_not_follow_its_grammar_yet(
    terminal: Open, random_model: Path, tmp_path: Path
) -> None:
    write_structures(tmp_path)
    chat = start_chat(terminal, random_model, "--grammar", "long.gbnf", "-n", "4")
    chat.enter("Hi", r"0123\n+\[token limit\] The answer does not follow the grammar yet\. Type /continue")
    chat.enter("/continue", r"4567\n+\[token limit\] The answer does not follow the grammar yet\.")
    chat.enter("/continue", r"89\n+>$")


# --- OpenAPI, large limits


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "example": "x", "xml": {"name": "a"}, "externalDocs": {"url": "u"}, "x-order": {"not": 3}},
         ['"a"'], ["null"]),
        ({"type": "string", "nullable": True}, ['"a"', "null"], ["1"]),
        ({"type": "string", "nullable": False}, ['"a"'], ["null"]),
        ({"type": "string", "nullable": True, "enum": ["a"]}, ['"a"'], ["null", '"b"']),
        ({"type": "object", "properties": {"a": {"type": "integer", "nullable": True}}, "required": ["a"]},
         ['{"a": 1}', '{"a": null}'], ["{}", "null"]),
        ({"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
          "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
          "$defs": {"Cat": {"type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}}},
                    "Dog": {"type": "object", "properties": {"kind": {"const": "dog", "default": "dog"}}}}},
         ['{"kind": "cat"}', '{"kind": "dog"}'], ["{}", '{"kind": "cow"}']),
        ({"type": "string", "maxLength": 3.0}, ['"abc"'], ['"abcd"']),
        ({"type": "string", "maxLength": 9223372036854775807}, ['"abcd"'], ["1"]),
        ({"anyOf": [{"type": "string", "minLength": 1 << 40}, {"type": "null"}]}, ["null"], ['"a"']),
        ({"oneOf": [{"type": "string"}, {"type": "null"}], "discriminator": {"propertyName": ["a"]}}, ["null"], ["1"]),
        ({"type": "array", "maxItems": 1e30, "minItems": 1.0}, ["[1]"], ["[]"]),
    ],
)  # fmt: skip
def test_keywords_of_openapi_and_of_generators_are_read(
    schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = grammar_from_schema(json.dumps(schema))
    assert [text for text in good if not is_complete_text(grammar, text)] == []
    assert [text for text in bad if is_complete_text(grammar, text)] == []


@pytest.mark.parametrize("count", [1500, 3000, 20_000])
def test_large_limits_are_kept_exactly(count: int) -> None:
    schemas: list[tuple[dict[str, Any], Any]] = [
        ({"type": "string", "maxLength": count}, "é" * count),
        ({"type": "array", "items": {"type": "string", "maxLength": count}}, ["é" * count]),
        ({"type": "string", "pattern": "^[a-z]+$", "maxLength": count}, "x" * count),
        ({"type": "string", "pattern": f"^x{{0,{count}}}$"}, "x" * count),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": count}, [7] * count),
        ({"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": count},
         {str(number): None for number in range(count)}),
    ]  # fmt: skip
    for schema, value in schemas:
        grammar, text = grammar_from_schema(json.dumps(schema)), json.dumps(value, ensure_ascii=False)
        assert is_complete_text(grammar, text), schema
        more = {'"': text[:-2] + 2 * text[-2] + '"', "]": text[:-1] + ", 7]", "}": text[:-1] + ', "x": null}'}
        longer = text.replace("é", "éé", 1) if isinstance(value, list) and value[0] != 7 else more[text[-1]]
        assert not is_complete_text(grammar, longer), schema
    assert is_complete_text(grammar_from_gbnf(f'root ::= ("ab" | [c]){{0,{count}}}'), "ab" * count)
    assert not is_complete_text(grammar_from_gbnf(f"root ::= [c]{{0,{count}}}"), "c" * (count + 1))


def test_a_string_of_400000_characters_can_follow_a_schema() -> None:
    grammar = grammar_from_schema(json.dumps({"type": "string", "maxLength": 400_000}))
    assert is_complete_text(grammar, json.dumps("x" * 400_000))
