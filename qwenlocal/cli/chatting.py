"""A chat: the input line first, the model behind it while the first question is typed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qwenlocal.chat.deferred import Deferred
from qwenlocal.chat.thread import Thread
from qwenlocal.cli.asked import Asked
from qwenlocal.cli.wiring import Program
from qwenlocal.language import tr
from qwenlocal.library.names import Name, PathName
from qwenlocal.library.store import Record
from qwenlocal.paths import shipped
from qwenlocal.terminal.chat import Chat
from qwenlocal.terminal.plain import dimmed, harmless, wrapped
from qwenlocal.terminal.session import Session
from qwenlocal.terminal.status import StatusLine

if TYPE_CHECKING:
    from qwenlocal.chat.conversation import Conversation
    from qwenlocal.chat.loading import Loaded
    from qwenlocal.cli.opening import Opener, OpenModels
    from qwenlocal.cli.resuming import GoingOn


def chat(
    asked: Asked,
    program: Program,
    name: Name,
    record: Record,
    going_on: GoingOn | None,
    system: str,
    prompt: str | None,
) -> None:
    """Chat until the user leaves; `prompt` is asked at once."""
    thread = going_on.thread if going_on else Thread(system)
    if going_on and system:
        thread.tell(system)
    models = _Models(asked, program, name, record)
    session = Session(
        thread,
        name.path.name if isinstance(name, PathName) else str(name),
        models,
        aside,
        _ask,
        [shipped("prompts"), program.folders.home / "prompts"],
        program.folders.chats,
        stats=asked.stats,
        markdown=asked.markdown,
    )
    if asked.journal:
        _keep(session, program, str(name), going_on)
    face = Chat(
        session,
        history=program.folders.history if asked.journal else None,
        verdict=lambda: models.verdict,
        begin=models.begin,
    )
    models.told = face.model_is_there
    keep = False
    try:
        face.run(prompt)
        keep = True
    finally:
        models.close(keep=keep)


def _keep(session: Session, program: Program, name: str, going_on: GoingOn | None) -> None:
    from qwenlocal.cli.resuming import open_journal, say_where_it_was

    journal = going_on.journal if going_on else open_journal(program)
    if journal is None:
        return
    session.journal = journal
    session.keeper = journal.keep(session.thread, model=name, id=going_on.chat.id if going_on else None)
    if going_on:
        say_where_it_was(going_on, session.keeper, aside)


class _Models:
    """`OpenModels`, once the first model is on its way: what it needs is imported behind the input line."""

    def __init__(self, asked: Asked, program: Program, name: Name, record: Record) -> None:
        self._asked, self._program, self._name, self._record = asked, program, name, record
        self._status = StatusLine(sys.stderr)
        self._fraction = 0.0
        self._opener: Opener | None = None
        self._open: OpenModels | None = None
        self._loaded = Deferred(self._load, self._stop, lambda failure: self.told(failure))
        self.told: Callable[[BaseException | None], object] = lambda failure: None

    def begin(self) -> None:
        """Have the first model loaded."""
        self._loaded.start()

    def _load(self) -> Loaded:
        from qwenlocal.cli.opening import Opener

        self._opener = Opener(self._asked, self._program)
        return self._opener.load(self._name, self._record, self._report)

    def _report(self, fraction: float) -> None:
        self._fraction = fraction

    def _stop(self) -> None:
        if self._opener:
            self._opener.loading.stop()

    def _wait(self) -> Loaded:
        """The first model, with a status line while it is loaded, and what is to be said of it."""
        while not self._loaded.is_over:
            self._loaded.start()
            self._status.show(tr("loading {name}: {fraction:.0%}", name=self._name, fraction=self._fraction))
            self._loaded.wait(0.1)
        self._status.clear()
        return self._loaded.get()

    @property
    def _models(self) -> OpenModels:
        from qwenlocal.chat.conversation import Manner
        from qwenlocal.cli.opening import Opener, OpenModels

        if self._open is None:
            opener = self._opener or Opener(self._asked, self._program)
            manner = Manner(limit=self._asked.limit, stops=self._asked.stops, overflow=self._asked.overflow)
            self._open = OpenModels(self._program, opener, self._name, self._record, self._wait, manner)
        return self._open

    def first(self, thread: Thread) -> Conversation:
        conversation = self._models.first(thread)
        loaded = self._loaded.get()
        for note in (loaded.plan.sentence(), *loaded.notes):
            aside(note)
        return conversation

    def names(self) -> list[str]:
        return [record.name for record in self._program.store.records()]

    @property
    def current(self) -> str:
        return self._open.current if self._open else str(self._name)

    def switch(self, name: str, thread: Thread) -> Conversation:
        if not self._models.is_begun:  # what was asked of its answers holds for the other one, too
            self.first(thread)
        return self._models.switch(name, thread)

    def widen(self, n_ctx: int, thread: Thread) -> Conversation:
        return self._models.widen(n_ctx, thread)

    @property
    def verdict(self) -> str:
        """What came out of the trial of a draft model."""
        return self._open.verdict if self._open else ""

    def close(self, *, keep: bool) -> None:
        """Give all memory back; a model that is still on its way is not waited for."""
        loaded = self._loaded.end()
        if self._open and self._open.is_begun:
            self._open.close(keep=keep)
        elif loaded:
            loaded.close()


def aside(sentence: str) -> None:
    """A dim line beside the answers."""
    sys.stderr.write(dimmed(wrapped(harmless(sentence), sys.stderr), sys.stderr) + "\n")
    sys.stderr.flush()


def _ask(question: str) -> str:
    from prompt_toolkit import prompt

    try:
        return prompt(question)
    except (EOFError, KeyboardInterrupt):
        return ""
