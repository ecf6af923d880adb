"""Hints that depend on the location of the user's files."""

from __future__ import annotations

from pathlib import Path

from qwenlocal.errors import BadWeights, QwenlocalError
from qwenlocal.formatting import join_sentences
from qwenlocal.i18n import tr
from qwenlocal.paths import Folders


def find_hint(error: QwenlocalError) -> str:
    """Return the hint of an error; only files in folders of downloads can be repaired by `verify`."""
    if not isinstance(error, BadWeights) or error.has_own_hint:
        return error.hint
    folders, path = Folders.from_environment(), Path(error.path).absolute()
    is_download = any(path.is_relative_to(folder.absolute()) for folder in (folders.home, folders.hub_cache))
    return error.hint if is_download else tr("Copy or download the file again.")


def describe_error(error: QwenlocalError) -> str:
    """Return the message and the hint in one line."""
    return join_hint(error, find_hint(error))


def join_hint(error: QwenlocalError, hint: str) -> str:
    """Return the message of an error and a hint in one line."""
    message = str(error)
    end = "" if message.endswith((".", "!", "?", "…", "。")) or not hint else "."
    return join_sentences(f"{message}{end}", hint)
