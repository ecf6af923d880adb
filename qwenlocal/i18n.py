"""
What the program says, in the language of whoever reads it.

English stands in the code; other languages are files `locale/<language>/LC_MESSAGES/qwenlocal.po` (GNU gettext), made
into `.mo` by `tools/messages.py`. The language is that of the locale: `LANGUAGE`, `LC_ALL`, `LC_MESSAGES`, `LANG`, the
first that is set. Another language needs one more file. JSON, file formats and the words of `--help` stay English.
"""

from __future__ import annotations

import functools
import gettext
import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "locale"
_VARIABLES = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")


def tr(message: str, **values: object) -> str:
    """
    `message` in the reader's language, with `values` in its places.

    With LANG=zh_CN.UTF-8, `tr("{count} tokens", count=3)` is "3 个词元"; without, "3 tokens".
    """
    said = _translations(_chosen()).gettext(message) if message else ""
    return said.format(**values) if values else said


def mark(message: str) -> str:
    """`message` itself, marked for translating: for tables that are shown with `tr` later."""
    return message


def _chosen() -> str:
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")


@functools.cache
def _translations(chosen: str) -> gettext.NullTranslations:
    languages = [language for language in chosen.split(":") if language]
    return gettext.translation("qwenlocal", _FOLDER, languages, fallback=True)
