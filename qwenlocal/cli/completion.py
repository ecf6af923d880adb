"""Shell completion of model names. It must be fast and must never fail."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator


def complete_installed_models(incomplete: str) -> list[str]:
    """Complete the name of an installed model."""
    return _complete(_installed(), incomplete)


def complete_models(incomplete: str) -> list[str]:
    """Complete the name of any model, installed ones first."""
    return _complete([*_installed(), *_catalog()], incomplete)


def _complete(names: Iterable[str], incomplete: str) -> list[str]:
    """
    Return the names that begin with `incomplete`.

    bash splits words at colons: for `qwen1.5:7` it asks for `7`, and expects what follows the colon. The words before
    are in COMP_WORDS, as `qwenlocal run qwen1.5 : 7`.
    """
    prefix = _before_colon(os.environ.get("COMP_WORDS", ""), incomplete) if _is_bash() else ""
    matches = dict.fromkeys(name for name in names if name.startswith(prefix + incomplete))
    return [name[len(prefix) :] for name in matches]


def _is_bash() -> bool:
    return os.environ.get("_QWENLOCAL_COMPLETE") == "complete_bash"


def _before_colon(words: str, incomplete: str) -> str:
    """`_before_colon("qwenlocal run qwen1.5 : 7", "7")` is "qwen1.5:"."""
    complete = words.rstrip().removesuffix(incomplete).rstrip()
    head, colon, rest = complete.rpartition(":")
    if not colon or rest.strip():
        return ""
    return f"{head.rstrip().split()[-1]}:" if head.split() else ""


def _installed() -> Iterator[str]:
    from qwenlocal.errors import QwenlocalError
    from qwenlocal.library.store import Store
    from qwenlocal.paths import Folders

    try:
        yield from (record.name for record in Store(Folders.from_environment()).records())
    except (QwenlocalError, OSError):
        return


def _catalog() -> Iterator[str]:
    from qwenlocal.errors import QwenlocalError
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.paths import bundled_folder

    try:
        yield from (card.name for card in Catalog.read(bundled_folder("models")).cards)
    except (QwenlocalError, OSError):
        return
