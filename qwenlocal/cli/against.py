"""`qwenlocal verify FILE --against SRC`: whether a GGUF file is what its checkpoint says."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.convert import find_source
from qwenlocal.cli.values import print_json
from qwenlocal.cli.wiring import Program
from qwenlocal.errors import BadWeights, ModelNotFound

if TYPE_CHECKING:
    from qwenlocal.measure.fidelity import Fidelity


def verify_against(text: str, source: str, *, as_json: bool) -> None:
    """Compare weights, token ids and logits of a file with those of the checkpoint it was made from."""
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.fidelity import measure
    from qwenlocal.measure.texts import known_texts
    from qwenlocal.terminal.status import StatusLine
    from qwenlocal.weights import gguf
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import Options
    from qwenlocal.weights.header import read_pairs

    program = Program(quiet=as_json)
    name = program.parse(text)
    record = program.local.here(name)
    if record is None:
        raise ModelNotFound(text, reason=f"{name} is not here.", hint=f"Fetch it: qwenlocal pull {name}")
    place = find_source(program, source)
    pairs = read_pairs(record.path)
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    if any(key not in pairs for key in keys):
        raise BadWeights(record.path, "it has no vocabulary to compare")
    machine, line = this_machine(), StatusLine(sys.stderr)
    found = measure(
        Checkpoint.open(place.path),
        record.path,
        known_texts(*(gguf.decode(pairs[key]) for key in keys)),
        threads=machine.cores,
        memory=machine.memory().available,
        options=Options(place.name, place.repo),
        report=lambda what, done, all: line.show(f"{what}: {done} of {all}"),
    )
    line.clear()
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found)
    if found.problems:
        raise BadWeights(record.path, f"it is not what {place.path} says: {found.problems[0]}", hint=_NEXT)
    program.say(f"{record.path.name} is true to {place.name}.")


_NEXT = "Convert the checkpoint again: qwenlocal convert"


def _show(found: Fidelity) -> None:
    types: dict[str, list[float]] = {}
    for tensor in found.tensors:
        types.setdefault(tensor.type, []).append(tensor.rmse)
    for kind, errors in sorted(types.items(), key=lambda item: -max(item[1])):
        mean = sum(errors) / len(errors)
        sys.stdout.write(f"weights  {kind:<8} {len(errors):>4} tensors, error {mean:.3%}, at most {max(errors):.3%}\n")
    if worst := found.worst:
        sys.stdout.write(f"worst    {worst.name} ({worst.type}): {worst.rmse:.3%}, explained {worst.allowed:.3%}\n")
    if not found.missing:
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
        "worst": found.worst.name if found.worst else None,
        "texts": found.texts,
        "wrong texts": [wrong.text for wrong in found.wrong_texts],
        "logits": {"tokens": error.tokens, "nmse": error.nmse, "kl": error.kl, "agreement": error.agreement}
        if error
        else None,
        "problems": found.problems,
    }
