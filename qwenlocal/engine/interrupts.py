"""Ctrl-C while llama.cpp works in the main thread: Python would raise it in a callback, where it is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """
    Hold Ctrl-C back: `with held() as pressed: …`, in which `pressed()` tells whether it was pressed.

    Raises
    ------
    KeyboardInterrupt: at the end of the block, if it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    count = 0

    def press(_number: int, _frame: object) -> None:
        nonlocal count
        count += 1

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if count:
        raise KeyboardInterrupt
