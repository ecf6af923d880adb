"""Several journals open in one process: none takes the locks of another one away, in the database or on chats."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenlocal.chat.journal import Journal

# Writes a message, opens the journal again and closes it; after a line of input, writes another message.
WRITE_AROUND = """
import sys
from pathlib import Path
from qwenlocal.chat.journal import Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
first, thread = Journal(Path(sys.argv[1])), Thread()
writer = JournalWriter(first, thread, "tiny")
thread.add(USER, "before")
Journal(Path(sys.argv[1])).close()
print("ready", flush=True)
sys.stdin.readline()
thread.add(USER, "after")
print(writer.error or "written", flush=True)
sys.stdin.readline()
"""

# Opens chat 1, then the journal again, tries to open both chats in it, and closes that.
LOCK_TWICE = """
import sys
from pathlib import Path
from qwenlocal.chat.journal import Journal
first, second = Journal(Path(sys.argv[1])), Journal(Path(sys.argv[1]))
answers = first.acquire(1), second.acquire(1), second.acquire(2), first.acquire(2)
second.close()
print(*answers, flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def run(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run code in another process until the block ends."""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


def test_a_second_journal_in_a_process_does_not_cost_the_first_one_its_log(path: Path) -> None:
    """Another process that closes the database deletes its log, unless a lock says that somebody else writes to it."""
    with run(WRITE_AROUND, path) as writer:
        assert read_line(writer) == "ready"
        with contextlib.closing(Journal(path)) as journal:
            assert [message.text for message in journal.load_thread(1).path] == ["before"]
        assert writer.stdin
        print(file=writer.stdin, flush=True)
        assert read_line(writer) == "written"
        with contextlib.closing(Journal(path)) as journal:
            assert [message.text for message in journal.load_thread(1).path] == ["before", "after"]


def test_a_second_journal_in_a_process_does_not_release_chats_of_the_first_one(path: Path) -> None:
    with run(LOCK_TWICE, path) as process, contextlib.closing(Journal(path)) as journal:
        assert read_line(process) == "True False True False"
        assert [journal.acquire(chat) for chat in (1, 2)] == [False, True]


def test_a_chat_is_free_when_the_journal_that_had_it_open_is_closed(path: Path) -> None:
    with contextlib.closing(Journal(path)) as first, contextlib.closing(Journal(path)) as second:
        assert first.acquire(1)
        assert not second.acquire(1)
        assert not second.chat_locks.acquire_all()
        first.close()
        assert second.acquire(1)
        second.release(1)
        assert second.chat_locks.acquire_all()
        assert not first.acquire(2)
