"""
Drafts without a draft model: what followed the last time these tokens stood here.

Answers that edit code, quote a text or fill in a form repeat what was said before. The last few tokens are looked up in
everything before them; what followed there is a guess at what follows here, and the model checks all of the guess in
one go (prompt lookup decoding: A. Saxena, 2023; llama.cpp: examples/lookup). Checking costs time, so a guess is only as
long as it is worth: see `Speculation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LENGTHS = (12, 6, 3)  # tokens that must have come before, most telling first
LONGEST_DRAFT = 31  # with the token before it, as many rows of logits as a context keeps


class NgramIndex:
    """
    Every run of 3, 6 and 12 tokens, and what came after its last occurrence.

    After `extend([5, 6, 7, 8, 9, 5, 6, 7])`, `draft(3)` is ([8, 9, 5], 3): after 5, 6, 7 came 8, 9, 5, and three tokens
    agree. Adding a token and asking for a draft take the same time however much was said.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in _LENGTHS}

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
                    after[tuple(self._ids[at - length : at])] = at
            self._ids.append(token)

    def draft(self, most: int) -> tuple[Sequence[int], int]:
        """At most `most` tokens that may follow, and how many before them agree; ([], 0) where nothing does."""
        for length, after in self._after.items():
            at = after.get(tuple(self._ids[-length:]))
            if at is not None:
                return self._ids[at : at + most], length
        return [], 0
