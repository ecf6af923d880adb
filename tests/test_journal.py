"""The journal: chats survive a killed process, a locked file and a damaged one."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlocal.chat.export import export_html, export_json, export_markdown
from qwenlocal.chat.journal import Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.errors import ChatNotFound, JournalError


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "chats.db")
    yield opened
    opened.close()


def talk(journal: Journal, *said: str, system: str = "") -> tuple[Thread, JournalWriter]:
    """A chat in which question and answer take turns."""
    thread = Thread(system)
    writer = JournalWriter(journal, thread, "tiny")
    for place, text in enumerate(said):
        message = thread.add((USER, ASSISTANT)[place % 2], text, model="tiny")
        if place % 2:
            thread.update(message, finish_reason="end of answer")
    return thread, writer


# --- writing


def test_a_chat_comes_back_as_it_was(journal: Journal) -> None:
    thread, writer = talk(journal, "你好", "Hello €", "And?", "More", system="Be kind.")
    thread.update(thread.path[1], ids=(5, 6, 151643), pinned=True)
    thread.evict_turns([1], "They met.")
    assert writer.chat_id is not None
    found = journal.load_thread(writer.chat_id)
    assert found.path == thread.path
    assert (found.system, found.evicted, found.summary, found.leaf) == ("Be kind.", {1}, "They met.", 4)
    (chat,) = journal.list_chats()
    assert (chat.title, chat.model, chat.messages) == ("你好", "tiny", 4)


def test_all_versions_and_the_selected_leaf_are_kept(journal: Journal) -> None:
    thread, writer = talk(journal, "Q", "one")
    thread.set_leaf(1)
    thread.add(ASSISTANT, "two")
    thread.select_version(thread.messages[2])
    found = journal.load_thread(writer.chat_id or 0)
    assert [message.text for message in found.versions(found.path[1])] == ["one", "two"]
    assert found.path[1].text == "one"


def test_a_message_with_zero_bytes_can_be_read_back(journal: Journal) -> None:
    _, writer = talk(journal, "log: x" + "\0" * 128 + "y", "A")
    assert [message.text for message in journal.load_thread(writer.chat_id or 0).path] == [
        "log: x" + "\ufffd" * 128 + "y",
        "A",
    ]


def test_an_empty_chat_is_not_written(journal: Journal) -> None:
    thread = Thread()
    JournalWriter(journal, thread, "tiny").close()
    thread.set_system_prompt("Be kind.")
    assert journal.list_chats() == []


def test_a_removed_question_is_deleted(journal: Journal) -> None:
    thread, writer = talk(journal, "Q", "A", "too long")
    thread.remove(thread.path[-1])
    assert [message.text for message in journal.load_thread(writer.chat_id or 0).path] == ["Q", "A"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_any_text_is_kept(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> None:
    journal = Journal(tmp_path_factory.mktemp("j") / "chats.db")
    thread, writer = talk(journal, *said)
    clean = [text.encode("utf-8", "replace").decode() for text in said]
    assert [message.text for message in journal.load_thread(writer.chat_id or 0).path] == clean
    assert not writer.error
    del thread
    journal.close()


def test_only_the_owner_can_read_the_files(journal: Journal) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such bits")
    talk(journal, "Q", "A")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in journal.path.parent.iterdir()}
    assert modes == dict.fromkeys(("chats.db", "chats.db-wal", "chats.db-shm", "chats.db-locks"), 0o600)


def test_an_answer_is_written_every_half_second_and_at_its_end(journal: Journal) -> None:
    now = [0.0]
    thread = Thread()
    writer = JournalWriter(journal, thread, "tiny", clock=lambda: now[0])
    thread.add(USER, "Q")
    answer = thread.add(ASSISTANT, "")
    on_disk = []
    for word in range(20):
        now[0] += 0.1
        thread.update(answer, text=answer.text + f"{word} ")
        on_disk.append(len(journal.load_thread(writer.chat_id or 0).messages[2].text.split()))
    assert all(said + 1 - there <= 5 for said, there in enumerate(on_disk))
    assert len(set(on_disk)) <= 6
    thread.update(answer, finish_reason="end of answer")
    assert len(journal.load_thread(writer.chat_id or 0).messages[2].text.split()) == 20


STREAMING = """
import sys, time
from pathlib import Path
from qwenlocal.chat.journal import Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import Thread
journal, thread = Journal(Path(sys.argv[1])), Thread()
JournalWriter(journal, thread, "tiny")
thread.add("user", "Count")
answer = thread.add("assistant", "")
for number in range(10**9):
    thread.update(answer, text=answer.text + f"{number} ")
    print(number, time.time(), flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("_try", range(3))
def test_a_killed_process_loses_at_most_a_second_of_an_answer(tmp_path: Path, _try: int) -> None:
    path = tmp_path / "chats.db"
    child = subprocess.Popen([sys.executable, "-c", STREAMING, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    lines = [child.stdout.readline() for _ in range(90 + 20 * _try)]
    child.kill()
    killed = time.time()
    lines += child.communicate()[0].splitlines()
    said = {int(number): float(at) for number, at in (line.split() for line in lines if len(line.split()) == 2)}
    found = Journal(path).load_thread(1)
    there = [int(word) for word in found.path[1].text.split()]
    assert there == list(range(len(there)))
    assert all(at > killed - 1.0 for number, at in said.items() if number >= len(there))


# --- searching


def test_search_ignores_case_and_order_in_any_script(journal: Journal) -> None:
    talk(journal, "What is a Tokenizer?", "It cuts text into pieces.")
    talk(journal, "什么是分词器？", "分词器把文本切成小块。")
    talk(journal, "Café?", "Cafe\u0301!")
    assert [hit.chat for hit in journal.search("TOKENIZER what")] == [1]
    assert [hit.role for hit in journal.search("分词")] == ["assistant", "user"]
    assert len(journal.search("切")) == 1
    assert len(journal.search("café")) == 2
    assert journal.search("tokenizer pieces") == []
    assert journal.search("  ") == []


def test_search_hits_show_their_context(journal: Journal) -> None:
    talk(journal, "x" * 100 + " needle\nin hay " + "y" * 100)
    (hit,) = journal.search("NEEDLE")
    assert hit.found == "needle"
    assert hit.before.endswith("x ") and hit.after.startswith(" in hay y")
    assert len(hit.before) + len(hit.after) <= 80
    assert hit.cut_before and hit.cut_after
    talk(journal, "a thread")
    (whole,) = journal.search("thread")
    assert not whole.cut_before and not whole.cut_after


def test_percent_and_underscore_are_not_wildcards(journal: Journal) -> None:
    talk(journal, "100 % sure", "a_b")
    assert len(journal.search("%")) == 1
    assert len(journal.search("_")) == 1


# --- several chats and processes


HOLDING = """
import sys
from pathlib import Path
from qwenlocal.chat.journal import Journal
from qwenlocal.chat.journal_writer import JournalWriter
journal = Journal(Path(sys.argv[1]))
print(journal.acquire(1), flush=True)
for words in sys.stdin:
    journal.load_thread(1)
    thread = journal.load_thread(1)
    JournalWriter(journal, thread, "other", 1)
    thread.add("user", words.strip())
    print("added", flush=True)
"""


@contextlib.contextmanager
def chat_1_open_elsewhere(path: Path) -> Iterator[Callable[[str], None]]:
    """Open chat 1 in another process, to which the function adds questions."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(path)], text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "True\n"

        def add(text: str) -> None:
            child.stdin.write(text + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "added\n"

        yield add
        child.stdin.close()


def can_open_elsewhere(journal: Journal, chat_id: int) -> bool:
    """Return True if another process can open a chat."""
    code = "import sys; from pathlib import Path; from qwenlocal.chat.journal import Journal\n"
    code += f"print(Journal(Path(sys.argv[1])).acquire({chat_id}))"
    other = subprocess.run([sys.executable, "-c", code, str(journal.path)], capture_output=True, text=True, check=True)
    return other.stdout == "True\n"


def texts(journal: Journal, chat_id: int) -> list[str]:
    return [message.text for message in journal.load_thread(chat_id).path]


def test_a_chat_that_is_open_elsewhere_is_copied_with_the_first_new_message(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A", system="Be kind.")
    writer.close()
    journal.rename_chat(1, "My title")
    with chat_1_open_elsewhere(journal.path):
        thread = journal.load_thread(1)
        copying = JournalWriter(journal, thread, "tiny", 1)
        thread.set_leaf(1)
        thread.set_leaf(2)
        assert (copying.chat_id, copying.original) == (None, 1)
        assert len(journal.list_chats()) == 1
        thread.add(USER, "And?")
        assert copying.chat_id == 2
    assert [texts(journal, number) for number in (1, 2)] == [["Q", "A"], ["Q", "A", "And?"]]
    assert journal.load_thread(2).system == "Be kind."
    assert {chat.title for chat in journal.list_chats()} == {"My title"}


def test_reading_a_chat_that_is_open_elsewhere_adds_no_copies(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A")
    writer.close()
    with chat_1_open_elsewhere(journal.path):
        for _ in range(10):
            JournalWriter(journal, journal.load_thread(1), "tiny", 1).close()
    assert [chat.id for chat in journal.list_chats()] == [1]


def test_a_copy_has_the_answer_that_is_growing_in_another_window(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    child = subprocess.Popen([sys.executable, "-c", STREAMING, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    for _ in range(90):
        child.stdout.readline()
    journal = Journal(path)
    thread = journal.load_thread(1)
    shown = thread.path[1].text
    writer = JournalWriter(journal, thread, "tiny", 1)
    thread.add(USER, "And?")
    child.kill()
    child.communicate()
    assert writer.chat_id == 2
    assert shown.startswith("0 1 2 ") and texts(journal, 2) == ["Count", shown, "And?"]
    assert journal.load_thread(2).path[1].finish_reason == "interrupted"


def test_a_chat_that_was_closed_elsewhere_continues_without_a_copy(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A")
    writer.close()
    with chat_1_open_elsewhere(journal.path):
        thread = journal.load_thread(1)
        waiting = JournalWriter(journal, thread, "tiny", 1)
    thread.add(USER, "And?")
    assert (waiting.chat_id, waiting.original) == (1, None)
    assert texts(journal, 1) == ["Q", "A", "And?"]
    assert len(journal.list_chats()) == 1


def test_a_chat_that_was_changed_elsewhere_is_copied_so_that_no_message_is_overwritten(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A")
    writer.close()
    with chat_1_open_elsewhere(journal.path) as add:
        thread = journal.load_thread(1)
        JournalWriter(journal, thread, "tiny", 1)
        add("From the other window")
    thread.add(USER, "And?")
    assert texts(journal, 1) == ["Q", "A", "From the other window"]
    assert texts(journal, 2) == ["Q", "A", "And?"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no zombies")
def test_a_killed_process_has_no_chat_open_even_before_its_parent_notices(tmp_path: Path) -> None:
    path = tmp_path / "chats.db"
    child = subprocess.Popen([sys.executable, "-c", STREAMING, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    child.stdout.readline()
    journal = Journal(path)
    assert not journal.acquire(1)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert journal.acquire(1)
    child.communicate()


def test_a_process_number_in_the_journal_means_nothing(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A")
    writer.close()
    with journal.transaction() as db:
        db.execute("UPDATE chats SET open_by = ?", (os.getppid(),))  # as earlier versions wrote it
    assert journal.acquire(1)


def test_closing_a_chat_during_an_answer_keeps_all_of_it_and_frees_the_chat(journal: Journal) -> None:
    thread, writer = talk(journal, "Q")
    answer = thread.add(ASSISTANT, "")
    thread.update(answer, text="The beginning")
    writer.close()
    thread.update(answer, text="The beginning and more, too late")
    writer.close()
    assert texts(journal, 1) == ["Q", "The beginning"]
    assert journal.load_thread(1).path[1].finish_reason == "interrupted"
    assert can_open_elsewhere(journal, 1)


def test_an_interrupted_transaction_is_rolled_back_and_the_next_one_succeeds(journal: Journal) -> None:
    talk(journal, "Q", "A")
    with pytest.raises(SystemExit), journal.transaction() as db:
        db.execute("DELETE FROM messages")
        raise SystemExit
    journal.rename_chat(1, "New")
    assert texts(journal, 1) == ["Q", "A"]


def test_continuing_a_chat_appends_to_it(journal: Journal) -> None:
    _, writer = talk(journal, "Q", "A")
    writer.close()
    thread = journal.load_thread(1)
    JournalWriter(journal, thread, "other", 1)
    thread.add(USER, "And?")
    assert [message.text for message in journal.load_thread(1).path] == ["Q", "A", "And?"]
    assert len(journal.list_chats()) == 1


def test_a_chat_that_is_only_read_does_not_become_the_last_one(journal: Journal) -> None:
    for question in ("First", "Second"):
        talk(journal, question, "A")[1].close()
    JournalWriter(journal, journal.open_thread(1), "other", 1).close()
    assert [(chat.id, chat.model) for chat in journal.list_chats()] == [(2, "tiny"), (1, "tiny")]
    thread = journal.open_thread(1)
    writer = JournalWriter(journal, thread, "other", 1)
    thread.set_system_prompt("Be kind.")
    writer.close()
    assert [(chat.id, chat.model) for chat in journal.list_chats()] == [(1, "other"), (2, "tiny")]
    assert journal.load_thread(1).system == "Be kind."


def test_an_answer_that_was_cut_when_its_process_was_killed_is_interrupted(journal: Journal) -> None:
    thread, _ = talk(journal, "Q")
    thread.add(ASSISTANT, "The beg")
    assert journal.load_thread(1).path[1].finish_reason == "interrupted"


def test_a_damaged_chat_that_cannot_be_opened_is_not_left_locked(journal: Journal) -> None:
    for question in ("First", "Second"):
        talk(journal, question, "A")[1].close()
    journal.open_thread(2)
    with journal.transaction() as db:
        db.execute("UPDATE messages SET parent = 7 WHERE number = 2")
    for chat_id in (1, 2):
        with pytest.raises(JournalError, match="is damaged"):
            journal.open_thread(chat_id)
    with pytest.raises(ChatNotFound):
        journal.open_thread(3)
    assert [can_open_elsewhere(journal, chat_id) for chat_id in (1, 2, 3)] == [True, False, True]


def test_chats_can_be_renamed_and_deleted(journal: Journal) -> None:
    talk(journal, "Q", "secret words")
    talk(journal, "R")
    journal.rename_chat(1, "About Q")
    assert journal.get_chat(1).title == "About Q"
    journal.delete_chat(1)
    with pytest.raises(ChatNotFound):
        journal.load_thread(1)
    for call in (lambda: journal.rename_chat(1, "x"), lambda: journal.delete_chat(1), lambda: journal.get_chat(1)):
        with pytest.raises(ChatNotFound):
            call()
    assert [chat.id for chat in journal.list_chats()] == [2]
    assert not [path for path in journal.path.parent.iterdir() if b"secret words" in path.read_bytes()]


def test_a_chat_deleted_while_open_continues_as_a_new_one(journal: Journal) -> None:
    thread = Thread()
    writer = JournalWriter(journal, thread, "tiny")
    thread.add(USER, "before")
    journal.delete_chat(1)
    thread.add(USER, "after")
    writer.close()
    (chat,) = journal.list_chats()
    assert [message.text for message in journal.load_thread(chat.id).path] == ["before", "after"]


# --- unusable files


def test_a_journal_of_a_newer_version_is_not_changed(journal: Journal) -> None:
    with contextlib.closing(sqlite3.connect(journal.path)) as database:
        database.execute("PRAGMA user_version = 99")
    before = journal.path.read_bytes()
    with pytest.raises(JournalError, match="newer version") as caught:
        Journal(journal.path)
    assert "--no-journal" in caught.value.hint
    assert journal.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_not_a_journal_is_not_changed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chats.db").write_bytes(content)
    with pytest.raises(JournalError, match="damaged") as caught:
        Journal(tmp_path / "chats.db")
    assert "chats recover" in caught.value.hint
    assert (tmp_path / "chats.db").read_bytes() == content


def test_a_locked_journal_is_reported(journal: Journal) -> None:
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalError, match="it is locked by another program"):
            Journal(journal.path, lock_timeout=0.05)


def test_a_failed_write_is_repeated_with_the_next_one(journal: Journal) -> None:
    other = Journal(journal.path, lock_timeout=0.05)
    thread, writer = talk(other, "Q", "A")
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        thread.add(USER, "while it is locked")
        assert writer.error == "it is locked by another program"
    thread.add(ASSISTANT, "afterwards")
    assert writer.error == ""
    assert [message.text for message in journal.load_thread(1).path] == ["Q", "A", "while it is locked", "afterwards"]
    other.close()


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        path = tmp_path / "missing" / "chats.db"  # root may write anywhere; a folder that is not there will do
    else:
        tmp_path.chmod(0o500)
        path = tmp_path / "chats.db"
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(path)


IMPOSSIBLE = [
    "UPDATE chats SET changed = 1e300",
    "UPDATE chats SET changed = 'yesterday'",
    "UPDATE chats SET created = 9e999",
    "UPDATE chats SET created = -1",
    "UPDATE chats SET title = x'ff'",
    "UPDATE chats SET title = CAST(x'ff' AS TEXT)",
    "UPDATE chats SET title = CAST(zeroblob(9) AS TEXT)",
    "UPDATE chats SET leaf = -1",
    "UPDATE chats SET leaf = 77",
    "UPDATE chats SET left_out = '{'",
    "UPDATE chats SET left_out = '[' || replace(hex(zeroblob(9000)), '00', '[')",
    "UPDATE chats SET id = -5",
    "UPDATE messages SET role = 'system' WHERE number = 1",
    "UPDATE messages SET parent = 5 WHERE number = 2",
    "UPDATE messages SET parent = 2 WHERE number = 1",
    "UPDATE messages SET number = 9223372036854775807 WHERE number = 2",
    "UPDATE messages SET text = CAST(x'fffe' AS TEXT) WHERE number = 2",
    "UPDATE messages SET text = x'00' WHERE number = 2",
    "UPDATE messages SET why = 'bored' WHERE number = 2",
    "UPDATE messages SET ids = x'01' WHERE number = 2",
    "UPDATE messages SET ids = x'ffffffff' WHERE number = 2",
    "UPDATE messages SET pinned = 7 WHERE number = 2",
    "UPDATE messages SET created = 253402300799 WHERE number = 2",
    "DELETE FROM messages WHERE number = 1",
]


@pytest.mark.parametrize("statement", IMPOSSIBLE)
def test_impossible_values_are_reported_as_damage(journal: Journal, statement: str) -> None:
    talk(journal, "Q", "A")
    with journal.transaction() as db:
        db.execute(statement)
    with pytest.raises(JournalError, match="damaged") as caught:
        for chat in journal.list_chats():
            journal.load_thread(chat.id)
    assert "chats recover" in caught.value.hint


@pytest.mark.parametrize("changes", ["role = 'x'", "text = x'00'", "created = 1e300"])
def test_search_reports_impossible_values_as_damage(journal: Journal, changes: str) -> None:
    talk(journal, "Q", "A")
    with journal.transaction() as db:
        db.execute(f"UPDATE messages SET {changes}")
    with pytest.raises(JournalError, match="damaged"):
        journal.search("A")


@settings(max_examples=25, deadline=None)
@given(st.integers(100, 20_000), st.binary(min_size=1, max_size=300))
def test_any_damage_is_reported_as_an_error(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("j") / "chats.db"
    journal = Journal(path)
    for number in range(6):
        talk(journal, f"Question {number} " + "q" * 600, "a" * 600)
    journal.close()
    data = bytearray(path.read_bytes())
    data[at : at + len(noise)] = noise
    path.write_bytes(data)
    try:
        opened = Journal(path)
        for chat in opened.list_chats():
            opened.load_thread(chat.id)
        opened.search("question")
        opened.close()
    except (JournalError, ChatNotFound):
        pass


# --- export


def test_export_as_markdown_json_and_html(journal: Journal) -> None:
    thread, _ = talk(journal, "<script>alert(1)</script>", "| a |\n|---|\n| **b** |", system="Be kind.")
    markdown = export_markdown(thread, "T")
    assert markdown.startswith("# T\n\n*System prompt:* Be kind.\n\n## You, ")
    assert "| **b** |" in markdown
    data = json.loads(export_json(thread, "T", "tiny"))
    assert [message["role"] for message in data["messages"]] == ["system", "user", "assistant"]
    assert data["tree"][1]["parent"] == 1
    page = export_html(thread, "<T>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<td><strong>b</strong></td>" in page
    assert "<title>&lt;T&gt;</title>" in page


def test_the_database_has_schema_version_1_and_a_write_ahead_log(journal: Journal) -> None:
    with sqlite3.connect(journal.path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
