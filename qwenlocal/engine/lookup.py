"""
Prompt lookup: drafts without a draft model, from earlier occurrences of the last few tokens.

Answers that edit code, quote a text or fill in a form repeat earlier text. The tokens that followed the same n-gram
before are a guess at the next ones, and the model checks them all at once (prompt lookup decoding: A. Saxena, 2023;
llama.cpp: examples/lookup). `Speculation` decides how many to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qwenlocal.engine.prefix_cache import common_prefix

_LENGTHS = (12, 6, 3)  # n-gram sizes, the most reliable first
_LONG = 24  # matching tokens that mean text is being copied
MATCH_LENGTHS = (_LONG, *_LENGTHS)
MAX_DRAFT = 31  # with the token before it, as many rows of logits as a context keeps


class Guess(NamedTuple):
    """
    Tokens that followed an n-gram before, its length `matched` (one of `MATCH_LENGTHS`), and whether they came `twice`.

    A continuation common to the last two occurrences is more reliable than one, and ends where they differ: in a form,
    at the end of the part that every entry shares (counting continuations: SuffixDecoding, Oliaro et al., 2024).
    """

    tokens: Sequence[int]
    matched: int
    twice: bool


NO_GUESS = Guess((), 0, False)


class NgramIndex:
    """
    An index of all n-grams of 3, 6 and 12 tokens, with the positions after their last two occurrences.

    After `extend([5, 6, 7, 8, 9, 5, 6, 7])`, `guess(3)` is ([8, 9, 5], 3, False): 5, 6, 7 was followed by 8, 9, 5 once.
    After another `extend([8, 1, 5, 6, 7])` it is ([8], 3, True). Adding a token and guessing take constant time.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {length: {} for length in _LENGTHS}

    @property
    def ids(self) -> Sequence[int]:
        """All tokens added so far."""
        return self._ids

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for token in ids:
            position = len(self._ids)
            for length, after in self._after.items():
                if position >= length:
                    ngram = tuple(self._ids[position - length : position])
                    after[ngram] = position, after.get(ngram, (0, 0))[0]
            self._ids.append(token)

    def guess(self, limit: int) -> Guess:
        """Return at most `limit` tokens that may follow; `NO_GUESS` if the last ones are new."""
        for length, after in self._after.items():
            positions = after.get(tuple(self._ids[-length:]))
            if positions is not None:
                return self._from(*positions, length, limit)
        return NO_GUESS

    def _from(self, position: int, before: int, length: int, limit: int) -> Guess:
        """Return the tokens after `position` that agree with those after `before` (0: there is only one occurrence)."""
        tokens = self._ids[position : position + limit]
        matched = _LONG if length == _LENGTHS[0] and self._is_long_match(position) else length
        if not before:
            return Guess(tokens, matched, False)
        common = common_prefix(tokens, self._ids[before : before + limit])
        return Guess(tokens[:common], matched, True) if common else NO_GUESS

    def _is_long_match(self, position: int) -> bool:
        return position >= _LONG and self._ids[position - _LONG : position] == self._ids[-_LONG:]
