"""Terminal modes: echo and line editing off during a chat, and back on when llama.cpp aborts the process."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from qwenlocal.errors import EngineCrashed
from qwenlocal.terminal.ansi import supports_ansi

_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste


@contextlib.contextmanager
def disable_echo(terminal: TextIO, out: TextIO) -> Iterator[None]:
    """
    Turn off echo and line editing, and turn on bracketed paste; also again after a suspension.

    Keys pressed while nobody reads them keep their meaning: Enter stays a carriage return, Ctrl-D stays Ctrl-D. Ctrl-C
    and Ctrl-Z still send their signals.
    """
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    import signal
    import termios

    original = termios.tcgetattr(terminal)
    no_echo = termios.tcgetattr(terminal)
    no_echo[0] &= ~termios.ICRNL
    no_echo[3] &= ~(termios.ECHO | termios.ICANON)

    def enable(*_signal: object) -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, no_echo)
        _write_sequence(out, _PASTE_ON)

    def restore() -> None:
        termios.tcsetattr(terminal, termios.TCSANOW, original)
        _write_sequence(out, _PASTE_OFF)

    def suspend(_number: int, _frame: object) -> None:
        restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    is_main = threading.current_thread() is threading.main_thread()
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTSTP, signal.SIGCONT)] if is_main else []
    if is_main:
        signal.signal(signal.SIGTSTP, suspend)
        signal.signal(signal.SIGCONT, enable)
    enable()
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        restore()


def _write_sequence(out: TextIO, sequence: str) -> None:
    if supports_ansi(out):
        out.write(sequence)
        out.flush()


def exit_after_crash(reason: str) -> None:
    """
    Restore the terminal, print llama.cpp's `reason` and the next step, and end the process.

    llama.cpp's abort callback calls this; no other Python code can run after it.
    """
    error = EngineCrashed(reason)
    _restore_echo()
    os.write(2, f"\nqwenlocal: {error}\n{error.hint}\n".encode())
    os._exit(error.exit_code)


def _restore_echo() -> None:
    """Turn on echo, line editing and line end conversion, as shells expect them."""
    if sys.platform == "win32" or not os.isatty(0):
        return
    import termios

    mode = termios.tcgetattr(0)
    mode[0] |= termios.ICRNL
    mode[3] |= termios.ECHO | termios.ICANON | termios.ISIG
    termios.tcsetattr(0, termios.TCSANOW, mode)
