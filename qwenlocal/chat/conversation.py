"""A conversation: who said what, and the model's next answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qwenlocal.chat.events import Done as _Done
from qwenlocal.chat.events import Event, LeftOut, Text, Why
from qwenlocal.chat.prompt import Tokenizer, chat_ids
from qwenlocal.chat.template import ChatTemplate
from qwenlocal.chat.turn import Pieces, answer
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Generator

_FULL, _MADE_FREE = 0.875, 0.5  # of the context: from where on turns leave, and until when
_SHORT = 40  # letters of a turn that is named


class Vocabulary(Tokenizer, Pieces, Protocol):
    """What a conversation needs of a model's vocabulary."""


@dataclass
class Manner:
    """
    How answers are given: sampling, most tokens (None: until the context is full), strings to stop at.

    Where a conversation outgrows the context, `overflow` "shift" leaves out its oldest turns, "stop" refuses.
    """

    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    stops: Sequence[str] = ()
    overflow: str = "shift"


class Conversation:
    """
    Messages so far, the last answer included, whether it was finished or not.

    `ask` gives events as they happen; what was said up to any moment is in `messages`, so that an interrupted answer
    is kept as far as it went.
    """

    def __init__(
        self,
        generator: Generator,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        manner: Manner,
        system: str = "",
        n_ctx: int | None = None,
    ) -> None:
        """`n_ctx` tokens are what the generator has room for; None where that is not known."""
        self._generator, self._vocabulary, self._template = generator, vocabulary, template
        self.manner, self.system, self._n_ctx = manner, system, n_ctx
        self.messages: list[dict[str, str]] = []
        self._left_out = 0  # messages, from the oldest on, that are not read any more

    def ask(self, text: str) -> Iterator[Event]:
        """
        Say `text` and let the model answer.

        A question that was interrupted before any answer came is asked together with this one.

        Raises
        ------
        ContextFull: the conversation does not fit; `text` is not part of it then.
        """
        before, left_out = [dict(message) for message in self.messages], self._left_out
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages[-1]["content"] += "\n\n" + text
        else:
            self.messages.append({"role": "user", "content": text})
        try:
            ids, told = self._fitting_ids()
            events = self._answer(ids)
            first = next(events)
        except BaseException:
            self.messages, self._left_out = before, left_out
            raise
        return itertools.chain(told, self._listen(first, events))

    def _fitting_ids(self) -> tuple[list[int], list[Event]]:
        """
        The ids of what is read, without the oldest turns where all of it leaves too little room for an answer.

        Then half of the context is made free at once: what is behind a turn that leaves has to be read again.
        """
        ids = self._ids()
        if self.manner.overflow != "shift" or self._n_ctx is None or len(ids) <= self._n_ctx * _FULL:
            return ids, []
        begin, turns = self._left_out, 0
        while len(ids) > self._n_ctx * _MADE_FREE and (rest := self._next_turn()) is not None:
            self._left_out, turns = rest, turns + 1
            ids = self._ids()
        if not turns:
            return ids, []
        return ids, [LeftOut(turns, _shortly(self.messages[begin]["content"]))]

    def _ids(self) -> list[int]:
        read = [*self._system_messages, *self.messages[self._left_out :]]
        return chat_ids(self._template, read, self._vocabulary)

    def _next_turn(self) -> int | None:
        """Where the turn after the oldest that is read begins; None where there is only the question."""
        later = range(self._left_out + 1, len(self.messages))
        return next((at for at in later if self.messages[at]["role"] == "user"), None)

    def _answer(self, ids: Sequence[int]) -> Iterator[Event]:
        manner = self.manner
        return answer(self._generator, self._vocabulary, ids, manner.sampling, limit=manner.limit, stops=manner.stops)

    def _listen(self, first: Event, rest: Iterator[Event]) -> Iterator[Event]:
        yield first
        for event in rest:
            if isinstance(event, Text):
                self._append(event.text)
            elif isinstance(event, _Done) and event.why is not Why.INTERRUPTED:
                self._append("")  # an empty answer is an answer, unless it was stopped before it began
            yield event

    def _append(self, text: str) -> None:
        if self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        self.messages[-1]["content"] += text

    @property
    def prompt_messages(self) -> list[dict[str, str]]:
        """The messages with the system prompt, if there is one, before them."""
        return [*self._system_messages, *self.messages]

    @property
    def _system_messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def stop(self) -> None:
        """End the answer that is being given; from any thread."""
        self._generator.stop()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages.clear()
        self._left_out = 0

    def save(self, path: Path, model: str) -> None:
        """Write the conversation as JSON: {"model", "messages"}, the form that chat APIs use; in one step."""
        draft = path.with_name(path.name + ".tmp")
        data = {"model": model, "messages": self.prompt_messages}
        draft.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
        draft.replace(path)


def _shortly(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"
