"""A chat that another process has open, as another window has it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOLD = (
    "import sys; from pathlib import Path; from qwenlocal.chat.journal import Journal; "
    "Journal(Path(sys.argv[1])).acquire(int(sys.argv[2])); print(flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def open_in_another_process(journal: Path, chat: int) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD, str(journal), str(chat)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline()
        yield
        holder.communicate("")
