"""The commands that look after models: pull, list, show, rm, verify."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal.cli.inspect import header_facts, memory_words, template_words
from qwenlocal.cli.values import bytes_for_people, print_json, print_table
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import BadWeights, Interrupted, ModelNotFound
from qwenlocal.library.store import Damage, Incomplete, Record

if TYPE_CHECKING:
    from qwenlocal.library.catalog import Card
    from qwenlocal.library.names import Name


def pull_model(text: str, *, limit_rate: int) -> None:
    """Have a model here."""
    program = Program()
    name = program.parse(text)
    record = program.have(name, limit_rate=limit_rate)
    program.say(f"{record.name} is here: {record.path} ({bytes_for_people(record.size)})")


# --- list


def list_models(*, everything: bool, as_json: bool) -> None:
    """What is here, what is on its way, and with `everything` what could be fetched."""
    program = Program()
    kept = program.store.records()
    records = [record for record in kept if not record.missing]
    coming = _on_their_way(kept, program.store.incomplete())
    here = {record.name for record in records}
    cards = [card for card in program.catalogue.cards if _usual_name(card) not in here] if everything else []
    if as_json:
        print_json(
            [_record_json(record) for record in records]
            + [{"name": c.name, "state": "partial", "size": c.size, "done": c.done} for c in coming]
            + [_card_json(card) for card in cards]
        )
        return
    rows = [(r.name, bytes_for_people(r.size), _record_state(r)) for r in records]
    rows += [(c.name, bytes_for_people(c.size), f"{c.done / max(1, c.size):.0%} fetched") for c in coming]
    rows += [(_usual_name(card), _card_size(card), _card_state(card)) for card in cards]
    if not rows:
        program.say("No model is here yet. Start with: qwenlocal run (qwenlocal list --all shows what there is)")
        return
    print_table(("NAME", "SIZE", ""), rows)


def _usual_name(card: Card) -> str:
    from qwenlocal.library.names import CatalogueName

    return str(CatalogueName(card))


def _card_size(card: Card) -> str:
    return bytes_for_people(card.default_file.size) if card.default_file else ""


def _record_state(record: Record) -> str:
    if record.is_checkpoint:
        return "a checkpoint, to be converted"
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
        if record.missing:
            found[record.name] = _Coming(record.name, record.size + record.missing, record.size)
    for part in incomplete:
        name = part.identity.model or part.identity.name
        known = found.get(name, _Coming(name, part.identity.size, 0))
        found[name] = known._replace(done=known.done + part.done)
    return list(found.values())


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
    """What a model is; without the network, so what is not here is shown from the catalogue."""
    from qwenlocal.library.local import known_file
    from qwenlocal.library.names import CatalogueName, PathName
    from qwenlocal.weights.header import read_header

    program = Program(quiet=as_json)
    name = program.parse(text)
    record = program.local.here(name)
    if record is None:
        if not isinstance(name, CatalogueName):
            raise ModelNotFound(text, reason=f"{name} is not here.", hint=f"Fetch it: qwenlocal pull {name}")
        known = known_file(name)
        _show({**_card_facts(name.card), "name": str(name), "size": known.size if known else None}, as_json)
        return
    facts = _record_json(record)
    if isinstance(name, PathName):
        facts["name"] = record.path.name
    _show({**facts, **header_facts(read_header(Path(record.files[0].path)))}, as_json)


def _card_facts(card: Card) -> dict[str, Any]:
    facts = {**_card_json(card), "title": card.title, "context": card.context, "checkpoint": card.checkpoint}
    if card.kv_bytes_per_token:
        facts["context memory"] = memory_words(card.kv_bytes_per_token, card.context)
    return {**facts, "sampling": dict(card.sampling)}


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    from qwenlocal.terminal.plain import harmless

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


def _name_of(program: Program, text: str) -> Name:
    """What `text` names; also a checkpoint that is gone, of which we still have what was made of it."""
    from qwenlocal.library.names import CheckpointName

    try:
        return program.parse(text)
    except ModelNotFound:
        path = Path(text).expanduser().resolve()
        if program.store.get(str(path)) is None:
            raise
        return CheckpointName(path)


def remove_model(text: str) -> None:
    """Remove a model or an unfinished download."""
    from qwenlocal.library.names import CheckpointName, PathName

    program = Program()
    name = _name_of(program, text)
    if isinstance(name, PathName):
        raise ModelNotFound(
            text, reason=f"{name.path} is a file of yours, not a model that was fetched.", hint="Remove it with rm."
        )
    dropped = [i for i in program.store.incomplete() if str(name) in (i.identity.model, i.identity.name)]
    for incomplete in dropped:
        program.store.drop(incomplete)
        program.say(
            f"Removed the unfinished download of {incomplete.identity.name} ({bytes_for_people(incomplete.done)})."
        )
    record = program.store.get(str(name))
    if record is None:
        if not dropped:
            raise ModelNotFound(text, reason=f"{name} is not here.", hint="See what is: qwenlocal list")
        return
    freed = program.store.remove(record)
    if isinstance(name, CheckpointName):
        program.say(
            f"Removed the GGUF file made of {record.name} ({bytes_for_people(freed)}); the checkpoint is yours."
        )
    elif record.owned:
        program.say(f"Removed {record.name}; {bytes_for_people(freed)} are free again.")
    else:
        program.say(f"Forgot {record.name}. Its file belongs to {record.origin} and was left alone: {record.path}")


def verify_model(text: str, *, repair: bool) -> None:
    """Read every byte; fetch again what is damaged."""
    from qwenlocal.library.download import Progress
    from qwenlocal.library.names import PathName, WebName
    from qwenlocal.terminal.progress import progress
    from qwenlocal.weights.header import read_header

    program = Program()
    name = program.parse(text)
    record = program.store.get(str(name)) or program.local.here(name)
    if record is None or record.missing:
        raise ModelNotFound(
            text, reason=f"{name} is not here, or not all of it.", hint=f"Fetch it: qwenlocal pull {name}"
        )
    try:
        with progress(sys.stderr) as shown:
            damage = program.store.check(record, lambda done, all: shown(Progress(record.name, done, all, "reading")))
    except KeyboardInterrupt as stop:
        raise Interrupted("Nothing was changed.") from stop
    if not damage:
        read_header(Path(record.files[0].path))
        digest = record.files[0].sha256
        proof = f": sha256 {digest}" if digest else " as far as its header tells (no digest of it is known)"
        program.say(f"{record.name} is whole{proof}.")
        return
    for bad in damage:
        program.say(_damage_words(bad))
    if not repair:
        raise BadWeights(record.path, "the file is damaged", hint=f"Mend it: qwenlocal verify {record.name}")
    if record.made_from and not isinstance(name, (PathName, WebName)):
        from qwenlocal.cli.conversion import converted

        mended = converted(program, name, again=True)
    else:
        with program.puller() as found:
            mended = found.mend(name, record, damage)
    program.say(f"{mended.name} is whole again: sha256 {mended.files[0].sha256}.")


def _damage_words(bad: Damage) -> str:
    if bad.blocks is None:
        return f"{bad.file.path} is damaged: its sha256 is {bad.sha256[:16]}…, it should be {bad.file.sha256[:16]}…."
    spans = ", ".join(f"{n} (bytes {n * bad.block_size:,} to {(n + 1) * bad.block_size:,})" for n in bad.blocks[:8])
    more = f" and {len(bad.blocks) - 8} more" if len(bad.blocks) > 8 else ""
    return f"{bad.file.path} is damaged in block {spans}{more}."
