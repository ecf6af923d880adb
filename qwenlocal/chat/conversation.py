"""A conversation: a thread of messages, and the model that answers them."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qwenlocal.chat.chat_template import ChatTemplate, encode_messages
from qwenlocal.chat.context_window import (
    EVICTION_TARGET,
    EVICTION_THRESHOLD,
    build_summary_request,
    evictable_turns,
    select_messages,
)
from qwenlocal.chat.events import Done, Event, FinishReason, Summarizing, Text, TurnsEvicted
from qwenlocal.chat.generate import stream_answer
from qwenlocal.chat.thread import ASSISTANT, USER, Message, Thread, Turn
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenGenerator
from qwenlocal.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from qwenlocal.errors import UsageError
from qwenlocal.formatting import shorten
from qwenlocal.i18n import tr
from qwenlocal.progress import PromptProgress

_SUMMARY_TOKENS, _SUMMARY_SHARE = 256, 0.25  # at most, and as a fraction of the context
_EMPTY_QUESTION = [{"role": USER, "content": ""}]


@dataclass
class GenerationConfig:
    """
    Settings for answers: sampling, the token limit (None: until the context is full), and strings to stop at.

    `overflow` says what to do when a conversation outgrows the context: "shift" evicts its oldest turns, "summarize"
    has the model summarize them first, "stop" raises `ContextFull`.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop_strings: Sequence[str] = ()
    overflow: str = "shift"


