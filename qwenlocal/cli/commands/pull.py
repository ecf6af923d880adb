"""`qwenlocal pull`: download a model or a checkpoint."""

from __future__ import annotations

from qwenlocal.cli.context import AppContext
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.names import HubCheckpointName


def pull_model(text: str, *, limit_rate: int, assume_yes: bool) -> None:
    """Download a model, or continue its download; convert it if it is published as a checkpoint only."""
    app = AppContext(limit_rate=limit_rate, assume_yes=assume_yes)
    name = app.library.models.resolve(text)
    if isinstance(name, HubCheckpointName):
        _pull_checkpoint(app, name)
        return
    record = app.library.models.ensure_model(name)
    app.say(
        tr("{name} is installed: {path} ({size})", name=record.name, path=record.path, size=format_bytes(record.size))
    )


def _pull_checkpoint(app: AppContext, name: HubCheckpointName) -> None:
    """Download the weights as they were published, without converting them."""
    from qwenlocal.library.local_models import LocalCheckpoint

    with app.library.checkpoints.find_on_hub(name.source) as checkpoint:
        local = checkpoint if isinstance(checkpoint, LocalCheckpoint) else checkpoint.download()
    app.say(tr("{name} is installed: {path}", name=name, path=local.path))
