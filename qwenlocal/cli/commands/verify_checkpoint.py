"""`qwenlocal verify FILE --against SRC`: compare a GGUF file with its checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.cli.console import print_json
from qwenlocal.cli.context import AppContext
from qwenlocal.cli.gguf_files import find_installed
from qwenlocal.errors import BadWeights, Interrupted
from qwenlocal.formatting import format_percent, format_quantity
from qwenlocal.library.local_models import LocalCheckpoint

if TYPE_CHECKING:
    from qwenlocal.measure.fidelity import Fidelity
    from qwenlocal.measure.independent_tokenizer import IndependentTokenizer


def verify_checkpoint(text: str, source: str, *, as_json: bool) -> None:
    """
    Compare weights, token ids and logits of a file with those of its checkpoint.

    Raises
    ------
    ModelNotFound: the file is not on this disk. BadWeights: it differs from the checkpoint.
    """
    app = AppContext(quiet=as_json)
    record = find_installed(app, text)
    with app.library.checkpoints.find(app.library.models.parse(source)) as found:
        checkpoint = found if isinstance(found, LocalCheckpoint) else found.download()
    try:
        fidelity = _compare(record.path, checkpoint)
    except KeyboardInterrupt as stop:
        raise Interrupted("Nothing was changed.") from stop
    if as_json:
        print_json(_facts(fidelity))
    else:
        _show(fidelity)
    if fidelity.problems:
        count = len(fidelity.problems)
        raise BadWeights(
            record.path,
            f"it does not match {checkpoint.path} ({format_quantity(count, 'difference')})",
            hint=f"If this is its checkpoint, convert it again: qwenlocal convert {shlex.quote(source)}",
        )
    app.say(f"{record.path.name} matches {checkpoint.name}.")


def _compare(file: Path, checkpoint: LocalCheckpoint) -> Fidelity:
    from qwenlocal.machine import this_machine
    from qwenlocal.measure.fidelity import compare_with_checkpoint, known_texts
    from qwenlocal.terminal.progress import status_line
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.conversion import ConversionOptions
    from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata
    from qwenlocal.weights.load_errors import check_file

    check_file(file, with_tensors=False)
    pairs, keys = read_raw_metadata(file), ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    if keys[1] not in pairs:
        raise BadWeights(file, f"“{keys[1]}” is missing")
    machine = this_machine()
    with status_line(sys.stderr) as show:
        return compare_with_checkpoint(
            Checkpoint.open(checkpoint.path),
            file,
            known_texts(*(decode_value(pairs[key]) for key in keys)),
            threads=machine.cores,
            memory=machine.memory().available,
            options=ConversionOptions(checkpoint.name, checkpoint.repo),
            report=lambda task, done, total: show(f"{task}: {done} of {total}"),
        )


def _show(fidelity: Fidelity) -> None:
    types: dict[str, list[float]] = {}
    for tensor in fidelity.tensors:
        types.setdefault(tensor.type, []).append(tensor.rmse)
    for type, errors in sorted(types.items(), key=lambda item: -max(item[1])):
        mean, count = sum(errors) / len(errors), format_quantity(len(errors), "tensor")
        text = f"error {format_percent(mean)}, at most {format_percent(max(errors))}" if max(errors) else "identical"
        sys.stdout.write(f"weights  {type:<8} {count:>12}, {text}\n")
    if (worst := fidelity.worst) and worst.rmse:
        limit = f"up to {format_percent(worst.allowed)} is normal for {worst.type}"
        sys.stdout.write(f"worst    {worst.name}: error {format_percent(worst.rmse)}; {limit}\n")
    if fidelity.non_finite:
        weights = format_quantity(fidelity.non_finite, "weight is", "weights are")
        sys.stdout.write(f"note     {weights} NaN or infinite in the checkpoint, zero in the file\n")
    if fidelity.texts:
        _show_behavior(fidelity)
    for problem in fidelity.problems:
        sys.stdout.write(f"error    {problem}\n")


def _show_behavior(fidelity: Fidelity) -> None:
    sys.stdout.write(
        f"tokens   {fidelity.texts - len(fidelity.wrong_texts)} of {fidelity.texts} texts have the same token ids"
        f"{_describe_tokenizer(fidelity.tokenizer)}\n"
    )
    if fidelity.tokenizer is None:
        sys.stdout.write("note     for an independent tokenizer: pip install transformers\n")
    elif fidelity.tokenizer.error:
        sys.stdout.write(f"note     {fidelity.tokenizer.name} cannot read the tokenizer: {fidelity.tokenizer.error}\n")
    if error := fidelity.logits:
        sys.stdout.write(
            f"logits   over {error.tokens} tokens: NMSE {error.nmse:.2e}, KL {error.kl:.2e} nats, "
            f"same most likely token {error.agreement:.1%} of the time\n"
        )
        if error.nmse and not any(tensor.rmse for tensor in fidelity.tensors):
            sys.stdout.write(
                "note     the weights are identical: llama.cpp computes those of a file in another order than those in "
                "memory, so the logits are rounded differently\n"
            )
    else:
        sys.stdout.write("logits   not compared: both models together do not fit into memory\n")


def _describe_tokenizer(tokenizer: IndependentTokenizer | None) -> str:
    return f" as with {tokenizer.name}" if tokenizer and tokenizer.encode else ""


def _facts(fidelity: Fidelity) -> Mapping[str, Any]:
    return {
        "tensors": [tensor._asdict() for tensor in fidelity.tensors],
        "missing": list(fidelity.missing),
        "surplus": list(fidelity.surplus),
        "contradictions": [str(each) for each in fidelity.metadata],
        "not finite": fidelity.non_finite,
        "worst": fidelity.worst.name if fidelity.worst else None,
        "texts": fidelity.texts,
        "wrong texts": list(fidelity.wrong_texts),
        "tokenizer": fidelity.tokenizer.name if fidelity.tokenizer and fidelity.tokenizer.encode else None,
        "logits": asdict(fidelity.logits) if fidelity.logits else None,
        "problems": fidelity.problems,
    }
