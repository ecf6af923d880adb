"""Shell completion of model names. It must be fast and must never fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from qwenlocal.errors import QwenlocalError


def complete_installed_models(incomplete: str) -> list[str]:
    """Complete the name of an installed model."""
    return _complete(incomplete, _installed_names)


def complete_models(incomplete: str) -> list[str]:
    """Complete the name of any model, installed ones first."""
    return _complete(incomplete, _installed_names, _catalog_names)


def _complete(incomplete: str, *sources: Callable[[], list[str]]) -> list[str]:
    """
    Return the names from all sources that begin with `incomplete`.

    bash splits words at colons: for `qwen1.5:7` it asks for `7`, and expects what follows the colon. The words before
    are in COMP_WORDS, as `qwenlocal run qwen1.5 : 7`.
    """
    is_bash = os.environ.get("_QWENLOCAL_COMPLETE") == "complete_bash"
    names: list[str] = []
    for source in sources:
        with contextlib.suppress(QwenlocalError, OSError):
            names += source()
    prefix = _before_colon(os.environ.get("COMP_WORDS", ""), incomplete) if is_bash else ""
    matches = dict.fromkeys(name for name in names if name.startswith(prefix + incomplete))
    return [name[len(prefix) :] for name in matches]


def _before_colon(words: str, incomplete: str) -> str:
    """`_before_colon("qwenlocal run qwen1.5 : 7", "7")` is "qwen1.5:"."""
    complete = words.rstrip().removesuffix(incomplete).rstrip()
    head, colon, rest = complete.rpartition(":")
    if not colon or rest.strip():
        return ""
    return f"{head.rstrip().split()[-1]}:" if head.split() else ""


def _installed_names() -> list[str]:
    from qwenlocal.library.store import Store
    from qwenlocal.paths import Folders

    return [record.name for record in Store(Folders.from_environment()).records()]


def _catalog_names() -> list[str]:
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.paths import bundled_folder

    return [card.name for card in Catalog.read(bundled_folder("models")).cards]
