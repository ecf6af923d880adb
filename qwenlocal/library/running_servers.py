"""Running servers: each writes a file, so that `qwenlocal run` can use the model that it has loaded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qwenlocal.errors import NotWritable
from qwenlocal.paths import ensure_writable


@dataclass(frozen=True)
class RunningServer:
    """
    A server of this user: its address, the path of its default model, and the model's context in tokens.

    `pid` is its process and `started` the time at which that began, so that a later process with the same number is not
    mistaken for it. `key` is a key that the server accepts, "" if it needs none.
    """

    url: str
    model: str
    n_ctx: int
    key: str
    pid: int
    started: float


def find_running_servers(folder: Path) -> list[RunningServer]:
    """Return the servers whose files are in `folder`; the files of those that have ended are deleted."""
    if not (paths := sorted(folder.glob("*.json"))):
        return []
    import psutil  # takes 10 ms of a start

    servers = []
    for path in paths:
        try:
            server = RunningServer(**json.loads(path.read_text("utf-8")))
            if psutil.Process(server.pid).create_time() == server.started:
                servers.append(server)
                continue
        except (OSError, ValueError, TypeError, psutil.Error):
            pass
        with contextlib.suppress(OSError):
            path.unlink()
    return servers


@contextlib.contextmanager
def announce_server(folder: Path, url: str, model: Path, n_ctx: int, key: str) -> Iterator[None]:
    """Let `find_running_servers` find this process during the block, if the folder is writable."""
    import psutil

    pid = os.getpid()
    server = RunningServer(url, os.path.realpath(model), n_ctx, key, pid, psutil.Process(pid).create_time())
    path = folder / f"{pid}.json"
    with contextlib.suppress(OSError, NotWritable):
        ensure_writable(folder)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(server), file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
