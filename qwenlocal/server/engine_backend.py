"""Answers of the server's engine for a `Conversation`, which runs in a thread of its own."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import queue
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from qwenlocal.chat.context_window import select_messages, select_messages_before
from qwenlocal.chat.conversation import Continuation, GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, PromptLogprobs, Text
from qwenlocal.chat.thread import Message, Thread
from qwenlocal.chat.turn_eviction import Messages, TurnEvictor
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress
from qwenlocal.server.answering import AnswerService, IndexedEvent
from qwenlocal.server.engine import ChatPrompt, Engine, GenerationRequest

_T = TypeVar("_T")

_Item = Event | PromptLogprobs | BaseException | None  # None: the answer has ended or was stopped


class EngineBackend:
    """
    Runs an engine of the event loop for a thread; implements `chat.conversation.ChatBackend`.

    Create it in the event loop. `stop` can be called from any thread, all other methods from one that is not the event
    loop's.
    """

    window = None

    def __init__(self, service: AnswerService, engine: Engine, client: str) -> None:
        self._service, self._engine, self._client = service, engine, client
        self._loop = asyncio.get_running_loop()
        self._pump: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._evictor = TurnEvictor(self.n_ctx, self._count_tokens, self._stream)

    @property
    def model(self) -> str:
        """The name of the model."""
        return self._engine.info.name

    @property
    def n_ctx(self) -> int:
        """The context in tokens."""
        return self._engine.info.n_ctx

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._run(self._engine.tokenize(text, special=False)))

    def count_prompt_tokens(self, thread: Thread) -> int:
        """Return the number of tokens of the prompt, 0 if there is nothing in it."""
        messages = select_messages(thread)
        return self._count_tokens(messages) if messages else 0

    def _count_tokens(self, messages: Messages) -> int:
        return self._run(self._engine.count_tokens(ChatPrompt(messages)))

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        if not (yield from self._evictor.make_room(thread, config.overflow)):
            yield from self._stream(select_messages(thread), config)

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        if answer.ids and answer.finish_reason == FinishReason.EOS.value:  # edited answers have no ids
            raise UsageError(tr("The last answer is complete."))
        if answer.ids and answer.model == self.model:  # the tokens of another model may mean another text
            prefix, text = tuple(answer.ids), self._complete_characters(answer)
        else:
            prefix, text = tuple(self._run(self._engine.tokenize(answer.text, special=False))), answer.text
        return Continuation(text, self._continue(thread, answer, config, prefix))

    def _complete_characters(self, answer: Message) -> str:
        """Return the text of an answer without the U+FFFD for half a character, which the next tokens complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(self._run(self._engine.pieces(answer.ids))))
        return answer.text.removesuffix(decoder.decode(b"", final=True))

    def _continue(
        self, thread: Thread, answer: Message, config: GenerationConfig, prefix: tuple[int, ...]
    ) -> Iterator[Event]:
        """Yield the events of the rest of an answer; with it, the thread may not fit any more."""
        if not (yield from self._evictor.make_room(thread, config.overflow)):
            yield from self._stream(select_messages_before(thread, answer), config, prefix)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel_pump)

    def _cancel_pump(self) -> None:
        self._is_stopped = True
        if self._pump:
            self._pump.cancel()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- streaming

    def _stream(self, messages: Messages, config: GenerationConfig, prefix: tuple[int, ...] = ()) -> Iterator[Event]:
        """Yield the events of an answer; after `stop`, `Done` with what came before it."""
        items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        request = _build_request(messages, config, prefix, self._client)
        self._loop.call_soon_threadsafe(self._start_pump, request, items)
        ids, prompt, tokens = prefix, 0, 0
        start = first = last = time.monotonic()
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, PromptLogprobs):
                continue
            if isinstance(item, PromptProgress):
                prompt = item.total
            elif isinstance(item, Text):
                last = time.monotonic()
                first, tokens, ids = first if tokens else last, item.tokens, ids + item.ids
            yield item
            if isinstance(item, Done):
                return
        yield Done(FinishReason.INTERRUPTED, GenerationStats(prompt, 0, tokens, first - start, last - first), ids)

    def _start_pump(self, request: GenerationRequest, items: queue.SimpleQueue[_Item]) -> None:
        if self._is_stopped:
            items.put(None)
        else:
            events = self._service.stream(self._engine, [request])
            self._pump = self._loop.create_task(_pump(events, items))


async def _pump(events: AsyncGenerator[IndexedEvent, None], items: queue.SimpleQueue[_Item]) -> None:
    """Move events into a queue; the last item is None or an error."""
    last: BaseException | None = None
    try:
        async with contextlib.aclosing(events):
            async for _, event in events:
                items.put(event)
    except Exception as error:
        last = error
    finally:
        items.put(last)


def _build_request(
    messages: Messages, config: GenerationConfig, prefix: tuple[int, ...], client: str
) -> GenerationRequest:
    values = {one.name: getattr(config.sampling, one.name) for one in fields(Sampling)}
    sampling = {name: value for name, value in values.items() if name not in config.unset and value is not None}
    return GenerationRequest(
        ChatPrompt(messages, prefix),
        sampling,
        config.max_tokens,
        tuple(config.stop_strings),
        client=client,
    )
