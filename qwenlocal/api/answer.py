"""Answers of the Python API."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwenlocal.chat.events import FinishReason, GenerationStats
from qwenlocal.errors import IncompleteAnswer
from qwenlocal.formatting import format_count
from qwenlocal.i18n import tr


@dataclass(frozen=True)
class Answer:
    """
    The answer of a model; `str(answer)` is its text.

    `finish_reason` says why it ended, `stats` has its token counts and times. `incomplete` is the reason why it does
    not follow its schema or grammar, None if it does or has none.
    """

    text: str
    finish_reason: FinishReason
    stats: GenerationStats
    incomplete: IncompleteAnswer | None = None
    _decode: Callable[[str], Any] = field(default=json.loads, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def parse(self) -> Any:
        """
        Return the answer as data: an instance of the pydantic class that was the schema, or the parsed JSON.

        Raises
        ------
        IncompleteAnswer: the answer was cut off before it followed its schema.
        """
        if self.incomplete:
            raise self.incomplete
        return self._decode(self.text)


def incomplete_answer(reason: FinishReason, max_tokens: int | None, n_ctx: int) -> IncompleteAnswer:
    """Build the error for an answer that ended for `reason` before it followed its schema or grammar."""
    count = max_tokens or 0
    message, hint = {
        FinishReason.LENGTH: (
            tr("The answer is incomplete: it was cut after {tokens}.", tokens=format_count(count, "token")),
            tr("Allow more tokens: -n {more}", more=max(256, 2 * count)),
        ),
        FinishReason.CONTEXT_FULL: (
            tr("The answer is incomplete: the context of {n_ctx:,} tokens is full.", n_ctx=n_ctx),
            tr("Use a longer context: -c {needed}", needed=2 * n_ctx),
        ),
        FinishReason.STOP_STRING: (tr("The answer is incomplete: a stop string ended it."), tr("Omit --stop.")),
        FinishReason.INTERRUPTED: (tr("The answer is incomplete: it was stopped."), tr("Ask again.")),
    }[reason]
    return IncompleteAnswer(message, hint=hint)
