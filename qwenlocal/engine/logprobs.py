"""Probabilities of tokens, for clients that rate texts or show alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenlocal.engine.context import Context


@dataclass(frozen=True)
class Logprobs:
    """
    The natural logarithm of a token's probability, and those of the most probable tokens at its position.

    The probabilities are the model's own: of temperature 1, without penalties and grammar.
    """

    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


def log_softmax(context: Context, row: int) -> Any:
    """Return the logarithms of all tokens' probabilities after a row of logits, as a numpy array."""
    import numpy

    logits = numpy.ctypeslib.as_array(context.logits(row), (len(context.model.tokenizer),)).astype(numpy.float64)
    shifted = logits - logits.max()
    return shifted - numpy.log(numpy.exp(shifted).sum())


def rank_tokens(log_probabilities: Any, token: int, count: int) -> Logprobs:
    """
    Look up `token` and the `count` most probable tokens.

    With probabilities of (1/4, 1/2, 1/4), token 1 and a count of 1, the result is `Logprobs(-0.69, ((1, -0.69),))`.
    """
    import numpy

    count = min(count, len(log_probabilities))
    top = numpy.argpartition(-log_probabilities, max(0, count - 1))[:count].tolist()
    ranked = sorted(top, key=lambda id: -log_probabilities[id])
    return Logprobs(float(log_probabilities[token]), tuple((id, float(log_probabilities[id])) for id in ranked))
