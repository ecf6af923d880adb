"""Editing of a message in the user's editor."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

_DEFAULT_EDITORS = ("notepad",) if sys.platform == "win32" else ("editor", "nano", "vim", "vi")


def edit_text(text: str) -> str:
    """
    Open `text` in $VISUAL or $EDITOR, and return the saved text.

    Raises
    ------
    UsageError: the editor cannot be started or fails, or the saved file is not UTF-8.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or next(filter(shutil.which, _DEFAULT_EDITORS), "vi")
    with tempfile.TemporaryDirectory(prefix="qwenlocal-") as folder:
        path = Path(folder, "message.md")
        path.write_text(text, "utf-8", errors="replace")
        try:
            with _line_mode():
                code = subprocess.call([*shlex.split(command), str(path)])
            edited = path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, UnicodeDecodeError):
                reason = tr("the saved file is not UTF-8 text")
            raise UsageError(
                tr("Cannot edit the message with {command}: {reason}.", command=command, reason=reason),
                hint=tr("Choose another editor: export EDITOR=nano"),
            ) from error
    if code:
        raise UsageError(tr("{command} failed with exit code {code}.", command=command, code=code))
    return edited.removesuffix("\n")


def _line_mode() -> AbstractContextManager[None]:
    """Let the terminal echo and edit lines, as programs expect it."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        return contextlib.nullcontext()
    from prompt_toolkit.input.vt100 import cooked_mode

    return cooked_mode(sys.stdin.fileno())
