"""
What was said, as a tree: every message knows the one before it, so that nothing is lost when one is said anew.

A question that is edited becomes another child of the message before it; an answer that is asked for again becomes
another child of its question. What is read is the path from the first message to the leaf.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

USER, ASSISTANT = "user", "assistant"


@dataclass
class Message:
    """
    One message; `number` counts from 1 within its thread, `parent` is 0 for the first.

    `why` is how an answer ended ("" while it comes, and for questions), `ids` are its tokens as the model said them.
    A pinned message stays in the context when older ones leave it; a dropped one is not read.
    """

    number: int
    parent: int
    role: str
    text: str
    why: str = ""
    ids: Sequence[int] = ()
    model: str = ""
    pinned: bool = False
    dropped: bool = False
    created: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as they lie on the path; `answer` is None where there is none yet."""

    question: Message
    answer: Message | None

    @property
    def messages(self) -> list[Message]:
        return [self.question, *([self.answer] if self.answer else [])]

    @property
    def pinned(self) -> bool:
        return self.question.pinned

    @property
    def dropped(self) -> bool:
        return self.question.dropped


class Recorder(Protocol):
    """Whoever keeps a thread: told of everything that changes."""

    def changed(self, message: Message) -> None:
        """A message is new, or is not what it was."""
        ...

    def removed(self, message: Message) -> None:
        """A message was taken back."""
        ...

    def moved(self, thread: Thread) -> None:
        """The leaf, the system prompt, or what is left out is another."""
        ...


class Forgetful:
    """Keeps nothing. Fulfils `Recorder`."""

    def changed(self, message: Message) -> None:
        pass

    def removed(self, message: Message) -> None:
        pass

    def moved(self, thread: Thread) -> None:
        pass


@dataclass
class Thread:
    """
    The tree, the leaf where it goes on (0: at the beginning), and what the context had no room for.

    `left` are numbers of questions whose turns are not read any more; `summary` stands for them, if there is one.
    """

    system: str = ""
    leaf: int = 0
    messages: dict[int, Message] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    summary: str = ""
    recorder: Recorder = field(default_factory=Forgetful)
    now: Callable[[], float] = time.time

    # --- reading

    @property
    def path(self) -> list[Message]:
        """The messages from the first to the leaf."""
        found, number = [], self.leaf
        while number:
            found.append(self.messages[number])
            number = self.messages[number].parent
        return found[::-1]

    @property
    def turns(self) -> list[Turn]:
        """The path in turns. An answer without a question before it (there is none in practice) is left out."""
        found: list[Turn] = []
        for message in self.path:
            if message.role == USER:
                found.append(Turn(message, None))
            elif found:
                found[-1] = Turn(found[-1].question, message)
        return found

    @property
    def last(self) -> Message | None:
        """The message at the leaf."""
        return self.messages.get(self.leaf)

    def versions(self, message: Message) -> list[Message]:
        """All that were said in its place, itself among them, in the order in which they came."""
        return [
            other for other in self.messages.values() if (other.parent, other.role) == (message.parent, message.role)
        ]

    # --- changing

    def add(self, role: str, text: str, *, model: str = "") -> Message:
        """A new message behind the leaf, which it becomes."""
        number = max(self.messages, default=0) + 1
        message = Message(number, self.leaf, role, text, model=model, created=self.now())
        self.messages[number] = message
        self.recorder.changed(message)
        self.go_to(number)
        return message

    def change(self, message: Message, **values: object) -> None:
        """Give a message other values: `change(message, text="…")`."""
        for name, value in values.items():
            setattr(message, name, value)
        self.recorder.changed(message)

    def remove(self, message: Message) -> None:
        """Take back a message that has none behind it."""
        del self.messages[message.number]
        if self.leaf == message.number:
            self.go_to(message.parent)
        self.recorder.removed(message)

    def go_to(self, number: int) -> None:
        """Go on from there; what is behind it stays in the tree."""
        self.leaf = number
        self.recorder.moved(self)

    def choose(self, message: Message) -> None:
        """Go to a version, and from there along what was said last."""
        number = message.number
        while later := [other.number for other in self.messages.values() if other.parent == number]:
            number = max(later)
        self.go_to(number)

    def tell(self, system: str) -> None:
        """Another system prompt."""
        self.system = system
        self.recorder.moved(self)

    def leave_out(self, questions: Sequence[int], summary: str) -> None:
        """The turns of these questions are not read any more; `summary` stands for all that are not."""
        self.left |= set(questions)
        self.summary = summary
        self.recorder.moved(self)

    def clear(self) -> None:
        """Go back to the beginning: everything stays in the tree, nothing is read."""
        self.left.clear()
        self.summary = ""
        self.go_to(0)
