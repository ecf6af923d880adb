"""The state of a chat in the terminal, shared by the input loop and the slash commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwenlocal.chat.events import Event
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.errors import UsageError
from qwenlocal.i18n import tr

if TYPE_CHECKING:
    from qwenlocal.chat.context_window import ContextWindow
    from qwenlocal.chat.conversation import Conversation
    from qwenlocal.chat.events import Done
    from qwenlocal.chat.journal import Journal
    from qwenlocal.chat.thread import Thread, Turn
    from qwenlocal.engine.adapters import LoadedAdapters

AnswerStarter = Callable[[], Iterator[Event]]
_TURN_NUMBER = re.compile(r"#?-?\d{1,9}")
_MIN_TIMED_TOKENS = 24  # new prompt tokens; the speed of shorter prompts means little


class ChatModels(Protocol):
    """Loads the models of a chat."""

    def load_first(self, thread: Thread) -> Conversation:
        """
        Return the conversation of `thread` with the model that the chat starts with, once it is loaded.

        Raises
        ------
        QwenlocalError: the model cannot be loaded. KeyboardInterrupt: the user did not wait for it.
        """

    @property
    def current(self) -> str:
        """The name of the current model, valid in any working directory."""

    def names(self) -> Sequence[str]:
        """
        List the models to choose from.

        Raises
        ------
        QwenlocalError: a remote engine does not list its models.
        """

    @property
    def adapters(self) -> LoadedAdapters | None:
        """The adapters of the current model; None if it is not loaded in this process."""

    def nearby_files(self) -> Sequence[str]:
        """List the paths of the GGUF files in the folder of the current model."""

    def switch(self, name: str, thread: Thread) -> Conversation:
        """
        Return the conversation of `thread` with another model, loaded if necessary.

        Raises
        ------
        QwenlocalError: there is no such model, or it cannot be loaded; the current model stays.
        """

    def resize_context(self, n_ctx: int, thread: Thread) -> Conversation:
        """
        Return the conversation of `thread` with a context of `n_ctx` tokens.

        Raises
        ------
        NotEnoughMemory: the context does not fit; nothing changes.
        """


@dataclass(frozen=True)
class PendingEdit:
    """The next line replaces the question of `turn`, or its answer."""

    turn: Turn
    is_answer: bool


@dataclass
class Session:
    """
    One chat in the terminal.

    `initial_thread` is the thread that the chat starts with, `model` the displayed name of the current model. `say`
    prints a note between the answers, `ask` asks for a letter or a line. `journal_writer` is None if the chat is not
    saved.
    """

    initial_thread: Thread
    model: str
    models: ChatModels
    say: Callable[[str], None]
    ask: Callable[[str], str]
    prompt_folders: Sequence[Path]
    save_folder: Path
    journal: Journal | None = None
    journal_writer: JournalWriter | None = None
    show_stats: bool = False
    render_markdown: bool = True
    last_result: Done | None = None
    prompt_speed: float = 0.0  # tokens per second of the last long prompt, 0 if there was none
    default_text: str = ""  # the initial text of the next input line
    pending_edit: PendingEdit | None = None
    loaded_conversation: Conversation | None = None

    @property
    def conversation(self) -> Conversation:
        """The conversation; waits until its model is loaded."""
        if self.loaded_conversation is None:
            self.loaded_conversation = self.models.load_first(self.initial_thread)
        return self.loaded_conversation

    @conversation.setter
    def conversation(self, new: Conversation) -> None:
        self.loaded_conversation = new

    @property
    def thread(self) -> Thread:
        """The messages so far; available before the model is loaded."""
        return self.loaded_conversation.thread if self.loaded_conversation else self.initial_thread

    def require_window(self, command: str) -> ContextWindow:
        """
        Return the context window, for a command that counts tokens.

        Raises
        ------
        UsageError: the chat's engine does not count tokens.
        """
        window = self.conversation.window
        if window is None:
            raise UsageError(
                tr("{command} needs token counts, which {model} does not offer.", command=command, model=self.model)
            )
        return window

    @property
    def chat_id(self) -> int | None:
        """The number of the chat in the journal; None if it is not saved, or not yet."""
        return self.journal_writer.chat_id if self.journal_writer else None

    def find_turn(self, text: str) -> Turn:
        """
        Return the turn with a number, counted from 1; the last one for "", and from the end for negative numbers.

        Raises
        ------
        UsageError: there is no such turn.
        """
        turns = self.thread.turns
        if not turns:
            raise UsageError(tr("There are no questions yet."))
        hint = tr("List the turns: /ctx")
        if not _TURN_NUMBER.fullmatch(text or "-1"):
            raise UsageError(tr("“{text}” is not a turn number.", text=text), hint=hint)
        number = int(text.lstrip("#") or "-1")
        if number == 0 or abs(number) > len(turns):
            raise UsageError(
                tr("There is no turn {number}; this chat has {count}.", number=number, count=len(turns)), hint=hint
            )
        return turns[number - 1 if number > 0 else number]

    def record_result(self, done: Done) -> None:
        """Remember the statistics of an answer."""
        self.last_result = done
        if done.stats.prompt_tokens - done.stats.reused_tokens >= _MIN_TIMED_TOKENS:
            self.prompt_speed = done.stats.prompt_speed

    def switch_thread(self, thread: Thread, *, chat_id: int | None = None) -> None:
        """Continue with another thread: a new chat, or chat `chat_id` of the journal."""
        if self.journal_writer:
            self.journal_writer.close()
        self.conversation.thread = thread
        self.last_result = None
        self.journal_writer = (
            JournalWriter(self.journal, thread, self.models.current, chat_id) if self.journal else None
        )
