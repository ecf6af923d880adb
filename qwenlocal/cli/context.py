"""
The objects that commands share, built when first used.

Each part is imported with its first use, so that `list` starts as fast as Python and its argument parser allow.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlocal.cli.console import can_ask, confirm, say
from qwenlocal.errors import ChatNotFound, DownloadFailed, NotWritable
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.store import Store
from qwenlocal.paths import Folders, bundled_folder

if TYPE_CHECKING:
    from qwenlocal.chat.journal import ChatInfo, Journal
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.library.checkpoints import CheckpointFinder
    from qwenlocal.library.external_caches import ExternalFile
    from qwenlocal.library.local_models import LocalModels
    from qwenlocal.library.provider import ModelProvider
    from qwenlocal.library.puller import Puller
    from qwenlocal.library.resolver import ResolvedModel


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
    def folders(self) -> Folders:
        """
        The folders of this machine.

        Raises
        ------
        NotWritable: the home folder cannot be read.
        """
        folders = Folders.from_environment()
        if folders.home.is_dir() and not os.access(folders.home, os.R_OK | os.X_OK):
            raise NotWritable(folders.home, "permission denied")
        return folders

    @cached_property
    def catalog(self) -> Catalog:
        """The model catalog in `models/`."""
        from qwenlocal.library.catalog import Catalog

        return Catalog.read(bundled_folder("models"))

    @cached_property
    def store(self) -> Store:
        """The records of installed models."""
        return Store(self.folders)

    @cached_property
    def local(self) -> LocalModels:
        """Models on this disk, including those of other programs."""
        from qwenlocal.library.local_models import LocalModels

        return LocalModels(
            self.folders,
            self.store,
            on_external_file=lambda file: self.say(
                tr("Using the file of {program}: {path}", program=file.program, path=file.path)
            ),
            report_hashing=_show_hashing,
        )

    @cached_property
    def checkpoints(self) -> CheckpointFinder:
        """Checkpoints on this disk and on hubs."""
        from qwenlocal.library.checkpoints import CheckpointFinder

        return CheckpointFinder(self.local, self.open_puller)

    @cached_property
    def models(self) -> ModelProvider:
        """Models by name: local, downloaded or converted."""
        from qwenlocal.library.checkpoint_converter import CheckpointConverter
        from qwenlocal.library.provider import ModelProvider
        from qwenlocal.terminal.progress import show_progress

        converter = CheckpointConverter(
            self.folders, self.store, self.checkpoints, say=self.say, open_progress=lambda: show_progress(sys.stderr)
        )
        return ModelProvider(
            self.folders, lambda: self.catalog, self.store, self.local, converter, self.open_puller, say=self.say
        )

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, unless `quiet`."""
        if not self.quiet:
            say(sentence)

    # --- downloads

    @contextlib.contextmanager
    def open_puller(self) -> Iterator[Puller]:
        """Open a downloader with every source that this machine can ask; it shows its progress on stderr."""
        from qwenlocal.library.artifact import DownloadPolicy
        from qwenlocal.library.http import HttpClient
        from qwenlocal.library.hubs import Hub, HuggingFace, ModelScope
        from qwenlocal.library.package_index import PackageIndex, index_url
        from qwenlocal.library.puller import Puller
        from qwenlocal.library.resolver import Resolver
        from qwenlocal.terminal.progress import show_progress

        client, policy = HttpClient(limit_rate=self.limit_rate), DownloadPolicy()
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hubs: list[Hub] = [HuggingFace(), ModelScope(client)]
        resolver = Resolver(
            self.catalog, self.folders, client, hubs, lambda: PackageIndex(index_url(), client), policy, offline=offline
        )
        with show_progress(sys.stderr) as show:
            yield Puller(
                self.folders,
                self.store,
                self.local,
                resolver,
                on_start=self._announce,
                report=show,
                policy=policy,
            )

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

        path = self.folders.journal
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


def _show_hashing(file: ExternalFile, done: int, total: int) -> None:
    from qwenlocal.terminal.progress import StatusLine

    line = StatusLine(sys.stderr, delay=0)
    line.show(tr("checking the file of {program}: {done:.0%}", program=file.program, done=done / max(1, total)))
    if done >= total:
        line.clear()
