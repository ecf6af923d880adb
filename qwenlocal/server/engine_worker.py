"""
The process that runs a model for a server.

llama.cpp ends the process when it is misused or a device vanishes; the server survives that. The main thread receives
messages, one thread prepares prompts, and one computes.
"""

from __future__ import annotations

import functools
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from qwenlocal.api.model_loader import ModelLoader
from qwenlocal.chat.chat_model import ChatModel
from qwenlocal.chat.chat_template import ChatTemplate, encode_messages, require_template, require_tokens
from qwenlocal.chat.events import Event, FinishReason, PromptLogprobs, TokenLogprob
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.embedding import Embedder
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.logprobs import Logprobs
from qwenlocal.engine.memory import check_memory
from qwenlocal.engine.memory_cache import MemoryCache, choose_budget
from qwenlocal.engine.prompt_cache import PromptCache, compute_cache_key
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.scheduler import Prefilled, Sampled, Scheduler, SchedulerEvent, SequenceRequest
from qwenlocal.engine.speculation import NoSpeculation, Speculation
from qwenlocal.errors import BadWeights, QwenlocalError, UsageError
from qwenlocal.huge_pages import collapse_buffers
from qwenlocal.i18n import tr
from qwenlocal.library.provider import ProvidedModel
from qwenlocal.machine import this_machine
from qwenlocal.paths import Folders
from qwenlocal.server.engine import (
    ChatPrompt,
    Embedding,
    EngineEvent,
    GenerationRequest,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from qwenlocal.server.wire import Call, Cancel, Emitted, Failed, Loading, Quit, Ready, Returned, Submit, WireError

_UNLIMITED = 1 << 30  # tokens
_PARKED = 8  # finished sequences that stay in the KV cache


@dataclass(frozen=True)
class WorkerSpec:
    """The model that a process runs, how to load it, and how many requests it answers at the same time."""

    model: ProvidedModel
    options: LoadOptions
    parallel: int


class _Answer:
    """A request that is being answered."""

    def __init__(
        self,
        key: int,
        ids: Sequence[int],
        request: GenerationRequest,
        sampling: Sampling,
        sampler: Sampler,
        builder: AnswerBuilder,
    ) -> None:
        self.key, self.ids, self.request, self.builder = key, ids, request, builder
        self.sampling, self.sampler = sampling, sampler
        self.prompt_logprobs: list[TokenLogprob] = []


class EngineLoop:
    """Runs a scheduler in a thread: takes requests from other threads and sends their events."""

    def __init__(self, model: ChatModel, scheduler: Scheduler, send: Callable[[Emitted], None]) -> None:
        self._model, self._scheduler, self._send = model, scheduler, send
        self._inbox: queue.SimpleQueue[_Answer | Cancel | Quit] = queue.SimpleQueue()
        self._answers: dict[int, _Answer] = {}

    def put(self, message: _Answer | Cancel | Quit) -> None:
        """Pass a message to the thread that computes, from any thread."""
        self._inbox.put(message)
        if isinstance(message, Cancel) and self._scheduler.is_prefilling(message.key):
            self._scheduler.interrupt()

    def run(self) -> None:
        """Compute until `Quit` arrives."""
        while self._take_messages():
            if self._scheduler.is_idle:
                continue
            items: list[tuple[int, EngineEvent | WireError]] = []
            for event in self._scheduler.step():
                if answer := self._answers.get(event.key):
                    items.extend((answer.key, item) for item in self._handle(answer, event))
            if items:
                self._send(Emitted(items))

    def _take_messages(self) -> bool:
        """Handle all messages; wait for one if there is nothing to compute. Return False after `Quit`."""
        while True:
            try:
                message = self._inbox.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return True
            if isinstance(message, Quit):
                return False
            if isinstance(message, Cancel):
                self._answers.pop(message.key, None)
                self._scheduler.finish(message.key)
            else:
                self._submit(message)

    def _submit(self, answer: _Answer) -> None:
        request = answer.request
        try:
            limit = _UNLIMITED if request.max_tokens is None else request.max_tokens
            self._scheduler.submit(
                SequenceRequest(
                    answer.key,
                    answer.ids,
                    answer.sampling,
                    limit,
                    request.client,
                    request.top_logprobs,
                    request.prompt_logprobs,
                    request.cache_prompt,
                ),
                answer.sampler,
            )
        except QwenlocalError as error:
            self._send(Emitted([(answer.key, WireError.pack(error))]))
        else:
            self._answers[answer.key] = answer

    def _handle(self, answer: _Answer, event: SchedulerEvent) -> Iterator[EngineEvent | WireError]:
        builder = answer.builder
        if isinstance(event, Prefilled):
            yield from self._report(answer, event)
        elif isinstance(event, Sampled):
            logprob = None if event.logprobs is None else self._token_logprob(event.id, event.logprobs)
            yield from builder.add(event.id, logprob)
            if builder.finish_reason:
                self._scheduler.finish(answer.key)
                yield from self._finish(answer, builder.finish_reason)
        elif event.error:
            del self._answers[answer.key]
            yield WireError.pack(event.error)
        else:
            yield from self._finish(answer, FinishReason.CONTEXT_FULL if event.is_full else FinishReason.LENGTH)

    def _report(self, answer: _Answer, event: Prefilled) -> Iterator[EngineEvent]:
        yield answer.builder.report(event.progress)
        if answer.request.prompt_logprobs:
            self._add_prompt_logprobs(answer, event)
            if event.progress.done == event.progress.total:
                yield PromptLogprobs(tuple(answer.prompt_logprobs))

    def _add_prompt_logprobs(self, answer: _Answer, event: Prefilled) -> None:
        """Store the probabilities of a part of a prompt, in place of earlier ones if the prompt is computed again."""
        ids, stored = answer.ids, answer.prompt_logprobs
        if not stored:
            stored.append(TokenLogprob(ids[0], self._model.model.tokenizer.piece(ids[0], special=True), float("nan")))
        end = min(event.progress.done + 1, len(ids))
        start = end - len(event.logprobs)
        stored[start:] = map(self._token_logprob, ids[start:end], event.logprobs)

    def _token_logprob(self, id: int, logprobs: Logprobs) -> TokenLogprob:
        piece = self._model.model.tokenizer.piece
        alternatives = tuple((other, piece(other, special=True), value) for other, value in logprobs.alternatives)
        return TokenLogprob(id, piece(id, special=True), logprobs.logprob, alternatives)

    def _finish(self, answer: _Answer, reason: FinishReason) -> Iterator[Event]:
        self._answers.pop(answer.key, None)
        yield from answer.builder.finish(reason)


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
            embedder.encode(prompt.text) if isinstance(prompt, TextPrompt) else self.encode(prompt)
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
            messages, prefix = prompt.messages, prompt.answer_prefix
            return require_tokens(encode_messages(self._template, messages, self.tokenizer, prefix))
        if isinstance(prompt, TextPrompt):
            return self.tokenize(prompt.text, True, self.tokenizer.adds_bos)
        self._check_ids(prompt.ids)
        return prompt.ids

    def _check_ids(self, ids: Sequence[int]) -> None:
        n_vocab = len(self.tokenizer)
        if (invalid := next((id for id in ids if not 0 <= id < n_vocab), None)) is not None:
            raise UsageError(tr("The model has no token with the id {id}.", id=invalid))

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
        return sampling, Sampler(sampling, self.tokenizer)

    def tokenize(self, text: str, special: bool, add_bos: bool) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.tokenize(text, special=special, add_bos=add_bos)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """
        Return the bytes of each token.

        Raises
        ------
        UsageError: there is no such token.
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

    def __init__(self, connection: Connection, spec: WorkerSpec) -> None:
        self._connection, self._spec = connection, spec
        self._sending = threading.Lock()
        self._pending: set[int] = set()  # the keys of requests that are prepared, and of embeddings
        self._pending_lock = threading.Lock()  # between a last look at these keys and what follows from it

    def run(self) -> None:
        """Load the model and serve it."""
        request = replace(self._spec.options.request, n_sequences=self._spec.parallel + _PARKED)
        options = replace(self._spec.options, request=request)
        loader = ModelLoader(Folders.from_environment(), options, on_crash=self._fail)
        try:
            model = loader.load(self._spec.model, lambda fraction: self._send(Loading(fraction)))
        except OSError as error:  # the file was deleted, for instance, since the server was started
            self._fail(BadWeights.unreadable(self._spec.model.record.path, error))
            return
        except QwenlocalError as error:
            self._fail(error)
            return
        scheduler = self._create_scheduler(model)
        loop = EngineLoop(model, scheduler, self._send)
        self._send(Ready(self._info(model), model.plan, model.notes))
        thread = threading.Thread(target=self._compute, args=(loop,))
        thread.start()
        threading.Thread(
            target=collapse_buffers, args=(self._spec.model.record.size, lambda: not scheduler.is_idle), daemon=True
        ).start()
        self._receive(loop, ModelFunctions(model))
        loop.put(Quit())
        thread.join()
        scheduler.save_prompt_caches()

    def _create_scheduler(self, model: ChatModel) -> Scheduler:
        path, folder, machine = self._spec.model.record.path, self._spec.options.prompt_caches, this_machine()
        drafts = self._spec.options.lookup and model.model.can_truncate
        memory_cache = MemoryCache(choose_budget(model.plan.memory, machine.memory().available))
        return Scheduler(
            model.context,
            self._spec.parallel,
            speculation=Speculation(model.costs) if drafts else NoSpeculation(),
            memory_cache=memory_cache,
            prompt_cache=PromptCache(folder, compute_cache_key(path, model.context.options)) if folder else None,
            check_memory=functools.partial(check_memory, machine.memory, machine.memory_pressure, memory_cache.clear),
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

    def _compute(self, loop: EngineLoop) -> None:
        try:
            loop.run()
        except BaseException as error:
            self._fail(error)
            os._exit(1)  # the server starts another process, and this one would keep the model's memory

    def _receive(self, loop: EngineLoop, functions: ModelFunctions) -> None:
        # Embeddings take seconds, and so do large grammars; nothing that is quick waits for them.
        with (
            ThreadPoolExecutor(max_workers=1) as quick,
            ThreadPoolExecutor(max_workers=1) as compiling,
            ThreadPoolExecutor(max_workers=1) as embedding,
        ):
            while not isinstance(message := self._receive_message(), Quit):
                if isinstance(message, Submit):
                    self._pending.add(message.key)
                    executor = compiling if message.request.sampling.get("grammar") else quick
                    executor.submit(self._prepare, message, loop, functions)
                elif isinstance(message, Call) and message.method == "embed":
                    self._pending.add(message.key)
                    embedding.submit(self._call, message, functools.partial(self._embed, functions, message.key))
                elif isinstance(message, Call):
                    quick.submit(self._call, message, getattr(functions, message.method))
                elif isinstance(message, Cancel) and not self._remove_pending(message.key):
                    loop.put(message)
            self._pending.clear()  # the process does not wait for embeddings

    def _remove_pending(self, key: int, then: Callable[[], None] = lambda: None) -> bool:
        """Remove a key and call `then`, unless it was removed before; return True if it was not."""
        with self._pending_lock:
            if is_pending := key in self._pending:
                self._pending.remove(key)
                then()
            return is_pending

    def _prepare(self, message: Submit, loop: EngineLoop, functions: ModelFunctions) -> None:
        if message.key not in self._pending:
            return
        try:
            answer = self._create_answer(message, functions)
        except Exception as error:
            if self._remove_pending(message.key):
                self._send(Emitted([(message.key, WireError.pack(error))]))
        else:
            if not self._remove_pending(message.key, lambda: loop.put(answer)):
                answer.sampler.close()

    def _create_answer(self, message: Submit, functions: ModelFunctions) -> _Answer:
        request = message.request
        ids = require_tokens(functions.encode(request.prompt))
        prefix = functions.encode(TokenPrompt(request.prefix))
        builder = AnswerBuilder(
            functions.tokenizer,
            len(ids),
            grammar=request.sampling.get("grammar"),
            stop_strings=request.stop,
            prefix=prefix,
        )
        sampling, sampler = functions.create_sampler({"answer_prefix": request.prefix, **request.sampling})
        return _Answer(message.key, [*ids, *prefix], request, sampling, sampler, builder)

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

    def _fail(self, error: BaseException) -> None:
        self._send(Failed(WireError.pack(error)))

    def _receive_message(self) -> object:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the server was killed: nobody waits for what the other threads compute

    def _send(self, message: object) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(1)


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Run a model in this process. Ctrl-C is the server's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Worker(connection, spec).run()
