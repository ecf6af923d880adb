"""Runs of a quality test in a terminal: progress, and Ctrl-C that keeps the windows measured so far."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qwenlocal.formatting import format_duration
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from qwenlocal.measure.quality import QualityMeter, QualityTest


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (the window is closed) act like Ctrl-C in the block, so that its files are removed."""
    numbers = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]
    before = {
        number: signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN  # as with nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_steps(test: QualityTest, name: str, make_steps: Callable[[], Iterator[QualityMeter]]) -> bool:
    """
    Load the model `name` and run the steps of a test in a thread, with progress; return False after Ctrl-C.

    The meters have the scores of all steps before that.
    """
    from qwenlocal.chat.worker import iterate_in_thread
    from qwenlocal.engine.context import Aborted
    from qwenlocal.engine.llama import LoadCancelled
    from qwenlocal.terminal.progress import status_line

    begin = last = time.monotonic()
    current = None
    with status_line(sys.stderr, delay=0) as show, iterate_in_thread(make_steps, test.abort.set) as meters:
        show(tr("loading {name}", name=name))
        try:
            for meter in meters:
                if meter is not current:  # another model
                    begin, current = last, meter
                last = time.monotonic()
                left = (last - begin) * (test.tokens / meter.tokens - 1)
                show(_describe_progress(meter, len(test.windows), left))
        except (Aborted, LoadCancelled):
            return False
    return True


def _describe_progress(meter: QualityMeter, total: int, left: float) -> str:
    return tr(
        "{name}: window {done} of {total}, perplexity {perplexity:.3f}, {time} left",
        name=meter.name,
        done=meter.windows,
        total=total,
        perplexity=meter.perplexity,
        time=format_duration(left),
    )
