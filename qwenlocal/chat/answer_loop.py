"""The loop that answers prompts, several at once: a scheduler generates their tokens, which become events."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qwenlocal.chat.events import Event, FinishReason, PromptLogprobs, TokenLogprob
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.logprobs import Logprobs
from qwenlocal.engine.sampling import Sampler
from qwenlocal.engine.scheduler import Prefilled, Sampled, Scheduler, SchedulerEvent, SequenceRequest
from qwenlocal.engine.tokenizer import Tokenizer

NO_LIMIT = 1 << 30
"""The `limit` of a `SequenceRequest` whose answer may be as long as the context allows."""

AnswerItem = Event | PromptLogprobs | Exception


@dataclass
class AnswerTask:
    """A prompt to answer, and the builder of its events. A `sampler` was created for it by another thread."""

    request: SequenceRequest
    builder: AnswerBuilder
    sampler: Sampler | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class AnswerLoop:
    """
    Answers prompts in the thread that calls `run` and `fail`; the other methods can be called from any thread.

    That thread calls `emit` with events, each with the key of its request. The last item of each request is `Done` or
    the error that ended it.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, emit: Callable[[Sequence[tuple[int, AnswerItem]]], object]
    ) -> None:
        self._scheduler, self._tokenizer, self._emit = scheduler, tokenizer, emit
        # New tasks, keys of those to cancel, and None to quit.
        self._inbox: queue.SimpleQueue[AnswerTask | int | None] = queue.SimpleQueue()
        self._tasks: dict[int, AnswerTask] = {}  # those that have not ended, by key

    def submit(self, task: AnswerTask) -> None:
        """Add a task."""
        self._inbox.put(task)

    def cancel(self, key: int) -> None:
        """End an answer early; its finish reason is INTERRUPTED. Keys of answers that have ended are ignored."""
        self._inbox.put(key)
        if self._scheduler.is_interruptible(key):
            self._scheduler.interrupt()

    def quit(self) -> None:
        """Let `run` return after it has handled all earlier calls of `submit` and `cancel`."""
        self._inbox.put(None)

    def run(self) -> None:
        """
        Answer until `quit` is called.

        Raises
        ------
        Everything that `Scheduler.step` raises; call `fail` with it before calling `run` again.
        """
        while self._take_messages():
            items: list[tuple[int, AnswerItem]] = []
            try:
                for event in self._scheduler.step():
                    if task := self._tasks.get(event.key):
                        for item in self._handle(task, event):
                            items.append((event.key, item))
            finally:
                if items:
                    self._emit(items)

    def fail(self, error: Exception) -> None:
        """End all answers with an error."""
        for key in self._tasks:
            self._scheduler.finish(key)
        items = [(key, error) for key in self._tasks]
        self._tasks.clear()
        self._emit(items)

    def _take_messages(self) -> bool:
        """Handle all messages; wait for one if there is nothing to compute. Return False after `quit`."""
        while True:
            if self._inbox.empty() and not self._scheduler.is_idle:
                return True
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, AnswerTask):
                self._start(message)
            elif task := self._tasks.get(message):
                self._emit([(message, item) for item in self._finish(task, FinishReason.INTERRUPTED)])

    def _start(self, task: AnswerTask) -> None:
        key = task.request.key
        try:
            self._scheduler.submit(task.request, task.sampler)
        except Exception as error:  # for the one who waits
            self._emit([(key, error)])
        else:
            self._tasks[key] = task

    def _handle(self, task: AnswerTask, event: SchedulerEvent) -> Iterator[AnswerItem]:
        builder = task.builder
        if isinstance(event, Prefilled):
            yield from self._report(task, event)
        elif isinstance(event, Sampled):
            logprob = None if event.logprobs is None else self._token_logprob(event.id, event.logprobs)
            yield from builder.add(event.id, logprob)
            if builder.finish_reason:
                yield from self._finish(task, builder.finish_reason)
        elif event.error:
            del self._tasks[event.key]
            yield event.error
        else:
            yield from self._finish(task, FinishReason.CONTEXT_FULL if event.is_full else FinishReason.LENGTH)

    def _report(self, task: AnswerTask, event: Prefilled) -> Iterator[AnswerItem]:
        yield task.builder.report(event.progress)
        if task.request.prompt_logprobs:
            self._add_prompt_logprobs(task, event)
            if event.progress.done == event.progress.total:
                yield PromptLogprobs(tuple(task.prompt_logprobs))

    def _add_prompt_logprobs(self, task: AnswerTask, event: Prefilled) -> None:
        """Store the probabilities of a part of a prompt, in place of earlier ones if the prompt is computed again."""
        ids, stored = task.request.ids, task.prompt_logprobs
        if not stored:
            stored.append(TokenLogprob(ids[0], self._tokenizer.piece(ids[0], special=True), float("nan")))
        end = min(event.progress.done + 1, len(ids))
        start = end - len(event.logprobs)
        stored[start:] = map(self._token_logprob, ids[start:end], event.logprobs)

    def _token_logprob(self, id: int, logprobs: Logprobs) -> TokenLogprob:
        piece = self._tokenizer.piece
        alternatives = tuple((other, piece(other, special=True), value) for other, value in logprobs.alternatives)
        return TokenLogprob(id, piece(id, special=True), logprobs.logprob, alternatives)

    def _finish(self, task: AnswerTask, reason: FinishReason) -> Iterator[Event]:
        self._scheduler.finish(task.request.key)
        yield from task.builder.finish(reason)
        del self._tasks[task.request.key]
