"""A model in a process of its own, as an `Engine` of the server's event loop."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from qwenlocal.chat.events import Done, FinishReason, GenerationStats
from qwenlocal.errors import EngineCrashed, QwenlocalError, ServerBusy, ServerStopped
from qwenlocal.server.engine import (
    Embedding,
    EngineEvent,
    GenerationRequest,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from qwenlocal.server.engine_worker import WorkerSpec, run_worker
from qwenlocal.server.wire import (
    Call,
    Cancel,
    Emitted,
    Failed,
    Loading,
    MessageProtocol,
    Quit,
    Ready,
    Returned,
    Submit,
    WireError,
    encode_message,
)

_QUIT_SECONDS = 10.0  # to save prompt caches
_SECONDS_PER_REQUEST = 5  # of a queue, for Retry-After
_SECONDS_PER_CALL = {"embed": 5}  # calls of other methods take milliseconds


class _PendingCall(NamedTuple):
    """A call of a function of the model."""

    method: str
    result: asyncio.Future[Any]


class EngineProcess:
    """
    Runs a model in a child process. Implements `Engine`; `start` first.

    At most `max_waiting` requests wait beyond those that are answered at the same time. Answers, embeddings and every
    other function have separate queues, so that many waiting embeddings do not block answers.
    """

    def __init__(
        self, spec: WorkerSpec, *, max_waiting: int = 64, report: Callable[[float], None] = lambda fraction: None
    ) -> None:
        """`report` gets the fraction of the model that is loaded, in the event loop."""
        self._spec, self._max_waiting, self._report = spec, max_waiting, report
        self._keys = itertools.count()
        self._queues: dict[int, asyncio.Queue[EngineEvent | QwenlocalError]] = {}
        self._calls: dict[int, _PendingCall] = {}
        self._n_admitted = 0
        self._failure: QwenlocalError | None = None
        self._ready: asyncio.Future[Ready] | None = None

    # --- life

    async def start(self) -> Ready:
        """
        Start the process and load the model.

        Raises
        ------
        BadWeights, NotEnoughMemory, ContextNotCreated: it cannot be loaded. EngineCrashed.
        """
        self._ready, self._disconnected = asyncio.get_running_loop().create_future(), asyncio.Event()
        self._spawning = asyncio.ensure_future(self._spawn())
        try:
            await asyncio.shield(self._spawning)  # `stop` needs the process
            return await self._ready
        except BaseException:
            await self.stop()
            raise

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: MessageProtocol(self._handle, self._disconnected.set), sock=ours
            )
            processes = multiprocessing.get_context("spawn")
            self._process = processes.Process(target=run_worker, args=(theirs, self._spec), daemon=True)
            try:
                await asyncio.to_thread(self._process.start)
            except BaseException:
                self._transport.close()
                raise
        self._ended = asyncio.ensure_future(self._wait_for_end())

    async def stop(self) -> None:
        """End the process; running answers are interrupted, and other requests get `ServerStopped`."""
        for inbox in self._queues.values():
            inbox.put_nowait(Done(FinishReason.INTERRUPTED, GenerationStats(0, 0, 0, 0.0, 0.0)))
        self._queues.clear()
        self._fail(ServerStopped())
        await asyncio.wait({self._spawning})
        if self._spawning.exception():  # there is no process; `start` raises this
            return
        self._send(Quit())
        _, running = await asyncio.wait({self._ended}, timeout=_QUIT_SECONDS)
        if running:
            self._process.kill()
            await asyncio.wait(running)

    async def _wait_for_end(self) -> None:
        """Wait until the process has ended, and tell everybody why."""
        await self._disconnected.wait()
        while (exit_code := self._process.exitcode) is None:  # None while another thread is waiting for it, too
            await asyncio.to_thread(self._process.join)
        self._fail(EngineCrashed.from_exit_code(exit_code, uses_gpu=self._uses_gpu))

    @property
    def is_alive(self) -> bool:
        """False once the process has ended by itself."""
        return self._failure is None

    @property
    def n_requests(self) -> int:
        """The number of answers that are being generated or waiting."""
        return len(self._queues)

    @property
    def info(self) -> ModelInfo:
        assert self._ready is not None
        return self._ready.result().info

    # --- requests

    @contextmanager
    def admit(self) -> Iterator[None]:
        self._check_queue(self._n_admitted, self._spec.parallel, _SECONDS_PER_REQUEST)
        self._n_admitted += 1
        try:
            yield
        finally:
            self._n_admitted -= 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        if self._failure is not None:
            raise self._failure
        key, inbox = next(self._keys), asyncio.Queue[EngineEvent | QwenlocalError]()
        self._queues[key] = inbox
        self._send(Submit(key, request))
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, QwenlocalError):
                    raise item
                yield item
                if isinstance(item, Done):
                    return
        finally:
            if self._queues.pop(key, None) is not None:
                self._send(Cancel(key))

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return list(await self._call("tokenize", text, special, add_bos))

    async def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return list(await self._call("pieces", list(ids)))

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return str(await self._call("apply_template", list(messages)))

    async def count_tokens(self, prompt: Prompt) -> int:
        return int(await self._call("count_tokens", prompt))

    async def embed(self, prompts: Sequence[TextPrompt | TokenPrompt]) -> list[Embedding]:
        return list(await self._call("embed", list(prompts)))

    async def _call(self, method: str, *arguments: Any) -> Any:
        n_others = sum(call.method == method for call in self._calls.values())
        self._check_queue(n_others, 1, _SECONDS_PER_CALL.get(method, 0))
        key = next(self._keys)
        self._calls[key] = call = _PendingCall(method, asyncio.get_running_loop().create_future())
        self._send(Call(key, method, arguments))
        try:
            return await call.result
        finally:
            if self._calls.pop(key, None) is not None:
                self._send(Cancel(key))

    def _check_queue(self, n_others: int, parallel: int, seconds: int) -> None:
        """
        Check that a request may wait with `n_others`, of which `parallel` are answered at a time, each in `seconds`.

        Raises
        ------
        ServerBusy: too many are waiting. EngineCrashed: the process has ended.
        """
        if self._failure is not None:
            raise self._failure
        n_waiting = n_others - parallel
        if n_waiting >= self._max_waiting:
            raise ServerBusy(n_waiting, max(1, seconds * (1 + n_waiting // parallel)))

    def _send(self, message: object) -> None:
        self._transport.write(encode_message(message))

    # --- replies

    def _handle(self, message: object) -> None:
        assert self._ready is not None
        if isinstance(message, Emitted):
            for key, item in message.items:
                self._deliver(key, item)
        elif isinstance(message, Returned):
            self._resolve(message)
        elif isinstance(message, Loading):
            self._report(message.fraction)
        elif isinstance(message, Failed):
            self._fail(message.error.unpack())
        elif isinstance(message, Ready) and not self._ready.done():
            self._ready.set_result(message)

    def _deliver(self, key: int, item: EngineEvent | WireError) -> None:
        if isinstance(item, (Done, WireError)):
            inbox = self._queues.pop(key, None)
        else:
            inbox = self._queues.get(key)
        if inbox:
            inbox.put_nowait(item.unpack() if isinstance(item, WireError) else item)

    def _resolve(self, message: Returned) -> None:
        call = self._calls.pop(message.key, None)
        if call is None or call.result.done():
            return
        if isinstance(message.value, WireError):
            call.result.set_exception(message.value.unpack())
        else:
            call.result.set_result(message.value)

    @property
    def _uses_gpu(self) -> bool:
        is_loaded = self._ready and self._ready.done() and not self._ready.exception()
        return bool(self._ready and is_loaded and self._ready.result().plan.offload.layers)

    def _fail(self, error: QwenlocalError) -> None:
        """Fail all waiting requests, because the process has ended; the first reason is the best one."""
        self._failure = self._failure or error
        for inbox in self._queues.values():
            inbox.put_nowait(self._failure)
        self._queues.clear()
        for future in (*(call.result for call in self._calls.values()), self._ready):
            if future is not None and not future.done():
                future.set_exception(self._failure)
        self._calls.clear()
