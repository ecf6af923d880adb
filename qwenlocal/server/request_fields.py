"""Fields that requests of several APIs share: sampling, messages, formats of answers, unsupported fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag

from qwenlocal.engine.sampling import MAX_PENALTY_WINDOW
from qwenlocal.i18n import tr
from qwenlocal.server.engine import ChatPrompt
from qwenlocal.server.http_errors import BadField

_SEEDS = 2**32 - 1
MAX_STOPS = 16
# Fields of samplers that are not supported, with the values that change nothing.
UNSUPPORTED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "typical_p": (1,),
    "top_n_sigma": (-1, 0),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "adaptive_target": (-1,),
    "min_keep": (0,),
    "tfs_z": (1,),
    "logits_processors": ([],),
    "samplers": (),
}

# Fields of OpenAI's chats, and of llama-server's, that other APIs do not have, with the values that change nothing.
OPENAI_CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    "stop": ([], ""),
    "n": (1,),
    "response_format": ({}, {"type": "text"}),
    "grammar": ("",),
    "logit_bias": ({}, []),
    "logprobs": (False,),
    "ignore_eos": (False,),
}

StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(fail_fast=True, max_length=MAX_STOPS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]),
]


def parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """
    Parse OpenAI's {"id": bias} or llama-server's [[id, bias or false]], in which false forbids the token.

    Raises
    ------
    ValueError: it is neither.
    """
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list):
        raise _not_a_bias()
    return tuple(_parse_bias(pair) for pair in pairs)


def _parse_bias(pair: object) -> tuple[int, float]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise _not_a_bias()
    token, bias = pair
    if isinstance(token, str) and token.isdecimal() and len(token) < 10:
        token = int(token)
    if type(token) is not int or (bias is not False and (type(bias) not in (int, float) or not math.isfinite(bias))):
        raise _not_a_bias()
    return token, -math.inf if bias is False else float(bias)


def _not_a_bias() -> ValueError:
    return ValueError(tr("expected token ids with numbers, such as {example}", example='{"9707": -100}'))


LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(
        parse_logit_bias, json_schema_input_type=dict[int, float] | list[tuple[int, float | Literal[False]]]
    ),
]


class ApiRequest(BaseModel):
    """Base class of requests: unknown fields are kept in `model_extra`, and "1" is not a number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    def refuse(self, neutral: Mapping[str, Sequence[Any]]) -> None:
        """
        Check the fields that would change the answer but are not supported.

        `neutral` maps their names to the values that change nothing; null is always one of them, also in an object.

        Raises
        ------
        BadField: one of them has another value; the first one in `neutral` if there are several.
        """
        for name, values in neutral.items():
            value = (self.model_extra or {}).get(name)
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if item is not None}
            if value is not None and value not in values:
                raise BadField(name, tr("“{field}” is not supported.", field=name), code="unsupported_parameter")


class SamplingFields(BaseModel):
    """The parameters of sampling, by llama.cpp's names; the model's recommendations replace missing ones."""

    temperature: float | None = Field(None, ge=0, le=10)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(
        None, ge=0.01, le=10, validation_alias=AliasChoices("repeat_penalty", "repetition_penalty")
    )
    repeat_last_n: int | None = Field(
        None, ge=-1, lt=2**31, validation_alias=AliasChoices("repeat_last_n", "penalty_last_n")
    )
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)

    def sampling(self) -> dict[str, Any]:
        """Return the parameters that are given, for `GenerationRequest.sampling`."""
        values = self.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        if values.get("top_k") == -1:
            values["top_k"] = 0
        if (window := values.get("repeat_last_n")) is not None:  # -1 is the whole context
            values["repeat_last_n"] = MAX_PENALTY_WINDOW if window == -1 else min(window, MAX_PENALTY_WINDOW)
        for penalty in ("frequency_penalty", "presence_penalty"):
            if values.get(penalty) == 0:
                del values[penalty]
        if (seed := values.pop("seed", -1)) != -1:  # llama-server: -1 is random
            values["seed"] = seed % _SEEDS
        return values


def choice_seed(sampling: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the sampling of one of several answers to a prompt: each has a seed of its own."""
    if not number or "seed" not in sampling:
        return dict(sampling)
    return {**sampling, "seed": (sampling["seed"] + number) % _SEEDS}


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str


def join_text(content: str | Sequence[TextPart] | None) -> str:
    """Return the text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def check_text_parts(value: Any) -> Any:
    """Reject parts other than text by their type, which is clearer than an error about missing text."""
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
            raise ValueError(tr("content of type “{type}” is not supported, only text", type=kind[:40]))
    return value


def list_or_text(value: Any) -> str:
    """Choose between a list and a text, so that an error is about the one that a request has."""
    return "list" if isinstance(value, list) else "text"


TextParts = Annotated[
    list[TextPart], Field(fail_fast=True), BeforeValidator(check_text_parts, json_schema_input_type=list[TextPart])
]
TextContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[TextParts, Tag("list")],
    Discriminator(list_or_text),
]


def format_message(role: str, content: str | Sequence[TextPart] | None) -> dict[str, str]:
    """Return a message for the chat template; the role “developer” becomes “system”."""
    return {"role": "system" if role == "developer" else role, "content": join_text(content)}


def continue_answer(messages: Sequence[Mapping[str, str]]) -> ChatPrompt:
    """
    Return the prompt for messages of which the last one is the beginning of the answer.

    Raises
    ------
    BadField: it is not the assistant's, or there is no question before it.
    """
    *others, last = messages
    if last["role"] != "assistant" or not any(message["role"] == "user" for message in others):
        raise BadField(
            "messages", tr("An answer can only be continued if it is the last message and follows a question.")
        )
    return ChatPrompt(others, last["content"])
