"""What the commands of a chat work with: the conversation, the models, the journal, and where to say something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import Conversation
    from qwenlocal.chat.events import Done
    from qwenlocal.chat.journal import Journal
    from qwenlocal.chat.journal_writer import Keeper
    from qwenlocal.chat.thread import Thread, Turn


_ENOUGH_TO_TELL = 24  # tokens


class Models(Protocol):
    """Who can load models."""

    def first(self, thread: Thread) -> Conversation:
        """
        The conversation of `thread` with the model that the chat begins with; waits until it is loaded.

        Raises
        ------
        QwenlocalError: it cannot be loaded. KeyboardInterrupt: it was not waited for.
        """
        ...

    @property
    def current(self) -> str:
        """The name of the model that answers, by which it is found again from any folder."""
        ...

    def names(self) -> Sequence[str]:
        """Models that are on this disk."""
        ...

    def switch(self, name: str, thread: Thread) -> Conversation:
        """
        The conversation of `thread` with another model, loaded if it is not.

        Raises
        ------
        QwenlocalError: there is no such model, or it cannot be loaded; the one before goes on.
        """
        ...

    def widen(self, n_ctx: int, thread: Thread) -> Conversation:
        """
        The conversation with room for `n_ctx` tokens.

        Raises
        ------
        NotEnoughMemory: they do not fit; nothing is changed then.
        """
        ...


@dataclass(frozen=True)
class Editing:
    """The next line takes the place of what `turn` asked, or of its answer."""

    turn: Turn
    answer: bool


@dataclass
class Session:
    """
    One chat at a terminal. `begun` is the thread that it begins with, `model` the model's name; `say` prints a sentence
    beside the answers, `ask` asks for a letter or a line; `keeper` is None where nothing is kept.
    """

    begun: Thread
    model: str
    models: Models
    say: Callable[[str], None]
    ask: Callable[[str], str]
    prompts: Sequence[Path]
    exports: Path
    journal: Journal | None = None
    keeper: Keeper | None = None
    stats: bool = False
    markdown: bool = True
    last: Done | None = None
    reading_speed: float = 0.0  # tokens a second, of the last prompt of which enough was new to tell
    written: set[Path] = field(default_factory=set)  # files of ours, which may be written again
    default_text: str = ""  # what the next input line begins with
    editing: Editing | None = None

    current: Conversation | None = None

    @property
    def conversation(self) -> Conversation:
        """The conversation; where the model is still being loaded, this waits for it."""
        if self.current is None:
            self.current = self.models.first(self.begun)
        return self.current

    @conversation.setter
    def conversation(self, new: Conversation) -> None:
        self.current = new

    @property
    def thread(self) -> Thread:
        """What was said so far."""
        return self.current.thread if self.current else self.begun

    def turn(self, text: str) -> Turn:
        """
        The turn of a number, counted from 1; of none, the last one; of a negative one, from the end.

        Raises
        ------
        UsageError: there is none.
        """
        turns = self.thread.turns
        if not turns:
            raise UsageError(tr("Nothing was asked yet."))
        number = text.strip().lstrip("#") or "-1"
        if not number.lstrip("-").isdecimal() or not number.lstrip("-"):
            raise UsageError(tr("“{text}” is no turn.", text=text), hint=tr("Turns are numbered: /ctx shows them."))
        place = int(number)
        if place == 0 or abs(place) > len(turns):
            raise UsageError(
                tr("There is no turn {place}; there are {count}.", place=place, count=len(turns)),
                hint=tr("/ctx shows them."),
            )
        return turns[place - 1 if place > 0 else place]

    def answered(self, done: Done) -> None:
        """Take note of how an answer went."""
        self.last = done
        if done.stats.prompt_tokens - done.stats.reused_tokens >= _ENOUGH_TO_TELL:
            self.reading_speed = done.stats.prompt_speed

    def talk_of(self, thread: Thread, *, id: int | None = None) -> None:
        """Go on with another thread; with `id`, a chat of the journal."""
        if self.keeper:
            self.keeper.close()
        self.conversation.thread = thread
        self.last = None
        self.keeper = self.journal.keep(thread, model=self.models.current, id=id) if self.journal else None
