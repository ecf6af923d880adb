"""A server on a loopback port, with an engine in this process that answers one request at a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from qwenlocal.chat.chat_template import CHATML, ChatTemplate, encode_messages, require_tokens
from qwenlocal.chat.events import FinishReason, PromptLogprobs, TokenLogprob
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.llama import Model
from qwenlocal.engine.logprobs import Logprobs
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.scheduler import Ended, Prefilled, Sampled, Scheduler, SequenceRequest
from qwenlocal.errors import ModelNotFound, UnknownToken
from qwenlocal.server.app import create_app
from qwenlocal.server.engine import (
    ChatPrompt,
    Embedding,
    EngineEvent,
    GenerationRequest,
    ModelHost,
    ModelInfo,
    Prompt,
    TextPrompt,
)
from qwenlocal.server.http_connection import HttpConnection
from qwenlocal.server.server_settings import ServerSettings

_T = TypeVar("_T")

GREEDY = Sampling(temperature=0, repeat_penalty=1)
CONTEXT = 2048


class LocalEngine:
    """Implements `Engine` with a model in this process; `running` counts the answers that are being computed."""

    def __init__(self, path: Path, name: str) -> None:
        options = ContextOptions(CONTEXT, threads=1, n_seq_max=2, flash_attention=False)
        self._context = Context(Model(path), options)
        self._model = self._context.model
        self._tokenizer, self._template = self._model.tokenizer, ChatTemplate(CHATML)
        self._scheduler, self._embedder = Scheduler(self._context, 1), Embedder(self._model, options)
        self._thread, self._lock, self._keys = ThreadPoolExecutor(1), asyncio.Lock(), itertools.count()
        self.info = ModelInfo(
            name,
            path.stat().st_size,
            path.stat().st_mtime,
            "sha",
            "f32",
            "qwen2",
            is_loaded=True,
            n_ctx=self._context.n_ctx,
            n_ctx_train=CONTEXT,
        )
        self.running = 0
        self.requests: list[GenerationRequest] = []
        self.failure: Exception | None = None
        self.delay = 0.0  # seconds before an answer begins

    async def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def admit(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        self.requests.append(request)
        async with self._lock:
            self.running += 1
            try:
                await asyncio.sleep(self.delay)
                if self.failure:
                    raise self.failure
                ids = await self._call(self._encode, request.prompt)
                async for event in self._answer(request, ids):
                    yield event
            finally:
                self.running -= 1

    async def _answer(self, request: GenerationRequest, ids: Sequence[int]) -> AsyncGenerator[EngineEvent, None]:
        key, sampling = next(self._keys), replace(GREEDY, **request.sampling)
        limit = 1 << 30 if request.max_tokens is None else request.max_tokens
        job = SequenceRequest(key, ids, sampling, limit, "", request.top_logprobs, request.prompt_logprobs)
        prefix = request.prompt.prefix_ids if isinstance(request.prompt, ChatPrompt) else ()
        builder = AnswerBuilder(
            self._tokenizer,
            len(ids) - len(prefix),
            grammar=sampling.grammar,
            stop_strings=request.stop,
            prefix=prefix,
        )
        prompt = [TokenLogprob(ids[0], self._piece(ids[0]), float("nan"))]
        await self._call(self._scheduler.submit, job)
        try:
            while True:
                for event in await self._call(self._scheduler.step):
                    if isinstance(event, Prefilled):
                        yield builder.report(event.progress)
                        prompt += map(self._logprob, ids[len(prompt) :], event.logprobs)
                        if request.prompt_logprobs and event.progress.done == len(ids):
                            yield PromptLogprobs(tuple(prompt))
                    elif isinstance(event, Sampled):
                        for item in builder.add(event.id, event.logprobs and self._logprob(event.id, event.logprobs)):
                            yield item
                        if builder.finish_reason:
                            break
                    elif isinstance(event, Ended):
                        if event.error:
                            raise event.error
                        builder.finish_reason = FinishReason.CONTEXT_FULL if event.is_full else FinishReason.LENGTH
                if builder.finish_reason:
                    for item in builder.finish(builder.finish_reason):
                        yield item
                    return
        finally:
            self._thread.submit(self._scheduler.finish, key)

    def _logprob(self, id: int, logprobs: Logprobs) -> TokenLogprob:
        alternatives = tuple((other, self._piece(other), value) for other, value in logprobs.alternatives)
        return TokenLogprob(id, self._piece(id), logprobs.logprob, alternatives)

    def _piece(self, id: int) -> bytes:
        return self._tokenizer.piece(id, special=True)

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, ChatPrompt):
            text = prompt.answer_prefix if isinstance(prompt.answer_prefix, str) else ""
            ids = encode_messages(self._template, prompt.messages, self._tokenizer, text)
            return [*require_tokens(ids), *prompt.prefix_ids]
        if isinstance(prompt, TextPrompt):
            return require_tokens(self._tokenizer.tokenize(prompt.text, special=True))
        if max(prompt.ids) >= len(self._tokenizer):
            raise UnknownToken(max(prompt.ids))
        return prompt.ids

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return self._tokenizer.tokenize(text, special=special, add_bos=add_bos)

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        if max(ids, default=0) >= len(self._tokenizer):
            raise UnknownToken(max(ids))
        return [self._piece(id) for id in ids]

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._template.render(messages)

    async def count_tokens(self, prompt: Prompt) -> int:
        return len(self._encode(prompt))

    async def embed(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        ids = [
            self._embedder.encode(prompt.text, truncate=prompt.truncate)
            if isinstance(prompt, TextPrompt)
            else self._encode(prompt)
            for prompt in prompts
        ]
        vectors = await self._call(lambda: list(self._embedder.embed(ids)))
        return [Embedding(vector, len(one)) for vector, one in zip(vectors, ids, strict=True)]

    def close(self) -> None:
        self._thread.shutdown()
        self._scheduler.close()
        self._embedder.close()
        self._context.close()
        self._model.close()


class LocalHost:
    """Implements `ModelHost` with one model; the names of `aliases` also mean it."""

    def __init__(self, engine: LocalEngine, aliases: Sequence[str] = ()) -> None:
        self.engine, self._names = engine, ("", engine.info.name, *aliases)
        self.delay = 0.0  # seconds to load
        self.keep_alive: float | None = None  # of the last request

    def models(self) -> list[ModelInfo]:
        return [self.engine.info]

    async def find(self, name: str) -> ModelInfo:
        if name not in self._names:
            raise ModelNotFound(name)
        return self.engine.info

    @contextlib.asynccontextmanager
    async def open(self, name: str, keep_alive: float | None = None) -> AsyncIterator[LocalEngine]:
        await self.find(name)
        self.keep_alive = keep_alive
        await asyncio.sleep(self.delay)
        yield self.engine

    async def unload(self, name: str) -> None:
        await self.find(name)
        self.keep_alive = 0.0


class Server:
    """A server, its address and its engine."""

    def __init__(self, url: str, host: LocalHost) -> None:
        self.url, self.host, self.engine = url, host, host.engine


@contextlib.contextmanager
def serve(model: Path, *, name: str = "tiny", aliases: Sequence[str] = (), **settings: Any) -> Iterator[Server]:
    """Serve a model during the block."""
    engine = LocalEngine(model, name)
    host = LocalHost(engine, aliases)
    with contextlib.closing(engine), serve_host(host, **settings) as url:
        yield Server(url, host)


@contextlib.contextmanager
def serve_host(host: ModelHost, /, **settings: Any) -> Iterator[str]:
    """Serve the models of a host during the block, at the address that it gets."""
    # asyncio sets TCP_NODELAY, which saves 40 ms per response, if it knows that the protocol is TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        app = create_app(host, ServerSettings(**settings))
        server = uvicorn.Server(
            uvicorn.Config(app, http=HttpConnection, log_level="critical", timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def wait_until(is_true: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
