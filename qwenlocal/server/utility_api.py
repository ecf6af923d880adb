"""
Utility routes: health, metrics, tokens, the chat template.

They are llama-server's (tools/server/README.md). The routes for tokens also accept vLLM's field names, and
`/tokenizer_info` is vLLM's (vllm/entrypoints/serve/tokenize): lm-evaluation-harness tokenizes with them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import AliasChoices, Field

from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import Engine
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.openai_models import ChatMessageFields, TokenId
from qwenlocal.server.request_fields import ApiRequest
from qwenlocal.server.server_metrics import ServerMetrics
from qwenlocal.server.streaming import respond_with_list

_SLICE = 4096  # tokens that are converted before other requests continue: a few milliseconds


# Unsupported fields that would change the prompt, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}


class TokenizeRequest(ApiRequest):
    """`POST /tokenize`: `add_special` adds the token that begins a text, `parse_special` finds control tokens."""

    model: str = ""
    content: str = Field(validation_alias=AliasChoices("content", "prompt"))
    add_special: bool = Field(False, validation_alias=AliasChoices("add_special", "add_special_tokens"))
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(ApiRequest):
    """`POST /detokenize`."""

    model: str = ""
    tokens: list[TokenId] = Field(fail_fast=True)


class ApplyTemplateRequest(ApiRequest):
    """`POST /apply-template`."""

    model: str = ""
    messages: list[ChatMessageFields] = Field(fail_fast=True, min_length=1)


class UtilityApi:
    """Routes for programs that watch a server, and for those that count tokens."""

    def __init__(self, service: AnswerService, metrics: ServerMetrics) -> None:
        self._service, self._metrics = service, metrics

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(route_class=JsonRoute, tags=["Utilities"])
        router.add_api_route("/health", self.report_health, methods=["GET"])
        router.add_api_route("/metrics", self.report_metrics, methods=["GET"])
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        router.add_api_route("/tokenizer_info", self.describe_tokenizer, methods=["GET"])
        router.add_api_route("/apply-template", self.apply_template, methods=["POST"])
        return router

    async def report_health(self) -> Response:
        """Tell that the server runs; needs no key."""
        return JSONResponse({"status": "ok"})

    async def report_metrics(self) -> Response:
        """Return measurements for Prometheus."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Convert a text to token ids."""
        async with self._service.open(body.model) as engine:
            ids = await engine.tokenize(body.content, special=body.parse_special, add_bos=body.add_special)
            slices = _add_pieces(engine, ids) if body.with_pieces else _slice(ids)
            return await respond_with_list("tokens", slices)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Convert token ids to text."""
        async with self._service.open(body.model) as engine:
            pieces = [piece async for ids in _slice(body.tokens) for piece in await engine.pieces(ids)]
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return JSONResponse({"content": text, "prompt": text})

    async def describe_tokenizer(self, model: str = "") -> Response:
        """Return the tokens that begin and end a text; null if the model has none."""
        async with self._service.open(model) as engine:
            info = engine.info
        return JSONResponse({"bos_token": info.bos_token or None, "eos_token": info.eos_token or None})

    async def apply_template(self, body: ApplyTemplateRequest) -> Response:
        """Return the prompt that the model's chat template makes of messages."""
        body.refuse(_UNSUPPORTED)
        async with self._service.open(body.model) as engine:
            prompt = await engine.apply_template([message.to_dict() for message in body.messages])
        return JSONResponse({"prompt": prompt})


async def _slice(ids: Sequence[int]) -> AsyncGenerator[Sequence[int], None]:
    for start in range(0, len(ids), _SLICE):
        yield ids[start : start + _SLICE]


async def _add_pieces(engine: Engine, ids: Sequence[int]) -> AsyncGenerator[Sequence[dict[str, Any]], None]:
    async for some in _slice(ids):
        pieces = await engine.pieces(some)
        yield [{"id": id, "piece": _format_piece(piece)} for id, piece in zip(some, pieces, strict=True)]


def _format_piece(piece: bytes) -> Any:
    """Return text, or the bytes of a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
