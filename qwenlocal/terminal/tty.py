"""What is said where llama.cpp ends the process itself, since nothing can be computed any more."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from qwenlocal.errors import EngineCrashed
from qwenlocal.terminal.ansi import obeys

_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"


def say_last_words(reason: str) -> None:
    """Set the terminal right, say llama.cpp's `reason` and a next step, and leave at once: no other code can run."""
    error = EngineCrashed(reason)
    _restore_terminal()
    os.write(2, f"\nqwenlocal: {error}\n{error.hint}\n".encode())
    os._exit(error.exit_code)


def _restore_terminal() -> None:
    """Echo, lines and line ends as shells expect them."""
    if sys.platform == "win32" or not os.isatty(0):
        return
    import termios

    mode = termios.tcgetattr(0)
    mode[0] |= termios.ICRNL
    mode[3] |= termios.ECHO | termios.ICANON | termios.ISIG
    termios.tcsetattr(0, termios.TCSANOW, mode)


@contextlib.contextmanager
def quiet(terminal: TextIO, out: TextIO) -> Iterator[None]:
    """
    No echo and no line editing by the terminal itself, pastes told apart from keys; again after a suspension.

    So keys that are pressed while nobody reads them keep their meaning: Enter stays a carriage return, Ctrl-D itself.
    Ctrl-C and Ctrl-Z work as ever.
    """
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    import signal
    import termios

    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)

    def begin(*_signal: object) -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, silent)
        _tell(out, _PASTE_ON)

    def end() -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
        _tell(out, _PASTE_OFF)

    def suspend(_number: int, _frame: object) -> None:
        end()
        os.kill(os.getpid(), signal.SIGSTOP)

    is_main = threading.current_thread() is threading.main_thread()
    old = [(number, signal.getsignal(number)) for number in (signal.SIGTSTP, signal.SIGCONT)] if is_main else []
    if is_main:
        signal.signal(signal.SIGTSTP, suspend)
        signal.signal(signal.SIGCONT, begin)
    begin()
    try:
        yield
    finally:
        for number, handler in old:
            signal.signal(number, handler)
        end()


def _tell(out: TextIO, sequence: str) -> None:
    if obeys(out):
        out.write(sequence)
        out.flush()
