"""
The thread in which a model computes, one task after the other.

The caller waits for items, so Ctrl-C reaches it at once, and passes the interrupt on to the computation.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Generic, TypeVar

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

T = TypeVar("T")
_POLL = 0.1 if sys.platform == "win32" else None  # seconds; there a wait without a timeout does not notice Ctrl-C


class _LastItem:
    """Marks the end of a task's items: it has none left, or raised `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ModelTask(Generic[T]):
    """An iterator that `ModelThread` runs; `put` gets its items. `interrupt` makes it end early while it runs."""

    def __init__(
        self,
        produce: Callable[[], Iterator[T]],
        interrupt: Callable[[], object],
        put: Callable[[T | _LastItem], object],
    ) -> None:
        self._produce, self._interrupt, self._put = produce, interrupt, put
        self._lock = threading.Lock()  # `interrupt` must not reach the next task
        self._is_running = self._is_stopped = False
        self._finished = threading.Event()

    def run(self) -> _LastItem:
        """Produce all items but the last one, and return that."""
        with self._lock:
            self._is_running = True
        error: BaseException | None = None
        try:
            for item in self._produce():
                if self._is_stopped:
                    self._interrupt()  # again: the first call has no effect before there is anything to interrupt
                self._put(item)
        except BaseException as reason:  # raised again in the waiting thread
            error = reason
        with self._lock:
            self._is_running = False
        return _LastItem(error)

    def finish(self, last: _LastItem) -> None:
        """Let the reader know that there are no more items."""
        self._put(last)
        self._finished.set()

    def wait(self) -> None:
        """Wait until the thread has finished with the task."""
        self._finished.wait()

    def stop(self) -> None:
        """End the task early, from any thread; items may still come."""
        with self._lock:
            self._is_stopped = True
            if self._is_running:
                self._interrupt()


class ModelThread:
    """A thread for the tasks of one model."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[ModelTask[object] | None] = queue.SimpleQueue()
        self._unfinished: set[ModelTask[object]] = set()
        self._lock, self._is_closed = threading.Lock(), False  # no task may follow the end of the queue
        # A daemon: an answer that nobody reads to its end must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="qwenlocal", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            last = task.run()
            self._unfinished.discard(task)
            task.finish(last)

    def _submit(self, task: ModelTask[object]) -> None:
        with self._lock:
            if self._is_closed:
                raise UsageError(tr("The model is closed."), hint=tr("Load it again with qwenlocal.load()."))
            self._unfinished.add(task)
            self._tasks.put(task)

    def iterate(self, produce: Callable[[], Iterator[T]], interrupt: Callable[[], object]) -> Generator[T, None, None]:
        """
        Run the iterator `produce()` as a task and yield its items; closing the generator ends the task early.

        Raises
        ------
        UsageError: the thread is closed. Everything that the iterator raises.
        """
        items: queue.SimpleQueue[T | _LastItem] = queue.SimpleQueue()
        task = ModelTask(produce, interrupt, items.put)
        self._submit(task)  # type: ignore[arg-type]
        try:
            while not isinstance(item := _get(items), _LastItem):
                yield item
        finally:  # without reading: Ctrl-C may have lost the last item
            task.stop()
            task.wait()
        if item.error:
            raise item.error

    async def iterate_async(
        self, produce: Callable[[], Iterator[T]], interrupt: Callable[[], object]
    ) -> AsyncGenerator[T, None]:
        """Do what `iterate` does, for asyncio; cancelling the task that waits ends the computation."""
        items: asyncio.Queue[T | _LastItem] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: T | _LastItem) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, item)

        task = ModelTask(produce, interrupt, put)
        self._submit(task)  # type: ignore[arg-type]
        item: T | _LastItem | None = None
        try:
            while not isinstance(item := await items.get(), _LastItem):
                yield item
        finally:
            task.stop()
            while not isinstance(item, _LastItem):
                item = await items.get()
        if item.error:
            raise item.error

    def stop_tasks(self) -> None:
        """End all tasks early, from any thread."""
        for task in list(self._unfinished):
            task.stop()

    def close(self) -> None:
        """End all tasks, then the thread."""
        with self._lock:
            self._is_closed = True
            self._tasks.put(None)
        self.stop_tasks()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _get(items: queue.SimpleQueue[T]) -> T:
    while True:
        try:
            return items.get(timeout=_POLL)
        except queue.Empty:
            continue
