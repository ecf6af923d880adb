"""Models brought into memory for `qwenlocal run`, the first one and those that a chat goes on with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlocal.chat.background import in_background
from qwenlocal.chat.conversation import Conversation, Manner
from qwenlocal.chat.loading import Draft, Loaded, Loading, LoadOptions
from qwenlocal.chat.thread import Thread
from qwenlocal.cli.asked import Asked
from qwenlocal.cli.loading import gpu_layers
from qwenlocal.cli.wiring import Program
from qwenlocal.engine.llama import library
from qwenlocal.engine.prompt_cache import digest_of
from qwenlocal.engine.tuned_settings import Tuned, read_tuned, remember_costs
from qwenlocal.errors import NotEnoughMemory
from qwenlocal.library.names import CatalogName, Name
from qwenlocal.library.store import Record
from qwenlocal.machine import power_source, this_machine
from qwenlocal.terminal.tty import say_last_words

if TYPE_CHECKING:
    from qwenlocal.engine.sampling import Sampling


class Opener:
    """Loads models as `asked`."""

    def __init__(self, asked: Asked, program: Program) -> None:
        self._asked, self._program = asked, program
        self.loading = Loading()

    def load(
        self, name: Name, record: Record, report: Callable[[float], None] = lambda _: None, n_ctx: int | None = None
    ) -> Loaded:
        """
        Load a model that is here; with room for `n_ctx` tokens, if that is said.

        Raises
        ------
        BadWeights, NotEnoughMemory, NoContext: it cannot be loaded. Interrupted: `loading` was stopped.
        """
        asked, folders = self._asked, self._program.folders
        card = name.card if isinstance(name, CatalogName) else None
        is_known = folders.tuned.is_dir()
        options = LoadOptions(
            replace(asked.wanted, n_ctx=n_ctx) if n_ctx else asked.wanted,
            gpu_layers(asked.gpu_layers),
            raw=asked.raw or None,
            lookup=asked.lookup,
            states=folders.states if asked.keep_cache and asked.journal else None,
            tuned=read_tuned(folders.tuned, digest_of(record.path), power_source()) if is_known else Tuned(),
            draft=self._draft(),
        )
        library().last_words = say_last_words
        return self.loading.load(
            record.path,
            options,
            this_machine(),
            name=str(name),
            size=record.size,
            is_base=card is not None and card.variant == "base",
            recommended=card.sampling if card else {},
            report=report,
        )

    def _draft(self) -> Draft | None:
        """The draft model, fetched if it is not here."""
        if self._asked.draft is None:
            return None
        name = self._program.parse(self._asked.draft)
        record = self._program.have(name, limit_rate=self._asked.limit_rate)
        return Draft(str(name), record.path, record.size)

    def sampling(self, loaded: Loaded) -> Sampling:
        """What the model's makers recommend, and what was asked for instead."""
        return replace(loaded.sampling.with_known(self._asked.sampling), grammar=self._asked.grammar)


class OpenModels:
    """
    The model that answers, and those that answered before, as long as there is room. Fulfils `session.Models`.

    `first` is the one that a chat begins with; it may still be on its way. `manner` is how it shall answer.
    """

    def __init__(
        self, program: Program, opener: Opener, name: Name, record: Record, first: Callable[[], Loaded], manner: Manner
    ) -> None:
        self._program, self._opener, self._manner = program, opener, manner
        self._first = (name, record, first)
        self._open: dict[str, tuple[Name, Record, Loaded]] = {}
        self._current = str(name)

    def first(self, thread: Thread) -> Conversation:
        name, record, wait = self._first
        loaded = wait()
        self._open[str(name)] = (name, record, loaded)
        self._manner.sampling = self._opener.sampling(loaded)
        return loaded.conversation(self._manner, thread)

    @property
    def is_begun(self) -> bool:
        """Whether any model is here."""
        return bool(self._open)

    @property
    def verdict(self) -> str:
        """What came out of the trial of a draft model, "" as long as nothing did."""
        found = self._open.get(self._current)
        return found[2].trial.verdict if found and found[2].trial else ""

    @property
    def current(self) -> str:
        return self._current

    def names(self) -> Sequence[str]:
        return [record.name for record in self._program.store.records()]

    def switch(self, name: str, thread: Thread) -> Conversation:
        parsed = self._program.parse(name)
        if str(parsed) not in self._open:
            record = self._program.have(parsed)
            self._open[str(parsed)] = (parsed, record, self._with_room(lambda: self._load(parsed, record)))
        loaded = self._open[str(parsed)][2]
        conversation = loaded.conversation(self._manner, thread)
        self._current = str(parsed)
        for note in loaded.notes:
            self._program.say(note)
        self._program.say(loaded.plan.sentence())
        return conversation

    def widen(self, n_ctx: int, thread: Thread) -> Conversation:
        name, record, before = self._open[self._current]
        before.sequence.remember()
        loaded = self._with_room(lambda: self._load(name, record, n_ctx))
        before.close()
        self._open[self._current] = (name, record, loaded)
        for note in (note for note in loaded.notes if note not in before.notes):  # such as what stretching risks
            self._program.say(note)
        self._program.say(loaded.plan.sentence())
        return loaded.conversation(self._manner, thread)

    def _load(self, name: Name, record: Record, n_ctx: int | None = None) -> Loaded:
        def load() -> Iterator[Loaded]:
            yield self._opener.load(name, record, n_ctx=n_ctx)

        self._opener.loading = Loading()  # an earlier one may have been stopped
        with in_background(load, self._opener.loading.stop) as found:
            return next(found)

    def _with_room(self, load: Callable[[], Loaded]) -> Loaded:
        """Load; where there is no room, without those that do not answer any more."""
        try:
            return load()
        except NotEnoughMemory:
            others = [name for name in self._open if name != self._current]
            if not others:
                raise
            for name in others:
                self._open.pop(name)[2].close()
            return load()

    def close(self, *, keep: bool) -> None:
        """Give the memory back; with `keep`, remember what was read and learnt."""
        for _, record, loaded in self._open.values():
            close(loaded, record, self._program, keep=keep)
        self._open.clear()


def close(loaded: Loaded, record: Record, program: Program, *, keep: bool) -> None:
    """Give a model's memory back; with `keep`, remember what was read, and what was learnt of this machine."""
    try:
        if keep:
            loaded.sequence.remember()
            if loaded.costs.one is not None:
                with contextlib.suppress(OSError):  # whether that can be written down is no matter
                    tuned = program.folders.tuned
                    remember_costs(tuned, digest_of(record.path), power_source(), loaded.costs.known)
    finally:
        loaded.close()
