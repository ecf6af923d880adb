"""The Anthropic API: messages, and counting their tokens (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from qwenlocal.chat.events import Done, FinishReason, Text
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import ChatPrompt, Engine, GenerationRequest
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.openai_format import new_id
from qwenlocal.server.request_fields import (
    OPENAI_CHAT_FIELDS,
    UNSUPPORTED_SAMPLING,
    ApiRequest,
    SamplingFields,
    StopStrings,
    TextContent,
    continue_answer,
    format_message,
)
from qwenlocal.server.security import identify_client
from qwenlocal.server.streaming import format_event, run_while_connected, stream_while_connected

_STOP_REASONS = {
    FinishReason.EOS: "end_turn",
    FinishReason.STOP_STRING: "stop_sequence",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.CONTEXT_FULL: "model_context_window_exceeded",
}
# Unsupported fields that would change the answer, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_SAMPLING,
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "output_format": (),
    **OPENAI_CHAT_FIELDS,
    "top_logprobs": (0,),
}


class AnthropicMessage(BaseModel):
    """A message; only text is supported."""

    role: Literal["user", "assistant"]
    content: TextContent


class AnthropicFormat(BaseModel):
    """The format of an answer."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(validation_alias="schema")


class OutputConfig(BaseModel):
    """Options for the answer."""

    format: AnthropicFormat | None = None


class CountTokensRequest(ApiRequest):
    """`POST /v1/messages/count_tokens`."""

    model: str = Field("", max_length=500)
    messages: list[AnthropicMessage] = Field(fail_fast=True, min_length=1, max_length=10_000)
    system: TextContent | None = None

    def prompt(self) -> ChatPrompt:
        """
        Return the messages for the chat template; the model continues a last message of the assistant.

        Raises
        ------
        BadField: a field is not supported, or the last message cannot be continued.
        """
        self.refuse(_UNSUPPORTED)
        system = [format_message("system", self.system)] if self.system else []
        messages = [*system, *(format_message(one.role, one.content) for one in self.messages)]
        if messages[-1]["role"] != "assistant":
            return ChatPrompt(messages)
        if messages[-1]["content"][-1:].isspace():  # Anthropic refuses it, too: few answers continue after a space
            field = f"messages.{len(self.messages) - 1}.content"
            raise BadField(field, tr("A prefilled answer must not end with a space or a line break."))
        return continue_answer(messages)


class MessagesRequest(CountTokensRequest, SamplingFields):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None


class AnthropicApi:
    """The routes that Anthropic's clients use."""

    def __init__(self, service: AnswerService, *, keep_alive: float) -> None:
        self._service, self._keep_alive = service, keep_alive

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(prefix="/v1/messages", route_class=JsonRoute, tags=["Anthropic"])
        router.add_api_route("", self.answer, methods=["POST"])
        router.add_api_route("/count_tokens", self.count_tokens, methods=["POST"])
        return router

    async def count_tokens(self, body: CountTokensRequest) -> Response:
        """Count the tokens of a chat."""
        prompt = body.prompt()
        async with self._service.open(body.model) as engine:
            return JSONResponse({"input_tokens": await engine.count_tokens(prompt)})

    async def answer(self, request: Request, body: MessagesRequest) -> Response:
        """Answer the last message of a chat."""
        prompt, sampling = body.prompt(), body.sampling()
        if body.output_config and body.output_config.format:
            if body.messages[-1].role == "assistant":
                raise BadField(
                    "output_config.format",
                    tr("“output_config.format” cannot be combined with a last message of the role “assistant”."),
                )
            schema = body.output_config.format.json_schema
            sampling["grammar"] = await self._service.grammars.compile_schema(schema, "output_config.format.schema")
        stop = tuple(body.stop_sequences or ())
        generation = GenerationRequest(prompt, sampling, body.max_tokens, stop, client=identify_client(request))
        if not body.stream:
            return JSONResponse(await run_while_connected(request, self._collect(body, generation)))
        return await stream_while_connected(
            request,
            self._stream(body, generation),
            keep_alive=self._keep_alive,
            encode_error=functools.partial(format_event, name="error"),
        )

    async def _collect(self, body: MessagesRequest, generation: GenerationRequest) -> dict[str, Any]:
        async with self._service.open(body.model) as engine:
            (answer,) = await self._service.collect(engine, [generation])
            message = _new_message(body, engine)
        end = answer.end
        return {
            **message,
            "content": [{"type": "text", "text": answer.text}],
            **_format_stop(end),
            "usage": _format_usage(end.stats.prompt_tokens, end.stats.reused_tokens, end.stats.answer_tokens),
        }

    async def _stream(self, body: MessagesRequest, generation: GenerationRequest) -> AsyncGenerator[bytes, None]:
        is_started = False
        async with self._service.open(body.model) as engine:
            message = _new_message(body, engine)
            async with contextlib.aclosing(self._service.stream(engine, [generation])) as events:
                async for _, event in events:
                    if isinstance(event, PromptProgress) and not is_started:
                        is_started = True
                        usage = _format_usage(event.total, event.reused, 0)
                        yield _event("message_start", message={**message, "usage": usage})
                        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
                        yield _event("ping")
                    elif isinstance(event, Text):
                        yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": event.text})
                    elif isinstance(event, Done):
                        yield _event("content_block_stop", index=0)
                        usage = {"output_tokens": event.stats.answer_tokens}
                        yield _event("message_delta", delta=_format_stop(event), usage=usage)
        yield _event("message_stop")


def _event(name: str, **data: Any) -> bytes:
    return format_event({"type": name, **data}, name)


def _new_message(body: MessagesRequest, engine: Engine) -> dict[str, Any]:
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": body.model or engine.info.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _format_stop(end: Done) -> dict[str, Any]:
    return {"stop_reason": _STOP_REASONS[end.finish_reason], "stop_sequence": end.stop_string}


def _format_usage(n_prompt: int, n_reused: int, n_answer: int) -> dict[str, int]:
    return {
        "input_tokens": n_prompt - n_reused,
        "cache_read_input_tokens": n_reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": n_answer,
    }
