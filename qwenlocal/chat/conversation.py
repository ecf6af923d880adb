"""A conversation: who said what, and the model's next answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qwenlocal.chat.events import Done as _Done
from qwenlocal.chat.events import Event, Text, Why
from qwenlocal.chat.prompt import Tokenizer, chat_ids
from qwenlocal.chat.template import ChatTemplate
from qwenlocal.chat.turn import Pieces, answer
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Generator


class Vocabulary(Tokenizer, Pieces, Protocol):
    """What a conversation needs of a model's vocabulary."""


@dataclass
class Manner:
    """How answers are given: sampling, most tokens (None: until the context is full), strings to stop at."""

    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    stops: Sequence[str] = ()


class Conversation:
    """
    Messages so far, the last answer included, whether it was finished or not.

    `ask` gives events as they happen; what was said up to any moment is in `messages`, so that an interrupted answer
    is kept as far as it went.
    """

    def __init__(
        self, generator: Generator, vocabulary: Vocabulary, template: ChatTemplate, manner: Manner, system: str = ""
    ) -> None:
        self._generator, self._vocabulary, self._template = generator, vocabulary, template
        self.manner, self.system = manner, system
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> Iterator[Event]:
        """
        Say `text` and let the model answer.

        A question that was interrupted before any answer came is asked together with this one.

        Raises
        ------
        ContextFull: the conversation does not fit; `text` is not part of it then.
        """
        before = [dict(message) for message in self.messages]
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages[-1]["content"] += "\n\n" + text
        else:
            self.messages.append({"role": "user", "content": text})
        try:
            ids = chat_ids(self._template, self.prompt_messages, self._vocabulary)
            events = self._answer(ids)
            first = next(events)
        except BaseException:
            self.messages = before
            raise
        return self._listen(first, events)

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
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def stop(self) -> None:
        """End the answer that is being given; from any thread."""
        self._generator.stop()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages.clear()

    def save(self, path: Path, model: str) -> None:
        """Write the conversation as JSON: {"model", "messages"}, the form that chat APIs use; in one step."""
        draft = path.with_name(path.name + ".tmp")
        data = {"model": model, "messages": self.prompt_messages}
        draft.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
