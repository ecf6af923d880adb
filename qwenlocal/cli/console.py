"""Output and questions of the commands: data on standard output, sentences and questions on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qwenlocal.errors import Interrupted, QwenlocalError
from qwenlocal.formatting import cut_long_words, display_width, join_sentences, pad
from qwenlocal.i18n import tr


def say(sentence: str) -> None:
    """Print a sentence on standard error, wrap at the terminal's width."""
    from qwenlocal.terminal.wrapping import wrap

    sys.stderr.write(wrap(cut_long_words(sentence), sys.stderr) + "\n")
    sys.stderr.flush()


def say_dimmed(sentence: str) -> None:
    """Print a sentence in gray on standard error, between the answers of a chat."""
    from qwenlocal.terminal.ansi import dim, escape_controls
    from qwenlocal.terminal.wrapping import wrap

    sys.stderr.write(dim(wrap(escape_controls(sentence), sys.stderr), sys.stderr) + "\n")
    sys.stderr.flush()


def print_json(data: Any) -> None:
    """Print `data` as JSON; NaN and infinity, which JSON lacks, become strings."""
    import json

    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=False, indent=1, default=str, allow_nan=False) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headings, aligned by display width."""
    widths = [max(display_width(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (pad(cell, width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


# --- questions


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
    from prompt_toolkit import PromptSession

    from qwenlocal.terminal.prompting import run_prompt

    try:
        answer, is_interrupted = run_prompt(PromptSession(), question)
    except (EOFError, KeyboardInterrupt) as stop:
        raise Interrupted from stop
    if is_interrupted:
        raise Interrupted
    return answer.strip()


def choose_number(
    numbers: Collection[int], default: int, *, check_text: Callable[[str], object] | None = None
) -> int | str:
    """
    Ask for one of `numbers` until the answer is one; Enter takes `default`.

    Any other text is returned as well if `check_text` is given and does not raise a `QwenlocalError`.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    while True:
        word = ask(tr("Which one? [{default}] ", default=default)) or str(default)
        number = word.removeprefix("#")
        if number.lstrip("0") in map(str, numbers):
            return int(number)
        if number.isdecimal() or check_text is None:
            say(tr("Enter one of these numbers."))
            continue
        try:
            check_text(word)
        except QwenlocalError as error:
            say(join_sentences(str(error), error.hint))
        else:
            return word


def confirm(question: str, *, default: bool = True) -> bool:
    """
    Ask a yes-or-no question; Enter gives the default.

    Raises
    ------
    Interrupted: Ctrl-C or Ctrl-D.
    """
    while True:
        word = ask(f"{question} {'[Y/n]' if default else '[y/N]'} ").lower()
        if word in ("y", "yes", "n", "no", ""):
            return word.startswith("y") if word else default
