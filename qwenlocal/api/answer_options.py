"""Options of answers, named as on the command line and in the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import OutOfRange, UsageError
from qwenlocal.i18n import tr

_SAMPLING = frozenset(
    (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "repeat_last_n",
        "frequency_penalty",
        "presence_penalty",
        "seed",
    )
)
_MAX_TOKENS = 1 << 30


class AnswerOptions(TypedDict, total=False):
    """
    The options of `chat`, `stream` and `complete`. Sampling defaults to the values that the model recommends.

    `max_tokens` limits the answer, `stop` ends it before any of these texts. `json` asks for a JSON object, `schema`
    for JSON that follows a JSON schema or a pydantic model class, `grammar` for text that follows a GBNF grammar.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    json: bool
    schema: Mapping[str, Any] | type | None
    grammar: str | None


@dataclass(frozen=True)
class AnswerSettings:
    """The options of an answer, checked; `decode` turns its text into data."""

    sampling: Sampling
    max_tokens: int | None
    stop_strings: tuple[str, ...]
    decode: Callable[[str], Any]


def parse_options(options: AnswerOptions, recommended: Sampling) -> AnswerSettings:
    """
    Check `options`; `recommended` fills in the sampling parameters that they omit.

    Raises
    ------
    UsageError: a value is out of range, or the schema or grammar is not supported.
    TypeError: there is no such option.
    """
    if unknown := set(options) - set(AnswerOptions.__annotations__):
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    max_tokens, stop = options.get("max_tokens"), options.get("stop") or ()
    if max_tokens is not None and not 1 <= max_tokens <= _MAX_TOKENS:
        raise OutOfRange("max_tokens", 1, _MAX_TOKENS, max_tokens)
    schema = options.get("schema")
    sampling = recommended.with_overrides({name: value for name, value in options.items() if name in _SAMPLING})  # type: ignore[misc]
    return AnswerSettings(
        replace(sampling, grammar=_grammar(options.get("json", False), schema, options.get("grammar"))),
        max_tokens,
        (stop,) if isinstance(stop, str) else tuple(stop),
        getattr(schema, "model_validate_json", json.loads),
    )


def _grammar(as_json: bool, schema: Mapping[str, Any] | type | None, gbnf: str | None) -> str | None:
    """Return the grammar that the answer must follow; None if there is none."""
    if sum((as_json, schema is not None, gbnf is not None)) > 1:
        raise UsageError(tr("json, schema and grammar cannot be combined."), hint=tr("Use one of them."))
    if gbnf is not None:
        from qwenlocal.engine.gbnf import grammar_from_gbnf

        return grammar_from_gbnf(gbnf)
    if schema is None and not as_json:
        return None
    from qwenlocal.engine.json_schema import ANY_OBJECT, grammar_from_schema

    return grammar_from_schema(ANY_OBJECT if schema is None else json.dumps(_json_schema(schema)))


def _json_schema(schema: Mapping[str, Any] | type) -> Mapping[str, Any]:
    """Return a mapping as it is, and the schema of a pydantic model class."""
    if isinstance(schema, Mapping):
        return schema
    describe = getattr(schema, "model_json_schema", None)
    if describe is None:
        raise UsageError(
            tr("The schema must be a JSON schema as a dict, or a pydantic model class."),
            hint=tr('For example: {"type": "object", "properties": …}'),
        )
    return dict(describe())


ChatInput = str | Sequence[Mapping[str, str]]


def parse_messages(prompt: ChatInput, system: str | None = None) -> list[dict[str, str]]:
    """
    Return the messages of a prompt: a question as text, or a list of {"role": …, "content": text}.

    Raises
    ------
    UsageError: there are none, or they are malformed.
    """
    before = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*before, {"role": "user", "content": prompt}]
    messages = list(prompt)
    if not messages or not all(map(_is_message, messages)):
        raise UsageError(
            tr("The messages must be a list of roles and texts."),
            hint=tr("For example: {messages}", messages='[{"role": "user", "content": "Why is the sky blue?"}]'),
        )
    return [*before, *({"role": message["role"], "content": message["content"]} for message in messages)]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
