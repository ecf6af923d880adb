"""Requests of Ollama's interface (https://docs.ollama.com/api)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from qwenlocal.server.openai_models import NonEmptyText
from qwenlocal.server.request_fields import ApiRequest, SamplingFields, StopStrings, compile_schema

# Fields and options that change the answer and are not supported, with the values that change nothing.
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
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, ...]] = {"mirostat": (0,), "typical_p": (1,), "tfs_z": (1,)}

ModelName = Annotated[str, Field(max_length=500, validation_alias=AliasChoices("model", "name"))]


class OllamaRequest(ApiRequest):
    """Base class of requests: they name a model, perhaps with the tag that Ollama adds."""

    model: ModelName

    @property
    def model_name(self) -> str:
        """The name without the tag "latest"."""
        return self.model.removesuffix(":latest")


class OllamaOptions(ApiRequest, SamplingFields):
    """The `options` of a request. The context length is chosen when the server starts."""

    num_predict: int | None = None
    stop: StopStrings | None = None


class OllamaMessage(ApiRequest):
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
    def max_tokens(self) -> int | None:
        """The limit of tokens; Ollama's negative numbers are none."""
        limit = self.options.num_predict
        return None if limit is None or limit < 0 else limit

    async def all_sampling(self) -> dict[str, Any]:
        """
        Return the options and the format, for `GenerationRequest.sampling`.

        Raises
        ------
        BadField: the schema is not supported.
        """
        sampling = self.options.sampling()
        if self.format:
            sampling["grammar"] = await compile_schema(None if self.format == "json" else self.format, "format")
        return sampling


class OllamaChatRequest(AnswerRequest):
    """`POST /api/chat`; without messages, it only loads the model."""

    messages: list[OllamaMessage] = Field(default_factory=list, max_length=10_000)

    def check(self) -> None:
        super().check()
        for message in self.messages:
            message.refuse(_UNSUPPORTED)


class OllamaGenerateRequest(AnswerRequest):
    """`POST /api/generate`; without a prompt, it only loads the model. `raw` omits the chat template."""

    prompt: str = ""
    system: str = ""
    raw: bool = False


class OllamaEmbedRequest(OllamaRequest):
    """`POST /api/embed`."""

    input: NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=2048)]
    dimensions: int | None = Field(None, ge=1)
