"""Answers of a model in this process: messages become token ids, and the engine's tokens become events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwenlocal.chat.chat_template import ChatTemplate
from qwenlocal.chat.context_window import ContextWindow, select_messages, select_messages_before
from qwenlocal.chat.conversation import Continuation, GenerationConfig
from qwenlocal.chat.events import Event, FinishReason
from qwenlocal.chat.generate import stream_answer
from qwenlocal.chat.thread import Message, Thread
from qwenlocal.chat.turn_eviction import TurnEvictor
from qwenlocal.engine.sequence import TokenGenerator
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr


class LocalBackend:
    """A generator of tokens with its chat template; implements `chat.conversation.ChatBackend`."""

    def __init__(
        self, generator: TokenGenerator, tokenizer: Tokenizer, template: ChatTemplate, *, n_ctx: int, model: str = ""
    ) -> None:
        """`n_ctx` is the generator's context in tokens, `model` the model's name."""
        self._generator, self._tokenizer, self.model = generator, tokenizer, model
        self.window = ContextWindow(tokenizer, template, n_ctx)
        self._evictor = TurnEvictor(n_ctx, lambda messages: len(self.window.encode(messages)), self._stream)

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        if not (yield from self._evictor.make_room(thread, config.overflow)):
            yield from self._stream(select_messages(thread), config)

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        if answer.ids and answer.finish_reason == FinishReason.EOS.value:  # edited answers have no ids
            raise UsageError(tr("The last answer is complete."))
        prefix = list(answer.ids) or self._tokenizer.tokenize(answer.text, special=False)
        text = answer.text
        if answer.ids:  # the text may end with U+FFFD for half a character, which the next tokens complete
            detokenizer = IncrementalDetokenizer(config.stop_strings)
            text = "".join(detokenizer.feed(self._tokenizer.piece(token)) for token in prefix)
        return Continuation(text, self._continue(thread, answer, config, prefix))

    def _continue(
        self, thread: Thread, answer: Message, config: GenerationConfig, prefix: Sequence[int]
    ) -> Iterator[Event]:
        """Yield the events of the rest of an answer; with it, the thread may not fit any more."""
        if not (yield from self._evictor.make_room(thread, config.overflow)):
            yield from self._stream(select_messages_before(thread, answer), config, prefix)

    def stop(self) -> None:
        self._generator.stop()

    def _stream(
        self, messages: list[dict[str, str]], config: GenerationConfig, prefix: Sequence[int] = ()
    ) -> Iterator[Event]:
        return stream_answer(
            self._generator,
            self._tokenizer,
            self.window.encode(messages),
            config.sampling,
            max_tokens=config.max_tokens,
            stop_strings=config.stop_strings,
            prefix=prefix,
        )
