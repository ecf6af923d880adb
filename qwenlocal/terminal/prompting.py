"""Prompts of prompt_toolkit that survive Ctrl-C at every moment."""

from __future__ import annotations

import threading

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import AnyFormattedText

from qwenlocal.chat.worker import redirect_sigint


def run_prompt(prompt: PromptSession[str], message: AnyFormattedText, default: str = "") -> tuple[str, bool]:
    """
    Read a line; also tell whether Ctrl-C was pressed after it was complete.

    Ctrl-C never interrupts the start or the end of asyncio's event loop, which would print a traceback.

    Raises
    ------
    EOFError: Ctrl-D. KeyboardInterrupt: Ctrl-C.
    """
    interrupted = threading.Event()

    def end_if_interrupted() -> None:
        if interrupted.is_set():
            prompt.app.exit(exception=KeyboardInterrupt)

    with redirect_sigint(interrupted.set):
        line = prompt.prompt(message, default=default, pre_run=end_if_interrupted)
    return line, interrupted.is_set()
