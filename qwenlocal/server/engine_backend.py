"""Answers of the server's engine for a `Conversation`, which runs in a thread of its own."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import queue
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from qwenlocal.chat.context_window import EVICTION_TARGET, EVICTION_THRESHOLD, evictable_turns, select_messages
from qwenlocal.chat.conversation import Continuation, GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, GenerationStats, PromptLogprobs, Text, TurnsEvicted
from qwenlocal.chat.thread import Message, Thread
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import UsageError
from qwenlocal.formatting import shorten
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
        return self._run(self._engine.count_tokens(ChatPrompt(messages))) if messages else 0

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        yield from self._make_room(thread)
        yield from self._stream(_build_request(thread, config, self._client))

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        raise UsageError(tr("A server does not continue answers."), hint=tr("Retry the answer instead."))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel_pump)

    def _cancel_pump(self) -> None:
        self._is_stopped = True
        if self._pump:
            self._pump.cancel()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- streaming

    def _stream(self, request: GenerationRequest) -> Iterator[Event]:
        """Yield the events of an answer; after `stop`, `Done` with the counts of what came before it."""
        items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._loop.call_soon_threadsafe(self._start_pump, request, items)
        prompt = tokens = 0
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
                first, tokens = first if tokens else last, item.tokens
            yield item
            if isinstance(item, Done):
                return
        yield Done(FinishReason.INTERRUPTED, GenerationStats(prompt, 0, tokens, first - start, last - first))

    def _start_pump(self, request: GenerationRequest, items: queue.SimpleQueue[_Item]) -> None:
        if self._is_stopped:
            items.put(None)
        else:
            events = self._service.stream(self._engine, [request])
            self._pump = self._loop.create_task(_pump(events, items))

    # --- a full context

    def _make_room(self, thread: Thread) -> Iterator[Event]:
        """Evict the oldest turns if the prompt leaves too little space for an answer, as `LocalBackend` does."""
        if self._count_without(thread, 0) <= self.n_ctx * EVICTION_THRESHOLD:
            return
        turns = evictable_turns(thread)
        target = self.n_ctx * EVICTION_TARGET
        count = bisect.bisect_left(
            range(len(turns)), True, key=lambda count: self._count_without(thread, count) <= target
        )
        if count and self._count_without(thread, count) < self.n_ctx:
            thread.evict_turns([turn.question.number for turn in turns[:count]], thread.summary)
            yield TurnsEvicted(count, shorten(turns[0].question.text))

    def _count_without(self, thread: Thread, count: int) -> int:
        """Return the number of tokens of the prompt without the oldest `count` turns that may leave it."""
        evicted = {turn.question.number for turn in evictable_turns(thread)[:count]}
        return self._run(self._engine.count_tokens(ChatPrompt(select_messages(thread, evicted))))


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


def _build_request(thread: Thread, config: GenerationConfig, client: str) -> GenerationRequest:
    values = {one.name: getattr(config.sampling, one.name) for one in fields(Sampling)}
    sampling = {name: value for name, value in values.items() if name not in config.unset and value is not None}
    return GenerationRequest(
        ChatPrompt(select_messages(thread)), sampling, config.max_tokens, tuple(config.stop_strings), client=client
    )
