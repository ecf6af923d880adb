"""
Work in another thread, so that Ctrl-C in the main thread can stop it.

llama.cpp computes without Python's interpreter lock, but a thread inside it cannot notice Ctrl-C. So the main thread
waits here and passes the interrupt on: to an iterator whose items it needs as they come (`iterate_in_thread`), or to a
function whose result it needs later (`BackgroundTask`).
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """
    A function that runs in a thread of its own once `start` is called.

    `stop` asks the function to return early. `on_done` is called in the worker thread when the function has returned,
    with the exception that it raised or None.
    """

    def __init__(
        self,
        function: Callable[[], T],
        stop: Callable[[], object],
        on_done: Callable[[BaseException | None], object],
    ) -> None:
        self._function, self._stop, self._on_done = function, stop, on_done
        self._thread = threading.Thread(target=self._run, daemon=True)
        # Not Thread.join: interrupted by Ctrl-C, it takes a running thread for one that has ended (Python 3.11).
        self._done = threading.Event()
        self._result: T | None = None
        self._exception: BaseException | None = None

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # raised again in the waiting thread
            self._exception = error
        try:
            self._on_done(self._exception)
        finally:
            self._done.set()

    def start(self) -> None:
        """Start the thread unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def is_done(self) -> bool:
        """True once the function has returned or raised."""
        return self._done.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until the function has returned, at most `seconds`."""
        self._done.wait(seconds)

    def result(self) -> T:
        """Wait for the result, or raise what the function raised. Starts the thread if necessary; Ctrl-C cancels it."""
        self.start()
        try:
            while not self._done.wait(0.1):
                pass
        except KeyboardInterrupt:
            self.cancel()
            raise
        if self._exception is not None:
            raise self._exception
        assert self._result is not None
        return self._result

    def cancel(self) -> T | None:
        """Stop the function and wait for its end; return a result that was ready anyway, for the caller to close."""
        if self._thread.ident is None:
            return None
        while not self._done.is_set():
            self._stop()
            self._done.wait(0.05)
        return self._result


class _End:
    """Marks the end of the items: the iterator is exhausted, or raised `exception`."""

    def __init__(self, exception: BaseException | None) -> None:
        self.exception = exception


@contextlib.contextmanager
def iterate_in_thread(make: Callable[[], Iterator[T]], stop: Callable[[], None]) -> Iterator[Iterator[T]]:
    """
    Run the iterator `make()` in a worker thread: `with iterate_in_thread(make, stop) as items: …`.

    Ctrl-C calls `stop`; the items that still come (the last text of an answer, and why it ended) are passed on.
    Exceptions of `make` and of its iterator are raised from `items`. When the block is left, the thread has ended, so
    whatever it works with can be freed.
    """
    items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    interrupted = threading.Event()

    def interrupt() -> None:
        interrupted.set()
        stop()

    def produce() -> None:
        for item in make():
            if interrupted.is_set():
                stop()  # again: the first call has no effect if Ctrl-C came before there was anything to stop
            items.put(item)

    task = BackgroundTask(produce, stop, lambda exception: items.put(_End(exception)))
    with redirect_sigint(interrupt):
        task.start()
        try:
            yield _drain(items)
        finally:
            task.cancel()


def _drain(items: queue.SimpleQueue[T | _End]) -> Iterator[T]:
    timeout = 0.1 if sys.platform == "win32" else None  # there a wait without a timeout does not notice Ctrl-C
    while True:
        try:
            item = items.get(timeout=timeout)
        except queue.Empty:
            continue
        if isinstance(item, _End):
            break
        yield item
    if item.exception is not None:
        raise item.exception


@contextlib.contextmanager
def run_alongside(function: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run `function` in a thread next to the block; it must return once its event is set."""
    stop = threading.Event()
    thread = threading.Thread(target=function, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def redirect_sigint(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on Ctrl-C, so that no KeyboardInterrupt is raised halfway through writing a line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda _number, _frame: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
