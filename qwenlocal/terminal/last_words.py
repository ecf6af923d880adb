"""What is said where llama.cpp ends the process itself, since nothing can be computed any more."""

from __future__ import annotations

import os
import sys

from qwenlocal.errors import EngineGone


def say_last_words(reason: str) -> None:
    """Set the terminal right, say llama.cpp's `reason` and a next step, and leave at once: no other code can run."""
    error = EngineGone(reason)
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
