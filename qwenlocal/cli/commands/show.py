"""`qwenlocal show`: what a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.model_facts import card_facts, describe_kv_memory, header_facts, print_facts, record_facts
from qwenlocal.errors import ModelNotFound
from qwenlocal.i18n import tr
from qwenlocal.library.names import CatalogName, HubCheckpointName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.catalog import ModelCard


def show_model(text: str, *, as_json: bool) -> None:
    """Show a model's size, origin, license and header; if it is not installed, the catalog's data, offline."""
    facts = _facts(AppContext(quiet=as_json), text)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def _facts(app: AppContext, text: str) -> dict[str, Any]:
    from qwenlocal.weights.split_model import read_split_model

    name = app.library.models.resolve(text)
    if isinstance(name, HubCheckpointName):
        return record_facts(app.library.models.stored_checkpoint(name))
    if record := app.library.local.find_offline(name):
        facts = record_facts(record)
        if isinstance(name, PathName):
            facts["name"] = record.path.name
        return {**facts, **header_facts(read_split_model(record.path).header)}
    if not isinstance(name, CatalogName):
        raise ModelNotFound(
            text,
            reason=tr("{name} is not downloaded.", name=name),
            hint=tr("Download it: qwenlocal pull {name}", name=name),
        )
    size = name.known_file.size if name.known_file else None
    return {**_catalog_facts(name.card), "name": str(name), "size": size}


def _catalog_facts(card: ModelCard) -> dict[str, Any]:
    facts = {**card_facts(card), "title": card.title, "context": card.context, "checkpoint": card.checkpoint}
    if card.kv_bytes_per_token:
        facts["context memory"] = describe_kv_memory(card.kv_bytes_per_token, card.context)
    return {**facts, "sampling": dict(card.sampling)}
