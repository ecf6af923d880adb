"""The objects that commands share, and how they talk to the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlocal.cli.console import can_ask, confirm, say
from qwenlocal.errors import ChatNotFound, DownloadFailed
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.model_library import ModelLibrary

if TYPE_CHECKING:
    from qwenlocal.chat.journal import ChatInfo, Journal
    from qwenlocal.library.external_caches import ExternalFile
    from qwenlocal.library.resolver import ResolvedModel
    from qwenlocal.progress import TaskProgress


@dataclass
class AppContext:
    """
    Container of a command's collaborators.

    `quiet` suppresses sentences on stderr; `limit_rate` limits downloads, in bytes per second (0: no limit);
    `assume_yes` answers questions about downloads with yes.
    """

    quiet: bool = False
    limit_rate: int = 0
    assume_yes: bool = False

    @cached_property
    def library(self) -> ModelLibrary:
        """
        The models of this machine; downloads and conversions show their progress on stderr.

        Raises
        ------
        NotWritable: the home folder cannot be read.
        """
        return ModelLibrary(
            say=self.say,
            on_download=self._announce,
            open_progress=_open_progress,
            report_hashing=_show_hashing,
            limit_rate=self.limit_rate,
        )

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, unless `quiet`."""
        if not self.quiet:
            say(sentence)

    # --- downloads

    def _announce(self, model: ResolvedModel) -> None:
        """
        Say what will be downloaded. Files of a third party need consent, or without a terminal at least this notice.

        Raises
        ------
        DownloadFailed: the user declined. Interrupted: Ctrl-C or Ctrl-D.
        """
        name, size, count = model.name, format_bytes(model.size), len(model.files)
        asks = model.is_third_party and not self.assume_yes and can_ask()
        if asks:
            self.say(tr("Source of {name} ({size}): {origin}.", name=name, size=size, origin=model.origin))
        elif model.is_checkpoint:
            self.say(
                tr("Downloading the checkpoint {name} ({size}, {count} file(s)).", name=name, size=size, count=count)
            )
        else:
            self.say(tr("Downloading {name} from {origin} ({size}).", name=name, origin=model.origin, size=size))
        if model.license:
            self.say(tr("License: {license}", license=model.license))
        if asks and not confirm(tr("Download {name} from this third party?", name=name)):
            raise DownloadFailed(
                tr("{name} was not downloaded.", name=name),
                hint=tr("To use another model: qwenlocal list --all. To skip the question: --yes"),
            )

    # --- chats

    def open_existing_journal(self) -> Journal | None:
        """
        Open the journal, if there is one.

        Raises
        ------
        JournalError: it is damaged, locked, or of a newer version.
        """
        from qwenlocal.chat.journal import Journal
        from qwenlocal.chat.sqlite_pages import wal_path

        path = self.library.folders.journal
        return Journal(path) if path.exists() or wal_path(path).exists() else None

    def find_chat(self, text: str) -> tuple[Journal, ChatInfo]:
        """
        Find the chat of a number, or the last one.

        Raises
        ------
        ChatNotFound: there is none. JournalError: the journal cannot be used.
        """
        from qwenlocal.chat.journal import parse_chat_number

        journal = self.open_existing_journal()
        chats = journal.list_chats() if journal else []
        if text != "last":
            number = parse_chat_number(text)
            chats = [chat for chat in chats if chat.id == number]
        if journal is None or not chats:
            raise ChatNotFound("" if text == "last" else text)
        return journal, chats[0]


def _open_progress() -> AbstractContextManager[Callable[[TaskProgress], None]]:
    from qwenlocal.terminal.progress import show_progress

    return show_progress(sys.stderr)


def _show_hashing(file: ExternalFile, done: int, total: int) -> None:
    from qwenlocal.terminal.progress import StatusLine

    line = StatusLine(sys.stderr, delay=0)
    line.show(tr("checking the file of {program}: {done:.0%}", program=file.program, done=done / max(1, total)))
    if done >= total:
        line.clear()
