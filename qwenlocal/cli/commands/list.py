"""`qwenlocal list`: installed models, unfinished downloads and conversions, and the catalog."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.model_facts import card_facts, record_facts
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.conversion_files import UnfinishedConversion, unfinished_conversions
from qwenlocal.library.store import ModelRecord, PartialDownload

_CARD_STATES = {"available": "available", "checkpoint": "available; converted after the download"}


def list_models(*, include_available: bool, as_json: bool) -> None:
    """List installed models and unfinished downloads; with `include_available`, also the rest of the catalog."""
    app = AppContext()
    records = app.library.store.records()
    installed = [record for record in records if not record.missing]
    partial = _partial_models(records, app.library.store.partial_downloads())
    conversions = list(unfinished_conversions(app.library.folders))
    names = {record.name for record in installed}
    cards = app.library.catalog.cards if include_available else ()
    available = [facts for facts in map(card_facts, cards) if facts["name"] not in names]
    if as_json:
        _print_json(installed, partial, conversions, available)
        return
    rows = [(r.name, format_bytes(r.size), _record_state(r, names)) for r in installed]
    rows += [(n, format_bytes(size), f"{done / max(1, size):.0%} downloaded") for n, (size, done) in partial.items()]
    rows += [(c.name, format_bytes(c.size), _conversion_state(c)) for c in conversions]
    rows += [(f["name"], format_bytes(f["size"]) if f["size"] else "", _CARD_STATES[f["state"]]) for f in available]
    if not rows:
        app.say(tr("No model is installed. To start: qwenlocal run (qwenlocal list --all shows all models)"))
        return
    print_table(("NAME", "SIZE", "STATE"), rows)


def _print_json(
    installed: Sequence[ModelRecord],
    partial: Mapping[str, tuple[int, int]],
    conversions: Sequence[UnfinishedConversion],
    available: Sequence[dict[str, Any]],
) -> None:
    print_json(
        [record_facts(record) for record in installed]
        + [{"name": name, "state": "partial", "size": size, "done": done} for name, (size, done) in partial.items()]
        + [
            {"name": c.name, "state": "converting" if c.is_running else "cut short", "size": c.size}
            for c in conversions
        ]
        + list(available)
    )


def _record_state(record: ModelRecord, installed: Collection[str]) -> str:
    if record.is_checkpoint:
        source = record.name.removesuffix("@checkpoint")
        is_converted = any(name == source or name.startswith(f"{source}:") for name in installed)
        return "checkpoint; its conversion is installed" if is_converted else "checkpoint, not converted"
    if record.made_from:
        return "installed, converted here"
    return "installed" if record.owned else f"installed by {record.origin}"


def _conversion_state(conversion: UnfinishedConversion) -> str:
    return "converting" if conversion.is_running else "conversion interrupted; pull continues it"


def _partial_models(
    records: Sequence[ModelRecord], incomplete: Sequence[PartialDownload]
) -> dict[str, tuple[int, int]]:
    """Return the size and the bytes done of every model whose download is unfinished, in one file or several."""
    models = {}
    for record in records:
        if record.missing and not (record.is_checkpoint and not _has_weights(record)):
            models[record.name] = (record.size + record.missing, record.size)
    for part in incomplete:
        name = part.identity.model or part.identity.name
        size, done = models.get(name, (part.identity.size, 0))
        models[name] = (size, done + part.done)
    return models


def _has_weights(record: ModelRecord) -> bool:
    """Tell whether any weights were downloaded, not only the small files that `convert --dry-run` needs."""
    return any((file.link or file.path).endswith(".safetensors") for file in record.files)
