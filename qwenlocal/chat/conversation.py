"""A conversation: who said what, and the model's next answer."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from qwenlocal.chat.events import Done, Event, LeftOut, Summarising, Text, Why
from qwenlocal.chat.prompt import Tokenizer, chat_ids
from qwenlocal.chat.room import FULL, MADE_FREE, next_to_leave, read_messages, shortly, to_summarise
from qwenlocal.chat.template import ChatTemplate
from qwenlocal.chat.thread import ASSISTANT, USER, Message, Thread, Turn
from qwenlocal.chat.turn import Pieces, answer
from qwenlocal.engine import sequence
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.text import TextStream
from qwenlocal.errors import UsageProblem
from qwenlocal.language import tr

_SUMMARY = 256  # tokens


class Vocabulary(Tokenizer, Pieces, Protocol):
    """What a conversation needs of a model's vocabulary."""


@dataclass
class Manner:
    """
    How answers are given: sampling, most tokens (None: until the context is full), strings to stop at.

    Where a conversation outgrows the context, `overflow` "shift" leaves out its oldest turns, "summarise" has the model
    write down first what they said, "stop" refuses.
    """

    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    stops: Sequence[str] = ()
    overflow: str = "shift"


class Conversation:
    """
    A thread of messages, and a model that answers.

    `ask`, `retry` and `go_on` give events as they happen; what was said up to any moment is in `thread`, so that an
    interrupted answer is kept as far as it went.
    """

    def __init__(
        self,
        generator: sequence.Generator,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        manner: Manner,
        thread: Thread | None = None,
        *,
        n_ctx: int | None = None,
        model: str = "",
    ) -> None:
        """`n_ctx` tokens are what the generator has room for; None where that is not known. `model` is its name."""
        self._generator, self._vocabulary, self._template = generator, vocabulary, template
        self.manner, self.thread, self.n_ctx, self._model = manner, thread or Thread(), n_ctx, model
        self._counted: tuple[list[dict[str, str]] | None, list[int]] = None, []

    # --- what can be said

    def ask(self, text: str) -> Iterator[Event]:
        """
        Say `text` and let the model answer.

        A question that was interrupted before any answer came is asked together with this one.

        Raises
        ------
        ContextFull: the conversation does not fit; `text` is not part of it then.
        """
        thread, last = self.thread, self.thread.last
        if last and last.role == USER:
            before = last.text
            thread.change(last, text=f"{before}\n\n{text}")
            return self._begin(lambda: thread.change(last, text=before))
        question = thread.add(USER, text)
        return self._begin(lambda: thread.remove(question))

    def edit(self, turn: Turn, text: str) -> Iterator[Event]:
        """
        Ask `text` instead of what the turn asked; what was said from there on stays in the thread.

        Raises
        ------
        ContextFull: it does not fit; nothing is changed then.
        """
        thread, leaf = self.thread, self.thread.leaf
        thread.go_to(turn.question.parent)
        question = thread.add(USER, text)

        def take_back() -> None:
            thread.remove(question)
            thread.go_to(leaf)

        return self._begin(take_back)

    def retry(self) -> Iterator[Event]:
        """
        Another answer to the last question; the one before stays in the thread.

        Raises
        ------
        UsageProblem: nothing was asked.
        """
        thread, leaf = self.thread, self.thread.leaf
        turn = self._last_turn()
        if turn.answer:
            thread.go_to(turn.question.number)
        versions = len(thread.versions(turn.answer)) if turn.answer else 0
        return self._begin(lambda: thread.go_to(leaf), version=versions)

    def go_on(self) -> Iterator[Event]:
        """
        Continue an answer that was cut, behind the very tokens that it ended with.

        Raises
        ------
        UsageProblem: nothing was asked. ContextFull: there is no room for more.
        """
        turn = self._last_turn()
        if turn.answer is None:
            return self._begin(lambda: None)
        message = turn.answer
        begun = list(message.ids) or self._vocabulary.tokenize(message.text, special=False)
        self.thread.go_to(turn.question.number)
        ids = self._ids()
        self.thread.go_to(message.number)
        events = self._answer(ids, self.manner.sampling, begun)
        first = next(events)
        if message.ids:  # the text may end with what stands for half a character, which now becomes whole
            text = TextStream(self.manner.stops)
            self.thread.change(message, text="".join(text.feed(self._vocabulary.piece(token)) for token in begun))
        return self._listen(itertools.chain([first], events), message)

    def replace_answer(self, turn: Turn, text: str) -> None:
        """Have the model have said `text`; what it said, and what followed, stays in the thread."""
        self.thread.go_to(turn.question.number)
        message = self.thread.add(ASSISTANT, text, model=self._model)
        self.thread.change(message, why=Why.END.value)

    def undo(self) -> Turn:
        """
        Go back before the last question; what was said stays in the thread.

        Raises
        ------
        UsageProblem: nothing was asked.
        """
        turn = self._last_turn()
        self.thread.go_to(turn.question.parent)
        return turn

    def stop(self) -> None:
        """End the answer that is being given; from any thread."""
        self._generator.stop()

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        self.thread.clear()

    # --- what is known of it

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages on the path."""
        return [{"role": message.role, "content": message.text} for message in self.thread.path]

    @property
    def prompt_messages(self) -> list[dict[str, str]]:
        """The messages with the system prompt, if there is one, before them."""
        system = [{"role": "system", "content": self.thread.system}] if self.thread.system else []
        return [*system, *self.messages]

    def tokens(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._vocabulary.tokenize(text, special=False))

    @property
    def tokens_read(self) -> int:
        """How many tokens the model reads of the conversation as it stands, at least those around a first question."""
        return len(self._ids_of(read_messages(self.thread) or [{"role": USER, "content": ""}]))

    def cost(self, turn: Turn) -> int:
        """How many tokens the model reads for a turn, with what the template puts around its messages."""
        before = [{"role": USER, "content": ""}, {"role": ASSISTANT, "content": ""}]
        said = [{"role": message.role, "content": message.text} for message in turn.messages]
        without = chat_ids(self._template, before, self._vocabulary)
        return len(chat_ids(self._template, [*before, *said], self._vocabulary)) - len(without)

    def save(self, path: Path, model: str) -> None:
        """Write the conversation as JSON: {"model", "messages"}, the form that chat APIs use; in one step."""
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        data = {"model": model, "messages": self.prompt_messages}
        draft.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
        draft.replace(path)

    # --- how it is done

    def _last_turn(self) -> Turn:
        turns = self.thread.turns
        if not turns:
            raise UsageProblem(tr("Nothing was asked yet."), hint=tr("Type a question first."))
        return turns[-1]

    def _begin(self, take_back: Callable[[], object], version: int = 0) -> Iterator[Event]:
        """The events of an answer to the question at the leaf; where it cannot be read, `take_back` is called."""
        events = self._respond(take_back, version)
        return itertools.chain([next(events)], events)

    def _respond(self, take_back: Callable[[], object], version: int) -> Iterator[Event]:
        sampling = self.manner.sampling
        if version and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + version) % (2**32 - 1))
        try:
            interrupted = yield from self._make_room()
            if interrupted:
                yield interrupted
                return
            events = self._answer(self._ids(), sampling)
            first = next(events)
        except BaseException:
            take_back()
            raise
        yield from self._listen(itertools.chain([first], events), None)

    def _make_room(self) -> Generator[Event, None, Done | None]:
        """
        Leave out the oldest turns where all of them leave too little room for an answer.

        Then half of the context is made free at once: what is behind a turn that leaves has to be read again. Returns
        how it ended where it was interrupted.
        """
        thread = self.thread
        if self.manner.overflow == "stop" or self.n_ctx is None or len(self._ids()) <= self.n_ctx * FULL:
            return None
        leaving = self._leaving(self.n_ctx)
        if not leaving:
            return None
        summary = ""
        if self.manner.overflow == "summarise":
            summary, interrupted = yield from self._summarise(leaving)
            if interrupted:
                return interrupted
        thread.leave_out([turn.question.number for turn in leaving], summary)
        yield LeftOut(len(leaving), shortly(leaving[0].question.text), summary)
        return None

    def _leaving(self, n_ctx: int) -> list[Turn]:
        """The oldest turns, until half of the context is free; none where the question would be too long even then."""
        thread, left = self.thread, set(self.thread.left)
        leaving: list[Turn] = []
        most = n_ctx - (_SUMMARY if self.manner.overflow == "summarise" else 0)
        try:
            while len(self._ids()) > n_ctx * MADE_FREE and (turn := next_to_leave(thread)) is not None:
                leaving.append(turn)
                thread.left.add(turn.question.number)
            return leaving if len(self._ids()) < most else []
        finally:
            thread.left = left  # until it is known what stands for them

    def _summarise(self, leaving: Sequence[Turn]) -> Generator[Event, None, tuple[str, Done | None]]:
        """What the turns say in few words, as before where they are too long to be read; and how it was interrupted."""
        ids = chat_ids(self._template, to_summarise(self.thread, leaving), self._vocabulary)
        if self.n_ctx is not None and len(ids) + _SUMMARY > self.n_ctx:
            return self.thread.summary, None
        text = ""
        for event in answer(self._generator, self._vocabulary, ids, Sampling(temperature=0), limit=_SUMMARY):
            if isinstance(event, Text):
                text += event.text
                yield Summarising(len(leaving), len(text.split()))
            elif isinstance(event, Done) and event.why is Why.INTERRUPTED:
                return "", event
            elif not isinstance(event, Done):
                yield event
        return text.strip(), None

    def _ids(self) -> list[int]:
        return self._ids_of(read_messages(self.thread))

    def _ids_of(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of the prompt; those asked for last are kept, for a long one takes a second for each megabyte."""
        if messages != self._counted[0]:
            self._counted = messages, chat_ids(self._template, messages, self._vocabulary)
        return self._counted[1]

    def _answer(self, ids: Sequence[int], sampling: Sampling, begun: Sequence[int] = ()) -> Iterator[Event]:
        limit, stops = self.manner.limit, self.manner.stops
        return answer(self._generator, self._vocabulary, ids, sampling, limit=limit, stops=stops, begun=begun)

    def _listen(self, events: Iterator[Event], message: Message | None) -> Iterator[Event]:
        """Hand on what happens, and write down what is said; `message` is the answer that goes on, if there is one."""
        thread = self.thread
        for event in events:
            if isinstance(event, Text):
                message = message or thread.add(ASSISTANT, "", model=self._model)
                thread.change(message, text=message.text + event.text)
            elif isinstance(event, Done):
                if message is None and event.why is not Why.INTERRUPTED:
                    message = thread.add(ASSISTANT, "", model=self._model)  # an empty answer is an answer
                if message:
                    thread.change(message, why=event.why.value, ids=event.ids)
            yield event
