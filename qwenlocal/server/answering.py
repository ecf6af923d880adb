"""Answers for all APIs: open the model, generate several answers at once, collect complete answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field

from qwenlocal.chat.events import Done, FinishReason, PromptLogprobs, Text, TokenLogprob
from qwenlocal.errors import ModelNotFound, UsageError
from qwenlocal.i18n import tr
from qwenlocal.server.engine import (
    Embedding,
    Engine,
    EngineEvent,
    GenerationRequest,
    ModelHost,
    ModelInfo,
    TextPrompt,
    TokenPrompt,
)
from qwenlocal.server.grammar_compiler import GrammarCompiler
from qwenlocal.server.http_errors import BadField, HttpError
from qwenlocal.server.server_metrics import ServerMetrics

_CONCURRENT = 8  # answers of one HTTP request at a time, so that the process of the model does not store all of them

IndexedEvent = tuple[int, EngineEvent]


@dataclass
class CollectedAnswer:
    """An answer that grows with its events; `done` is the last one."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    done: Done | None = None

    def add(self, event: EngineEvent) -> None:
        """Append an event."""
        if isinstance(event, Text):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event.tokens
        elif isinstance(event, Done):
            self.done = event

    @property
    def end(self) -> Done:
        """The last event of a complete answer."""
        if self.done is None:
            raise ValueError("the answer has not ended")
        return self.done


class AnswerService:
    """Models and their answers, with metrics; `grammars` compiles the grammars of answers."""

    def __init__(self, host: ModelHost, metrics: ServerMetrics, grammars: GrammarCompiler) -> None:
        self._host, self._metrics, self.grammars = host, metrics, grammars

    def models(self) -> list[ModelInfo]:
        """Return all installed models."""
        return self._host.models()

    async def find_model(self, name: str) -> ModelInfo:
        """
        Return the installed model that a request names.

        Raises
        ------
        HttpError: it is not installed.
        """
        try:
            return await self._host.find(name)
        except ModelNotFound as error:
            raise self._model_not_found(name) from error

    async def unload(self, name: str) -> None:
        """
        Unload a model as soon as it is idle.

        Raises
        ------
        HttpError: it is not installed.
        """
        try:
            await self._host.unload(name)
        except ModelNotFound as error:
            raise self._model_not_found(name) from error

    def _model_not_found(self, name: str) -> HttpError:
        names = ", ".join(model.name for model in self.models()) or tr("none")
        return HttpError(
            404,
            tr("The model “{name}” is not installed. Installed: {names}.", name=name, names=names),
            code="model_not_found",
            param="model",
            hint=tr("To install another one, on the server: qwenlocal pull NAME"),
        )

    @contextlib.asynccontextmanager
    async def open(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Engine]:
        """
        Load a model and keep it loaded during the block, and for `keep_alive` seconds after it.

        Raises
        ------
        HttpError: it is not installed, or the server's options do not suit it. The errors of `ModelHost.open`.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                engine = await stack.enter_async_context(self._host.open(name, keep_alive))
            except ModelNotFound as error:
                raise self._model_not_found(name) from error
            except UsageError as error:
                hint = tr("On the server: {hint}", hint=error.hint) if error.hint else ""
                raise HttpError(500, str(error), code="model_not_loaded", hint=hint) from error
            yield engine

    async def stream(self, engine: Engine, requests: Sequence[GenerationRequest]) -> AsyncGenerator[IndexedEvent, None]:
        """
        Generate several answers at once, and yield their events with the index of the request.

        Raises
        ------
        HttpError: an answer was interrupted because the server is shutting down. The errors of `Engine.admit` and
        `Engine.generate`.
        """
        streams = [self._metrics.measure(engine.generate(request)) for request in requests]
        with engine.admit():
            async with contextlib.aclosing(_merge(streams)) as events:
                async for index, event in events:
                    if isinstance(event, Done) and event.finish_reason is FinishReason.INTERRUPTED:
                        raise HttpError(
                            503, tr("The answer was interrupted: the server is shutting down."), code="interrupted"
                        )
                    yield index, event

    async def embed(
        self,
        name: str,
        prompts: Sequence[TextPrompt | TokenPrompt],
        dimensions: int | None,
        keep_alive: float | None = None,
    ) -> tuple[str, list[Embedding]]:
        """
        Return the name of a model, and the embeddings of `prompts`.

        Raises
        ------
        BadField: the embeddings do not have the number of `dimensions`.
        """
        async with self.open(name, keep_alive) as engine:
            name, embeddings = engine.info.name, await engine.embed(prompts) if prompts else []
        if embeddings and dimensions not in (None, size := len(embeddings[0].vector)):
            raise BadField("dimensions", tr("This model's vectors have {size} dimensions.", size=size))
        return name, embeddings

    async def collect(self, engine: Engine, requests: Sequence[GenerationRequest]) -> list[CollectedAnswer]:
        """Return the complete answers to several requests."""
        answers = [CollectedAnswer() for _ in requests]
        async with contextlib.aclosing(self.stream(engine, requests)) as events:
            async for index, event in events:
                answers[index].add(event)
        return answers


async def _merge(streams: Sequence[AsyncGenerator[EngineEvent, None]]) -> AsyncGenerator[IndexedEvent, None]:
    """Yield the events of several streams as they come, each with the index of its stream."""
    if len(streams) == 1:  # the most frequent case, without a task and a queue
        async with contextlib.aclosing(streams[0]) as stream:
            async for event in stream:
                yield 0, event
        return
    queue: asyncio.Queue[IndexedEvent | None] = asyncio.Queue(maxsize=2 * _CONCURRENT)
    slots = asyncio.Semaphore(_CONCURRENT)

    async def pump(index: int, stream: AsyncGenerator[EngineEvent, None]) -> None:
        async with slots, contextlib.aclosing(stream):
            async for event in stream:
                await queue.put((index, event))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    everything = asyncio.gather(*tasks)
    closing = asyncio.ensure_future(_close_queue(everything, queue))
    try:
        while (item := await queue.get()) is not None:
            yield item
        everything.result()
    finally:
        for task in (*tasks, closing):
            task.cancel()
        await asyncio.gather(*tasks, closing, return_exceptions=True)


async def _close_queue(everything: asyncio.Future[list[None]], queue: asyncio.Queue[IndexedEvent | None]) -> None:
    await asyncio.gather(everything, return_exceptions=True)
    await queue.put(None)
