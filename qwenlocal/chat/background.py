"""
Events made in another thread, so that the one a person types in stays awake.

llama.cpp computes without Python's lock, but a thread that is inside it cannot notice Ctrl-C; the main thread waits
here instead, and passes an interruption on.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """The iterator is exhausted, or raised `reason`."""

    def __init__(self, reason: BaseException | None) -> None:
        self.reason = reason


@contextlib.contextmanager
def in_background(make: Callable[[], Iterator[T]], stop: Callable[[], None]) -> Iterator[Iterator[T]]:
    """
    The items of `make()`, which runs in a thread of its own: `with in_background(make, stop) as items: …`.

    On Ctrl-C `stop` is called, and the items that still come (an answer's last words, and why it ended) are given.
    What `make` or its iterator raises is raised by the items. However the block is left, the thread has ended then:
    what it works with can be freed.
    """
    items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    pressed = threading.Event()

    def interrupt() -> None:
        pressed.set()
        stop()

    def work() -> None:
        try:
            for item in make():
                if pressed.is_set():
                    stop()  # again: what was pressed before the work could be stopped must not be lost
                items.put(item)
        except BaseException as reason:  # handed to the waiting thread
            items.put(_End(reason))
        else:
            items.put(_End(None))

    thread = threading.Thread(target=work, daemon=True)
    with _interrupts_call(interrupt):
        thread.start()
        try:
            yield _received(items)
        finally:
            while thread.is_alive():
                stop()
                thread.join(0.05)


def _received(items: queue.SimpleQueue[T | _End]) -> Iterator[T]:
    while not isinstance(item := _get(items), _End):
        yield item
    if item.reason is not None:
        raise item.reason


def _get(items: queue.SimpleQueue[T | _End]) -> T | _End:
    """The next item. On Windows a wait without end would not notice Ctrl-C."""
    while True:
        try:
            return items.get(timeout=0.1 if sys.platform == "win32" else None)
        except queue.Empty:
            continue


@contextlib.contextmanager
def _interrupts_call(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` instead of raising somewhere in the middle of a line being written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda _number, _frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
