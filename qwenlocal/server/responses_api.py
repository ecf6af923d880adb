"""
OpenAI's responses: text in, text out (https://platform.openai.com/docs/api-reference/responses).

Nothing is stored, so a response cannot be continued by its id.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from qwenlocal.chat.events import Done, FinishReason, Text
from qwenlocal.i18n import tr
from qwenlocal.server.answering import AnswerService
from qwenlocal.server.engine import ChatPrompt, Engine, GenerationRequest
from qwenlocal.server.grammar_compiler import GrammarCompiler
from qwenlocal.server.http_errors import BadField
from qwenlocal.server.json_route import JsonRoute
from qwenlocal.server.openai_format import new_id
from qwenlocal.server.request_fields import (
    OPENAI_CHAT_FIELDS,
    UNSUPPORTED_SAMPLING,
    ApiRequest,
    SamplingFields,
    TextContent,
    format_message,
    list_or_text,
)
from qwenlocal.server.security import identify_client
from qwenlocal.server.streaming import format_event, run_while_connected, stream_while_connected

# Unsupported fields that would change the answer, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED_SAMPLING,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "max_tool_calls": (),
    "reasoning": ({}, {"effort": "none"}),
    "max_tokens": (),
    "max_completion_tokens": (),
    **OPENAI_CHAT_FIELDS,
}


class InputMessage(BaseModel):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextContent


class TextFormat(BaseModel):
    """The format of the text."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")

    def to_dict(self) -> dict[str, Any]:
        """Return the format as it was sent."""
        return self.model_dump(by_alias=True, exclude_none=True)


class TextOptions(BaseModel):
    """Options for the text."""

    format: TextFormat | None = None


class ResponsesRequest(ApiRequest, SamplingFields):
    """`POST /v1/responses`."""

    model: str = Field("", max_length=500)
    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[InputMessage], Field(fail_fast=True, min_length=1, max_length=10_000), Tag("list")],
        Discriminator(list_or_text),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    text: TextOptions | None = None

    @property
    def text_format(self) -> TextFormat:
        """The format of the text."""
        return (self.text and self.text.format) or TextFormat.model_validate({})

    def prompt(self) -> ChatPrompt:
        """Return the instructions and the input for the chat template."""
        system = [format_message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return ChatPrompt([*system, format_message("user", self.input)])
        return ChatPrompt([*system, *(format_message(one.role, one.content) for one in self.input)])

    async def all_sampling(self, grammars: GrammarCompiler) -> dict[str, Any]:
        """
        Return the sampling and the format, for `GenerationRequest.sampling`.

        Raises
        ------
        BadField: the schema is missing or not supported.
        """
        sampling, form = self.sampling(), self.text_format
        if form.type == "text":
            return sampling
        if form.type == "json_schema" and form.json_schema is None:
            raise BadField("text.format.schema", tr("The schema is missing."))
        return {**sampling, "grammar": await grammars.compile_schema(form.json_schema, "text.format.schema")}


class ResponsesApi:
    """The route of responses."""

    def __init__(self, service: AnswerService, *, keep_alive: float) -> None:
        self._service, self._keep_alive = service, keep_alive

    def router(self) -> APIRouter:
        """Return the route."""
        router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])
        router.add_api_route("/responses", self.respond, methods=["POST"])
        return router

    async def respond(self, request: Request, body: ResponsesRequest) -> Response:
        """Answer a text or a chat."""
        body.refuse(_UNSUPPORTED)
        generation = GenerationRequest(
            body.prompt(),
            await body.all_sampling(self._service.grammars),
            body.max_output_tokens,
            client=identify_client(request),
        )
        if not body.stream:
            return JSONResponse(await run_while_connected(request, self._collect(body, generation)))
        return await stream_while_connected(
            request,
            self._stream(body, generation),
            keep_alive=self._keep_alive,
            encode_error=functools.partial(format_event, name="error"),
        )

    async def _collect(self, body: ResponsesRequest, generation: GenerationRequest) -> dict[str, Any]:
        async with self._service.open(body.model) as engine:
            response = _ResponseText(body, engine)
            (answer,) = await self._service.collect(engine, [generation])
        response.text = answer.text
        return response.finish(answer.end)

    async def _stream(self, body: ResponsesRequest, generation: GenerationRequest) -> AsyncGenerator[bytes, None]:
        is_started = False
        async with self._service.open(body.model) as engine:
            response = _ResponseText(body, engine)
            async with contextlib.aclosing(self._service.stream(engine, [generation])) as events:
                async for _, event in events:
                    if not is_started:
                        is_started = True
                        for chunk in response.begin():
                            yield chunk
                    if isinstance(event, Text):
                        yield response.add(event.text)
                    elif isinstance(event, Done):
                        for chunk in response.end(event):
                            yield chunk


class _ResponseText:
    """A response with one message, and its events."""

    def __init__(self, body: ResponsesRequest, engine: Engine) -> None:
        self._numbers = itertools.count()
        self._item_id = new_id("msg_")
        self.text = ""
        self._fields: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or engine.info.name,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text_format.to_dict()},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }

    def begin(self) -> list[bytes]:
        """Return the events before the text."""
        item = self._item("in_progress", [])
        return [
            self._event("response.created", response=self._fields),
            self._event("response.in_progress", response=self._fields),
            self._event("response.output_item.added", output_index=0, item=item),
            self._part_event("response.content_part.added", part=self._part()),
        ]

    def add(self, text: str) -> bytes:
        """Append text and return its event."""
        self.text += text
        return self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def end(self, end: Done) -> list[bytes]:
        """Return the events after the text."""
        response = self.finish(end)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        return [
            self._part_event("response.output_text.done", text=self.text, logprobs=[]),
            self._part_event("response.content_part.done", part=self._part()),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(kind, response=response),
        ]

    def finish(self, end: Done) -> dict[str, Any]:
        """Return the complete response."""
        is_complete = end.finish_reason in (FinishReason.EOS, FinishReason.STOP_STRING)
        status, stats = "completed" if is_complete else "incomplete", end.stats
        return {
            **self._fields,
            "status": status,
            "incomplete_details": None if is_complete else {"reason": "max_output_tokens"},
            "output": [self._item(status, [self._part()])],
            "usage": {
                "input_tokens": stats.prompt_tokens,
                "input_tokens_details": {"cached_tokens": stats.reused_tokens, "cache_write_tokens": 0},
                "output_tokens": stats.answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": stats.prompt_tokens + stats.answer_tokens,
            },
        }

    def _item(self, status: str, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _part_event(self, kind: str, **data: Any) -> bytes:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **data)

    def _event(self, kind: str, **data: Any) -> bytes:
        return format_event({"type": kind, "sequence_number": next(self._numbers), **data}, kind)
