"""The parts that ask the network; imported only when something must be fetched."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from qwenlocal.library.catalog import Catalog
from qwenlocal.library.download import DownloadPolicy
from qwenlocal.library.http import HttpClient
from qwenlocal.library.hubs import Hub, HuggingFace, ModelScope
from qwenlocal.library.local_models import Local, Say
from qwenlocal.library.package_index import PackageIndex, index_url
from qwenlocal.library.puller import Puller
from qwenlocal.library.resolver import Sources
from qwenlocal.library.store import Store
from qwenlocal.paths import Folders
from qwenlocal.terminal.progress import progress


@contextlib.contextmanager
def puller(
    catalog: Catalog, folders: Folders, store: Store, local: Local, *, say: Say, limit_rate: int
) -> Iterator[Puller]:
    """A puller over every source of this machine, which shows its progress on stderr."""
    client, manner = HttpClient(limit_rate=limit_rate), DownloadPolicy()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hubs: list[Hub] = [HuggingFace(), ModelScope(client)]
    sources = Sources(
        catalog, folders, client, hubs, lambda: PackageIndex(index_url(), client), manner, offline=offline
    )
    with progress(sys.stderr) as shown:
        yield Puller(folders, store, local, sources, client, say=say, report=shown, manner=manner)
