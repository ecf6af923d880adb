"""Answers of a model in this process: messages become token ids, and the engine's tokens become events."""

from __future__ import annotations

import bisect
from collections.abc import Generator, Iterator, Sequence

from qwenlocal.chat.chat_template import ChatTemplate
from qwenlocal.chat.context_window import (
    EVICTION_TARGET,
    EVICTION_THRESHOLD,
    ContextWindow,
    build_summary_request,
    evictable_turns,
    select_messages,
)
from qwenlocal.chat.conversation import Continuation, GenerationConfig
from qwenlocal.chat.events import Done, Event, FinishReason, Summarizing, Text, TurnsEvicted
from qwenlocal.chat.generate import stream_answer
from qwenlocal.chat.thread import Message, Thread, Turn
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenGenerator
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.formatting import shorten
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress

_SUMMARY_TOKENS, _SUMMARY_SHARE = 256, 0.25  # at most, and as a fraction of the context


class LocalBackend:
    """A generator of tokens with its chat template; implements `chat.conversation.ChatBackend`."""

    def __init__(
        self, generator: TokenGenerator, tokenizer: Tokenizer, template: ChatTemplate, *, n_ctx: int, model: str = ""
    ) -> None:
        """`n_ctx` is the generator's context in tokens, `model` the model's name."""
        self._generator, self._tokenizer, self.model = generator, tokenizer, model
        self.window = ContextWindow(tokenizer, template, n_ctx)

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        if not (yield from self._make_room(thread, config.overflow)):
            yield from self._stream(self._encode_prompt(thread), config)

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        if answer.ids and answer.finish_reason == FinishReason.EOS.value:  # edited answers have no ids
            raise UsageError(tr("The last answer is complete."))
        prefix = list(answer.ids) or self._tokenizer.tokenize(answer.text, special=False)
        ids = self._encode_prompt(thread)
        text = answer.text
        if answer.ids:  # the text may end with U+FFFD for half a character, which the next tokens complete
            detokenizer = IncrementalDetokenizer(config.stop_strings)
            text = "".join(detokenizer.feed(self._tokenizer.piece(token)) for token in prefix)
        return Continuation(text, self._stream(ids, config, prefix))

    def stop(self) -> None:
        self._generator.stop()

    def _encode_prompt(self, thread: Thread) -> list[int]:
        return self.window.encode(select_messages(thread))

    def _stream(self, ids: Sequence[int], config: GenerationConfig, prefix: Sequence[int] = ()) -> Iterator[Event]:
        return stream_answer(
            self._generator,
            self._tokenizer,
            ids,
            config.sampling,
            max_tokens=config.max_tokens,
            stop_strings=config.stop_strings,
            prefix=prefix,
        )

    # --- a full context

    def _make_room(self, thread: Thread, overflow: str) -> Generator[Event, None, bool]:
        """
        Evict the oldest turns if the prompt leaves too little space for an answer.

        Half of the context is freed at once, because everything behind an evicted turn has to be processed again.
        Returns True if the summary was interrupted.
        """
        if overflow == "stop" or len(self._encode_prompt(thread)) <= self.window.n_ctx * EVICTION_THRESHOLD:
            return False
        wants_summary = overflow == "summarize"
        turns = self._choose_turns_to_evict(thread, self._summary_tokens if wants_summary else 0)
        wants_summary = wants_summary and bool(turns)
        request = self._encode_summary_request(thread, turns) if wants_summary else []
        summary = (yield from self._summarize(request, len(turns))) if request else thread.summary
        if turns and summary is not None:
            thread.evict_turns([turn.question.number for turn in turns], summary)
            first, lacks_room = shorten(turns[0].question.text), wants_summary and not request
            yield TurnsEvicted(len(turns), first, summary if request else "", lacks_room)
        return summary is None

    def _choose_turns_to_evict(self, thread: Thread, reserved: int) -> list[Turn]:
        """
        Return the fewest oldest turns that free half of the context.

        There are none if the question does not fit even then, next to `reserved` tokens.
        """
        turns, n_ctx = evictable_turns(thread), self.window.n_ctx

        def length_without(count: int) -> int:
            evicted = {turn.question.number for turn in turns[:count]}
            return len(self.window.encode(select_messages(thread, evicted)))

        count = bisect.bisect_left(
            range(len(turns)), True, key=lambda count: length_without(count) <= n_ctx * EVICTION_TARGET
        )
        return turns[:count] if length_without(count) < n_ctx - reserved else []

    def _encode_summary_request(self, thread: Thread, turns: Sequence[Turn]) -> list[int]:
        """Return the ids of the prompt for a summary of the turns; none if a summary does not fit behind it."""
        ids = self.window.encode(build_summary_request(thread, turns))
        return ids if len(ids) + self._summary_tokens <= self.window.n_ctx else []

    def _summarize(self, ids: Sequence[int], turns: int) -> Generator[Event, None, str | None]:
        """Have the model summarize that many turns, and return the summary; None if it was interrupted."""
        text = ""
        for event in self._stream(ids, GenerationConfig(Sampling(temperature=0), self._summary_tokens)):
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
        return min(_SUMMARY_TOKENS, int(self.window.n_ctx * _SUMMARY_SHARE))
