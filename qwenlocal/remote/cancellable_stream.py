"""A stream that is read in its own thread, so that waiting for it can be cancelled at any moment."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_INTERVAL = 0.1  # seconds between two attempts to close a connection


class _End:
    """Marks the end of the items, and the exception that caused it."""

    def __init__(self, exception: BaseException | None = None) -> None:
        self.exception = exception


class CancellableStream(Generic[T]):
    """
    The items of the iterator `read()`, which runs in a thread.

    `cancel` ends the iteration at once, from any thread. `disconnect` makes `read` end; that may take seconds, because
    a connection that is being opened cannot be interrupted, so nobody waits for it.
    """

    def __init__(self, read: Callable[[], Iterator[T]], disconnect: Callable[[], object]) -> None:
        self._read, self._disconnect = read, disconnect
        self._items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            for item in self._read():
                self._items.put(item)
            self._items.put(_End())
        except BaseException as error:  # raised again in the thread that iterates
            self._items.put(_End(error))

    @property
    def is_cancelled(self) -> bool:
        """True once `cancel` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the iteration and close the connection; nothing happens if it has ended."""
        if self._cancelled.is_set() or not self._thread.is_alive():
            return
        self._cancelled.set()
        self._items.put(_End())
        self._disconnect()
        threading.Thread(target=self._disconnect_later, daemon=True).start()

    def _disconnect_later(self) -> None:
        """Close a connection that is opened after `cancel`, too."""
        while self._thread.is_alive():
            self._thread.join(_INTERVAL)
            self._disconnect()

    def __iter__(self) -> Iterator[T]:
        while not isinstance(item := self._items.get(), _End):
            yield item
        if item.exception is not None and not self.is_cancelled:
            raise item.exception
