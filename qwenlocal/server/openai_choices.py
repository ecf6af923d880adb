"""The choices in responses of OpenAI's chats and completions, whole and in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from qwenlocal.chat.events import Done, GenerationStats, Text, TokenLogprob
from qwenlocal.server.answering import AnswerService, CollectedAnswer
from qwenlocal.server.engine import Engine, GenerationRequest, TextPrompt, TokenPrompt
from qwenlocal.server.openai_format import (
    FINISH_REASONS,
    CompletionLogprobs,
    RunningStats,
    format_chat_logprobs,
    format_timings,
    format_usage,
    new_header,
)
from qwenlocal.server.openai_models import GenerationFields
from qwenlocal.server.streaming import END_OF_STREAM, format_event


class ChoiceFormat(Protocol):
    """The format of choices; `object` and `chunk` name the kind of response."""

    object: str
    chunk: str
    id_prefix: str

    async def prepare(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Compute additional data that the choices need."""

    def first_chunk(self, index: int, answer: CollectedAnswer) -> dict[str, Any] | None:
        """Return the chunk before the text of the answer number `index`; None if there is none."""

    def text_chunk(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the next text."""

    def last_chunk(self) -> dict[str, Any]:
        """Return the fields of the chunk with the finish reason."""

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        """Return the fields of a complete choice."""


class ChatChoices:
    """The choices of a chat."""

    object, chunk, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs

    async def prepare(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        pass

    def first_chunk(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def text_chunk(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self._format(tokens)}

    def last_chunk(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": self._format(answer.logprobs)}

    def _format(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return format_chat_logprobs(tokens) if self._has_logprobs else None


class CompletionChoices:
    """The choices of completions; with `echo`, each begins with its prompt."""

    object = chunk = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, has_logprobs: bool, echo: bool) -> None:
        self._has_logprobs, self._echo = has_logprobs, echo
        self._prompts: list[str] = []
        self._logprobs: list[CompletionLogprobs] = []

    async def prepare(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        self._logprobs = [CompletionLogprobs() for _ in requests]
        if self._echo:
            self._prompts = [await _read_prompt(engine, request) for request in requests]

    def first_chunk(self, index: int, answer: CollectedAnswer) -> dict[str, Any] | None:
        return self.text_chunk(index, self._prompts[index], answer.prompt_logprobs) if self._echo else None

    def text_chunk(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs[index].format(tokens) if self._has_logprobs else None}

    def last_chunk(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def full_choice(self, index: int, answer: CollectedAnswer) -> dict[str, Any]:
        prompt = self._prompts[index] if self._echo else ""
        return self.text_chunk(index, prompt + answer.text, [*answer.prompt_logprobs, *answer.logprobs])


async def _read_prompt(engine: Engine, request: GenerationRequest) -> str:
    """Return the text of a prompt, to be repeated before the answer."""
    prompt = request.prompt
    if isinstance(prompt, TokenPrompt):
        return b"".join(await engine.pieces(prompt.ids)).decode("utf-8", errors="replace")
    return prompt.text if isinstance(prompt, TextPrompt) else ""


class ChoiceResponse:
    """A response with the answers to `requests`, as `body` asks for it."""

    def __init__(
        self,
        service: AnswerService,
        body: GenerationFields,
        requests: Sequence[GenerationRequest],
        choices: ChoiceFormat,
    ) -> None:
        self._service, self._body, self._requests, self._format = service, body, requests, choices

    async def collect(self) -> dict[str, Any]:
        """Return the complete response."""
        async with self._service.open(self._body.model) as engine:
            await self._format.prepare(engine, self._requests)
            answers = await self._service.collect(engine, self._requests)
            header = self._header(engine, self._format.object)
        ends = [answer.end for answer in answers]
        choices = [
            {
                "index": index,
                **self._format.full_choice(index, answer),
                "finish_reason": FINISH_REASONS[answer.end.finish_reason],
            }
            for index, answer in enumerate(answers)
        ]
        return {
            **header,
            "choices": choices,
            "usage": format_usage(ends, self._body.choices),
            "timings": format_timings(ends[0].stats),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the response as server-sent events."""
        options = self._body.stream_options
        has_usage = bool(options and options.include_usage)
        answers = [CollectedAnswer() for _ in self._requests]
        is_started = [False] * len(answers)
        running = [RunningStats() for _ in answers]
        async with self._service.open(self._body.model) as engine:
            header = {**self._header(engine, self._format.chunk), **({"usage": None} if has_usage else {})}
            await self._format.prepare(engine, self._requests)
            async with contextlib.aclosing(self._service.stream(engine, self._requests)) as events:
                async for index, event in events:
                    answers[index].add(event)
                    stats = running[index].add(event)
                    if not isinstance(event, (Text, Done)):
                        continue
                    if not is_started[index]:
                        is_started[index] = True
                        if chunk := self._format.first_chunk(index, answers[index]):
                            yield _format_chunk(header, index, chunk)
                    if isinstance(event, Text):
                        chunk = self._format.text_chunk(index, event.text, event.logprobs)
                        yield _format_chunk(header, index, chunk, stats if self._body.timings_per_token else None)
                    else:
                        reason = FINISH_REASONS[event.finish_reason]
                        yield _format_chunk(header, index, self._format.last_chunk(), event.stats, reason)
        if has_usage:
            usage = format_usage([answer.end for answer in answers], self._body.choices)
            yield format_event({**header, "choices": [], "usage": usage})
        yield END_OF_STREAM

    def _header(self, engine: Engine, kind: str) -> dict[str, Any]:
        return new_header(kind, self._body.model or engine.info.name, self._format.id_prefix)


def _format_chunk(
    header: dict[str, Any],
    index: int,
    chunk: dict[str, Any],
    stats: GenerationStats | None = None,
    finish_reason: str | None = None,
) -> bytes:
    timings = {"timings": format_timings(stats)} if stats else {}
    return format_event({**header, "choices": [{"index": index, **chunk, "finish_reason": finish_reason}], **timings})
