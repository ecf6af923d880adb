"""Terminal modes: echo and line editing off during a chat, and back on when llama.cpp aborts the process."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from qwenlocal.errors import QwenlocalError
from qwenlocal.terminal.ansi import supports_ansi

_PASTE_ON, _PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste
_crash_lock = threading.Lock()  # several threads of ggml may abort at once; only the first one reports it


@contextlib.contextmanager
def disable_echo(terminal: TextIO, out: TextIO) -> Iterator[bytes]:
    """
    Turn off echo and line editing, and turn on bracketed paste; also again after a suspension.

    Keys pressed while nobody reads them keep their meaning: Enter stays a carriage return, Ctrl-D stays Ctrl-D. Ctrl-C
    and Ctrl-Z still send their signals, but discard nothing. Yields the bytes that had been typed before.
    """
    if sys.platform == "win32" or not terminal.isatty():
        yield b""
        return
    import signal
    import termios

    original = termios.tcgetattr(terminal)
    no_echo = termios.tcgetattr(terminal)
    no_echo[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
    no_echo[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    no_echo[3] |= termios.NOFLSH

    def enable(*_signal: object) -> None:
        with contextlib.suppress(termios.error, OSError):  # the window was closed
            termios.tcsetattr(terminal, termios.TCSANOW, no_echo)
            enable_bracketed_paste(out)

    def restore() -> None:
        with contextlib.suppress(termios.error, OSError):
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
    try:
        enable()
        typed = _read_available(terminal.fileno())
        if typed and not typed.endswith(b"\n"):
            _write_sequence(out, "\n")  # below the echo
        yield typed
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        restore()


@contextlib.contextmanager
def call_on_resume(function: Callable[[], object]) -> Iterator[None]:
    """Call `function`, too, whenever the process continues after a suspension. Only in the main thread."""
    if sys.platform == "win32":
        yield
        return
    import signal

    previous = signal.getsignal(signal.SIGCONT)

    def resume(number: int, frame: FrameType | None) -> None:
        if callable(previous):
            previous(number, frame)
        function()

    signal.signal(signal.SIGCONT, resume)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, previous)


def _read_available(descriptor: int) -> bytes:
    data = b""
    while select.select([descriptor], [], [], 0)[0] and (more := os.read(descriptor, 1 << 16)):
        data += more
    return data


def enable_bracketed_paste(out: TextIO) -> None:
    """Ask the terminal to mark pasted text."""
    _write_sequence(out, _PASTE_ON)


def _write_sequence(out: TextIO, sequence: str) -> None:
    if supports_ansi(out):
        out.write(sequence)
        out.flush()


def exit_after_crash(error: QwenlocalError) -> None:
    """
    Restore the terminal, print the error and the next step, and end the process.

    llama.cpp's abort callback calls this; no other Python code can run after it.
    """
    _crash_lock.acquire()
    _restore_echo()
    os.write(2, f"\nqwenlocal: {error}\n{error.hint}\n".encode())
    os._exit(error.exit_code)


def _restore_echo() -> None:
    """Turn on echo, line editing and line end conversion, as shells expect them."""
    if sys.platform == "win32" or not os.isatty(0):
        return
    import termios

    mode = termios.tcgetattr(0)
    mode[0] |= termios.ICRNL | termios.IXON
    mode[3] |= termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN
    mode[3] &= ~termios.NOFLSH
    termios.tcsetattr(0, termios.TCSANOW, mode)
