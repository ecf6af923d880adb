"""A route for our own command line: token ids in, token ids out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from qwenlocal.chat.events import Done, FinishReason, Text
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import OutOfRange
from qwenlocal.progress import PromptProgress
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import GenerationRequest, TokenPrompt
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.openai_models import TokenId
from qwenlocal.server.request_fields import ApiRequest
from qwenlocal.server.security import identify_client
from qwenlocal.server.streaming import END_OF_STREAM, format_event, stream_while_connected

_END_NAMES = {FinishReason.EOS: "token", FinishReason.CONTEXT_FULL: "full"}


def _validate_sampling(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except OutOfRange as error:
        raise BadField(f"sampling.{error.option}", str(error)) from error


class TokensRequest(ApiRequest):
    """`POST /v1/tokens`."""

    # Both also apply to the sampling, a dataclass with tuples; if it were strict, JSON could not express it.
    model_config = ConfigDict(extra="forbid", strict=False)

    model: str = ""
    ids: list[TokenId] = Field(min_length=1)
    sampling: Annotated[Sampling, WrapValidator(_validate_sampling)]
    limit: int = Field(ge=1)


class TokenApi:
    """The route that `remote.server_tokens` uses."""

    def __init__(self, service: AnswerService, *, keep_alive: float) -> None:
        self._service, self._keep_alive = service, keep_alive

    def router(self) -> APIRouter:
        """Return the route."""
        router = APIRouter(route_class=JsonRoute, tags=["qwenlocal"])
        router.add_api_route("/v1/tokens", self.continue_tokens, methods=["POST"])
        return router

    async def continue_tokens(self, request: Request, body: TokensRequest) -> Response:
        """Continue a prompt of token ids; each event has progress, further ids, or the end."""
        if body.sampling.grammar is not None:
            await self._service.grammars.check(body.sampling.grammar, "sampling.grammar")
        sampling = {name: value for name, value in vars(body.sampling).items() if value is not None}
        generation = GenerationRequest(TokenPrompt(body.ids), sampling, body.limit, client=identify_client(request))
        return await stream_while_connected(request, self._stream(body.model, generation), keep_alive=self._keep_alive)

    async def _stream(self, model: str, generation: GenerationRequest) -> AsyncGenerator[bytes, None]:
        sent = 0
        async with (
            self._service.open(model) as engine,
            contextlib.aclosing(self._service.stream(engine, [generation])) as events,
        ):
            async for _, event in events:
                if isinstance(event, PromptProgress):
                    yield format_event({"progress": list(event)})
                elif isinstance(event, Text):
                    sent += len(event.ids)
                    yield format_event({"ids": list(event.ids)})
                elif isinstance(event, Done):
                    rest = list(event.ids[sent:])
                    yield format_event({"ids": rest, "end": _END_NAMES.get(event.finish_reason, "limit")})
        yield END_OF_STREAM
