"""
The process that runs a model for a server.

llama.cpp ends the process when it is misused or a device vanishes; the server survives that. The main thread receives
messages, one thread prepares prompts, and one computes.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from qwenlocal.api.model_loader import ModelLoader
from qwenlocal.chat.answer_loop import AnswerItem, AnswerLoop
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key
from qwenlocal.engine.scheduler import Scheduler
from qwenlocal.errors import BadWeights, QwenlocalError
from qwenlocal.huge_pages import collapse_in_background
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.paths import Folders
from qwenlocal.server.engine import Embedding, ModelInfo, TextPrompt, TokenPrompt
from qwenlocal.server.event_buffer import EventBuffer
from qwenlocal.server.model_functions import ModelFunctions
from qwenlocal.server.wire import (
    Call,
    Cancel,
    Emitted,
    Failed,
    Loading,
    Quit,
    Ready,
    Returned,
    Submit,
    WireError,
    WorkerConnection,
)

_PARKED = 8  # finished sequences that stay in the KV cache


@dataclass(frozen=True)
class WorkerSpec:
    """The model that a process runs, how to load it, and how many requests it answers at the same time."""

    model: ProvidedModel
    options: LoadOptions
    parallel: int


class Worker:
    """The process: receives messages until the server sends `Quit`; ends at once if the server has ended."""

    def __init__(self, connection: WorkerConnection, spec: WorkerSpec) -> None:
        self._connection, self._spec = connection, spec
        self._pending: set[int] = set()  # the keys of requests that are prepared, and of embeddings
        self._pending_lock = threading.Lock()  # between a last look at these keys and what follows from it

    def run(self) -> None:
        """Load the model and serve it."""
        request = replace(self._spec.options.request, n_sequences=self._spec.parallel + _PARKED)
        options = replace(self._spec.options, request=request)
        loader = ModelLoader(
            Folders.from_environment(),
            options,
            defers_template_errors=True,  # completions need no template
            on_crash=self._fail,
        )
        try:
            model = loader.load(self._spec.model, lambda fraction: self._send(Loading(fraction)))
        except OSError as error:  # the file was deleted, for instance, since the server was started
            self._fail(BadWeights.unreadable(self._spec.model.record.path, error))
            return
        except QwenlocalError as error:
            self._fail(error)
            return
        scheduler = self._create_scheduler(model)
        loop = AnswerLoop(scheduler, model.model.tokenizer, EventBuffer(self._emit).add)
        self._send(Ready(self._info(model), model.plan, model.notes))
        thread = threading.Thread(target=self._run_or_exit, args=(loop.run,))
        thread.start()
        collapse_in_background(self._spec.model.record.size, lambda: not scheduler.is_idle)
        self._receive(loop, ModelFunctions(model))
        loop.quit()
        thread.join()
        scheduler.save_prompt_caches()

    def _create_scheduler(self, model: ChatModel) -> Scheduler:
        path, folder = self._spec.model.record.path, self._spec.options.prompt_caches
        prompt_cache = (
            PromptCache(folder, compute_cache_key(path, model.context.options, model.adapters.specs))
            if folder
            else None
        )
        return model.create_scheduler(
            self._spec.parallel, uses_lookup=self._spec.options.lookup, prompt_cache=prompt_cache
        )

    def _info(self, model: ChatModel) -> ModelInfo:
        record = self._spec.model.record
        return ModelInfo(
            str(self._spec.model.name),
            record.size,
            record.path.stat().st_mtime,
            is_loaded=True,
            n_ctx=model.plan.options.n_ctx,
            n_ctx_train=model.model.n_ctx_train,
            has_template=model.template is not None,
            bos_token=model.model.tokenizer.bos,
            eos_token=model.model.tokenizer.eos,
        )

    def _run_or_exit(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function; if it raises, report that and end the process, because requests would wait forever."""
        try:
            function(*arguments)
        except BaseException as error:
            self._fail(error)
            os._exit(1)  # the server starts another process, and this one would keep the model's memory

    def _receive(self, loop: AnswerLoop, functions: ModelFunctions) -> None:
        # Embeddings take seconds, and so do large grammars; nothing that is quick waits for them.
        with (
            ThreadPoolExecutor(max_workers=1) as quick,
            ThreadPoolExecutor(max_workers=1) as compiling,
            ThreadPoolExecutor(max_workers=1) as embedding,
        ):

            def handle(message: object) -> None:
                if isinstance(message, Submit):
                    self._pending.add(message.key)
                    executor = compiling if message.request.sampling.get("grammar") else quick
                    executor.submit(self._run_or_exit, self._prepare, message, loop, functions)
                elif isinstance(message, Call) and message.method == "embed":
                    self._pending.add(message.key)
                    embed = functools.partial(self._embed, functions, message.key)
                    embedding.submit(self._run_or_exit, self._call, message, embed)
                elif isinstance(message, Call):
                    quick.submit(self._run_or_exit, self._call, message, getattr(functions, message.method))
                elif isinstance(message, Cancel) and not self._remove_pending(message.key):
                    loop.cancel(message.key)

            # Inside the block, whose end would wait for embeddings.
            self._run_or_exit(self._handle_messages, handle)
            self._pending.clear()  # the process does not wait for embeddings

    def _handle_messages(self, handle: Callable[[object], None]) -> None:
        while not isinstance(message := self._receive_message(), Quit):
            handle(message)

    def _remove_pending(self, key: int, then: Callable[[], None] = lambda: None) -> bool:
        """Remove a key and call `then`, unless it was removed before; return True if it was not."""
        with self._pending_lock:
            if is_pending := key in self._pending:
                self._pending.remove(key)
                then()
            return is_pending

    def _prepare(self, message: Submit, loop: AnswerLoop, functions: ModelFunctions) -> None:
        if message.key not in self._pending:
            return
        try:
            task = functions.create_task(message.key, message.request)
        except Exception as error:
            if self._remove_pending(message.key):
                self._emit([(message.key, error)])
        else:
            if not self._remove_pending(message.key, lambda: loop.submit(task)) and task.sampler:
                task.sampler.close()

    def _embed(
        self, functions: ModelFunctions, key: int, prompts: Sequence[TextPrompt | TokenPrompt]
    ) -> list[Embedding]:
        try:
            return functions.embed(prompts, lambda: key in self._pending)
        finally:
            self._remove_pending(key)

    def _call(self, message: Call, function: Callable[..., object]) -> None:
        try:
            value = function(*message.arguments)
        except Exception as error:
            value = WireError.pack(error)
        self._send(Returned(message.key, value))

    def _emit(self, items: Sequence[tuple[int, AnswerItem]]) -> None:
        pack = WireError.pack
        self._send(Emitted([(key, pack(item) if isinstance(item, Exception) else item) for key, item in items]))

    def _fail(self, error: BaseException) -> None:
        self._send(Failed(WireError.pack(error)))

    def _receive_message(self) -> object:
        try:
            return self._connection.receive()
        except (EOFError, OSError):
            os._exit(1)  # the server was killed: nobody waits for what the other threads compute

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            os._exit(1)


def run_worker(connection: socket.socket, spec: WorkerSpec) -> None:
    """Run a model in this process. Ctrl-C is the server's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Worker(WorkerConnection(connection), spec).run()
