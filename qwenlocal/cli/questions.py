"""Questions at the terminal, asked on standard error."""

from __future__ import annotations

import sys

from qwenlocal.errors import Interrupted
from qwenlocal.i18n import tr


def can_ask() -> bool:
    """Tell whether a user at a terminal can read a question and answer it."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def can_chat() -> bool:
    """Tell whether standard input and output are a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def ask(question: str) -> str:
    """
    Return the line that the user types, without surrounding white space.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    from prompt_toolkit import prompt

    try:
        return prompt(question).strip()
    except (EOFError, KeyboardInterrupt) as stop:
        raise Interrupted from stop


def ask_or_skip(question: str) -> str:
    """Return the line that the user types, "" for Ctrl-C or Ctrl-D."""
    try:
        return ask(question)
    except Interrupted:
        return ""


def choose_number(count: int, default: int, *, allow_text: bool = False) -> int | str:
    """
    Ask for a number from 1 to `count`; Enter takes `default`. With `allow_text`, any other word is returned as it is.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    while True:
        word = ask(tr("Which one? [{default}] ", default=default)) or str(default)
        if word.isdecimal():
            if 1 <= int(word) <= count:
                return int(word)
        elif allow_text:
            return word


def confirm(question: str) -> bool:
    """
    Ask a yes-or-no question; Enter means yes.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    while True:
        word = ask(f"{question} [Y/n] ").lower()
        if word in ("", "y", "yes"):
            return True
        if word in ("n", "no"):
            return False
