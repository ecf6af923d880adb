"""The commands that look after models: pull, list, show, rm, verify."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal.cli.inspect import header_facts, memory_words, template_words
from qwenlocal.cli.values import bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import BadWeights, Interrupted, ModelNotFound, UsageProblem
from qwenlocal.i18n import tr
from qwenlocal.library.conversion_files import UnfinishedConversion, drop, unfinished
from qwenlocal.library.names import CHECKPOINT_SUFFIX
from qwenlocal.library.store import Damage, Incomplete, Record

if TYPE_CHECKING:
    from qwenlocal.library.catalog import Card
    from qwenlocal.library.names import HubCheckpointName, Name


def pull_model(text: str, *, limit_rate: int) -> None:
    """Have a model here."""
    from qwenlocal.library.names import HubCheckpointName

    program = Program()
    name = program.parse(text)
    if isinstance(name, HubCheckpointName):
        _pull_checkpoint(program, name, limit_rate)
        return
    record = program.have(name, limit_rate=limit_rate)
    program.say(
        tr(
            "{name} is here: {path} ({size})",
            name=record.name,
            path=record.path,
            size=bytes_for_people(record.size),
        )
    )


def _pull_checkpoint(program: Program, name: HubCheckpointName, limit_rate: int) -> None:
    """The weights as they were published, without converting them."""
    from qwenlocal.cli.checkpoints import Remote, on_hub

    with on_hub(program, name.source, limit_rate) as source:
        there = source.fetch() if isinstance(source, Remote) else source
    program.say(tr("{name} is here: {path}", name=name, path=there.path))


# --- list


def list_models(*, everything: bool, as_json: bool) -> None:
    """What is here, what is on its way, and with `everything` what could be fetched."""
    program = Program()
    kept = program.store.records()
    records = [record for record in kept if not record.missing]
    coming = _on_their_way(kept, program.store.incomplete())
    begun = list(unfinished(program.folders))
    here = {record.name for record in records}
    cards = [card for card in program.catalog.cards if _usual_name(card) not in here] if everything else []
    if as_json:
        print_json(
            [_record_json(record) for record in records]
            + [{"name": c.name, "state": "partial", "size": c.size, "done": c.done} for c in coming]
            + [{"name": c.name, "state": _conversion_state(c), "size": c.size} for c in begun]
            + [_card_json(card) for card in cards]
        )
        return
    rows = [(r.name, bytes_for_people(r.size), _record_state(r, here)) for r in records]
    rows += [(c.name, bytes_for_people(c.size), f"{c.done / max(1, c.size):.0%} fetched") for c in coming]
    rows += [(c.name, bytes_for_people(c.size), _conversion_words(c)) for c in begun]
    rows += [(_usual_name(card), _card_size(card), _card_state(card)) for card in cards]
    if not rows:
        program.say(tr("No model is here yet. Start with: qwenlocal run (qwenlocal list --all shows what there is)"))
        return
    print_table(("NAME", "SIZE", ""), rows)


def _conversion_state(conversion: UnfinishedConversion) -> str:
    return "converting" if conversion.is_running else "cut short"


def _conversion_words(conversion: UnfinishedConversion) -> str:
    return "being converted" if conversion.is_running else "cut short while it was converted; pull goes on"


def _usual_name(card: Card) -> str:
    from qwenlocal.library.names import CatalogName

    return str(CatalogName(card))


def _card_size(card: Card) -> str:
    return bytes_for_people(card.default_file.size) if card.default_file else ""


def _record_state(record: Record, here: Collection[str]) -> str:
    if record.is_checkpoint:
        source = record.name.removesuffix(CHECKPOINT_SUFFIX)
        made = any(name == source or name.startswith(f"{source}:") for name in here)
        return "a checkpoint; what was made of it is here, too" if made else "a checkpoint, to be converted"
    if record.made_from:
        return "here, converted"
    return "here" if record.owned else f"here, of {record.origin}"


def _card_state(card: Card) -> str:
    return "can be fetched" if card.gguf or card.files else "can be fetched, and is converted then"


class _Coming(NamedTuple):
    """A model on its way, of one file or several."""

    name: str
    size: int
    done: int


def _on_their_way(records: Sequence[Record], incomplete: Sequence[Incomplete]) -> list[_Coming]:
    found: dict[str, _Coming] = {}
    for record in records:
        if record.missing and not (record.is_checkpoint and not _has_weights(record)):
            found[record.name] = _Coming(record.name, record.size + record.missing, record.size)
    for part in incomplete:
        name = part.identity.model or part.identity.name
        known = found.get(name, _Coming(name, part.identity.size, 0))
        found[name] = known._replace(done=known.done + part.done)
    return list(found.values())


def _has_weights(record: Record) -> bool:
    """Not only the few small files that were looked at."""
    return any((file.link or file.path).endswith(".safetensors") for file in record.files)


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "state": "checkpoint" if record.is_checkpoint else "here",
        "size": record.size,
        "path": str(record.path),
        "sha256": record.files[0].sha256 or None,
        "origin": record.origin,
        "licence": record.licence or None,
        "owned": record.owned,
        "added": record.added or None,
    }


def _card_json(card: Card) -> dict[str, Any]:
    return {
        "name": _usual_name(card),
        "state": "available" if card.gguf or card.files else "checkpoint",
        "size": card.default_file.size if card.default_file else None,
        "repository": card.gguf or card.checkpoint,
        "licence": card.licence,
    }


# --- show


def show_model(text: str, *, as_json: bool) -> None:
    """What a model is; without the network, so what is not here is shown from the catalog."""
    from qwenlocal.library.local_models import known_file
    from qwenlocal.library.names import CatalogName, HubCheckpointName, PathName
    from qwenlocal.weights.parts import read_parts

    program = Program(quiet=as_json)
    name = program.parse(text)
    if isinstance(name, HubCheckpointName):
        _show(_record_json(_kept(program, name)), as_json)
        return
    record = program.local.here(name)
    if record is None:
        if not isinstance(name, CatalogName):
            raise ModelNotFound(
                text, reason=tr("{name} is not here.", name=name), hint=tr("Fetch it: qwenlocal pull {name}", name=name)
            )
        known = known_file(name)
        _show({**_card_facts(name.card), "name": str(name), "size": known.size if known else None}, as_json)
        return
    facts = _record_json(record)
    if isinstance(name, PathName):
        facts["name"] = record.path.name
    _show({**facts, **header_facts(read_parts(record.path).header)}, as_json)


def _kept(program: Program, name: HubCheckpointName) -> Record:
    record = program.store.get(str(name))
    if record is None or record.missing:
        raise ModelNotFound(
            str(name),
            reason=tr("{name} is not here, or not all of it.", name=name),
            hint=tr("Fetch it: qwenlocal pull {of}", of=name.source),
        )
    return record


def _card_facts(card: Card) -> dict[str, Any]:
    facts = {**_card_json(card), "title": card.title, "context": card.context, "checkpoint": card.checkpoint}
    if card.kv_bytes_per_token:
        facts["context memory"] = memory_words(card.kv_bytes_per_token, card.context)
    return {**facts, "sampling": dict(card.sampling)}


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    from qwenlocal.terminal.ansi import harmless

    if as_json:
        print_json(facts)
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        if value is None or value == {} or value == "":
            continue
        if key == "chat template":
            value = template_words(value)
        sys.stdout.write(
            f"{key:<{width}}  {harmless(_words(key, value)).replace(chr(10), chr(10) + ' ' * (width + 2))}\n"
        )


def _words(key: str, value: Any) -> str:
    if key == "size":
        return f"{bytes_for_people(value)} ({value:,} bytes)"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- rm, verify


def remove_model(text: str) -> None:
    """Remove a model or an unfinished download."""
    from qwenlocal.library.names import LocalCheckpointName, PathName

    program = Program()
    name = program.parse(text)
    if isinstance(name, PathName):
        raise ModelNotFound(
            text,
            reason=tr("{path} is a file of yours, not a model that was fetched.", path=name.path),
            hint=tr("Remove it with rm."),
        )
    dropped = [i for i in program.store.incomplete() if str(name) in (i.identity.model, i.identity.name)]
    for incomplete in dropped:
        program.store.drop(incomplete)
        program.say(
            tr(
                "Removed the unfinished download of {name} ({size}).",
                name=incomplete.identity.name,
                size=bytes_for_people(incomplete.done),
            )
        )
    found = bool(dropped)
    for conversion in unfinished(program.folders):
        if conversion.name == str(name) or conversion.name.startswith(f"{name}:"):
            drop(conversion.folder, program.store.paths())
            program.say(
                tr(
                    "Removed the unfinished conversion ({size}).",
                    size=bytes_for_people(conversion.size),
                )
            )
            found = True
    record = program.store.get(str(name))
    if record is None:
        if not found:
            raise ModelNotFound(
                text, reason=tr("{name} is not here.", name=name), hint=tr("See what is: qwenlocal list")
            )
        return
    freed = program.store.remove(record)
    if isinstance(name, LocalCheckpointName):
        program.say(
            tr(
                "Removed the GGUF file made of {name} ({size}); the checkpoint is yours.",
                name=record.name,
                size=bytes_for_people(freed),
            )
        )
    elif record.owned:
        program.say(
            tr(
                "Removed {name}; {size} are free again.",
                name=record.name,
                size=bytes_for_people(freed),
            )
        )
    else:
        program.say(
            tr(
                "Forgot {name}. Its file belongs to {origin} and was left alone: {path}",
                name=record.name,
                origin=record.origin,
                path=record.path,
            )
        )


def verify_model(text: str, *, repair: bool, as_json: bool) -> None:
    """Read every byte; fetch again what is damaged."""
    program = Program(quiet=as_json)
    name = program.parse(text)
    record = _recorded(program, text, name)
    damage = _damage(program, record)
    if damage and not as_json:
        for bad in damage:
            program.say(_damage_words(bad))
    if damage and repair:
        record, damage = _mended(program, name, record, damage), []
        program.say(tr("{name} is whole again{proof}.", name=record.name, proof=_proof(record)))
    elif not damage:
        _check_readable(record)
        program.say(tr("{name} is whole{proof}.", name=record.name, proof=_proof(record)))
    if as_json:
        print_json(
            {
                **_record_json(record),
                "whole": not damage,
                "damage": [{"file": b.file.path, "blocks": b.blocks} for b in damage],
            }
        )
    if damage:
        raise BadWeights(
            record.path, "the file is damaged", hint=tr("Mend it: qwenlocal verify {name}", name=record.name)
        )


def _recorded(program: Program, text: str, name: Name) -> Record:
    from qwenlocal.library.names import LocalCheckpointName

    record = program.store.get(str(name)) or program.local.here(name)
    if record is not None and not record.missing:
        return record
    if isinstance(name, LocalCheckpointName):
        raise UsageProblem(
            tr("{text} is a checkpoint, and nothing was made of it yet.", text=text),
            hint=tr("To compare a GGUF file with it: qwenlocal verify FILE --against {text}", text=text),
        )
    raise ModelNotFound(
        text,
        reason=tr("{name} is not here, or not all of it.", name=name),
        hint=tr("Fetch it: qwenlocal pull {name}", name=name),
    )


def _damage(program: Program, record: Record) -> list[Damage]:
    from qwenlocal.library.download import Progress
    from qwenlocal.terminal.progress import progress

    try:
        with progress(sys.stderr) as shown:
            return program.store.check(record, lambda done, all: shown(Progress(record.name, done, all, "reading")))
    except KeyboardInterrupt as stop:
        raise Interrupted("Nothing was changed.") from stop


def _check_readable(record: Record) -> None:
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.parts import read_parts

    if record.is_checkpoint:
        Checkpoint.open(record.path.parent)
    else:
        read_parts(record.path)


def _proof(record: Record) -> str:
    digests = [file.sha256 for file in record.files if file.sha256]
    if not digests:
        return " as far as its header tells (no digest of it is known)"
    return f": sha256 {digests[0]}" + (f" and {len(digests) - 1} more" if len(digests) > 1 else "")


def _mended(program: Program, name: Name, record: Record, damage: Sequence[Damage]) -> Record:
    """Only what is damaged is fetched, or converted, again."""
    from qwenlocal.cli.conversion import converted
    from qwenlocal.library.names import CatalogName, HubCheckpointName, HubName, LocalCheckpointName

    if record.made_from and isinstance(name, (CatalogName, LocalCheckpointName, HubName)):
        return converted(program, name, again=True)
    with program.puller() as puller:
        if not isinstance(name, HubCheckpointName):
            return puller.mend(name, record, damage)
        if not record.owned:
            raise BadWeights(
                record.path.parent,
                "a file of it is damaged",
                hint=tr(
                    "Another program brought it, so it is left alone. Remove it there, then: qwenlocal pull {name}",
                    name=name,
                ),
            )
        _drop_damaged(program, record, damage)
        puller.pull_checkpoint(puller.outline(name.source))
    return _kept(program, name)


def _drop_damaged(program: Program, record: Record, damage: Sequence[Damage]) -> None:
    """Remove damaged files of a checkpoint, and what its record says of them, whether the hub answers then or not."""
    bad = [each.file for each in damage]
    for file in bad:
        for path in filter(None, (file.link, file.path)):
            Path(path).unlink(missing_ok=True)
    rest = [file for file in record.files if file not in bad]
    program.store.add(replace(record, files=rest, missing=sum(file.size for file in bad)))


def _damage_words(bad: Damage) -> str:
    if bad.blocks is None:
        return f"{bad.file.path} is damaged: its sha256 is {bad.sha256[:16]}…, it should be {bad.file.sha256[:16]}…."
    spans = ", ".join(f"{n} (bytes {n * bad.block_size:,} to {(n + 1) * bad.block_size:,})" for n in bad.blocks[:8])
    more = f" and {len(bad.blocks) - 8} more" if len(bad.blocks) > 8 else ""
    return f"{bad.file.path} is damaged in block {spans}{more}."
