"""What is typed while an answer comes: kept for the next input line, and not shown in the middle of the answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def typed_ahead(terminal: TextIO) -> Iterator[None]:
    """
    No echo, and no line editing by the terminal itself, so that a carriage return stays one: whatever was typed is
    there for the input line that follows, which sends it. Ctrl-C works as ever.
    """
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
