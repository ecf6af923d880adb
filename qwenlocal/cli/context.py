"""
The objects that commands share, built when first used.

Each part is imported with its first use, so that `list` starts as fast as Python and its argument parser allow.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlocal.cli.output import say
from qwenlocal.errors import NotWritable
from qwenlocal.i18n import tr
from qwenlocal.library.store import Store
from qwenlocal.paths import Folders, bundled_folder

if TYPE_CHECKING:
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.library.checkpoints import CheckpointFinder
    from qwenlocal.library.external_caches import ExternalFile
    from qwenlocal.library.local_models import LocalModels
    from qwenlocal.library.provider import ModelProvider
    from qwenlocal.library.puller import Puller


@dataclass
class AppContext:
    """
    Container of a command's collaborators.

    `quiet` suppresses sentences on stderr; `limit_rate` limits downloads to so many bytes per second (0: no limit);
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

    def open_puller(self) -> AbstractContextManager[Puller]:
        """Open a downloader; this imports the network code."""
        from qwenlocal.cli.network import open_puller

        return open_puller(self)


def _show_hashing(file: ExternalFile, done: int, total: int) -> None:
    from qwenlocal.terminal.progress import StatusLine

    line = StatusLine(sys.stderr, delay=0)
    line.show(tr("checking the file of {program}: {done:.0%}", program=file.program, done=done / max(1, total)))
    if done >= total:
        line.clear()
