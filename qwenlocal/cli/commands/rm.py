"""`qwenlocal rm`: remove a model, an unfinished download or an unfinished conversion."""

from __future__ import annotations

from qwenlocal.cli.context import AppContext
from qwenlocal.errors import ModelNotFound
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.conversion_files import remove_unfinished, unfinished_conversions
from qwenlocal.library.names import LocalCheckpointName, ModelName, PathName


def remove_model(text: str) -> None:
    """
    Remove everything that is called `text`; files that other models use stay.

    Raises
    ------
    ModelNotFound: there is nothing of that name, or it is a file of the user's.
    """
    app = AppContext()
    name = app.library.models.resolve(text)
    if isinstance(name, PathName):
        raise ModelNotFound(
            text,
            reason=tr("{path} is your own file; qwenlocal did not download it.", path=name.path),
            hint=tr("Delete it with rm."),
        )
    has_removed_parts = _remove_unfinished(app, name)
    record = app.library.local.find_record(name)
    if record is None:
        if not has_removed_parts:
            raise ModelNotFound(
                text,
                reason=tr("{name} is not installed.", name=name),
                hint=tr("List installed models: qwenlocal list"),
            )
        return
    freed = format_bytes(app.library.store.remove(record))
    if isinstance(name, LocalCheckpointName):
        app.say(
            tr("Removed the model converted from {name} ({size}). Your checkpoint stays.", name=record.name, size=freed)
        )
    elif record.owned:
        app.say(tr("Removed {name}; {size} freed.", name=record.name, size=freed))
    else:
        app.say(
            tr(
                "Removed {name} from the list. Its file belongs to {origin} and stays: {path}",
                name=record.name,
                origin=record.origin,
                path=record.path,
            )
        )


def _remove_unfinished(app: AppContext, name: ModelName) -> bool:
    """Remove unfinished downloads and conversions of a model; return whether there were any."""
    has_removed = False
    for incomplete in app.library.store.partial_downloads():
        if str(name) in (incomplete.identity.model, incomplete.identity.name):
            app.library.store.remove_partial(incomplete)
            has_removed = True
            app.say(
                tr(
                    "Removed the unfinished download of {name} ({size}).",
                    name=incomplete.identity.name,
                    size=format_bytes(incomplete.done),
                )
            )
    for conversion in unfinished_conversions(app.library.folders):
        if conversion.name == str(name) or conversion.name.startswith(f"{name}:"):
            remove_unfinished(conversion.folder, app.library.store.file_paths())
            has_removed = True
            app.say(tr("Removed the unfinished conversion ({size}).", size=format_bytes(conversion.size)))
    return has_removed
