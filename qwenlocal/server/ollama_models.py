"""Requests of the Ollama API (https://docs.ollama.com/api)."""

from __future__ import annotations

import abc
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, ConfigDict, Discriminator, Field, PlainValidator, Tag, model_validator

from qwenlocal.i18n import tr
from qwenlocal.server.grammar_compiler import GrammarCompiler
from qwenlocal.server.openai_models import NonEmptyText
from qwenlocal.server.request_fields import UNSUPPORTED_SAMPLING, ApiRequest, SamplingFields, StopStrings, list_or_text

# Unsupported fields and options that would change the answer, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "images": ([],),
    "think": (False,),
    "template": ("",),
    "suffix": ("",),
    "context": ([],),
    "tool_calls": ([],),
    "width": (0,),
    "height": (0,),
}
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_SAMPLING,
    "penalize_newline": (True,),
    "logit_bias": ({}, []),
    "grammar": ("",),
}

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_keep_alive(value: object) -> float:
    """
    Parse Ollama's `keep_alive` to seconds: `parse_keep_alive("1h30m")` is 5400; a negative one is infinity.

    Raises
    ------
    ValueError: it is neither a number nor a time in Go's notation.
    """
    if isinstance(value, str):
        value = _parse_time(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(tr("expected a number of seconds, or a duration such as 5m"))
    return math.inf if value < 0 else float(value)


def _parse_time(text: str) -> float | None:
    """`_parse_time("-1h30m")` is -5400; None if the text is not a time."""
    digits = text.removeprefix("-")
    parts = list(_DURATION.finditer(digits))
    if parts and "".join(part[0] for part in parts) == digits:
        seconds = sum(float(part["number"]) * _UNITS[part["unit"]] for part in parts)
        return -seconds if text.startswith("-") else seconds
    try:
        return float(text)
    except ValueError:
        return None


KeepAlive = Annotated[float, PlainValidator(parse_keep_alive, json_schema_input_type=float | str)]
ModelName = Annotated[str, Field(max_length=500, validation_alias=AliasChoices("model", "name"))]


class OllamaObject(ApiRequest):
    """Base class of objects in requests. Programs in Go send null for what they do not set, and 1.0 for 1."""

    model_config = ConfigDict(strict=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class OllamaRequest(OllamaObject):
    """
    Base class of requests: they name a model, perhaps with the tag that Ollama adds.

    It stays loaded for `keep_alive` seconds after the request; None keeps the time that was set before.
    """

    model: ModelName
    keep_alive: KeepAlive | None = None

    @property
    def model_name(self) -> str:
        """The name without the tag "latest"."""
        return self.model.removesuffix(":latest")


class OllamaOptions(OllamaObject, SamplingFields):
    """The `options` of a request. The server sets the length of the context, so `num_ctx` has no effect."""

    num_predict: int | None = None
    num_ctx: int | None = None
    stop: StopStrings | None = None


class OllamaMessage(OllamaObject):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str = ""


class AnswerRequest(OllamaRequest):
    """The fields that chats and texts share."""

    stream: bool = True
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: OllamaOptions = Field(default_factory=lambda: OllamaOptions.model_validate({}))
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def check(self) -> None:
        """
        Check the fields that are not supported.

        Raises
        ------
        BadField: one of them is used.
        """
        self.refuse(_UNSUPPORTED)
        self.options.refuse(_UNSUPPORTED_OPTIONS)

    @property
    @abc.abstractmethod
    def is_empty(self) -> bool:
        """True if there is nothing to answer: the request only loads the model, or unloads it."""

    @property
    def max_tokens(self) -> int | None:
        """The limit of tokens; Ollama's negative numbers are none."""
        limit = self.options.num_predict
        return None if limit is None or limit < 0 else limit

    async def all_sampling(self, grammars: GrammarCompiler) -> dict[str, Any]:
        """
        Return the options and the format, for `GenerationRequest.sampling`.

        Raises
        ------
        BadField: the schema is not supported.
        """
        sampling = self.options.sampling()
        if self.format:
            schema = None if self.format == "json" else self.format
            sampling["grammar"] = await grammars.compile_schema(schema, "format")
        return sampling


class OllamaChatRequest(AnswerRequest):
    """`POST /api/chat`; without messages, it only loads the model."""

    messages: list[OllamaMessage] = Field(fail_fast=True, default_factory=list, max_length=10_000)

    @property
    def is_empty(self) -> bool:
        return not self.messages

    def check(self) -> None:
        super().check()
        for message in self.messages:
            message.refuse(_UNSUPPORTED)


class OllamaGenerateRequest(AnswerRequest):
    """`POST /api/generate`; without a prompt, it only loads the model. `raw` omits the chat template."""

    prompt: str = ""
    system: str = ""
    raw: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.prompt


class OllamaEmbeddingRequest(OllamaRequest):
    """`POST /api/embeddings`, the predecessor of /api/embed."""

    prompt: str = ""


class OllamaEmbedRequest(OllamaRequest):
    """`POST /api/embed`; `truncate` leaves out the end of texts that are longer than the context."""

    input: Annotated[
        Annotated[NonEmptyText, Tag("text")]
        | Annotated[list[NonEmptyText], Field(fail_fast=True, max_length=2048), Tag("list")],
        Discriminator(list_or_text),
    ] = Field(default_factory=list)
    dimensions: int | None = Field(None, ge=1)
    truncate: bool = True
