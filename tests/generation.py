"""Answers of token sequences, and how much of a prompt they reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwenlocal.engine.context import Context
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import DEFAULT_COSTS
from qwenlocal.progress import PromptProgress

GREEDY = Sampling(temperature=0, repeat_penalty=1)
CHEAP = dict.fromkeys(DEFAULT_COSTS, 1.0)  # checking any number takes as long as one: everything is drafted

OpenContext = Callable[..., Context]


def answer(sequence: TokenSequence, ids: Sequence[int], limit: int, sampling: Sampling = GREEDY) -> list[int]:
    return [step for step in sequence.generate(ids, sampling, limit=limit) if isinstance(step, int)]


def answer_and_count(sequence: TokenSequence, ids: Sequence[int], limit: int) -> tuple[int, list[int]]:
    """Return the number of reused tokens, and the answer."""
    progress, *steps = sequence.generate(ids, GREEDY, limit=limit)
    assert isinstance(progress, PromptProgress)
    return progress.reused, [step for step in steps if isinstance(step, int)]
