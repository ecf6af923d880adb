"""
Requests of the OpenAI API, with the additional fields of llama-server.

Sources: https://platform.openai.com/docs/api-reference; llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from qwenlocal.i18n import tr
from qwenlocal.server.engine import ChatPrompt
from qwenlocal.server.grammar_compiler import GrammarCompiler
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.request_fields import (
    UNSUPPORTED_SAMPLING,
    ApiRequest,
    LogitBias,
    SamplingFields,
    StopStrings,
    TextContent,
    continue_answer,
    format_message,
)

_MAX_CHOICES = 64
_MAX_TOP_LOGPROBS = 20
_MAX_INPUTS = 2048  # of one request, as OpenAI's
_MAX_ANSWERS = 2048  # to one request

# Unsupported fields that would change the answer, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_SAMPLING,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "suffix": ("",),
    "json_schema": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "lora": ([],),
    "n_probs": (0,),
    "image_data": ([],),
    "images": ([],),
    "regex": ("",),
    "ebnf": ("",),
    "n_indent": (0,),
    "t_max_predict_ms": (-1, 0),
    "max_new_tokens": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
}


class JsonSchemaFormat(BaseModel):
    """The schema of an answer, and its name."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = ""
    json_schema: dict[str, Any] = Field(validation_alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The format of an answer. `schema` is llama-server's way to give the schema of a `json_object`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    object_schema: dict[str, Any] | None = Field(None, validation_alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class GenerationFields(ApiRequest, SamplingFields):
    """The fields that chats and completions share."""

    model: str = Field("", max_length=500)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    best_of: int | None = None
    stop: StopStrings | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None

    @property
    def choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    def check(self) -> None:
        """
        Check rules that types cannot express.

        Raises
        ------
        BadField: a field has no effect here, or two fields contradict each other.
        """
        self.refuse(_UNSUPPORTED)
        if self.best_of is not None and self.best_of != self.choices:
            raise BadField("best_of", tr("“best_of” is not supported unless it equals “n”."))
        if self.stream_options and not self.stream:
            raise BadField("stream_options", tr("“stream_options” needs “stream”: true."))
        if self.grammar and self.response_format and self.response_format.type != "text":
            raise BadField("grammar", tr("“grammar” and “response_format” cannot be combined."))

    async def all_sampling(self, grammars: GrammarCompiler) -> dict[str, Any]:
        """
        Return all settings that affect the choice of tokens, for `GenerationRequest.sampling`.

        Raises
        ------
        BadField: the schema or the grammar is not usable.
        """
        sampling = self.sampling()
        if self.logit_bias:
            sampling["logit_bias"] = self.logit_bias
        if self.ignore_eos:
            sampling["ignore_eos"] = True
        if self.grammar:
            sampling["grammar"] = await grammars.compile_gbnf(self.grammar)
        if self.response_format and (grammar := await _compile_format(self.response_format, grammars)):
            sampling["grammar"] = grammar
        return sampling


async def _compile_format(response_format: ResponseFormat, grammars: GrammarCompiler) -> str:
    if response_format.type == "text":
        return ""
    if response_format.json_schema:
        schema = response_format.json_schema.json_schema
        return await grammars.compile_schema(schema, "response_format.json_schema.schema")
    return await grammars.compile_schema(response_format.object_schema, "response_format.schema")


class ChatMessageFields(ApiRequest):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: TextContent | None = None

    def to_dict(self) -> dict[str, str]:
        """Return the message for the chat template."""
        return format_message(self.role, self.content)

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessageFields:
        if (self.model_extra or {}).get("tool_calls"):
            raise ValueError(tr("tool calls are not supported"))
        if self.content is None and self.role != "assistant":
            raise ValueError(tr("content is missing"))
        return self


class ChatCompletionRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessageFields] = Field(fail_fast=True, min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=-1, validation_alias=AliasChoices("max_tokens", "n_predict"))
    max_completion_tokens: int | None = Field(None, ge=-1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def limit(self) -> int | None:
        """The limit of tokens, by its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        self.refuse({"echo": (False,)})
        if self.top_logprobs and not self.logprobs:
            raise BadField("top_logprobs", tr("“top_logprobs” needs “logprobs”: true."))
        if self.add_generation_prompt is bool(self.continue_final_message):  # vLLM needs both, SGLang the latter
            raise BadField(
                "add_generation_prompt",
                tr("“add_generation_prompt” must be the opposite of “continue_final_message”."),
            )

    def prompt(self) -> ChatPrompt:
        """
        Return the messages for the chat template.

        Raises
        ------
        BadField: the last one cannot be continued.
        """
        messages = [message.to_dict() for message in self.messages]
        return continue_answer(messages) if self.continue_final_message else ChatPrompt(messages)


def _choose_input(value: Any) -> str:
    """Choose the type of a `TextInput` by its first item, so that an error is about that type."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    return "ids" if isinstance(first, int) else "id_lists" if isinstance(first, list) else "texts"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
NonEmptyText = Annotated[str, Field(min_length=1)]
# One text or several, as characters or as token ids.
TextInput = Annotated[
    Annotated[NonEmptyText, Tag("text")]
    | Annotated[list[NonEmptyText], Field(fail_fast=True, min_length=1, max_length=_MAX_INPUTS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=_MAX_INPUTS), Tag("id_lists")],
    Discriminator(_choose_input),
]


def list_texts(value: TextInput) -> list[str | list[int]]:
    """`list_texts("a")` is ["a"], `list_texts([1, 2])` is [[1, 2]]; several texts stay as they are."""
    texts: Any = value
    return [texts] if isinstance(texts, str) or isinstance(texts[0], int) else list(texts)


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    prompt: TextInput
    max_tokens: int | None = Field(16, ge=-1, validation_alias=AliasChoices("max_tokens", "n_predict"))
    logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)
    echo: bool | None = None

    def check(self) -> None:
        super().check()
        if (count := len(list_texts(self.prompt)) * self.choices) > _MAX_ANSWERS:
            raise BadField(
                "n",
                tr(
                    "“n” times the number of prompts is {count:,}; the limit is {limit:,}.",
                    count=count,
                    limit=_MAX_ANSWERS,
                ),
            )


class EmbeddingRequest(ApiRequest):
    """`POST /v1/embeddings`."""

    model: str = Field("", max_length=500)
    input: TextInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
