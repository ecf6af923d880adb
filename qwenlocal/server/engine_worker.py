"""
The process that runs a model for a server.

llama.cpp ends the process when it is misused or a device vanishes; the server survives that. The main thread receives
messages, one thread prepares prompts, and one computes.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from qwenlocal.api.model_loader import ModelLoader
from qwenlocal.chat.answer_loop import NO_LIMIT, AnswerItem, AnswerLoop, AnswerTask
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.chat.chat_template import ChatTemplate, encode_messages, require_template, require_tokens
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.scheduler import Scheduler, SequenceRequest
from qwenlocal.errors import BadWeights, QwenlocalError, UnknownToken
from qwenlocal.huge_pages import collapse_in_background
from qwenlocal.i18n import tr
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.paths import Folders
from qwenlocal.server.engine import ChatPrompt, Embedding, ModelInfo, Prompt, TextPrompt, TokenPrompt
from qwenlocal.server.event_buffer import EventBuffer
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


class ModelFunctions:
    """Functions of a model besides answering; each method can be called through `Call`."""

    def __init__(self, model: ChatModel) -> None:
        self._model, self.tokenizer = model, model.model.tokenizer

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return Embedder(self._model.model, self._model.plan.options)

    def embed(
        self, prompts: Sequence[TextPrompt | TokenPrompt], is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Embedding]:
        """Return an embedding per prompt; fewer, once it is not wanted any more."""
        embedder = self._embedder
        texts = [
            embedder.encode(prompt.text, truncate=prompt.truncate)
            if isinstance(prompt, TextPrompt)
            else self.encode(prompt)
            for prompt in prompts
        ]
        vectors = itertools.takewhile(lambda vector: is_wanted(), embedder.embed(texts))
        return [Embedding(vector, len(ids)) for vector, ids in zip(vectors, texts, strict=False)]

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """
        Return the token ids of a prompt.

        Raises
        ------
        UsageError: the model has no chat template. BadWeights, TextTooLong: the messages cannot be encoded.
        """
        if isinstance(prompt, ChatPrompt):
            text = prompt.answer_prefix if isinstance(prompt.answer_prefix, str) else ""
            ids = encode_messages(self._template, prompt.messages, self.tokenizer, text)
            self._check_ids(prompt.prefix_ids)
            return [*require_tokens(ids), *prompt.prefix_ids]
        if isinstance(prompt, TextPrompt):
            return self.tokenize(prompt.text, True, self.tokenizer.adds_bos)
        self._check_ids(prompt.ids)
        return prompt.ids

    def _check_ids(self, ids: Sequence[int]) -> None:
        n_vocab = len(self.tokenizer)
        if (invalid := next((id for id in ids if not 0 <= id < n_vocab), None)) is not None:
            raise UnknownToken(invalid)

    @property
    def _template(self) -> ChatTemplate:
        return require_template(self._model.template, tr("Use /v1/completions, or another model."))

    def create_sampler(self, overrides: Mapping[str, Any]) -> tuple[Sampling, Sampler]:
        """
        Return the model's sampling with some of its fields replaced, and a sampler for it.

        Raises
        ------
        UsageError: a value is invalid.
        """
        sampling = self._model.sampling.with_overrides(overrides)
        self._check_ids(sampling.answer_prefix)
        return sampling, Sampler(sampling, self.tokenizer)

    def tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.tokenize(text, special=special, add_bos=add_bos)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """
        Return the bytes of each token.

        Raises
        ------
        UnknownToken: there is no such token.
        """
        self._check_ids(ids)
        return [self.tokenizer.piece(id, special=True) for id in ids]

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of the prompt for messages."""
        return str(self._template.render(messages))

    def count_tokens(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.encode(prompt))


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
        prompt_cache = PromptCache(folder, compute_cache_key(path, model.context.options)) if folder else None
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
            task = self._create_task(message, functions)
        except Exception as error:
            if self._remove_pending(message.key):
                self._emit([(message.key, error)])
        else:
            if not self._remove_pending(message.key, lambda: loop.submit(task)) and task.sampler:
                task.sampler.close()

    def _create_task(self, message: Submit, functions: ModelFunctions) -> AnswerTask:
        request = message.request
        ids = require_tokens(functions.encode(request.prompt))
        prefix = request.prompt.prefix_ids if isinstance(request.prompt, ChatPrompt) else ()
        sampling, sampler = functions.create_sampler({"answer_prefix": prefix, **request.sampling})
        sequence = SequenceRequest(
            message.key,
            ids,
            sampling,
            NO_LIMIT if request.max_tokens is None else request.max_tokens,
            request.client,
            request.top_logprobs,
            request.prompt_logprobs,
            request.cache_prompt,
        )
        builder = AnswerBuilder(
            functions.tokenizer,
            len(ids) - len(prefix),
            grammar=sampling.grammar,
            stop_strings=request.stop,
            prefix=prefix,
        )
        return AnswerTask(sequence, builder, sampler)

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
