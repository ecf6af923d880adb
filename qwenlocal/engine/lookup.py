"""
Prompt lookup: the tokens that followed an earlier occurrence of the last few tokens, as a draft without a draft model.

Answers that edit code, quote a text or fill in a form repeat earlier text. The last few tokens are looked up in the
text before them; the tokens that follow there are a guess at the next ones, and the model checks all of them at once
(prompt lookup decoding: A. Saxena, 2023; llama.cpp: examples/lookup). `Speculation` sets how many are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qwenlocal.engine.prefix_cache import common_prefix

_LENGTHS = (12, 6, 3)  # tokens that must agree, the most telling first
_LONG = 24  # agreeing tokens from which on text is being copied
AGREED = (_LONG, *_LENGTHS)
LONGEST_DRAFT = 31  # with the token before it, as many rows of logits as a context keeps


class Guess(NamedTuple):
    """
    Tokens that followed before, the number of agreeing tokens ahead of them (one of `AGREED`), and whether they came
    twice.

    Tokens behind both of the last two occurrences are a surer guess than those behind one, and a guess ends where the
    two differ: in a form that is filled in, at the end of the part that every entry shares (the idea of counting
    continuations: SuffixDecoding, Oliaro and others, 2024).
    """

    tokens: Sequence[int]
    agreed: int
    twice: bool


NOTHING = Guess((), 0, False)


class NgramIndex:
    """
    Index of every run of 3, 6 and 12 tokens, with the places after its last two occurrences.

    After `extend([5, 6, 7, 8, 9, 5, 6, 7])`, `guess(3)` is ([8, 9, 5], 3, False): after 5, 6, 7 came 8, 9, 5, once, and
    three tokens agree. After another `extend([8, 1, 5, 6, 7])` it is ([8], 3, True). Adding a token and asking for a
    guess take constant time.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], tuple[int, int]]] = {length: {} for length in _LENGTHS}

    @property
    def ids(self) -> Sequence[int]:
        """All tokens so far."""
        return self._ids

    def extend(self, ids: Iterable[int]) -> None:
        """Add tokens at the end."""
        for token in ids:
            at = len(self._ids)
            for length, after in self._after.items():
                if at >= length:
                    run = tuple(self._ids[at - length : at])
                    after[run] = at, after.get(run, (0, 0))[0]
            self._ids.append(token)

    def guess(self, most: int) -> Guess:
        """Return at most `most` tokens that may follow; `NOTHING` if the last ones are new."""
        for length, after in self._after.items():
            places = after.get(tuple(self._ids[-length:]))
            if places is not None:
                return self._from(*places, length, most)
        return NOTHING

    def _from(self, at: int, before: int, length: int, most: int) -> Guess:
        tokens = self._ids[at : at + most]
        agreed = _LONG if length == _LENGTHS[0] and self._is_long(at) else length
        if not before:
            return Guess(tokens, agreed, False)
        same = common_prefix(tokens, self._ids[before : before + most])
        return Guess(tokens[:same], agreed, True) if same else NOTHING

    def _is_long(self, at: int) -> bool:
        return at >= _LONG and self._ids[at - _LONG : at] == self._ids[-_LONG:]