class Conversation:
    """
    A thread of messages, and a model that answers.

    `ask`, `edit`, `retry` and `continue_answer` yield events as they happen. `thread` is up to date at every moment, so
    the text of an interrupted answer is kept.
    """

    def __init__(
        self,
        generator: TokenGenerator,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        config: GenerationConfig,
        thread: Thread | None = None,
        *,
        n_ctx: int,
        model: str = "",
    ) -> None:
        """`n_ctx` is the generator's context in tokens, `model` the model's name."""
        self._generator, self._tokenizer, self._template = generator, tokenizer, template
        self.config, self.thread, self.n_ctx, self._model = config, thread or Thread(), n_ctx, model
        self._last_encoded: tuple[list[dict[str, str]] | None, list[int]] = None, []

    # --- asking

    def ask(self, text: str) -> Iterator[Event]:
        """
        Add the question `text` and generate the answer.

        A question that was interrupted before its answer began is merged with this one.

        Raises
        ------
        ContextFull: the conversation does not fit; `text` is not added then.
        """
        thread, last = self.thread, self.thread.last
        if last and last.role == USER:
            original = last.text
            thread.update(last, text=f"{original}\n\n{text}")
            return self._answer(lambda: thread.update(last, text=original))
        question = thread.add(USER, text)
        return self._answer(lambda: thread.remove(question))

    def edit(self, turn: Turn, text: str) -> Iterator[Event]:
        """
        Ask `text` in place of the turn's question; the turn and what follows it stay in the thread.

        Raises
        ------
        ContextFull: the conversation does not fit; nothing is changed then.
        """
        thread, leaf = self.thread, self.thread.leaf
        thread.set_leaf(turn.question.parent)
        question = thread.add(USER, text)

        def undo() -> None:
            thread.remove(question)
            thread.set_leaf(leaf)

        return self._answer(undo)

    def retry(self) -> Iterator[Event]:
        """
        Generate another answer to the last question; the earlier one stays in the thread.

        Raises
        ------
        UsageError: there is no question.
        """
        thread, leaf = self.thread, self.thread.leaf
        turn = self._last_turn()
        if turn.answer:
            thread.set_leaf(turn.question.number)
        version = len(thread.versions(turn.answer)) if turn.answer else 0
        return self._answer(lambda: thread.set_leaf(leaf), version=version)

    def continue_answer(self) -> Iterator[Event]:
        """
        Continue an answer that was cut short, exactly after its last token.

        Raises
        ------
        UsageError: there is no question, or the model has ended the answer. ContextFull: there is no space for more.
        """
        turn = self._last_turn()
        if turn.answer is None:
            return self._answer(lambda: None)
        message = turn.answer
        if message.ids and message.finish_reason == FinishReason.EOS.value:  # edited answers have no ids
            raise UsageError(tr("The last answer is complete."))
        prefix = list(message.ids) or self._tokenizer.tokenize(message.text, special=False)
        self.thread.set_leaf(turn.question.number)
        ids = self._encode_prompt()
        self.thread.set_leaf(message.number)
        events = _start(self._stream(ids, self.config.sampling, prefix))
        text = message.text
        if message.ids:  # the text may end with U+FFFD for half a character, which the next tokens complete
            detokenizer = IncrementalDetokenizer(self.config.stop_strings)
            text = "".join(detokenizer.feed(self._tokenizer.piece(token)) for token in prefix)
        self.thread.update(message, text=text, ids=(), finish_reason="")  # an answer that grows, as a new one does
        return self._record(events, message)

    def replace_answer(self, turn: Turn, text: str) -> None:
        """Make `text` the answer of a turn; its earlier answer and what follows it stay in the thread."""
        self.thread.set_leaf(turn.question.number)
        message = self.thread.add(ASSISTANT, text, model=self._model)
        self.thread.update(message, finish_reason=FinishReason.EOS.value)

    def undo(self) -> Turn:
        """
        Go back to before the last question and return its turn, which stays in the thread.

        Raises
        ------
        UsageError: there is no question.
        """
        turn = self._last_turn()
        self.thread.set_leaf(turn.question.parent)
        return turn

    def stop(self) -> None:
        """Stop the answer that is being generated; can be called from any thread."""
        self._generator.stop()

    # --- reading

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokenizer.tokenize(text, special=False))

    @property
    def prompt_tokens(self) -> int:
        """
        The number of tokens that the conversation takes in the context; if it is empty, those of an empty question.

        It may be more than `n_ctx`: turns are evicted with the next question.
        """
        messages = select_messages(self.thread) or _EMPTY_QUESTION
        return len(self._encode(messages)) - self._header_tokens

    @property
    def used_tokens(self) -> int:
        """The number of tokens in the context, for people: `prompt_tokens`, but at most `n_ctx`."""
        return min(self.prompt_tokens, self.n_ctx)

    @property
    def system_tokens(self) -> int:
        """The number of tokens of the system prompt, with an empty question."""
        messages = [{"role": "system", "content": self.thread.system}, *_EMPTY_QUESTION]
        return len(encode_messages(self._template, messages, self._tokenizer))

    @functools.cached_property
    def _header_tokens(self) -> int:
        """The number of tokens of the markup that begins an answer."""
        prompt = self._template.render(_EMPTY_QUESTION)
        question = self._template.render(_EMPTY_QUESTION, add_generation_prompt=False)
        return len(self._tokenizer.tokenize(prompt.removeprefix(question), special=True))

    def count_turn_tokens(self, turn: Turn) -> int:
        """Return the number of tokens that a turn adds to the prompt, including the template's markup."""
        before = [{"role": USER, "content": ""}, {"role": ASSISTANT, "content": ""}]
        messages = [message.to_dict() for message in turn.messages]
        without = encode_messages(self._template, before, self._tokenizer)
        return len(encode_messages(self._template, [*before, *messages], self._tokenizer)) - len(without)

    # --- answering

    def _last_turn(self) -> Turn:
        turns = self.thread.turns
        if not turns:
            raise UsageError(tr("There is no question yet."), hint=tr("Type a question first."))
        return turns[-1]

    def _answer(self, undo: Callable[[], object], version: int = 0) -> Iterator[Event]:
        """Start the answer to the question at the leaf; if it fails before its first event, call `undo`."""
        return _start(self._respond(undo, version))

    def _respond(self, undo: Callable[[], object], version: int) -> Iterator[Event]:
        sampling = self.config.sampling
        if version and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + version) % (2**32 - 1))
        try:
            if (yield from self._make_room()):
                return
            events = _start(self._stream(self._encode_prompt(), sampling))
        except BaseException:
            undo()
            raise
        yield from self._record(events, None)

    def _make_room(self) -> Generator[Event, None, bool]:
        """
        Evict the oldest turns if the prompt leaves too little space for an answer.

        Half of the context is freed at once, because everything behind an evicted turn has to be processed again.
        Returns True if the summary was interrupted.
        """
        overflow = self.config.overflow
        if overflow == "stop" or len(self._encode_prompt()) <= self.n_ctx * EVICTION_THRESHOLD:
            return False
        turns = self._choose_turns_to_evict()
        wants_summary = bool(turns) and overflow == "summarize"
        request = self._encode_summary_request(turns) if wants_summary else []
        summary = (yield from self._summarize(request, len(turns))) if request else self.thread.summary
        if turns and summary is not None:
            self.thread.evict_turns([turn.question.number for turn in turns], summary)
            first, lacks_room = shorten(turns[0].question.text), wants_summary and not request
            yield TurnsEvicted(len(turns), first, summary if request else "", lacks_room)
        return summary is None

    def _choose_turns_to_evict(self) -> list[Turn]:
        """Return the fewest oldest turns that free half of the context; none if the question does not fit even then."""
        turns = evictable_turns(self.thread)
        limit = self.n_ctx - (self._summary_tokens if self.config.overflow == "summarize" else 0)

        def length_without(count: int) -> int:
            evicted = {turn.question.number for turn in turns[:count]}
            return len(self._encode(select_messages(self.thread, evicted)))

        count = bisect.bisect_left(
            range(len(turns)), True, key=lambda count: length_without(count) <= self.n_ctx * EVICTION_TARGET
        )
        return turns[:count] if length_without(count) < limit else []

    def _encode_summary_request(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids of the prompt for a summary of the turns; none if a summary does not fit behind it."""
        ids = encode_messages(self._template, build_summary_request(self.thread, turns), self._tokenizer)
        return ids if len(ids) + self._summary_tokens <= self.n_ctx else []

    def _summarize(self, ids: Sequence[int], turns: int) -> Generator[Event, None, str | None]:
        """Have the model summarize that many turns, and return the summary; None if it was interrupted."""
        text = ""
        greedy = Sampling(temperature=0)
        for event in stream_answer(self._generator, self._tokenizer, ids, greedy, max_tokens=self._summary_tokens):
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
        return min(_SUMMARY_TOKENS, int(self.n_ctx * _SUMMARY_SHARE))

    def _encode_prompt(self) -> list[int]:
        return self._encode(select_messages(self.thread))

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of the prompt. The latest are cached: tokenizing takes about a second per megabyte."""
        last = self._last_encoded  # other threads encode, too: commands while the model answers
        if messages != last[0]:
            self._last_encoded = last = messages, encode_messages(self._template, messages, self._tokenizer)
        return last[1]

    def _stream(self, ids: Sequence[int], sampling: Sampling, prefix: Sequence[int] = ()) -> Iterator[Event]:
        return stream_answer(
            self._generator,
            self._tokenizer,
            ids,
            sampling,
            max_tokens=self.config.max_tokens,
            stop_strings=self.config.stop_strings,
            prefix=prefix,
        )

    def _record(self, events: Iterator[Event], message: Message | None) -> Iterator[Event]:
        """Pass events on and add their text to the thread: to `message`, an answer to continue, or to a new one."""
        thread = self.thread
        for event in events:
            if isinstance(event, Text):
                message = message or thread.add(ASSISTANT, "", model=self._model)
                thread.update(message, text=message.text + event.text)
            elif isinstance(event, Done):
                if message is None and event.finish_reason is not FinishReason.INTERRUPTED:
                    message = thread.add(ASSISTANT, "", model=self._model)  # an empty answer is an answer
                if message:
                    thread.update(message, finish_reason=event.finish_reason.value, ids=event.ids)
            yield event


def _start(events: Iterator[Event]) -> Iterator[Event]:
    """Wait for the first event, so that errors before it are raised here."""
    return itertools.chain([next(events)], events)
