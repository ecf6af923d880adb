"""The parts that ask the network; imported only when something must be fetched."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from qwenlocal.cli.wiring import Program
from qwenlocal.library.download import Manner
from qwenlocal.library.http import Client
from qwenlocal.library.hubs import HuggingFace, ModelScope
from qwenlocal.library.index import PackageIndex, index_url
from qwenlocal.library.pull import Puller
from qwenlocal.library.sources import Sources
from qwenlocal.terminal.progress import progress


def sources(program: Program, client: Client, manner: Manner) -> Sources:
    """Every source of this machine."""
    return Sources(
        program.catalogue,
        program.folders,
        client,
        [HuggingFace(), ModelScope(client)],
        lambda: PackageIndex(index_url(), client),
        manner,
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )


@contextlib.contextmanager
def puller(program: Program, *, limit_rate: int = 0) -> Iterator[Puller]:
    """A puller that shows its progress on stderr."""
    client, manner = Client(limit_rate=limit_rate), Manner()
    with progress(sys.stderr) as shown:
        yield Puller(
            program.folders,
            program.store,
            program.local,
            sources(program, client, manner),
            client,
            say=program.say,
            report=shown,
            manner=manner,
        )
