"""
Translation of messages into the user's language.

Messages are English in the code; translations are in `locale/<language>/LC_MESSAGES/qwenlocal.po` (GNU gettext),
compiled to `.mo` by `tools/messages.py`. The first of the variables `LANGUAGE`, `LC_ALL`, `LC_MESSAGES` and `LANG` that
is set chooses the language. JSON, file formats and `--help` stay English.
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
    Translate `message` and fill in its placeholders.

    With LANG=zh_CN.UTF-8, `tr("{count} tokens", count=3)` is "3 个词元"; in English it is "3 tokens".
    """
    translated = _translations(_locale_names()).gettext(message) if message else ""
    return translated.format(**values) if values else translated


def translate(message: str, language: str) -> str:
    """Translate `message` into one of `list_languages()`, for a user with another language than this process."""
    return _translations(language).gettext(message)


def list_languages() -> list[str]:
    """Return the languages that have a catalog; English, the language of the code, has none."""
    return sorted(path.parent.parent.name for path in _FOLDER.glob("*/LC_MESSAGES/qwenlocal.mo"))


def mark(message: str) -> str:
    """Return `message`, marked for translation; for constants that are passed to `tr` later."""
    return message


def _locale_names() -> str:
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")


@functools.cache
def _translations(names: str) -> gettext.NullTranslations:
    languages = [language for language in names.split(":") if language]
    return gettext.translation("qwenlocal", _FOLDER, languages, fallback=True)
