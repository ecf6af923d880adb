"""
Drafts without a draft model: what followed the last time these tokens stood here.

Answers that edit code, quote a text or fill in a form repeat what was said before. The last few tokens are looked up in
everything before them; what followed there is a guess at what follows here, and the model checks all of the guess in
one go (prompt lookup decoding: A. Saxena, 2023; llama.cpp: examples/lookup). Checking costs time, so a guess is only as
long as it is worth: see `Speculation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qwenlocal.engine.prefix import common_prefix

_LENGTHS = (12, 6, 3)  # tokens that must have come before, most telling first
_LONG = 24  # so many that it is being copied, hardly by chance
AGREED = (_LONG, *_LENGTHS)
LONGEST_DRAFT = 31  # with the token before it, as many rows of logits as a context keeps


class Guess(NamedTuple):
    """
    What followed before, how many tokens ahead of it agree (one of `AGREED`), and whether it followed twice.

    What came behind both of the last two occurrences is a surer guess than what came once, and a guess goes only as
    far as the two agree: in a form that is filled in, to the end of what is the same in every entry (the idea of
    counting what followed: SuffixDecoding, Oliaro and others, 2024).
    """

    tokens: Sequence[int]
    agreed: int
    twice: bool


NOTHING = Guess((), 0, False)


class NgramIndex:
    """
    Every run of 3, 6 and 12 tokens, and what came after its last two occurrences.

    After `extend([5, 6, 7, 8, 9, 5, 6, 7])`, `guess(3)` is ([8, 9, 5], 3, False): after 5, 6, 7 came 8, 9, 5, once, and
    three tokens agree. After another `extend([8, 1, 5, 6, 7])` it is ([8], 3, True). Adding a token and asking for a
    guess take the same time however much was said.
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
        """At most `most` tokens that may follow; `NOTHING` where these tokens never stood before."""
        for length, after in self._after.items():
            found = after.get(tuple(self._ids[-length:]))
            if found is not None:
                return self._from(*found, length, most)
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
