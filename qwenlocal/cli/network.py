"""Downloads: the hubs, the package index and the progress display. Imported only when something must be downloaded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwenlocal.cli.questions import can_ask, confirm
from qwenlocal.errors import DownloadFailed
from qwenlocal.formatting import format_bytes
from qwenlocal.i18n import tr
from qwenlocal.library.artifact import DownloadPolicy
from qwenlocal.library.http import HttpClient
from qwenlocal.library.hubs import Hub, HuggingFace, ModelScope
from qwenlocal.library.package_index import PackageIndex, index_url
from qwenlocal.library.puller import DownloadSummary, Puller
from qwenlocal.library.resolver import Resolver
from qwenlocal.terminal.progress import show_progress

if TYPE_CHECKING:
    from qwenlocal.cli.context import AppContext


@contextlib.contextmanager
def open_puller(app: AppContext) -> Iterator[Puller]:
    """Open a downloader with every source that this machine can ask; it shows its progress on stderr."""
    client, policy = HttpClient(limit_rate=app.limit_rate), DownloadPolicy()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hubs: list[Hub] = [HuggingFace(), ModelScope(client)]
    resolver = Resolver(
        app.catalog, app.folders, client, hubs, lambda: PackageIndex(index_url(), client), policy, offline=offline
    )
    with show_progress(sys.stderr) as show:
        yield Puller(
            app.folders,
            app.store,
            app.local,
            resolver,
            client,
            on_start=lambda summary: _announce(app, summary),
            report=show,
            policy=policy,
        )


def _announce(app: AppContext, summary: DownloadSummary) -> None:
    name, size, count = summary.name, format_bytes(summary.size), summary.file_count
    if summary.is_checkpoint:
        app.say(tr("Downloading the checkpoint {name} ({size}, {count} file(s)).", name=name, size=size, count=count))
    else:
        app.say(tr("Downloading {name} from {origin} ({size}).", name=name, origin=summary.origin, size=size))
    if summary.licence:
        app.say(tr("Licence: {licence}", licence=summary.licence))
    if summary.is_third_party and not app.assume_yes and can_ask():
        _confirm(summary)


def _confirm(summary: DownloadSummary) -> None:
    """
    Ask before files of a third party are downloaded; without a terminal, `_announce` has named their origin.

    Raises
    ------
    DownloadFailed: the user declined. Interrupted: Ctrl-C or Ctrl-D.
    """
    if not confirm(tr("Download {name} from this third party? Its sha256 is checked.", name=summary.name)):
        raise DownloadFailed(
            tr("{name} was not downloaded.", name=summary.name),
            hint=tr("To use another model: qwenlocal list --all. To skip the question: --yes"),
        )
