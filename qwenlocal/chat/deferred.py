"""Something that is made in the background, and waited for where it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Deferred(Generic[T]):
    """
    The result of `make`, which runs in a thread of its own once `start` is called.

    `told` is called when it is over, with what went wrong, or None. `stop` ends making it, soon.
    """

    def __init__(
        self, make: Callable[[], T], stop: Callable[[], object], told: Callable[[BaseException | None], object]
    ) -> None:
        self._make, self._stop, self._told = make, stop, told
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._result: T | None = None
        self._failure: BaseException | None = None

    def _work(self) -> None:
        try:
            self._result = self._make()
        except BaseException as reason:  # handed to whoever waits
            self._failure = reason
        self._told(self._failure)

    def start(self) -> None:
        """Begin, if it was not begun."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it is there, or failed."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Until it is over, at most so long."""
        self._thread.join(seconds)

    def get(self) -> T:
        """
        Wait for it. What `make` raised is raised here; Ctrl-C ends making it.
        """
        self.start()
        try:
            while self._thread.is_alive():
                self._thread.join(0.1)
        except KeyboardInterrupt:
            self.end()
            raise
        if self._failure is not None:
            raise self._failure
        assert self._result is not None
        return self._result

    def end(self) -> T | None:
        """Have it ended; what it made all the same, to be closed."""
        if self._thread.ident is None:
            return None
        while self._thread.is_alive():
            self._stop()
            self._thread.join(0.05)
        return self._result
