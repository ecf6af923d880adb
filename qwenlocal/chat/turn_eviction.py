"""Room in a full context: the oldest turns of a conversation leave it, summarized if that was chosen."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Generator, Iterator, Sequence

from qwenlocal.chat.context_window import (
    EVICTION_TARGET,
    EVICTION_THRESHOLD,
    build_summary_request,
    evictable_turns,
    select_messages,
)
from qwenlocal.chat.conversation import GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, Summarizing, Text, TurnsEvicted
from qwenlocal.chat.thread import Thread, Turn
from qwenlocal.engine.sampling import Sampling
from qwenlocal.formatting import shorten
from qwenlocal.progress import PromptProgress

_SUMMARY_TOKENS, _SUMMARY_SHARE = 256, 0.25  # at most, and as a fraction of the context

Messages = list[dict[str, str]]


class TurnEvictor:
    """
    Evicts turns from a context of `n_ctx` tokens.

    `count_tokens` returns the tokens of a prompt, `stream` the events of the answer to one.
    """

    def __init__(
        self,
        n_ctx: int,
        count_tokens: Callable[[Messages], int],
        stream: Callable[[Messages, GenerationConfig], Iterator[Event]],
    ) -> None:
        self._n_ctx, self._count_tokens, self._stream = n_ctx, count_tokens, stream

    def make_room(self, thread: Thread, overflow: str) -> Generator[Event, None, bool]:
        """
        Evict the oldest turns if the thread leaves too little space for an answer, or for the rest of one.

        Half of the context is freed at once, because everything behind an evicted turn has to be processed again.
        Returns True if the summary was interrupted.
        """
        if overflow == "stop" or self._count_tokens(select_messages(thread)) <= self._n_ctx * EVICTION_THRESHOLD:
            return False
        wants_summary = overflow == "summarize"
        turns = self._choose_turns(thread, self._summary_tokens if wants_summary else 0)
        wants_summary = wants_summary and bool(turns)
        request = self._build_request(thread, turns) if wants_summary else []
        summary = (yield from self._summarize(request, len(turns))) if request else thread.summary
        if turns and summary is not None:
            thread.evict_turns([turn.question.number for turn in turns], summary)
            first, lacks_room = shorten(turns[0].question.text), wants_summary and not request
            yield TurnsEvicted(len(turns), first, summary if request else "", lacks_room)
        return summary is None

    def _choose_turns(self, thread: Thread, reserved: int) -> list[Turn]:
        """
        Return the fewest oldest turns that free half of the context.

        There are none if the question does not fit even then, next to `reserved` tokens.
        """
        turns = evictable_turns(thread)

        def count_without(count: int) -> int:
            evicted = {turn.question.number for turn in turns[:count]}
            return self._count_tokens(select_messages(thread, evicted))

        count = bisect.bisect_left(
            range(len(turns)), True, key=lambda count: count_without(count) <= self._n_ctx * EVICTION_TARGET
        )
        return turns[:count] if count_without(count) < self._n_ctx - reserved else []

    def _build_request(self, thread: Thread, turns: Sequence[Turn]) -> Messages:
        """Return the messages that ask for a summary of the turns; none if a summary does not fit behind them."""
        messages = build_summary_request(thread, turns)
        return messages if self._count_tokens(messages) + self._summary_tokens <= self._n_ctx else []

    def _summarize(self, request: Messages, turns: int) -> Generator[Event, None, str | None]:
        """Have the model summarize that many turns, and return the summary; None if it was interrupted."""
        text = ""
        for event in self._stream(request, GenerationConfig(Sampling(temperature=0), self._summary_tokens)):
            if isinstance(event, Text):
                text += event.text
                yield Summarizing(turns, len(text.split()))
            elif isinstance(event, PromptProgress):
                yield event
            elif isinstance(event, Done) and event.finish_reason is FinishReason.INTERRUPTED:
                yield event
                return None
        return text.strip()

    @property
    def _summary_tokens(self) -> int:
        """The maximum length of a summary."""
        return min(_SUMMARY_TOKENS, int(self._n_ctx * _SUMMARY_SHARE))
