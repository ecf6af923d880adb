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
from dataclasses import dataclass, field
from typing import TypeVar

from qwenlocal.api.answer_options import AnswerSettings
from qwenlocal.chat.answer_loop import NO_LIMIT, AnswerItem, AnswerLoop, AnswerTask
from qwenlocal.chat.events import Done, Event, PromptLogprobs
from qwenlocal.chat.generate import AnswerBuilder
from qwenlocal.engine.scheduler import Scheduler, SequenceRequest
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

T = TypeVar("T")
_POLL = 0.1 if sys.platform == "win32" else None  # seconds; there a wait without a timeout does not notice Ctrl-C


@dataclass
class _Reader:
    """The reader of an answer: `put` gets its items, and setting `stopped` ends it early."""

    key: int
    put: Callable[[AnswerItem], object]
    stopped: threading.Event
    ended: threading.Event = field(default_factory=threading.Event)  # all items are there, and nothing is computed


class AnswerThread:
    """A thread that answers prompts, as many at once as `scheduler` runs; the methods can be called from any thread."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, on_end: Callable[[], object]) -> None:
        """The thread itself calls `on_end` before it ends: nothing is computed any more."""
        self._tokenizer, self._on_end = tokenizer, on_end
        self._loop = AnswerLoop(scheduler, tokenizer, self._emit)
        self._keys = itertools.count()
        self._readers: dict[int, _Reader] = {}  # of answers that have not ended, by key
        # Reentrant: the garbage collector may close the model in a thread that holds the lock.
        self._lock, self._is_closed = threading.RLock(), False
        # A daemon: an answer that nobody reads to its end must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="qwenlocal", daemon=True)
        self._thread.start()

    @property
    def n_unfinished(self) -> int:
        """The number of answers that are being computed or are waiting."""
        return len(self._readers)

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
        items: queue.SimpleQueue[AnswerItem] = queue.SimpleQueue()
        reader = self._start(ids, settings, items.put, stopped)
        try:
            while True:
                yield _check(item := _get(items))
                if isinstance(item, Done):
                    return
        finally:  # without reading: Ctrl-C may have lost the last item
            self._stop(reader)
            if self._thread is not threading.current_thread():  # where the garbage collector may close generators
                reader.ended.wait()

    async def iterate_async(
        self, ids: Sequence[int], settings: AnswerSettings, stopped: threading.Event
    ) -> AsyncGenerator[Event, None]:
        """Do what `iterate` does, for asyncio; cancelling the task that waits ends the computation."""
        items: asyncio.Queue[AnswerItem] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: AnswerItem) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(items.put_nowait, item)

        reader = self._start(ids, settings, put, stopped)
        item: AnswerItem | None = None
        try:
            while not isinstance(item, Done):
                yield _check(item := await items.get())
        finally:
            self._stop(reader)
            while not isinstance(item, (Done, Exception)):
                item = await items.get()

    def stop_all(self) -> None:
        """End all answers early; their finish reason is INTERRUPTED."""
        with self._lock:
            for reader in self._readers.copy().values():
                self._stop(reader)

    def wake(self) -> None:
        """End the answers whose readers have set `stopped`."""
        for reader in self._readers.copy().values():
            if reader.stopped.is_set():
                self._stop(reader)

    def close(self) -> None:
        """End all answers, then the thread."""
        with self._lock:
            self._is_closed = True
            self.stop_all()
            self._loop.quit()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _start(
        self,
        ids: Sequence[int],
        settings: AnswerSettings,
        put: Callable[[AnswerItem], object],
        stopped: threading.Event,
    ) -> _Reader:
        sampling = settings.sampling
        builder = AnswerBuilder(self._tokenizer, len(ids), grammar=sampling.grammar, stop_strings=settings.stop_strings)
        with self._lock:
            if self._is_closed:
                raise UsageError(tr("The model is closed."), hint=tr("Load it again with qwenlocal.load()."))
            key = next(self._keys)
            self._readers[key] = reader = _Reader(key, put, stopped)
            request = SequenceRequest(key, ids, sampling, settings.max_tokens or NO_LIMIT)
            self._loop.submit(AnswerTask(request, builder))
        self.wake()  # it may have been stopped before it started
        return reader

    def _stop(self, reader: _Reader) -> None:
        if not reader.ended.is_set():
            self._loop.cancel(reader.key)

    # --- in the thread itself

    def _work(self) -> None:
        while True:
            try:
                self._loop.run()
                break
            except Exception as error:  # raised again in the threads that wait
                self._loop.fail(error)
        self._on_end()

    def _emit(self, items: Sequence[tuple[int, AnswerItem]]) -> None:
        for key, item in items:
            reader, is_last = self._readers[key], isinstance(item, (Done, Exception))
            if is_last:
                del self._readers[key]
            reader.put(item)
            if is_last:
                reader.ended.set()


def _check(item: AnswerItem) -> Event:
    """Return an event, or raise the error that has ended the answer."""
    if isinstance(item, Exception):
        raise item
    assert not isinstance(item, PromptLogprobs)  # nobody asks for them here
    return item


def _get(items: queue.SimpleQueue[T]) -> T:
    while True:
        try:
            return items.get(timeout=_POLL)
        except queue.Empty:
            continue
