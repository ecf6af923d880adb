"""Worker threads: results, exceptions and Ctrl-C reach the waiting thread."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from qwenlocal.chat.worker import BackgroundTask, iterate_in_thread


def ignore(_exception: BaseException | None) -> None:
    """Ignore the end of a task."""


def test_a_task_returns_its_result_and_reports_that_it_is_done() -> None:
    reported: list[BaseException | None] = []
    task = BackgroundTask(lambda: 42, lambda: None, reported.append)
    assert not task.is_done
    assert task.result() == 42
    assert task.is_done
    assert reported == [None]


def test_an_exception_of_a_task_is_raised_from_its_result() -> None:
    reported: list[BaseException | None] = []

    def fail() -> int:
        raise ValueError("broken")

    task = BackgroundTask(fail, lambda: None, reported.append)
    with pytest.raises(ValueError, match="broken"):
        task.result()
    assert [str(exception) for exception in reported] == ["broken"]


def test_a_cancelled_task_returns_its_result_anyway() -> None:
    stopped = threading.Event()

    def wait() -> str:
        stopped.wait()
        return "leftover"

    task = BackgroundTask(wait, stopped.set, ignore)
    assert task.cancel() is None, "it was never started"
    task.start()
    assert task.cancel() == "leftover"


def numbers(stopped: threading.Event) -> Callable[[], Iterator[int]]:
    """Make an iterator that counts until it is stopped, and then yields -1."""

    def count() -> Iterator[int]:
        number = 0
        while not stopped.wait(0.001):
            yield number
            number += 1
        yield -1

    return count


def test_items_arrive_in_order_and_leaving_the_block_stops_the_iterator() -> None:
    stopped, threads = threading.Event(), threading.active_count()
    with iterate_in_thread(numbers(stopped), stopped.set) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
    assert stopped.is_set()
    assert threading.active_count() == threads


def test_an_exception_of_the_iterator_is_raised_after_its_items() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with iterate_in_thread(fail, lambda: None) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no Ctrl-C on Windows")
def test_ctrl_c_stops_the_iterator_and_its_last_items_still_arrive() -> None:
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with iterate_in_thread(numbers(stopped), stopped.set) as items:
        next(items)
        os.kill(os.getpid(), signal.SIGINT)
        assert list(items)[-1] == -1
    assert signal.getsignal(signal.SIGINT) is before
