"""The functions of a loaded model that a server uses: tasks that answer requests, embeddings, tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenlocal.chat.answer_loop import NO_LIMIT, AnswerTask
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.chat.chat_template import ChatTemplate, encode_messages, require_template, require_tokens
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.scheduler import SequenceRequest
from qwenlocal.errors import UnknownToken
from qwenlocal.i18n import tr
from qwenlocal.server.engine import ChatPrompt, Embedding, GenerationRequest, Prompt, TextPrompt, TokenPrompt


class ModelFunctions:
    """Functions of a model besides answering; each method can be called through `Call`."""

    def __init__(self, model: ChatModel) -> None:
        self._model, self.tokenizer = model, model.model.tokenizer

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return Embedder(self._model.model, self._model.plan.options)

    def embed(
        self, prompts: Sequence[TextPrompt | TokenPrompt], is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Embedding]:
        """Return an embedding per prompt; fewer, once it is not wanted any more."""
        embedder = self._embedder
        texts = [
            embedder.encode(prompt.text, truncate=prompt.truncate)
            if isinstance(prompt, TextPrompt)
            else self.encode(prompt)
            for prompt in prompts
        ]
        vectors = itertools.takewhile(lambda vector: is_wanted(), embedder.embed(texts))
        return [Embedding(vector, len(ids)) for vector, ids in zip(vectors, texts, strict=False)]

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """
        Return the token ids of a prompt.

        Raises
        ------
        UsageError: the model has no chat template. BadWeights, TextTooLong: the messages cannot be encoded.
        """
        if isinstance(prompt, ChatPrompt):
            text = prompt.answer_prefix if isinstance(prompt.answer_prefix, str) else ""
            ids = encode_messages(self._template, prompt.messages, self.tokenizer, text)
            self._check_ids(prompt.prefix_ids)
            return [*require_tokens(ids), *prompt.prefix_ids]
        if isinstance(prompt, TextPrompt):
            return self.tokenize(prompt.text, True, self.tokenizer.adds_bos)
        self._check_ids(prompt.ids)
        return prompt.ids

    def _check_ids(self, ids: Sequence[int]) -> None:
        n_vocab = len(self.tokenizer)
        if (invalid := next((id for id in ids if not 0 <= id < n_vocab), None)) is not None:
            raise UnknownToken(invalid)

    @property
    def _template(self) -> ChatTemplate:
        return require_template(self._model.template, tr("Use /v1/completions, or another model."))

    def _create_sampler(self, overrides: Mapping[str, Any]) -> tuple[Sampling, Sampler]:
        """
        Return the model's sampling with some of its fields replaced, and a sampler for it.

        Raises
        ------
        UsageError: a value is invalid.
        """
        sampling = self._model.sampling.with_overrides(overrides)
        self._check_ids(sampling.answer_prefix)
        return sampling, Sampler(sampling, self.tokenizer)

    def create_task(self, key: int, request: GenerationRequest) -> AnswerTask:
        """
        Return the task of an `AnswerLoop` that answers a request; compiling its grammar may take seconds.

        Raises
        ------
        UsageError: a parameter or the grammar is invalid. The errors of `encode`.
        """
        ids = require_tokens(self.encode(request.prompt))
        prefix = request.prompt.prefix_ids if isinstance(request.prompt, ChatPrompt) else ()
        sampling, sampler = self._create_sampler({"answer_prefix": prefix, **request.sampling})
        sequence = SequenceRequest(
            key,
            ids,
            sampling,
            NO_LIMIT if request.max_tokens is None else request.max_tokens,
            request.client,
            request.top_logprobs,
            request.prompt_logprobs,
            request.cache_prompt,
        )
        builder = AnswerBuilder(
            self.tokenizer,
            len(ids) - len(prefix),
            grammar=sampling.grammar,
            stop_strings=request.stop,
            prefix=prefix,
        )
        return AnswerTask(sequence, builder, sampler)

    def tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.tokenize(text, special=special, add_bos=add_bos)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """
        Return the bytes of each token.

        Raises
        ------
        UnknownToken: there is no such token.
        """
        self._check_ids(ids)
        return [self.tokenizer.piece(id, special=True) for id in ids]

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of the prompt for messages."""
        return str(self._template.render(messages))

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.encode(prompt))
