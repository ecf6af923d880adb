"""The command `qwenlocal serve` as a process, and its address."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

DEADLINE = 60.0


class Server:
    """A running server: its process, its address, and the lines that it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self.url = ""
        self._has_address = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._has_address.wait(DEADLINE)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("http"):
                self.url = line.split()[0]
                self._has_address.set()
        self._has_address.set()

    def ask(self, **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=DEADLINE)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(DEADLINE)
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def serving(home: Path, *arguments: object, **environment: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "qwenlocal", "serve", "--port", "0", "-c", "512", "-t", "1", *map(str, arguments)]
    env = {**os.environ, "QWENLOCAL_HOME": str(home), "LC_ALL": "C.UTF-8", **environment}
    server = Server(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        yield server
    finally:
        server.stop()
