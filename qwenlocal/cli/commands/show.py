"""`qwenlocal show`: what a model is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.model_facts import (
    card_facts,
    describe_kv_memory,
    describe_template,
    describe_value,
    header_facts,
    record_facts,
)
from qwenlocal.errors import ModelNotFound
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.local_models import known_file
from qwenlocal.library.names import CatalogName, HubCheckpointName, PathName

if TYPE_CHECKING:
    from qwenlocal.library.catalog import ModelCard


def show_model(text: str, *, as_json: bool) -> None:
    """Show a model's size, origin, license and header; what is not installed is shown from the catalog, offline."""
    from qwenlocal.weights.split_model import read_split_model

    app = AppContext(quiet=as_json)
    name = app.models.parse(text)
    if isinstance(name, HubCheckpointName):
        _print(record_facts(app.models.stored_checkpoint(name)), as_json)
        return
    record = app.local.find(name)
    if record is None:
        if not isinstance(name, CatalogName):
            raise ModelNotFound(
                text,
                reason=tr("{name} is not downloaded.", name=name),
                hint=tr("Download it: qwenlocal pull {name}", name=name),
            )
        known = known_file(name)
        _print({**_catalog_facts(name.card), "name": str(name), "size": known.size if known else None}, as_json)
        return
    facts = record_facts(record)
    if isinstance(name, PathName):
        facts["name"] = record.path.name
    _print({**facts, **header_facts(read_split_model(record.path).header)}, as_json)


def _catalog_facts(card: ModelCard) -> dict[str, Any]:
    facts = {**card_facts(card), "title": card.title, "context": card.context, "checkpoint": card.checkpoint}
    if card.kv_bytes_per_token:
        facts["context memory"] = describe_kv_memory(card.kv_bytes_per_token, card.context)
    return {**facts, "sampling": dict(card.sampling)}


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    from qwenlocal.terminal.ansi import escape_controls

    if as_json:
        print_json(facts)
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        if value is None or value == {} or value == "":
            continue
        text = escape_controls(_describe(key, value)).replace("\n", "\n" + " " * (width + 2))
        sys.stdout.write(f"{key:<{width}}  {text}\n")


def _describe(key: str, value: Any) -> str:
    if key == "chat template":
        return describe_template(value)
    if key == "size":
        return f"{format_bytes(value)} ({value:,} bytes)"
    return describe_value(value)
