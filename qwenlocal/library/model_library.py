"""
The models of this machine: what finding, downloading and converting them needs, built when first used.

Each part is imported with its first use, so that `list` starts as fast as Python and its argument parser allow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlocal.errors import NotWritable
from qwenlocal.i18n import tr
from qwenlocal.library.store import Store
from qwenlocal.paths import Folders, bundled_folder

if TYPE_CHECKING:
    from qwenlocal.library.adapters import AdapterLibrary
    from qwenlocal.library.catalog import Catalog
    from qwenlocal.library.checkpoints import CheckpointFinder
    from qwenlocal.library.external_caches import ExternalFile
    from qwenlocal.library.local_models import LocalModels
    from qwenlocal.library.provider import ModelProvider
    from qwenlocal.library.puller import Puller
    from qwenlocal.library.resolver import ResolvedModel
    from qwenlocal.progress import Say, TaskProgress


def find_folders() -> Folders:
    """
    Return the folders of this machine.

    Raises
    ------
    NotWritable: the home folder cannot be read.
    """
    folders = Folders.from_environment()
    if folders.home.is_dir() and not os.access(folders.home, os.R_OK | os.X_OK):
        raise NotWritable(folders.home, "permission denied")
    return folders


@dataclass
class ModelLibrary:
    """
    The installed models and the ways to get others.

    `say` gets the sentences that a user must see, `on_download` each model that is about to be downloaded; an error
    that it raises prevents the download. `open_progress` opens a display of downloads and conversions, `report_hashing`
    gets bytes done and bytes in all of another program's file. `limit_rate` limits downloads, in bytes per second
    (0: no limit).
    """

    say: Say
    on_download: Callable[[ResolvedModel], None]
    open_progress: Callable[[], AbstractContextManager[Callable[[TaskProgress], None]]]
    report_hashing: Callable[[ExternalFile, int, int], None]
    limit_rate: int = 0
    folders: Folders = field(default_factory=find_folders)

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
            report_hashing=self.report_hashing,
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

        converter = CheckpointConverter(
            self.folders, self.store, self.checkpoints, say=self.say, open_progress=self.open_progress
        )
        return ModelProvider(
            self.folders, lambda: self.catalog, self.store, self.local, converter, self.open_puller, say=self.say
        )

    @cached_property
    def adapters(self) -> AdapterLibrary:
        """LoRA adapters, as files for a model."""
        from qwenlocal.library.adapters import AdapterLibrary

        return AdapterLibrary(self.folders, say=self.say, open_progress=self.open_progress)

    @contextlib.contextmanager
    def open_puller(self) -> Iterator[Puller]:
        """Open a downloader with every source that this machine can ask."""
        from qwenlocal.library.artifact import DownloadPolicy
        from qwenlocal.library.http import HttpClient
        from qwenlocal.library.hubs import Hub, HuggingFace, ModelScope
        from qwenlocal.library.package_index import PackageIndex, index_url
        from qwenlocal.library.puller import Puller
        from qwenlocal.library.resolver import Resolver

        client, policy = HttpClient(limit_rate=self.limit_rate), DownloadPolicy()
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hubs: list[Hub] = [HuggingFace(), ModelScope(client)]
        resolver = Resolver(
            self.catalog, self.folders, client, hubs, lambda: PackageIndex(index_url(), client), policy, offline=offline
        )
        with self.open_progress() as report:
            yield Puller(
                self.folders,
                self.store,
                self.local,
                resolver,
                on_start=self.on_download,
                report=report,
                policy=policy,
            )
