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

from qwenlocal.chat.answer_loop import AnswerItem, AnswerLoop
from qwenlocal.chat.chat_model import load_chat_model
from qwenlocal.chat.chat_template import CHATML, ChatTemplate
from qwenlocal.chat.events import Done, Summarizing, TurnsEvicted
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import ModelNotFound
from qwenlocal.machine import this_machine
from qwenlocal.server.app import create_app
from qwenlocal.server.engine import (
    Embedding,
    EngineEvent,
    GenerationRequest,
    ModelHost,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from qwenlocal.server.http_connection import HttpConnection
from qwenlocal.server.model_functions import ModelFunctions
from qwenlocal.server.server_settings import ServerSettings

_T = TypeVar("_T")

GREEDY = Sampling(temperature=0, repeat_penalty=1)
CONTEXT = 2048


class LocalEngine:
    """Implements `Engine` with a model in this process; `running` counts the answers that are being computed."""

    def __init__(self, path: Path, name: str) -> None:
        request = LoadRequest(n_ctx=CONTEXT, threads=1, n_sequences=2, flash_attention=False)
        size = path.stat().st_size
        loaded = load_chat_model(path, LoadOptions(request, lookup=False), this_machine(), name=name, size=size)
        self._model = replace(loaded, sampling=GREEDY, template=ChatTemplate(CHATML))
        self._functions = ModelFunctions(self._model)
        self._thread, self._lock, self._keys = ThreadPoolExecutor(1), asyncio.Lock(), itertools.count()
        self._inboxes: dict[int, Callable[[AnswerItem], object]] = {}
        self._answers = AnswerLoop(
            self._model.create_scheduler(1, uses_lookup=False), self._model.model.tokenizer, self._emit
        )
        self._computing = threading.Thread(target=self._answers.run)
        self._computing.start()
        self.info = ModelInfo(
            name,
            size,
            path.stat().st_mtime,
            "sha",
            "f32",
            "qwen2",
            is_loaded=True,
            n_ctx=self._model.context.n_ctx,
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
                async for event in self._answer(request):
                    yield event
            finally:
                self.running -= 1

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        key, inbox, loop = next(self._keys), asyncio.Queue[AnswerItem](), asyncio.get_running_loop()
        self._inboxes[key] = lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item)
        self._answers.submit(await self._call(self._functions.create_task, key, request))
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                assert not isinstance(item, (Summarizing, TurnsEvicted))
                yield item
                if isinstance(item, Done):
                    return
        finally:
            self._answers.cancel(key)

    def _emit(self, items: Sequence[tuple[int, AnswerItem]]) -> None:
        for key, item in items:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._inboxes[key](item)

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return self._functions.tokenize(text, special, add_bos)

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return self._functions.pieces(ids)

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._functions.apply_template(messages)

    async def count_tokens(self, prompt: Prompt) -> int:
        return self._functions.count_tokens(prompt)

    async def embed(self, prompts: Sequence[TextPrompt | TokenPrompt]) -> list[Embedding]:
        return await self._call(self._functions.embed, prompts)

    def close(self) -> None:
        self._thread.shutdown()
        self._answers.quit()
        self._computing.join()
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
