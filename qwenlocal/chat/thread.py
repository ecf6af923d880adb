"""
The messages of a chat as a tree: every message knows its parent, so that editing and retrying lose nothing.

An edited question is another child of the message before it; another answer is another child of its question. The
model reads the path from the first message to the leaf.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

USER, ASSISTANT = "user", "assistant"


@dataclass
class Message:
    """
    One message. `number` counts from 1 within its thread; `parent` is 0 for the first message.

    `finish_reason` says how an answer ended, "" while it is being generated and for questions; `ids` are its tokens as
    the model produced them. A pinned message stays in a full context; a dropped one is not read.
    """

    number: int
    parent: int
    role: str
    text: str
    finish_reason: str = ""
    ids: Sequence[int] = ()
    model: str = ""
    pinned: bool = False
    dropped: bool = False
    created: float = 0.0

    def to_dict(self) -> dict[str, str]:
        """Return the message as chat APIs represent it."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Turn:
    """A question on the path and its answer, None if there is none yet."""

    question: Message
    answer: Message | None

    @property
    def messages(self) -> list[Message]:
        return [self.question, *([self.answer] if self.answer else [])]


class ThreadObserver:
    """Receives every change of a thread; this base class ignores them."""

    def changed(self, message: Message) -> None:
        """A message was added or updated."""

    def removed(self, message: Message) -> None:
        """A message was removed."""

    def moved(self) -> None:
        """The leaf, the system prompt, the evicted turns or their summary changed."""


@dataclass
class Thread:
    """
    The tree of messages, and its leaf: the last message of the path, 0 if the path is empty.

    `evicted` are the numbers of the questions whose turns left a full context; `summary` replaces them, "" if there is
    none.
    """

    system: str = ""
    leaf: int = 0
    messages: dict[int, Message] = field(default_factory=dict)
    evicted: set[int] = field(default_factory=set)
    summary: str = ""
    observer: ThreadObserver = field(default_factory=ThreadObserver)

    # --- reading

    @property
    def path(self) -> list[Message]:
        """The messages from the first to the leaf."""
        return self.path_to(self.leaf)

    def path_to(self, number: int) -> list[Message]:
        """Return the messages from the first to `number`."""
        path = []
        while number:
            path.append(self.messages[number])
            number = self.messages[number].parent
        return path[::-1]

    @property
    def prompt_messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one, and the messages on the path, as chat APIs represent them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(message.to_dict() for message in self.path)]

    @property
    def turns(self) -> list[Turn]:
        """The path as turns. An answer without a question (in practice there is none) is skipped."""
        turns: list[Turn] = []
        for message in self.path:
            if message.role == USER:
                turns.append(Turn(message, None))
            elif turns:
                turns[-1] = Turn(turns[-1].question, message)
        return turns

    @property
    def last(self) -> Message | None:
        """The message at the leaf."""
        return self.messages.get(self.leaf)

    def versions(self, message: Message) -> list[Message]:
        """Return the message and its alternatives (siblings of the same role), the oldest first."""
        return [
            other for other in self.messages.values() if (other.parent, other.role) == (message.parent, message.role)
        ]

    # --- changing

    def add(self, role: str, text: str, *, model: str = "") -> Message:
        """Append a message after the leaf and make it the leaf."""
        number = max(self.messages, default=0) + 1
        message = Message(number, self.leaf, role, text, model=model, created=time.time())
        self.messages[number] = message
        self.observer.changed(message)
        self.set_leaf(number)
        return message

    def update(self, message: Message, **values: object) -> None:
        """Set fields of a message: `update(message, text="…")`."""
        for name, value in values.items():
            setattr(message, name, value)
        self.observer.changed(message)

    def remove(self, message: Message) -> None:
        """Remove a message that has no children."""
        del self.messages[message.number]
        if self.leaf == message.number:
            self.set_leaf(message.parent)
        self.observer.removed(message)

    def set_leaf(self, number: int) -> None:
        """Continue after message `number`; the messages after it stay in the tree."""
        self.leaf = number
        self.observer.moved()

    def select_version(self, message: Message) -> None:
        """Go to a version, and from there along its most recent messages to their end."""
        number = message.number
        while children := [other.number for other in self.messages.values() if other.parent == number]:
            number = max(children)
        self.set_leaf(number)

    def set_system_prompt(self, text: str) -> None:
        """Replace the system prompt."""
        self.system = text
        self.observer.moved()

    def evict_turns(self, questions: Sequence[int], summary: str) -> None:
        """Remove the turns of these questions from the context; `summary` replaces all evicted turns."""
        self.evicted |= set(questions)
        self.summary = summary
        self.observer.moved()

    def clear(self) -> None:
        """Start over with an empty path; all messages stay in the tree."""
        self.evicted.clear()
        self.summary = ""
        self.set_leaf(0)
