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
from qwenlocal.engine.saved import digest_of
from qwenlocal.engine.tuned import Tuned, read_tuned, remember_costs
from qwenlocal.errors import NotEnoughMemory
from qwenlocal.library.names import CatalogueName, Name
from qwenlocal.library.store import Record
from qwenlocal.machine import power_source, this_machine
from qwenlocal.terminal.last_words import say_last_words

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
        card = name.card if isinstance(name, CatalogueName) else None
        is_known = folders.tuned.is_dir()
        options = LoadOptions(
            replace(asked.wanted, n_ctx=n_ctx) if n_ctx else asked.wanted,
            gpu_layers(asked.gpu_layers),
            raw=asked.raw or None,
            lookup=asked.lookup,
            states=folders.states if asked.keep_cache else None,
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
    """The model that answers, and those that answered before, as long as there is room. Fulfils `session.Models`."""

    def __init__(self, program: Program, opener: Opener, name: Name, record: Record, loaded: Loaded) -> None:
        self._program, self._opener = program, opener
        self._open: dict[str, tuple[Name, Record, Loaded]] = {str(name): (name, record, loaded)}
        self._current = str(name)
        self._manner: Manner | None = None

    @property
    def current(self) -> Loaded:
        """The one that answers."""
        return self._open[self._current][2]

    def conversation(self, manner: Manner, thread: Thread) -> Conversation:
        """The conversation of `thread` with the model that answers."""
        self._manner = manner
        return self.current.conversation(manner, thread)

    def names(self) -> Sequence[str]:
        return [record.name for record in self._program.store.records()]

    def switch(self, name: str, thread: Thread) -> Conversation:
        parsed = self._program.parse(name)
        if str(parsed) not in self._open:
            record = self._program.have(parsed)
            self._open[str(parsed)] = (parsed, record, self._with_room(lambda: self._load(parsed, record)))
        loaded = self._open[str(parsed)][2]
        assert self._manner is not None
        conversation = loaded.conversation(self._manner, thread)
        self._current = str(parsed)
        for note in loaded.notes:
            self._program.say(note)
        self._program.say(loaded.plan.sentence())
        return conversation

    def widen(self, n_ctx: int, thread: Thread) -> Conversation:
        name, record, before = self._open[self._current]
        assert self._manner is not None
        before.sequence.remember()
        loaded = self._with_room(lambda: self._load(name, record, n_ctx))
        before.close()
        self._open[self._current] = (name, record, loaded)
        return loaded.conversation(self._manner, thread)

    def _load(self, name: Name, record: Record, n_ctx: int | None = None) -> Loaded:
        def load() -> Iterator[Loaded]:
            yield self._opener.load(name, record, n_ctx=n_ctx)

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
            try:
                if keep:
                    loaded.sequence.remember()
                    self._remember_costs(loaded, record)
            finally:
                loaded.close()
        self._open.clear()

    def _remember_costs(self, loaded: Loaded, record: Record) -> None:
        """What decoding several tokens at once takes here; whether it can be written down is no matter."""
        if loaded.costs.one is not None:
            with contextlib.suppress(OSError):
                tuned = self._program.folders.tuned
                remember_costs(tuned, digest_of(record.path), power_source(), loaded.costs.known)
