"""`qwenlocal verify`: check every byte of a model, and repair damage."""

from __future__ import annotations

import sys

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.model_facts import record_facts
from qwenlocal.errors import BadWeights, Interrupted, ModelNotFound, UsageError
from qwenlocal.i18n import tr
from qwenlocal.library.names import LocalCheckpointName, ModelName
from qwenlocal.library.store import FileDamage, ModelRecord
from qwenlocal.progress import TaskProgress


def verify_model(text: str, *, repair: bool, as_json: bool) -> None:
    """
    Compare every byte with the recorded digests; with `repair`, download or convert damaged parts again.

    Raises
    ------
    BadWeights: the model is damaged, and was not repaired.
    """
    app = AppContext(quiet=as_json, assume_yes=True)  # repairs use the sources of the first download
    name = app.library.models.resolve(text)
    record = _installed_record(app, text, name)
    damage = _find_damage(app, record)
    for each in damage:
        app.say(_describe_damage(each))
    if damage and repair:
        record, damage = app.library.models.repair(name, record, damage), []
        app.say(tr("{name} is repaired{proof}.", name=record.name, proof=_describe_digests(record)))
    elif not damage:
        _check_readable(record)
        if any(file.sha256 for file in record.files):
            app.say(tr("{name} is intact{proof}.", name=record.name, proof=_describe_digests(record)))
        else:
            app.say(tr("The header is valid; there is no published digest to compare with."))
    if as_json:
        print_json(
            {
                **record_facts(record),
                "whole": not damage,
                "damage": [{"file": each.file.path, "blocks": each.blocks} for each in damage],
            }
        )
    if damage:
        raise BadWeights(
            record.path, "the file is damaged", hint=tr("Repair it: qwenlocal verify {name}", name=record.name)
        )


def _installed_record(app: AppContext, text: str, name: ModelName) -> ModelRecord:
    record = app.library.store.get(str(name)) or app.library.local.find_offline(name)
    if record is not None and not record.missing:
        return record
    if isinstance(name, LocalCheckpointName):
        from qwenlocal.weights.checkpoint import Checkpoint

        Checkpoint.open(name.path)
        raise UsageError(
            tr("{text} is a checkpoint that has not been converted.", text=text),
            hint=tr("To compare a GGUF file with it: qwenlocal verify FILE --against {text}", text=text),
        )
    raise ModelNotFound(
        text,
        reason=tr("{name} is not downloaded, or incomplete.", name=name),
        hint=tr("Download it: qwenlocal pull {name}", name=name),
    )


def _find_damage(app: AppContext, record: ModelRecord) -> list[FileDamage]:
    from qwenlocal.terminal.progress import show_progress

    try:
        with show_progress(sys.stderr) as show:
            return app.library.store.find_damage(
                record, lambda done, total: show(TaskProgress(record.name, done, total, "reading"))
            )
    except KeyboardInterrupt as stop:
        raise Interrupted("Nothing was changed.") from stop


def _check_readable(record: ModelRecord) -> None:
    """Check the headers: a file may be damaged before its first digest is computed."""
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.load_errors import check_file

    if record.is_checkpoint:
        Checkpoint.open(record.path.parent)
    else:
        check_file(record.path)


def _describe_digests(record: ModelRecord) -> str:
    digests = [file.sha256 for file in record.files if file.sha256]
    if not digests:
        return ""
    return f": SHA-256 {digests[0]}" + (f" and {len(digests) - 1} more" if len(digests) > 1 else "")


def _describe_damage(damage: FileDamage) -> str:
    file, size = damage.file, damage.file.block
    if damage.blocks is None:
        return f"{file.path} is damaged: its SHA-256 is {damage.sha256[:16]}…, not {file.sha256[:16]}…."
    spans = ", ".join(f"{n} (bytes {n * size:,} to {(n + 1) * size:,})" for n in damage.blocks[:8])
    more = f" and {len(damage.blocks) - 8} more" if len(damage.blocks) > 8 else ""
    return f"{file.path} is damaged in block {spans}{more}."
