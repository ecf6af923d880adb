"""kill -9 while writing: a file has its old or its new content, never a part of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenlocal.library.store import Store
from qwenlocal.paths import Folders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")

RECORDS = """
import sys
from pathlib import Path
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders
home = Path(sys.argv[1])
store = Store(Folders(home, home, home, home))
for number in range(10**9):
    file = StoredFile("/x", number, 0, "0" * 64, 1, tuple(range(2000)))
    store.add(ModelRecord("one", [file], "origin"))
    print(number, flush=True)
"""
CONVERSATION = """
import sys
from pathlib import Path
from qwenlocal.chat.export import export_messages
from qwenlocal.chat.thread import Thread
from qwenlocal.fileio import replace_text
for number in range(10**9):
    thread = Thread()
    thread.add("user", "x" * 50_000 + str(number))
    replace_text(Path(sys.argv[1]) / "talk.json", export_messages(thread, "m"))
    print(number, flush=True)
"""


def kill_while_writing(code: str, folder: Path) -> int:
    """Run `code` until it has written a few times, kill it, and return the last number that it printed."""
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    for _ in range(20):
        child.stdout.readline()
    time.sleep(0.05)
    child.kill()
    rest = child.communicate()[0].split("\n")
    numbers = [int(line) for line in rest if line.isdigit()]
    return numbers[-1] if numbers else 19


@pytest.mark.parametrize("_try", range(3))
def test_a_record_is_complete(tmp_path: Path, _try: int) -> None:
    last = kill_while_writing(RECORDS, tmp_path)
    (record,) = Store(Folders(tmp_path, tmp_path, tmp_path, tmp_path)).records()
    assert record.files[0].size in (last, last + 1)
    assert record.files[0].checksums == tuple(range(2000))


@pytest.mark.parametrize("_try", range(3))
def test_a_saved_conversation_is_complete(tmp_path: Path, _try: int) -> None:
    last = kill_while_writing(CONVERSATION, tmp_path)
    content = json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"]
    assert content.startswith("x" * 50_000)
    assert int(content[50_000:]) in (last, last + 1)
