"""
The boundary between HTTP and models: requests and events that do not depend on a protocol.

The APIs (OpenAI, Anthropic, Ollama) turn HTTP requests into `GenerationRequest`s and the events of
`chat.events` into HTTP responses. An `Engine` runs one model; a `ModelHost` finds engines by name and loads them.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from qwenlocal.chat.events import Event, PromptLogprobs


@dataclass(frozen=True)
class ChatPrompt:
    """
    Messages ({"role": …, "content": text}) that the model's chat template turns into a prompt.

    The model continues `answer_prefix`, with which its answer begins: a text of the client, which becomes a part of the
    prompt, or the tokens of an answer that was cut, perhaps in the middle of a character. These are the first ones of
    `Done.ids`; stop strings and the grammar apply to them, too.
    """

    messages: Sequence[Mapping[str, str]]
    answer_prefix: str | tuple[int, ...] = ""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens with which the answer begins; none if its beginning is a text."""
        return () if isinstance(self.answer_prefix, str) else self.answer_prefix


@dataclass(frozen=True)
class TextPrompt:
    """
    Text to continue; control tokens spelled in it are parsed, as llama-server does.

    With `truncate`, the embedding of a text that is longer than the context is that of its beginning.
    """

    text: str
    truncate: bool = False


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue."""

    ids: Sequence[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt
EngineEvent = Event | PromptLogprobs


@dataclass(frozen=True)
class GenerationRequest:
    """
    A prompt and how to answer it.

    `sampling` overrides the sampling that the model recommends: fields of `engine.sampling.Sampling` by name, such as
    {"temperature": 0.0, "grammar": grammar_from_schema(schema)}. If `max_tokens` is None, only the context limits the
    answer. `top_logprobs` requests the log probability of each token and of that many alternatives, `prompt_logprobs`
    the same for the tokens of the prompt. `client` identifies the client, so that many requests of one client do not
    delay those of others.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    cache_prompt: bool = True
    client: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """
    A model on this disk. `size` in bytes, `modified` in seconds since 1970.

    `architecture` ("qwen2"), `parameters` ("0.5B"), `quantization` ("q4_k_m") and `n_ctx_train` come from its file, if
    they are stated there. A loaded model is unloaded at the time `expires`, unless it is used before.
    """

    name: str
    size: int
    modified: float
    digest: str = ""
    quantization: str = ""
    architecture: str = ""
    parameters: str = ""
    is_loaded: bool = False
    expires: float = math.inf
    n_ctx: int = 0
    n_ctx_train: int = 0
    has_template: bool = True
    bos_token: str = ""
    eos_token: str = ""


@dataclass(frozen=True)
class Embedding:
    """The vector of a text, normalized to length 1, and how many tokens the text has."""

    vector: Sequence[float]
    tokens: int


class Engine(Protocol):
    """A loaded model. All methods can be called concurrently."""

    @property
    def info(self) -> ModelInfo:
        """The model."""

    def admit(self) -> AbstractContextManager[None]:
        """
        Give a request, which may need several answers, one place in the queue for the duration of the block.

        Raises
        ------
        ServerBusy: too many requests are waiting. EngineCrashed: the process of the model has ended.
        """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        """
        Yield the events of an answer: `PromptProgress`, `PromptLogprobs` if requested, `Text`, then one `Done`.

        Closing the iterator (`aclose`, or cancelling the task that waits for it) ends the computation.

        Raises
        ------
        ContextFull: the prompt is too long. UsageError: an option is not usable. TextTooLong, BadWeights.
        EngineCrashed: the process of the model has ended.
        """

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        """Return the token ids of `text`."""

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token; joined and decoded as UTF-8, they are the text."""

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of the prompt for messages. Raises UsageError if the model has no chat template."""

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt."""

    async def embed(self, prompts: Sequence[TextPrompt | TokenPrompt]) -> list[Embedding]:
        """Return an embedding per prompt."""


class ModelHost(Protocol):
    """The models of this machine, loaded when they are needed."""

    def models(self) -> list[ModelInfo]:
        """All installed models, the loaded ones first."""

    async def find(self, name: str) -> ModelInfo:
        """
        Describe the model that `open` would load.

        Raises
        ------
        ModelNotFound: it is not on this disk.
        """

    def open(self, name: str, keep_alive: float | None = None) -> AbstractAsyncContextManager[Engine]:
        """
        Load the model `name` ("" for the default one) and keep it loaded for the duration of the block.

        It stays loaded for `keep_alive` seconds after the last block; None keeps the time that was set before.

        Raises
        ------
        ModelNotFound: it is not on this disk. NotEnoughMemory, BadWeights: it cannot be loaded.
        """

    async def unload(self, name: str) -> None:
        """
        Unload a model as soon as it is idle; do nothing if it is not loaded.

        Raises
        ------
        ModelNotFound: it is not on this disk.
        """
