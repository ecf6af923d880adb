"""Model names for the shell's completion. It must be quick and must never fail."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator


def models_here(incomplete: str) -> list[str]:
    """Models that are on this disk."""
    return _matching(_here(), incomplete)


def all_models(incomplete: str) -> list[str]:
    """Models that are here, then those of the catalog."""
    return _matching([*_here(), *_catalog()], incomplete)


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    """
    The names that begin with what is typed.

    bash cuts words at colons: of `qwen1.5:7` it asks for `7`, and wants what follows the colon. What was typed before
    stands in COMP_WORDS, as `qwenlocal run qwen1.5 : 7`.
    """
    before = _before_colon(os.environ.get("COMP_WORDS", ""), incomplete) if _asks_bash() else ""
    found = dict.fromkeys(name for name in names if name.startswith(before + incomplete))
    return [name[len(before) :] for name in found]


def _asks_bash() -> bool:
    return os.environ.get("_QWENLOCAL_COMPLETE") == "complete_bash"


def _before_colon(words: str, incomplete: str) -> str:
    """`_before_colon("qwenlocal run qwen1.5 : 7", "7")` is "qwen1.5:"."""
    typed = words.rstrip().removesuffix(incomplete).rstrip()
    head, colon, rest = typed.rpartition(":")
    if not colon or rest.strip():
        return ""
    return f"{head.rstrip().split()[-1]}:" if head.split() else ""


def _here() -> Iterator[str]:
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
    from qwenlocal.paths import shipped

    try:
        yield from (card.name for card in Catalog.read(shipped("models")).cards)
    except (QwenlocalError, OSError):
        return
