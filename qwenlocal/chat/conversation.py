"""A conversation: a thread of messages, and the backend that answers them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qwenlocal.chat.events import Done, Event, FinishReason, Text
from qwenlocal.chat.thread import ASSISTANT, USER, Message, Thread, Turn
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from qwenlocal.chat.context_window import ContextWindow


@dataclass
class GenerationConfig:
    """
    Settings for answers: sampling, the token limit (None: until the context is full), and strings to stop at.

    `overflow` says what to do when a conversation outgrows the context: "shift" evicts its oldest turns, "summarize"
    has the model summarize them first, "stop" raises `ContextFull`. `unset` are names of settings that nobody has
    chosen: a remote engine uses its own values for them.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop_strings: Sequence[str] = ()
    overflow: str = "shift"
    unset: frozenset[str] = frozenset()


class Continuation(NamedTuple):
    """The text of an answer without half a character at its end, and the events of what follows it."""

    text: str
    events: Iterator[Event]


class ChatBackend(Protocol):
    """Answers threads with a model in this process (`LocalBackend`), on a server or in a remote engine."""

    @property
    def model(self) -> str:
        """The name of the model, "" if it has none."""

    @property
    def window(self) -> ContextWindow | None:
        """The context that threads must fit into; None if the backend does not count tokens."""

    def answer(self, thread: Thread, config: GenerationConfig) -> Iterator[Event]:
        """
        Yield the events of the answer to the question at the thread's leaf; the last one is `Done`.

        Old turns may be evicted from the thread.

        Raises
        ------
        ContextFull: the thread does not fit.
        """

    def continue_answer(self, thread: Thread, answer: Message, config: GenerationConfig) -> Continuation:
        """
        Continue `answer`, the message at the thread's leaf, after its last token. Old turns may be evicted.

        Raises
        ------
        UsageError: the model has ended the answer.
        """

    def stop(self) -> None:
        """Stop the answer that is being generated within milliseconds, from any thread."""


class Conversation:
    """
    A thread of messages, and a backend that answers.

    `ask`, `edit`, `retry` and `continue_answer` yield events as they happen. `thread` is up to date at every moment, so
    the text of an interrupted answer is kept.
    """

    def __init__(self, backend: ChatBackend, config: GenerationConfig, thread: Thread | None = None) -> None:
        """Continue `thread`, or start a new one."""
        self._backend, self.config, self.thread = backend, config, thread or Thread()

    @property
    def window(self) -> ContextWindow | None:
        """The context that the thread must fit into; None if the backend does not count tokens."""
        return self._backend.window

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
        Ask `text` in place of the turn's question; the turn and the later ones stay in the thread.

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
        text, events = self._backend.continue_answer(self.thread, message, self.config)
        events = _start(events)
        self.thread.update(message, text=text, ids=(), finish_reason="")  # an answer that grows, as a new one does
        return self._record(events, message)

    def replace_answer(self, turn: Turn, text: str) -> None:
        """Make `text` the answer of a turn; its earlier answer and the later turns stay in the thread."""
        self.thread.set_leaf(turn.question.number)
        message = self.thread.add(ASSISTANT, text, model=self._backend.model)
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
        self._backend.stop()

    # --- answering

    def _last_turn(self) -> Turn:
        turns = self.thread.turns
        if not turns:
            raise UsageError(tr("There is no question yet."), hint=tr("Type a question first."))
        return turns[-1]

    def _answer(self, undo: Callable[[], object], version: int = 0) -> Iterator[Event]:
        """Start the answer to the question at the leaf; if it fails before its first text, call `undo`."""
        return _start(self._respond(undo, version))

    def _respond(self, undo: Callable[[], object], version: int) -> Iterator[Event]:
        config = self.config
        if version and config.sampling.seed is not None:
            seed = (config.sampling.seed + version) % (2**32 - 1)
            config = replace(config, sampling=replace(config.sampling, seed=seed))
        has_answer = False
        try:
            for event in self._record(self._backend.answer(self.thread, config), None):
                has_answer = has_answer or isinstance(event, (Text, Done))
                yield event
        except Exception:
            if not has_answer:
                undo()
            raise

    def _record(self, events: Iterator[Event], message: Message | None) -> Iterator[Event]:
        """Pass events on and add their text to the thread: to `message`, an answer to continue, or to a new one."""
        thread = self.thread
        for event in events:
            if isinstance(event, Text):
                message = message or thread.add(ASSISTANT, "", model=self._backend.model)
                thread.update(message, text=message.text + event.text)
            elif isinstance(event, Done):
                if message is None and event.finish_reason is not FinishReason.INTERRUPTED:
                    message = thread.add(ASSISTANT, "", model=self._backend.model)  # an empty answer is an answer
                if message:
                    thread.update(message, finish_reason=event.finish_reason.value, ids=event.ids)
            yield event


def _start(events: Iterator[Event]) -> Iterator[Event]:
    """Wait for the first event, so that errors before it are raised here."""
    return itertools.chain([next(events)], events)
