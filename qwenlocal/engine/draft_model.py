"""A small model that guesses what a large one with the same vocabulary will say."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.engine.context import CacheFull, Context
from qwenlocal.engine.llama import Model
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.weights.kinds import PADDING

_SURE = 0.5  # what follows a wrong token is wrong as well
_LARGEST_DIFFERENCE = 128  # tokens of padding; Qwen1.5 has 151,936 up to 7B, 152,064 from 14B on


def shares_vocabulary(large: Model, small: Model) -> bool:
    """
    Whether every token of one is the same in the other; ids without a token at the end may be there or not.

    Takes 0.2 s for Qwen's 151,936 tokens.
    """
    sizes = len(large.tokenizer), len(small.tokenizer)
    if abs(sizes[0] - sizes[1]) > _LARGEST_DIFFERENCE:
        return False
    for token in range(min(sizes)):
        one, other = large.tokenizer.text_of(token), small.tokenizer.text_of(token)
        if one != other and not (PADDING.fullmatch(one) and PADDING.fullmatch(other)):
            return False
    return True


class DraftModel:
    """
    Continues what the large model has said so far, token by token the likeliest, in a context of its own.

    `vocabulary_size` is the large model's: no id beyond it is drafted. A token less likely than `sure` ends a draft.
    """

    def __init__(self, context: Context, vocabulary_size: int, sure: float = _SURE) -> None:
        self._context, self._sure = context, sure
        self._size = min(vocabulary_size, len(context.model.tokenizer))
        self._ids: list[int] = []  # what was said
        self._held: list[int] = []  # what the cache holds

    def begin(self, ids: Sequence[int]) -> None:
        """The text so far is `ids`."""
        self._ids = list(ids)

    def extend(self, tokens: Sequence[int]) -> None:
        """More of the text, whoever guessed it."""
        self._ids.extend(tokens)

    def catch_up(self) -> None:
        """
        Read what was said since the last draft, but for the last token.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        self._read(self._ids[:-1])

    def draft(self, most: int) -> list[int]:
        """
        At most `most` tokens that may come next; fewer where it is not sure, or there is no room.

        Raises
        ------
        Aborted: the flag of the context was set.
        """
        drafted: list[int] = []
        while len(drafted) < most:
            row = self._read([*self._ids, *drafted])
            token = self._likeliest(row) if row is not None else None
            if token is None:
                break
            drafted.append(token)
        return drafted

    def _read(self, ids: Sequence[int]) -> int | None:
        """Have the cache hold `ids`; the row of logits after them, None where there is no room or nothing new."""
        known = min(common_prefix(self._held, ids), max(0, len(ids) - 1))
        self._context.truncate(0, known)
        self._held, row = list(ids[:known]), None
        while len(self._held) < len(ids):
            new = ids[len(self._held) : len(self._held) + self._context.n_batch]
            if len(self._held) + len(new) > self._context.n_ctx:
                return None
            try:
                row = self._context.decode([(0, new)])[0]
            except CacheFull:
                return None
            finally:
                self._held = list(ids[: self._context.length(0)])
        return row

    def _likeliest(self, row: int) -> int | None:
        """The likeliest token after a row of logits; None where it is no better than a guess."""
        import numpy

        scores = numpy.ctypeslib.as_array(self._context.logits(row), (self._size,))
        token = int(scores.argmax())
        probability = 1 / float(numpy.exp(scores - scores[token]).sum())
        return token if probability >= self._sure else None

    def close(self) -> None:
        """Give the memory back, the model's too."""
        self._context.close()
        self._context.model.close()
