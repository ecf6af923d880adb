"""Model names for the shell's completion. It must be quick and must never fail."""

from __future__ import annotations

from collections.abc import Iterator


def models_here(incomplete: str) -> list[str]:
    """Models that are on this disk."""
    return [name for name in _here() if name.startswith(incomplete)]


def all_models(incomplete: str) -> list[str]:
    """Models that are here, then those of the catalogue."""
    return list(dict.fromkeys(name for name in (*_here(), *_catalogue()) if name.startswith(incomplete)))


def _here() -> Iterator[str]:
    from qwenlocal.errors import QwenlocalError
    from qwenlocal.library.store import Store
    from qwenlocal.paths import Folders

    try:
        yield from (record.name for record in Store(Folders.from_environment()).records())
    except (QwenlocalError, OSError):
        return


def _catalogue() -> Iterator[str]:
    from qwenlocal.errors import QwenlocalError
    from qwenlocal.library.catalog import Catalogue
    from qwenlocal.paths import shipped

    try:
        yield from (card.name for card in Catalogue.read(shipped("models")).cards)
    except (QwenlocalError, OSError):
        return
