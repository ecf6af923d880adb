"""Text that a command reads: prompt files, standard input and prompts with placeholders (--template)."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from qwenlocal.cli.console import say
from qwenlocal.errors import ModelNotFound, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import bundled_folder, parse_path
from qwenlocal.text_encoding import MAX_BYTES, decode_text, read_text

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_PATIENCE = 1.5  # seconds of waiting for standard input until a note says so


def read_stdin(*, is_optional: bool) -> str:
    """
    Read all of standard input; `is_optional` says that there is a prompt without it.

    Raises
    ------
    UsageError: it cannot be read, is not text, or is longer than any model can read.
    """
    note = tr("Waiting for the end of standard input …")
    if is_optional:
        note += " " + tr("To answer without it, press Ctrl-C and add: < /dev/null")
    timer = threading.Timer(_PATIENCE, say, (note,))
    timer.daemon = True
    timer.start()
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:  # it is a folder, for example
        raise UsageError(tr("Cannot read standard input: {reason}.", reason=error.strerror)) from error
    finally:
        timer.cancel()
    return decode_text(data, tr("Standard input"))


def read_prompt_file(name: str) -> str:
    """
    Read a file of the user's, or one of the prompts that come with qwenlocal.

    Raises
    ------
    ModelNotFound: there is neither. UsageError: it is not text.
    """
    own = bundled_folder("prompts") / Path(name).name
    if not os.path.exists(parse_path(name)) and own.is_file():
        return read_text(own)
    try:
        return read_text(parse_path(name))
    except ModelNotFound as error:
        names = ", ".join(sorted(path.name for path in bundled_folder("prompts").glob("*.txt")))
        raise ModelNotFound(name, reason=str(error), hint=tr("Prompts that come with qwenlocal: ") + names) from error


def fill_placeholders(template: str, values: Mapping[str, str]) -> str:
    """
    `fill_placeholders("To {lang}: {input} {{}}", {"lang": "French", "input": "Hi"})` is "To French: Hi {}".

    Raises
    ------
    UsageError: a placeholder has no value.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in values:
            raise UsageError(
                f"The placeholder {{{match[1]}}} of the template has no value.",
                hint=f"Set it with --var {match[1]}=TEXT, or as a key in each line of the --batch file.",
            )
        return values[match[1]]

    return _PLACEHOLDER.sub(value, template)
