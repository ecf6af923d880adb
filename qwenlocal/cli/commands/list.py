"""`qwenlocal list`: installed models, unfinished downloads and conversions, and the catalog."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.cli.console import print_json, print_table
from qwenlocal.cli.context import AppContext
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.conversion_files import UnfinishedConversion, unfinished_conversions
from qwenlocal.library.store import ModelRecord, PartialDownload

if TYPE_CHECKING:
    from qwenlocal.library.catalog import ModelCard

_CHECKPOINT_SUFFIX = "@checkpoint"  # `library.names.CHECKPOINT_SUFFIX`, whose import takes 10 ms


class _PartialModel(NamedTuple):
    """A model whose download is not finished, in one file or several."""

    name: str
    size: int
    done: int


def list_models(*, include_available: bool, as_json: bool) -> None:
    """List what is installed and unfinished_conversions; with `include_available`, also the rest of the catalog."""
    app = AppContext()
    records = app.store.records()
    installed = [record for record in records if not record.missing]
    partial = _partial_models(records, app.store.partial_downloads())
    conversions = list(unfinished_conversions(app.folders))
    names = {record.name for record in installed}
    cards = _available_cards(app, names) if include_available else []
    if as_json:
        _print_json(installed, partial, conversions, cards)
        return
    rows = [(r.name, format_bytes(r.size), _record_state(r, names)) for r in installed]
    rows += [(p.name, format_bytes(p.size), f"{p.done / max(1, p.size):.0%} downloaded") for p in partial]
    rows += [(c.name, format_bytes(c.size), _conversion_state(c)) for c in conversions]
    rows += _card_rows(cards) if cards else []
    if not rows:
        app.say(tr("No model is installed. To start: qwenlocal run (qwenlocal list --all shows all models)"))
        return
    print_table(("NAME", "SIZE", "STATE"), rows)


def _print_json(
    installed: Sequence[ModelRecord],
    partial: Sequence[_PartialModel],
    conversions: Sequence[UnfinishedConversion],
    cards: Sequence[ModelCard],
) -> None:
    from qwenlocal.cli.model_facts import card_facts, record_facts

    print_json(
        [record_facts(record) for record in installed]
        + [{"name": p.name, "state": "partial", "size": p.size, "done": p.done} for p in partial]
        + [
            {"name": c.name, "state": "converting" if c.is_running else "cut short", "size": c.size}
            for c in conversions
        ]
        + [card_facts(card) for card in cards]
    )


def _record_state(record: ModelRecord, installed: Collection[str]) -> str:
    if record.is_checkpoint:
        source = record.name.removesuffix(_CHECKPOINT_SUFFIX)
        is_converted = any(name == source or name.startswith(f"{source}:") for name in installed)
        return "checkpoint; its conversion is installed" if is_converted else "checkpoint, not converted"
    if record.made_from:
        return "installed, converted here"
    return "installed" if record.owned else f"installed by {record.origin}"


def _conversion_state(conversion: UnfinishedConversion) -> str:
    return "converting" if conversion.is_running else "conversion interrupted; pull continues it"


def _partial_models(records: Sequence[ModelRecord], incomplete: Sequence[PartialDownload]) -> list[_PartialModel]:
    """Sum up unfinished downloads by model."""
    models: dict[str, _PartialModel] = {}
    for record in records:
        if record.missing and not (record.is_checkpoint and not _has_weights(record)):
            models[record.name] = _PartialModel(record.name, record.size + record.missing, record.size)
    for part in incomplete:
        name = part.identity.model or part.identity.name
        model = models.get(name, _PartialModel(name, part.identity.size, 0))
        models[name] = model._replace(done=model.done + part.done)
    return list(models.values())


def _has_weights(record: ModelRecord) -> bool:
    """Tell whether any weights were downloaded, not only the small files that `convert --dry-run` needs."""
    return any((file.link or file.path).endswith(".safetensors") for file in record.files)


def _available_cards(app: AppContext, installed: Collection[str]) -> list[ModelCard]:
    from qwenlocal.cli.model_facts import card_name

    return [card for card in app.catalog.cards if card_name(card) not in installed]


def _card_rows(cards: Sequence[ModelCard]) -> list[tuple[str, str, str]]:
    from qwenlocal.cli.model_facts import card_name

    return [
        (
            card_name(card),
            format_bytes(card.default_file.size) if card.default_file else "",
            "available" if card.gguf or card.files else "available; converted after the download",
        )
        for card in cards
    ]
