"""The OpenAI API: models, chats, completions, embeddings (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import Embedding, GenerationRequest, ModelInfo, TextPrompt, TokenPrompt
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.openai_choices import ChatChoices, ChoiceFormat, ChoiceResponse, CompletionChoices
from qwenlocal.server.openai_models import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationFields,
    list_texts,
)
from qwenlocal.server.request_fields import choice_seed
from qwenlocal.server.security import identify_client
from qwenlocal.server.streaming import respond_with_list, run_while_connected, stream_while_connected


class OpenAiApi:
    """The routes under /v1 that OpenAI's clients use."""

    def __init__(self, service: AnswerService, *, keep_alive: float) -> None:
        self._service, self._keep_alive = service, keep_alive

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])
        router.add_api_route("/models", self.list_models, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.get_model, methods=["GET"])
        router.add_api_route("/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/completions", self.complete, methods=["POST"])
        router.add_api_route("/embeddings", self.embed, methods=["POST"])
        return router

    async def list_models(self) -> Response:
        """List the installed models."""
        models = [_format_model(model) for model in self._service.models()]
        ids = [model["id"] for model in models] or [None]
        return JSONResponse(
            {"object": "list", "data": models, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
        )

    async def get_model(self, name: str) -> Response:
        """Describe an installed model."""
        return JSONResponse(_format_model(await self._service.find_model(name)))

    async def chat(self, request: Request, body: ChatCompletionRequest) -> Response:
        """Answer the last message of a chat."""
        body.check()
        generation = GenerationRequest(
            body.prompt(),
            max_tokens=body.limit,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return await self._respond(request, body, [generation], ChatChoices(bool(body.logprobs)))

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or more texts."""
        body.check()
        has_logprobs, echo = body.logprobs is not None, bool(body.echo)
        generations = [
            GenerationRequest(
                _prompt(text),
                max_tokens=body.max_tokens,
                top_logprobs=body.logprobs,
                prompt_logprobs=echo and has_logprobs,
            )
            for text in list_texts(body.prompt)
        ]
        return await self._respond(request, body, generations, CompletionChoices(has_logprobs, echo))

    async def _respond(
        self,
        request: Request,
        body: GenerationFields,
        generations: Sequence[GenerationRequest],
        choices: ChoiceFormat,
    ) -> Response:
        """Respond with as many answers to each prompt as `body` asks for, generated with the fields that all share."""
        sampling = await body.all_sampling(self._service.grammars)
        requests = [
            replace(
                generation,
                sampling=choice_seed(sampling, number),
                max_tokens=None if generation.max_tokens == -1 else generation.max_tokens,  # llama-server: no limit
                stop=tuple(body.stop or ()),
                cache_prompt=body.cache_prompt is not False,
                client=identify_client(request),
            )
            for generation in generations
            for number in range(body.choices)
        ]
        response = ChoiceResponse(self._service, body, requests, choices)
        if not body.stream:
            return JSONResponse(await run_while_connected(request, response.collect()))
        return await stream_while_connected(request, response.stream(), keep_alive=self._keep_alive)

    async def embed(self, request: Request, body: EmbeddingRequest) -> Response:
        """Return a vector for each text."""
        prompts = [_prompt(text) for text in list_texts(body.input)]
        name, embeddings = await run_while_connected(request, self._service.embed(body.model, prompts, body.dimensions))
        tokens = sum(embedding.tokens for embedding in embeddings)
        return await respond_with_list(
            "data",
            _format_embeddings(embeddings, is_base64=body.encoding_format == "base64"),
            {
                "object": "list",
                "model": body.model or name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
        )


async def _format_embeddings(
    embeddings: Sequence[Embedding], *, is_base64: bool
) -> AsyncGenerator[Sequence[dict[str, Any]], None]:
    encode = _encode_base64 if is_base64 else list
    for index, embedding in enumerate(embeddings):
        yield [{"object": "embedding", "index": index, "embedding": encode(embedding.vector)}]


def _encode_base64(vector: Sequence[float]) -> str:
    """Encode a vector as OpenAI does: 32-bit floats, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _format_model(model: ModelInfo) -> dict[str, Any]:
    """Describe a model to clients of OpenAI and of Anthropic, which ask for the same path."""
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.modified),
        "owned_by": "qwenlocal",
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.modified, timezone.utc).isoformat(),
        "meta": {"size": model.size, "n_ctx": model.n_ctx, "n_ctx_train": model.n_ctx_train},
    }


def _prompt(value: str | list[int]) -> TextPrompt | TokenPrompt:
    return TextPrompt(value) if isinstance(value, str) else TokenPrompt(value)
