"""The Ollama API: chats, texts, embeddings and models (https://docs.ollama.com/api)."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from qwenlocal.chat.events import Done, Text
from qwenlocal.i18n import tr
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import ChatPrompt, Embedding, Engine, GenerationRequest, ModelInfo, Prompt, TextPrompt
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.ollama_models import (
    AnswerRequest,
    OllamaChatRequest,
    OllamaEmbeddingRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaRequest,
)
from qwenlocal.server.openai_format import FINISH_REASONS, format_chat_logprobs
from qwenlocal.server.request_fields import continue_answer, format_message
from qwenlocal.server.security import identify_client
from qwenlocal.server.streaming import NDJSON, respond_with_list, run_while_connected, stream_while_connected

_VERSION = "0.12.11"  # version of Ollama with this API; some programs refuse to work with older ones
_NANOSECONDS = 1e9
_NEVER = 253_370_764_800.0  # seconds since 1970, in the year 9999
_log = logging.getLogger(__name__)

FormatText = Callable[[str], dict[str, Any]]


class OllamaApi:
    """The routes under /api that Ollama's clients use."""

    def __init__(self, service: AnswerService, *, keep_alive: float) -> None:
        self._service, self._keep_alive = service, keep_alive
        self._warned: set[str] = set()

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(prefix="/api", route_class=JsonRoute, tags=["Ollama"])
        router.add_api_route("/version", self.report_version, methods=["GET"])
        router.add_api_route("/tags", self.list_models, methods=["GET"])
        router.add_api_route("/ps", self.list_loaded, methods=["GET"])
        router.add_api_route("/show", self.show_model, methods=["POST"])
        router.add_api_route("/chat", self.chat, methods=["POST"])
        router.add_api_route("/generate", self.generate, methods=["POST"])
        router.add_api_route("/embed", self.embed, methods=["POST"])
        router.add_api_route("/embeddings", self.embed_prompt, methods=["POST"])
        return router

    async def report_version(self) -> Response:
        """Return the version of Ollama that has this API."""
        return JSONResponse({"version": _VERSION})

    async def list_models(self) -> Response:
        """List the installed models."""
        return JSONResponse({"models": [_format_model(model) for model in self._service.models()]})

    async def list_loaded(self) -> Response:
        """List the loaded models."""
        return JSONResponse({"models": [_format_loaded(model) for model in self._service.models() if model.is_loaded]})

    async def show_model(self, body: OllamaRequest) -> Response:
        """Describe an installed model."""
        return JSONResponse(_format_description(await self._service.find_model(body.model_name)))

    async def chat(self, request: Request, body: OllamaChatRequest) -> Response:
        """Answer the last message of a chat; if it is the assistant's, continue it."""
        body.check()
        messages = [format_message(message.role, message.content) for message in body.messages]
        is_begun = bool(messages) and messages[-1]["role"] == "assistant"
        prompt = continue_answer(messages) if is_begun else ChatPrompt(messages)

        def format_text(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}}

        return await self._respond(request, body, lambda _: prompt, format_text)

    async def generate(self, request: Request, body: OllamaGenerateRequest) -> Response:
        """Answer a prompt, or continue it."""
        body.check()
        system = [{"role": "system", "content": body.system}] if body.system else []

        def choose_prompt(engine: Engine) -> Prompt:
            if body.raw or not engine.info.has_template:
                return TextPrompt(body.prompt)
            return ChatPrompt([*system, {"role": "user", "content": body.prompt}])

        return await self._respond(request, body, choose_prompt, lambda text: {"response": text})

    async def _respond(
        self,
        request: Request,
        body: AnswerRequest,
        choose_prompt: Callable[[Engine], Prompt],
        format_text: FormatText,
    ) -> Response:
        sampling = await body.all_sampling(self._service.grammars)
        lines = self._answer(body, sampling, choose_prompt, format_text, identify_client(request))
        if not body.stream:
            return JSONResponse(await run_while_connected(request, _join_lines(lines, format_text)))
        return await stream_while_connected(
            request,
            _encode_lines(lines),
            keep_alive=self._keep_alive,
            encode_error=_encode_line,
            media_type=NDJSON,
        )

    async def _answer(
        self,
        body: AnswerRequest,
        sampling: dict[str, Any],
        choose_prompt: Callable[[Engine], Prompt],
        format_text: FormatText,
        client: str,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the lines of the answer: texts, then one with the counts and times."""
        start = time.monotonic()
        if body.is_empty and body.keep_alive == 0:
            await self._service.unload(body.model_name)
            yield {**_new_line(body), **format_text(""), "done": True, "done_reason": "unload"}
            return
        async with self._service.open(body.model_name, body.keep_alive) as engine:
            loaded = time.monotonic()
            if body.is_empty:
                yield {**_new_line(body), **format_text(""), "done": True, "done_reason": "load"}
                return
            self._warn_about_context(engine.info, body.options.num_ctx or 0)
            prompt = choose_prompt(engine)
            generation = GenerationRequest(
                prompt,
                sampling,
                body.max_tokens,
                tuple(body.options.stop or ()),
                body.top_logprobs if body.logprobs else None,
                client=client,
            )
            async with contextlib.aclosing(self._service.stream(engine, [generation])) as events:
                async for _, event in events:
                    if isinstance(event, Text):
                        logprobs = format_chat_logprobs(event.logprobs)["content"]
                        fields = {"logprobs": logprobs} if body.logprobs else {}
                        yield {**_new_line(body), **format_text(event.text), "done": False, **fields}
                    elif isinstance(event, Done):
                        times = _format_times(event, time.monotonic() - start, loaded - start)
                        yield {**_new_line(body), **format_text(""), "done": True, **times}

    def _warn_about_context(self, model: ModelInfo, num_ctx: int) -> None:
        """
        Log a `num_ctx` that is larger than the context, once per model.

        Ollama does the same if it is larger than the model's, so its clients do not expect an error: some always ask
        for the length that the model was trained with. A prompt that is too long is an error, with both lengths.
        """
        if num_ctx <= model.n_ctx or model.name in self._warned:
            return
        self._warned.add(model.name)
        _log.warning(
            tr(
                "A client requested a context of {asked:,} tokens (“num_ctx”); that of {name} has {n_ctx:,}. "
                "For a longer one, start the server with -c {asked}",
                name=model.name,
                asked=num_ctx,
                n_ctx=model.n_ctx,
            )
        )

    async def embed(self, request: Request, body: OllamaEmbedRequest) -> Response:
        """Return a vector for each text."""
        start = time.monotonic()
        texts = [body.input] if isinstance(body.input, str) else body.input
        prompts = [TextPrompt(text, truncate=body.truncate) for text in texts]
        _, embeddings = await run_while_connected(
            request, self._service.embed(body.model_name, prompts, body.dimensions, body.keep_alive)
        )
        return await respond_with_list(
            "embeddings",
            _format_embeddings(embeddings),
            {
                "model": body.model,
                "total_duration": int((time.monotonic() - start) * _NANOSECONDS),
                "prompt_eval_count": sum(embedding.tokens for embedding in embeddings),
            },
        )

    async def embed_prompt(self, request: Request, body: OllamaEmbeddingRequest) -> Response:
        """Return the vector of one text; the predecessor of /api/embed."""
        prompts = [TextPrompt(body.prompt)] if body.prompt else []
        _, embeddings = await run_while_connected(
            request, self._service.embed(body.model_name, prompts, None, body.keep_alive)
        )
        return JSONResponse({"embedding": [value for embedding in embeddings for value in embedding.vector]})


# --- formats


async def _format_embeddings(embeddings: Sequence[Embedding]) -> AsyncGenerator[Sequence[list[float]], None]:
    for embedding in embeddings:
        yield [list(embedding.vector)]


def _new_line(body: AnswerRequest) -> dict[str, Any]:
    return {"model": body.model, "created_at": _format_time(time.time())}


def _format_times(end: Done, total: float, loading: float) -> dict[str, Any]:
    stats = end.stats
    return {
        "done_reason": FINISH_REASONS[end.finish_reason],
        "total_duration": int(total * _NANOSECONDS),
        "load_duration": int(loading * _NANOSECONDS),
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_duration": int(stats.first_token * _NANOSECONDS),
        "eval_count": stats.answer_tokens,
        "eval_duration": int(stats.answer * _NANOSECONDS),
    }


async def _join_lines(lines: AsyncGenerator[dict[str, Any], None], format_text: FormatText) -> dict[str, Any]:
    """Return the last line with the text of all of them."""
    last: dict[str, Any] = {}
    text, logprobs = "", []
    async with contextlib.aclosing(lines):
        async for line in lines:
            text += line["message"]["content"] if "message" in line else line["response"]
            logprobs += line.get("logprobs", [])
            last = line
    return {**last, **format_text(text), **({"logprobs": logprobs} if logprobs else {})}


async def _encode_lines(lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(lines):
        async for line in lines:
            yield _encode_line(line)


def _encode_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _format_model(model: ModelInfo) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _format_time(model.modified),
        "size": model.size,
        "digest": model.digest,
        "details": _format_details(model),
    }


def _format_loaded(model: ModelInfo) -> dict[str, Any]:
    expires = _format_time(min(model.expires, _NEVER))
    return {**_format_model(model), "expires_at": expires, "size_vram": 0, "context_length": model.n_ctx}


def _format_description(model: ModelInfo) -> dict[str, Any]:
    """Describe a model; `context_length` is that of the loaded model, or else the one that it was trained with."""
    architecture = model.architecture or "qwen2"
    return {
        "modified_at": _format_time(model.modified),
        "details": _format_details(model),
        "model_info": {
            "general.architecture": architecture,
            "general.basename": model.name,
            f"{architecture}.context_length": model.n_ctx or model.n_ctx_train,
        },
        "capabilities": ["completion", "embedding"],
    }


def _format_details(model: ModelInfo) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.architecture,
        "families": [model.architecture] if model.architecture else [],
        "parameter_size": model.parameters,
        "quantization_level": model.quantization,
    }
