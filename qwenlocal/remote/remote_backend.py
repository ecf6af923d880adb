"""Answers of a remote model: messages are sent as they are, and chunks of the answer become events."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenlocal.chat.context_window import select_messages, select_messages_before
from qwenlocal.chat.conversation import Continuation, GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, Text
from qwenlocal.chat.thread import Message, Thread
from qwenlocal.formatting import replace_surrogates
from qwenlocal.remote.cancellable_stream import CancellableStream
from qwenlocal.remote.client import RemoteClient
from qwenlocal.remote.errors import AnswerCut, EngineFailed, RemoteError
from qwenlocal.remote.wire_format import AnswerChunk, TokenUsage

# Sampling parameters, as engines name them. Only the repetition penalty has two names: one for llama-server, one for
# vLLM, SGLang, DashScope and together.ai.
_PARAMETERS = {
    "temperature": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "min_p": ("min_p",),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty"),
    "repeat_last_n": ("repeat_last_n",),
    "frequency_penalty": ("frequency_penalty",),
    "presence_penalty": ("presence_penalty",),
    "seed": ("seed",),
}
# Continue the last message instead of beginning another one: vLLM and SGLang. llama-server does so by itself, DashScope
# if the message is "partial".
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


class RemoteBackend:
    """
    The model `model` of a remote engine; implements `chat.conversation.ChatBackend`.

    `response_format` is OpenAI's field for answers in JSON. Tokens are not counted here, so there is no window.
    """

    window = None

    def __init__(self, client: RemoteClient, model: str, response_format: Mapping[str, Any] | None = None) -> None:
        self._client, self.model, self._response_format = client, model, response_format
        self._stream: CancellableStream[AnswerChunk] | None = None

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        yield from self._answer(select_messages(thread), config)

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        partial = {**answer.to_dict(), "partial": True}
        messages: list[Mapping[str, Any]] = [*select_messages_before(thread, answer), partial]
        return Continuation(answer.text, self._answer(messages, config, answer.text))

    def stop(self) -> None:
        if stream := self._stream:
            stream.cancel()

    def _answer(
        self, messages: Sequence[Mapping[str, Any]], config: GenerationConfig, text: str = ""
    ) -> Iterator[Event]:
        """Yield the events of an answer that begins with `text`."""
        request = self._request(messages, config) | (_CONTINUE if text else {})
        clock, has_text, failure = _AnswerClock(), False, None
        last = AnswerChunk()
        self._stream = stream = self._client.stream_chat(request)
        try:
            for chunk in stream:
                clock.record(chunk)
                if chunk.finish_reason:
                    last = chunk
                if chunk.text:
                    text, has_text = text + chunk.text, True
                    yield Text(chunk.text)
                if chunk.error:
                    raise EngineFailed(self._client.endpoint.host, 0, chunk.error)
        except RemoteError as error:
            if not last.finish_reason:  # otherwise the answer is complete
                failure = error
        finally:
            stream.cancel()
        if last.finish_reason == "content_filter":
            failure = AnswerCut(self._client.endpoint.host, "content_filter")
        if failure and not has_text:
            raise failure
        reason = FinishReason.INTERRUPTED if failure else _finish_reason(last)
        yield Done(reason, clock.stats(), is_incomplete=self._response_format is not None and not _is_json(text))
        if failure:
            raise failure

    def _request(self, messages: Sequence[Mapping[str, Any]], config: GenerationConfig) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{**message, "content": replace_surrogates(message["content"])} for message in messages],
        }
        for name, fields in _PARAMETERS.items():
            value = getattr(config.sampling, name)
            if name not in config.unset and value is not None:
                request |= dict.fromkeys(fields, value)
        if config.max_tokens is not None:
            request["max_tokens"] = config.max_tokens
        if config.stop_strings:
            request["stop"] = list(config.stop_strings)
        if self._response_format is not None:
            request["response_format"] = self._response_format
        return request


class _AnswerClock:
    """Measures an answer from its request on, and keeps the engine's counts of tokens."""

    def __init__(self) -> None:
        self._start = self._first = self._last = time.monotonic()
        self._usage: TokenUsage | None = None
        self._has_begun = False

    def record(self, chunk: AnswerChunk) -> None:
        self._usage = chunk.usage or self._usage
        if chunk.text or chunk.is_thinking:
            self._last = time.monotonic()
            if not self._has_begun:
                self._first, self._has_begun = self._last, True

    def stats(self) -> GenerationStats:
        usage = self._usage or TokenUsage(0, 0)
        first = self._first if self._has_begun else time.monotonic()
        return GenerationStats(
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.answer_tokens,
            first - self._start,
            self._last - self._first,
        )


def _finish_reason(last: AnswerChunk) -> FinishReason:
    """Return why an answer ended; `last` has no finish reason if it was stopped here."""
    if not last.finish_reason:
        return FinishReason.INTERRUPTED
    if last.finish_reason == "length":
        return FinishReason.LENGTH
    return FinishReason.STOP_STRING if last.is_stop_string else FinishReason.EOS


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False
