"""`qwenlocal verify FILE --against SRC`: whether a GGUF file is what its checkpoint says."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.checkpoints import Remote, Source, find_source
from qwenlocal.cli.values import print_json
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import BadWeights, Interrupted, ModelNotFound

if TYPE_CHECKING:
    from qwenlocal.measure.fidelity import Fidelity


def verify_against(text: str, source: str, *, as_json: bool) -> None:
    """Compare weights, token ids and logits of a file with those of the checkpoint it was made from."""
    program = Program(quiet=as_json)
    name = program.parse(text)
    record = program.local.here(name)
    if record is None:
        raise ModelNotFound(text, reason=f"{name} is not here.", hint=f"Fetch it: qwenlocal pull {name}")
    with find_source(program, source) as found_source:
        place = found_source.fetch() if isinstance(found_source, Remote) else found_source
    found = _measured(record.path, place)
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found)
    if found.problems:
        count = len(found.problems)
        raise BadWeights(
            record.path,
            f"it is not what {place.path} says ({'one thing differs' if count == 1 else f'{count} things differ'})",
            hint=f"Was it made from this checkpoint? Make it anew: qwenlocal convert {source}",
        )
    program.say(f"{record.path.name} is true to {place.name}.")


def _measured(file: Path, place: Source) -> Fidelity:
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.fidelity import measure
    from qwenlocal.measure.texts import known_texts
    from qwenlocal.terminal.status import StatusLine
    from qwenlocal.weights import gguf
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import Options
    from qwenlocal.weights.header import read_pairs

    pairs, keys = read_pairs(file), ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    if any(key not in pairs for key in keys):
        raise BadWeights(file, "it has no vocabulary to compare")
    machine, line = this_machine(), StatusLine(sys.stderr)
    try:
        return measure(
            Checkpoint.open(place.path),
            file,
            known_texts(*(gguf.decode(pairs[key]) for key in keys)),
            threads=machine.cores,
            memory=machine.memory().available,
            options=Options(place.name, place.repo),
            report=lambda what, done, all: line.show(f"{what}: {done} of {all}"),
        )
    except KeyboardInterrupt as stop:
        raise Interrupted("Nothing was changed.") from stop
    finally:
        line.clear()


def _show(found: Fidelity) -> None:
    types: dict[str, list[float]] = {}
    for tensor in found.tensors:
        types.setdefault(tensor.type, []).append(tensor.rmse)
    for kind, errors in sorted(types.items(), key=lambda item: -max(item[1])):
        mean = sum(errors) / len(errors)
        sys.stdout.write(f"weights  {kind:<8} {len(errors):>4} tensors, error {mean:.3%}, at most {max(errors):.3%}\n")
    if worst := found.worst:
        sys.stdout.write(f"worst    {worst.name} ({worst.type}): {worst.rmse:.3%}, explained {worst.allowed:.3%}\n")
    if found.not_finite:
        sys.stdout.write(f"note     {found.not_finite:,} weights are NaN or infinite in the checkpoint, zero here\n")
    if found.texts:
        _show_behaviour(found)
    for problem in found.problems:
        sys.stdout.write(f"wrong    {problem}\n")


def _show_behaviour(found: Fidelity) -> None:
    sys.stdout.write(f"tokens   {found.texts - len(found.wrong_texts)} of {found.texts} texts have the right ids\n")
    if error := found.logits:
        sys.stdout.write(
            f"logits   over {error.tokens} tokens: NMSE {error.nmse:.2e}, KL {error.kl:.2e} nats, "
            f"the same likeliest token {error.agreement:.1%} of the time\n"
        )
    else:
        sys.stdout.write("logits   not compared: both models together do not fit into memory\n")


def _as_json(found: Fidelity) -> Mapping[str, Any]:
    error = found.logits
    return {
        "tensors": [tensor._asdict() for tensor in found.tensors],
        "missing": list(found.missing),
        "surplus": list(found.surplus),
        "contradictions": [str(each) for each in found.contradictions],
        "not finite": found.not_finite,
        "worst": found.worst.name if found.worst else None,
        "texts": found.texts,
        "wrong texts": [wrong.text for wrong in found.wrong_texts],
        "logits": {"tokens": error.tokens, "nmse": error.nmse, "kl": error.kl, "agreement": error.agreement}
        if error
        else None,
        "problems": found.problems,
    }
