"""Saved chats in real terminals: closed windows, two windows, damaged journals, `chats rm`, /export and /save."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_holder import open_in_another_process
from conftest import SAYS, Run
from terminal import Open, Terminal, start_chat

from qwenlocal.chat.journal import Journal
from qwenlocal.chat.journal_writer import JournalWriter
from qwenlocal.chat.thread import USER, Thread
from qwenlocal.paths import Folders


def save_chats(home: Path, count: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    journal = Journal(home / "chats.db")
    for number in range(1, count + 1):
        thread = Thread()
        writer = JournalWriter(journal, thread, "tiny")
        thread.add(USER, f"Question {number}")
        writer.close()
    journal.close()


def chat_ids(journal: Callable[[], Journal]) -> list[int]:
    opened = journal()
    ids = sorted(chat.id for chat in opened.list_chats())
    opened.close()
    return ids


def wait_for_answer(journal: Journal) -> None:
    """Wait until the beginning of the first answer is written, which takes half a second."""
    deadline = time.monotonic() + 20
    while not journal.load_thread(1).path[-1].text.startswith("abcdefgh"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    journal.close()


# --- closed windows


@pytest.mark.parametrize(
    ("end", "words"),
    [(Terminal.hang_up, 40), (Terminal.terminate, 40), (Terminal.kill, 1)],
    ids=["hup", "term", "kill"],
)
def test_a_chat_whose_window_was_closed_continues_at_once_with_the_cut_answer(
    terminal: Open, endless_model: Path, journal: Callable[[], Journal], end: Callable[[Terminal], None], words: int
) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000")
    chat.enter("Go", r"(abcdefgh\s){40}")
    chat.read(0.7)  # kill -9 loses up to half a second
    end(chat)
    again = start_chat(terminal, "--continue", "-n", "9")
    text = again.text.replace("\n", " ")
    assert "Continuing chat 1, “Go”: 2 messages" in text
    assert "The last answer was cut off; /continue finishes it." in text
    assert "another window" not in text
    cut = journal().load_thread(1).path[1]
    assert cut.finish_reason == "interrupted" and cut.text.count("abcdefgh") >= words
    again.enter("/continue", "token limit")
    assert journal().load_thread(1).path[1].text == ("abcdefgh " * 1_000)[: len(cut.text) + 9]
    assert chat_ids(journal) == [1]


def test_a_window_that_is_closed_before_the_answer_offers_to_answer(
    terminal: Open, speaking_model: Path, folders: Folders
) -> None:
    save_chats(folders.home, 1)
    again = start_chat(terminal, speaking_model, "--continue")
    assert "The last question has no answer yet; /continue answers it." in again.text
    again.enter("/continue", re.escape(SAYS))


def test_reopening_a_closed_window_again_and_again_adds_no_chats(
    terminal: Open, endless_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000")
    for number in range(4):
        chat.enter(f"Question {number}", rf"> Question {number}\n.*abcdefgh abcdefgh")
        chat.hang_up()
        chat = start_chat(terminal, "--continue", "-c", "60000")
        assert chat_ids(journal) == [1]
    assert [m.text for m in journal().load_thread(1).path if m.role == USER] == [f"Question {n}" for n in range(4)]


def test_looking_at_an_older_chat_does_not_make_it_the_last_one(
    terminal: Open, speaking_model: Path, folders: Folders
) -> None:
    save_chats(folders.home, 2)
    chat = start_chat(terminal, speaking_model, "--resume", "1")
    chat.enter("/load 2", "Question 2")
    chat.enter("/load 1", r"Loaded 1 message\. Last question: Question 1")
    chat.enter("/exit", "To continue this chat: qwenlocal run --resume 1")
    assert "Continuing chat 2" in start_chat(terminal, speaking_model, "--continue").text


def test_a_second_window_copies_the_chat_with_its_first_message_only(
    terminal: Open, endless_model: Path, journal: Callable[[], Journal]
) -> None:
    first = start_chat(terminal, endless_model, "-c", "60000")
    first.enter("Go", r"(abcdefgh\s){40}")
    wait_for_answer(journal())
    second = start_chat(terminal, "--continue", "-n", "9")
    assert "It is open in another window. Unless you close that window first" in second.text
    assert chat_ids(journal) == [1]
    second.enter("And?", "token limit")
    assert chat_ids(journal) == [1, 2]
    question, answer, *_ = journal().load_thread(2).path
    assert question.text == "Go" and answer.text.startswith("abcdefgh ")
    assert [m.text for m in journal().load_thread(2).path[2:]] == ["And?", "abcdefgh "]
    second.enter("/load 1", "It is open in another window")


# --- a damaged journal


def test_continue_with_a_damaged_journal_opens_a_chat_that_is_not_saved(
    terminal: Open, speaking_model: Path, folders: Folders
) -> None:
    home = folders.home
    save_chats(home, 3)
    data = bytes(19) + (home / "chats.db").read_bytes()[19:]
    (home / "chats.db").write_bytes(data)
    for choice in (["--continue"], ["--resume", "2"], ["--resume"]):
        chat = start_chat(terminal, speaking_model, *choice)
        text = re.sub(r"\s+", " ", chat.text)
        assert "A new chat starts; it is not saved. Recover the readable messages: qwenlocal chats recover" in text
        chat.enter("Hi", re.escape(SAYS))
        assert chat.exit() == 0
        assert (home / "chats.db").read_bytes() == data


# --- qwenlocal chats rm


def test_ranges_of_chats_are_deleted(qwenlocal: Run, journal: Callable[[], Journal], folders: Folders) -> None:
    save_chats(folders.home, 12)
    result = qwenlocal("chats", "rm", "3-7", "9", "6-8")
    assert result.returncode == 0
    assert result.stderr.splitlines() == [f"Deleted: {n} Question {n}" for n in (3, 4, 5, 6, 7, 9, 8)]
    assert chat_ids(journal) == [1, 2, 10, 11, 12]
    assert qwenlocal("chats", "rm", "#1-#10", "last").returncode == 0
    assert chat_ids(journal) == [11]


def test_every_command_reads_numbers_of_chats_alike(
    invoke: Run, journal: Callable[[], Journal], folders: Folders
) -> None:
    save_chats(folders.home, 4)
    for text in ("2", "#2", "02", "#002"):
        assert "Question 2" in invoke("chats", "show", text).stdout
    for text in ("9", "1-2", "2-", "-2", "²", "two", "#", "", "9" * 5000):
        assert invoke("chats", "show", "--", text).returncode == 3, text
    assert invoke("chats", "rm", "02", "#03-04").returncode == 0
    assert chat_ids(journal) == [1]
    assert invoke("chats", "rm", "1-").returncode == 3


@pytest.mark.parametrize(
    ("texts", "code", "message"),
    [
        (["2", "7-3"], 2, "“7-3” is not a range of chats."),
        (["2", "4-9"], 3, "There is no chat 4-9."),
        (["2", "99999999999999999999"], 3, "There is no chat 99999999999999999999."),
        (["2", "1-2-3"], 3, "There is no chat 1-2-3."),
        (["2", "²"], 3, "There is no chat ²."),
    ],
)
def test_nothing_is_deleted_if_one_of_the_chats_is_not_there(
    qwenlocal: Run,
    journal: Callable[[], Journal],
    folders: Folders,
    texts: list[str],
    code: int,
    message: str,
) -> None:
    save_chats(folders.home, 3)
    result = qwenlocal("chats", "rm", *texts)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert chat_ids(journal) == [1, 2, 3]


def test_nothing_is_deleted_if_one_of_the_chats_is_open(
    qwenlocal: Run, journal: Callable[[], Journal], folders: Folders
) -> None:
    home = folders.home
    save_chats(home, 3)
    with open_in_another_process(home / "chats.db", 2):
        result = qwenlocal("chats", "rm", "1-3")
        assert (result.returncode, "Chat 2 is open in another window." in result.stderr) == (2, True)
    assert chat_ids(journal) == [1, 2, 3]


def test_a_terminal_asks_before_chats_are_deleted(
    terminal: Open, journal: Callable[[], Journal], folders: Folders
) -> None:
    save_chats(folders.home, 4)
    asking = terminal("chats", "rm", "2-3")
    asking.wait_for(r"2 .*Question 2.*3 .*Question 3.*Delete 2 chats permanently\? \[y/N\]")
    asking.type("\r")
    assert asking.wait_for_exit() == 1
    assert "Nothing was deleted." in asking.text
    interrupted = terminal("chats", "rm", "2")
    interrupted.wait_for("Delete 1 chat permanently")
    interrupted.type("\x03")
    assert interrupted.wait_for_exit() == 130
    assert chat_ids(journal) == [1, 2, 3, 4]
    agreed = terminal("chats", "rm", "2-3")
    agreed.wait_for("Delete 2 chats")
    agreed.type("y\r")
    assert agreed.wait_for_exit() == 0
    assert terminal("chats", "rm", "4", "--yes").wait_for_exit() == 0
    assert chat_ids(journal) == [1]


# --- /export and /save


@pytest.mark.parametrize(
    "command", ["/export talk.md", "/export talk.json", "/save talk.json", '/export "my talk.html"']
)
def test_files_are_overwritten_only_with_force(
    terminal: Open, speaking_model: Path, tmp_path: Path, command: str
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    path = tmp_path / command.split(" ", 1)[1].strip('"')
    chat.enter(command, "Saved:")
    path.write_text("mine")
    chat.enter(command, r"already\s+exists\..*--force")
    assert path.read_text() == "mine"
    chat.enter(f"{command} --force", "Saved:.*Saved:")
    assert SAYS in path.read_text()
