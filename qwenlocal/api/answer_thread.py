"""
The thread in which a model answers, several prompts at once.

The caller waits for events, so Ctrl-C reaches it at once, and passes the interrupt on to the computation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import TypeVar

from qwenlocal.api.answer_options import AnswerSettings
from qwenlocal.chat.events import Event, FinishReason
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.scheduler import Prefilled, Sampled, Scheduler, SchedulerEvent, SequenceRequest
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

T = TypeVar("T")
_POLL = 0.1 if sys.platform == "win32" else None  # seconds; there a wait without a timeout does not notice Ctrl-C
_UNLIMITED = 1 << 30  # tokens


class _End:
    """Marks the end of an answer's events, and the error that caused it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Task:
    """An answer that is being computed or waits for that; `put` gets its events, and setting `stopped` ends it."""

    def __init__(
        self,
        request: SequenceRequest,
        builder: AnswerBuilder,
        put: Callable[[Event | _End], object],
        stopped: threading.Event,
    ) -> None:
        self.request, self.builder, self.put, self.stopped = request, builder, put, stopped
        self.finished = threading.Event()


class AnswerThread:
    """A thread that answers prompts, as many at once as `scheduler` runs; the methods can be called from any thread."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, on_end: Callable[[], object]) -> None:
        """The thread itself calls `on_end` before it ends: nothing is computed any more."""
        self._scheduler, self._tokenizer, self._on_end = scheduler, tokenizer, on_end
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()  # new tasks; None: look at all of them
        self._keys = itertools.count()
        self._tasks: dict[int, _Task] = {}  # those that have not finished
        # Reentrant: the garbage collector may close the model in a thread that holds the lock.
        self._lock, self._is_closed = threading.RLock(), False
        # A daemon: an answer that nobody reads to its end must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="qwenlocal", daemon=True)
        self._thread.start()

    @property
    def n_unfinished(self) -> int:
        """The number of answers that are being computed or are waiting."""
        return len(self._tasks)

    # --- for the callers' threads

    def iterate(
        self, ids: Sequence[int], settings: AnswerSettings, stopped: threading.Event
    ) -> Generator[Event, None, None]:
        """
        Yield the events of the answer to a prompt; closing the generator ends the computation.

        So does `stopped`, if `wake` is called after setting it; then the text so far is the answer.

        Raises
        ------
        UsageError: the model is closed, or the grammar is not usable. ContextFull: the prompt is too long.
        LowMemory: memory runs out. BadWeights: the model computes NaN.
        """
        items: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()
        task = self._start(ids, settings, items.put, stopped)
        try:
            while not isinstance(item := _get(items), _End):
                yield item
        finally:  # without reading: Ctrl-C may have lost the last item
            self._stop(task)
            if self._thread is not threading.current_thread():  # where the garbage collector may close generators
                task.finished.wait()
        if item.error:
            raise item.error

    async def iterate_async(
        self, ids: Sequence[int], settings: AnswerSettings, stopped: threading.Event
    ) -> AsyncGenerator[Event, None]:
        """Do what `iterate` does, for asyncio; cancelling the task that waits ends the computation."""
        items: asyncio.Queue[Event | _End] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: Event | _End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(items.put_nowait, item)

        task = self._start(ids, settings, put, stopped)
        item: Event | _End | None = None
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
        finally:
            self._stop(task)
            while not isinstance(item, _End):
                item = await items.get()
        if item.error:
            raise item.error

    def stop_all(self) -> None:
        """End all answers early; their finish reason is INTERRUPTED."""
        with self._lock:
            for task in self._tasks.values():
                task.stopped.set()
        self.wake()

    def wake(self) -> None:
        """Let the thread look for answers that were stopped."""
        self._inbox.put(None)
        self._scheduler.interrupt()

    def close(self) -> None:
        """End all answers, then the thread."""
        with self._lock:
            self._is_closed = True
        self.stop_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _start(
        self,
        ids: Sequence[int],
        settings: AnswerSettings,
        put: Callable[[Event | _End], object],
        stopped: threading.Event,
    ) -> _Task:
        sampling = settings.sampling
        builder = AnswerBuilder(self._tokenizer, len(ids), grammar=sampling.grammar, stop_strings=settings.stop_strings)
        with self._lock:
            if self._is_closed:
                raise UsageError(tr("The model is closed."), hint=tr("Load it again with qwenlocal.load()."))
            key = next(self._keys)
            request = SequenceRequest(key, ids, sampling, settings.max_tokens or _UNLIMITED)
            self._tasks[key] = task = _Task(request, builder, put, stopped)
            self._inbox.put(task)
        return task

    def _stop(self, task: _Task) -> None:
        if not task.finished.is_set():
            task.stopped.set()
            self.wake()

    # --- in the thread itself

    def _work(self) -> None:
        while self._take_tasks():
            try:
                for event in self._scheduler.step():
                    if task := self._tasks.get(event.key):
                        self._handle(task, event)
            except Exception as error:  # raised again in the threads that wait
                for task in list(self._tasks.values()):
                    self._finish(task, error)
        self._on_end()

    def _take_tasks(self) -> bool:
        """Begin and end answers; wait if there is nothing to compute. Return False once the thread is closed."""
        while True:
            try:
                task = self._inbox.get(block=self._scheduler.is_idle)
            except queue.Empty:
                return True
            if task and not task.stopped.is_set():
                self._submit(task)
            for one in list(self._tasks.values()):
                if one.stopped.is_set():
                    self._complete(one, FinishReason.INTERRUPTED)
            if self._is_closed and not self._tasks:
                return False

    def _submit(self, task: _Task) -> None:
        try:
            self._scheduler.submit(task.request)
        except Exception as error:  # raised again in the thread that waits
            self._finish(task, error)

    def _handle(self, task: _Task, event: SchedulerEvent) -> None:
        if isinstance(event, Prefilled):
            task.put(task.builder.report(event.progress))
        elif isinstance(event, Sampled):
            for item in task.builder.add(event.id):
                task.put(item)
            if task.builder.finish_reason:
                self._complete(task, task.builder.finish_reason)
        elif event.error:
            self._finish(task, event.error)
        else:
            self._complete(task, FinishReason.CONTEXT_FULL if event.is_full else FinishReason.LENGTH)

    def _complete(self, task: _Task, reason: FinishReason) -> None:
        for item in task.builder.finish(reason):
            task.put(item)
        self._finish(task)

    def _finish(self, task: _Task, error: BaseException | None = None) -> None:
        self._scheduler.finish(task.request.key)
        with self._lock:
            del self._tasks[task.request.key]
        task.put(_End(error))
        task.finished.set()


def _get(items: queue.SimpleQueue[T]) -> T:
    while True:
        try:
            return items.get(timeout=_POLL)
        except queue.Empty:
            continue
