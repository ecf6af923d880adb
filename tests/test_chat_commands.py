"""What is said anew, kept, attached and switched, in the real program on a real terminal."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SAYS, Run
from terminal import Open, Terminal

from qwenlocal.chat.journal import Journal
from qwenlocal.engine.sampling import Sampling
from qwenlocal.terminal.commands.models import SETTINGS
from qwenlocal.terminal.commands.table import COMMANDS, find_command
from qwenlocal.testing import write_model


@pytest.fixture
def journal(environment: dict[str, str]) -> Callable[[], Journal]:
    return lambda: Journal(Path(environment["QWENLOCAL_HOME"]) / "chats.db")


def said(terminal: Terminal, line: str, pattern: str) -> str:
    """Type a line, and wait for what it brings about."""
    terminal.type(f"{line}\r")
    return terminal.wait_for(pattern)


def started(terminal: Open, model: Path, *more: str) -> Terminal:
    chat = terminal("run", str(model), *more)
    chat.wait_for_prompt()
    return chat


# --- anew


def test_answers_are_given_again_shown_and_chosen(terminal: Open, random_model: Path) -> None:
    chat = started(terminal, random_model, "-n", "5", "--temp", "2", "--seed", "1")
    said(chat, "Hi", "token limit")
    said(chat, "/retry 2", r"token limit.*token limit.*token limit")
    text = said(chat, "/versions", r"\* 3 ")
    assert re.search(r"^  1 ", text, re.M) and re.search(r"^  2 ", text, re.M)
    said(chat, "/versions 1", "Version 1 of 3")
    said(chat, "/versions", r"^\* 1 ")
    said(chat, "/versions 7", "A number from 1 to 3 is wanted")


def test_the_last_question_comes_back_to_be_changed(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "First", re.escape(SAYS))
    chat.wait_for_prompt(2)
    said(chat, "/undo", r"Back before “First”.*^> First$")
    chat.type(" and more\r")
    chat.wait_for(re.escape(SAYS) + ".*" + re.escape(SAYS))
    chat.wait_for_prompt(4)
    thread = journal().load_thread(1)
    assert [message.text for message in thread.path] == ["First and more", SAYS]
    said(chat, "/branch", r"^  2 ")
    said(chat, "/branch 2", "Going on behind")
    said(chat, "/edit 1", r"Change it below.*^> First$")
    chat.type("!\r")
    chat.wait_for(r"^> First!$.*" + re.escape(SAYS))
    said(chat, "/answer", f"Change it below.*Change it below.*^> {SAYS}$")
    chat.type(" indeed\r")
    chat.wait_for("The model has said that now")
    assert [message.text for message in journal().load_thread(1).path] == ["First!", f"{SAYS} indeed"]


def test_an_empty_line_leaves_what_was_to_be_changed(terminal: Open, speaking_model: Path) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "Hi", re.escape(SAYS))
    chat.wait_for_prompt(2)
    said(chat, "/edit", r"Change it below.*^> Hi$")
    chat.type("\x15\r")
    chat.wait_for("Nothing was changed")
    said(chat, "/edit 5", "There is no turn 5; there are 1")


def test_whoever_turns_away_from_editing_changes_nothing(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "Hi", re.escape(SAYS))
    said(chat, "/answer", r"Change it below.*^> " + re.escape(SAYS) + "$")
    chat.type("\x03")
    chat.wait_for("Nothing was changed")
    said(chat, "And you?", r"^> And you\?$.*" + re.escape(SAYS))
    said(chat, "/edit 1", r"Change it below.*^> Hi$")
    chat.type("\x15/tokens abc\r")
    chat.wait_for("^3 tokens")
    said(chat, "More", r"^> More$.*" + re.escape(SAYS))
    chat.wait_for_prompt(6)
    assert [message.text for message in journal().load_thread(1).path] == ["Hi", SAYS, "And you?", SAYS, "More", SAYS]


def test_a_cut_answer_goes_on(terminal: Open, endless_model: Path, journal: Callable[[], Journal]) -> None:
    chat = started(terminal, endless_model, "-n", "12")
    said(chat, "Go", r"\[token limit\] /continue goes on")
    said(chat, "/continue", r"token limit.*token limit")
    assert journal().load_thread(1).path[1].text == ("abcdefgh " * 3)[:24]


def test_one_ctrl_c_ends_several_answers(terminal: Open, endless_model: Path) -> None:
    chat = started(terminal, endless_model, "--no-lookup", "-n", "20000")
    said(chat, "Go", "abcdefgh abcdefgh")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\]")
    chat.wait_for_prompt(2)
    chat.type("/retry 3\r")
    chat.wait_for(r"/retry 3.*abcdefgh abcdefgh")
    chat.type("\x03")
    chat.wait_for_prompt(3)
    chat.type("/versions\r")
    chat.wait_for(r"^\* 2 .*^>$")
    assert not re.search(r"^[* ] 3 ", chat.text, re.M)


def test_a_fork_is_another_chat_with_the_beginning_of_this_one(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    for number in range(1, 3):
        said(chat, f"Question {number}", rf"Question {number}.*" + re.escape(SAYS))
    said(chat, "/fork 1", "Another chat begins here, with 2 messages. It is chat 2")
    said(chat, "Other", r"^> Other$.*" + re.escape(SAYS))
    chat.wait_for_prompt(5)
    assert [m.text for m in journal().load_thread(2).path] == ["Question 1", SAYS, "Other", SAYS]
    assert [m.text for m in journal().load_thread(1).path] == ["Question 1", SAYS, "Question 2", SAYS]


# --- what is read


_LINES_OF_CTX = (r"\] (\d+) of 4,096 tokens", r"(\d+) tokens +system prompt", r"(\d+) tokens +pinned +First")


def test_the_context_is_shown_and_turns_can_be_pinned_and_dropped(terminal: Open, speaking_model: Path) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "First", re.escape(SAYS))
    said(chat, "Second", r"^> Second$.*" + re.escape(SAYS))
    said(chat, "/pin 1", "“First” stays in the context")
    said(chat, "/drop 2", "“Second” is not read any more")
    text = said(chat, "/ctx", r"dropped +Second")
    assert re.search(r"\[[#.]{40}\] [\d,]+ of 4,096 tokens", text)
    assert re.search(r"^ +1 +\d+ tokens +pinned +First", text, re.M)
    used, system, first = (int(re.search(what, text, re.M)[1]) for what in _LINES_OF_CTX)  # type: ignore[index]
    assert used == system + first, "what is dropped does not count"
    said(chat, "/tokens abc", "^3 tokens")
    said(chat, "/stats", r"prompt \d+ tokens")


# --- model and manner


def test_another_model_goes_on_with_the_same_talk(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    write_model(tmp_path / "other.gguf", reply="Rome")
    chat = started(terminal, speaking_model)
    said(chat, "Hi", re.escape(SAYS))
    said(chat, "/model ./nowhere.gguf", "There is no file")
    said(chat, "/model ./other.gguf", "goes on from here, with room for 4,096 tokens")
    said(chat, "And you?", "^Rome")
    chat.wait_for_prompt(5)
    path = journal().load_thread(1).path
    assert [message.text for message in path] == ["Hi", SAYS, "And you?", "Rome"]
    assert path[3].model.endswith("other.gguf")
    said(chat, f"/model {speaking_model}", "goes on from here.*goes on from here")
    said(chat, "Again", r"^> Again$.*" + re.escape(SAYS))


def test_what_was_asked_of_answers_holds_for_another_model_from_the_first_line_on(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    write_model(tmp_path / "other.gguf", reply="Rome")
    chat = started(terminal, speaking_model, "--temp", "0", "--seed", "7")
    said(chat, "/model ./other.gguf", "goes on from here")
    text = said(chat, "/set", "overflow +shift")
    assert re.search(r"temperature +0 ", text) and re.search(r"seed +7 ", text)
    said(chat, "And you?", "^Rome")
    said(chat, "/clear", "is forgotten")
    said(chat, "Again?", "^Rome.*^Rome")
    chat.wait_for_prompt(5)
    assert {chat.model for chat in journal().list_chats()} == {str(tmp_path / "other.gguf")}, "found from any folder"


def test_settings_are_shown_changed_and_refused(terminal: Open, speaking_model: Path) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "/set temperature 0.3", "temperature is 0.3 from now on")
    said(chat, "/set max-tokens 3", "max_tokens is 3 from now on")
    text = said(chat, "/set", "overflow +shift")
    assert re.search(r"temperature +0\.3 ", text)
    said(chat, "/set temperature 99", "temperature must lie between 0 and 10")
    said(chat, "/set max-tokens -5", "“-5” is nothing for max_tokens")
    said(chat, "/set temprature 1", "There is no setting temprature")
    said(chat, "/set seed x", "“x” is nothing for seed")
    said(chat, "Hi", r"^Par$.*token limit")


def test_every_setting_of_sampling_can_be_set() -> None:
    assert set(Sampling.__dataclass_fields__) - {"grammar", "begun"} <= set(SETTINGS)


def test_prompts_are_those_of_the_program_and_ones_own(
    terminal: Open, speaking_model: Path, environment: dict[str, str]
) -> None:
    own = Path(environment["QWENLOCAL_HOME"]) / "prompts" / "pirate.txt"
    own.parent.mkdir(parents=True)
    own.write_text("Talk like a pirate.")
    chat = started(terminal, speaking_model)
    said(chat, "/prompt", r"Prompts: .*programmer.*pirate")
    said(chat, "/prompt pirate", "told so from the next message on")
    said(chat, "/system", "Talk like a pirate.")
    said(chat, "/prompt captain", "There is no prompt captain")


# --- files


def test_a_file_goes_with_a_message_and_its_price_is_said(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    chat = started(terminal, speaking_model)
    text = said(chat, "What is in @notes.txt?", re.escape(SAYS))
    assert re.search(r"notes.txt: \d+ tokens = \d+% of what is left", text)
    question = journal().load_thread(1).path[0].text
    assert question == "notes.txt:\n```txt\nremember the milk\n```\n\nWhat is in @notes.txt?"
    said(chat, "/read nowhere.txt", "Cannot read nowhere.txt: No such file")
    (tmp_path / "pic.png").write_bytes(b"\x89PNG....")
    said(chat, "@pic.png?", "pic.png is a PNG image")
    said(chat, "/read notes.txt", r"^> @notes.txt")


@pytest.mark.parametrize(("letter", "kept"), [("h", "line 0 "), ("p", "needle"), ("w", "line 32 "), ("c", "")])
def test_a_file_that_is_too_long_is_cut_as_one_likes(
    letter: str, kept: str, terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    lines = [f"line {n} " + "x" * 30 for n in range(33)]
    lines[25] = "\nthe needle is here\n"
    (tmp_path / "long.txt").write_text("\n".join(lines))
    chat = started(terminal, speaking_model, "-c", "1024")
    said(chat, "Where is the needle? @long.txt", r"^h, p, w or c\?")
    if letter == "c":
        said(chat, letter, r"Nothing was sent; the line is below again.*^> Where is the needle")
        assert journal().list_chats() == []
        return
    said(chat, letter, re.escape(SAYS))
    question = journal().load_thread(1).path[0].text
    assert kept in question
    assert question.endswith("Where is the needle? @long.txt")
    assert (len(question) > 1_200) == (letter == "w")


def test_answers_and_their_code_are_copied_through_the_terminal(terminal: Open, tmp_path: Path) -> None:
    chat = started(terminal, write_model(tmp_path / "m.gguf", reply="copy me"))
    said(chat, "Hi", "copy me")
    said(chat, "/copy", "Copied, where the terminal allows it: 7 letters")
    assert b"\x1b]52;c;" + base64.b64encode(b"copy me") + b"\x07" in chat.raw
    said(chat, "/copy code", "There is no code in the last answer")


def test_a_chat_is_saved_loaded_exported_and_named(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "Hi", re.escape(SAYS))
    said(chat, "/save talk.json", "Saved:")
    said(chat, "/export talk.html", "Saved:.*Saved:")
    said(chat, "/export talk.doc", "ends in none of")
    said(chat, "/export nowhere/talk.md", r"nowhere\s+cannot\s+be\s+written:.*Choose\s+another\s+folder")
    said(chat, "/save " + "x" * 300, "No file can have this name")
    said(chat, "/title About Paris", "This chat is called “About Paris”")
    said(chat, "/clear", "is forgotten")
    said(chat, "/load talk.json", "Going on with 2 messages; the last: Hi")
    said(chat, "/load 1", "Going on with 2 messages.*Going on with 2 messages")
    said(chat, "More", r"^> More$.*" + re.escape(SAYS))
    chat.wait_for_prompt(9)
    assert "<h1>Hi</h1>" in (tmp_path / "talk.html").read_text()
    found = {chat.id: (chat.title, chat.messages) for chat in journal().list_chats()}
    assert found[1] == ("About Paris", 4)
    (tmp_path / "bad.json").write_text("[1, 2]")
    said(chat, "/load " + "9" * 40, "cannot be read")
    said(chat, "/load bad.json", "there are no messages in it")
    said(chat, "/load 99", "There is no chat 99")


# --- nothing is lost


def test_a_chat_that_was_killed_goes_on_where_it_was(
    terminal: Open, endless_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, endless_model, "-c", "60000")
    said(chat, "Remember this", r"(abcdefgh\s){20}")
    time.sleep(1.2)
    chat.read()
    shown = chat.text.count("abcdefgh")
    chat.kill()
    kept = journal().load_thread(1).path[1].text
    assert kept.count("abcdefgh") >= min(20, shown)
    again = terminal("run", "--continue", "-n", "9")
    again.wait_for("Going on with chat 1, “Remember this”: 2 messages")
    again.wait_for_prompt()
    said(again, "And?", r"^> And\?$.*abcdefgh")
    again.wait_for(r"token limit")
    assert [m.role for m in journal().load_thread(1).path] == ["user", "assistant", "user", "assistant"]


def test_a_window_that_is_closed_keeps_the_chat(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    said(chat, "Hi", re.escape(SAYS))
    chat.wait_for_prompt(2)
    chat.hang_up()
    assert [message.text for message in journal().load_thread(1).path] == ["Hi", SAYS]


def test_a_chat_is_picked_from_a_list(terminal: Open, speaking_model: Path) -> None:
    for question in ("About cats", "About dogs"):
        chat = started(terminal, speaking_model)
        said(chat, question, re.escape(SAYS))
        chat.type("\x04")
        chat.ended()
    chat = terminal("run", "--resume")
    chat.wait_for(r"1 .*About dogs.*2 .*About cats.*Which one\? \[1\]")
    chat.type("2\r")
    chat.wait_for("Going on with chat 1, “About cats”")
    direct = terminal("run", "--resume", "2")
    direct.wait_for("Going on with chat 2, “About dogs”")


def test_without_a_journal_nothing_is_kept(terminal: Open, speaking_model: Path, environment: dict[str, str]) -> None:
    chat = started(terminal, speaking_model, "--no-journal")
    said(chat, "Nobody may know. " + "Nobody. " * 20, re.escape(SAYS))
    chat.type("\x04")
    chat.ended()
    home = Path(environment["QWENLOCAL_HOME"])
    assert not [path for path in home.rglob("*") if path.is_file() and b"Nobody" in path.read_bytes()]
    assert not (home / "chats.db").exists()
    assert not (home / "states").exists()


def test_a_damaged_journal_is_said_left_alone_and_mended_on_request(
    terminal: Open, speaking_model: Path, environment: dict[str, str], qwenlocal: Run
) -> None:
    path = Path(environment["QWENLOCAL_HOME"]) / "chats.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage" * 1000)
    chat = started(terminal, speaking_model)
    text = chat.text.replace("\n", " ")
    assert "is damaged" in text and "This chat is not kept" in text
    said(chat, "Hi", re.escape(SAYS))
    chat.type("\x04")
    assert chat.ended() == 0
    assert path.read_bytes() == b"garbage" * 1000


def test_a_journal_of_a_newer_version_is_left_alone(
    terminal: Open, speaking_model: Path, environment: dict[str, str]
) -> None:
    path = Path(environment["QWENLOCAL_HOME"]) / "chats.db"
    path.parent.mkdir(parents=True)
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    chat = started(terminal, speaking_model)
    assert "newer version" in chat.text


# --- keys and terminals


def test_what_is_typed_during_an_answer_shows_below_it(terminal: Open, endless_model: Path) -> None:
    chat = started(terminal, endless_model, "-c", "60000", "--no-lookup")
    said(chat, "Go", "abcdefgh abcdefgh")
    chat.type("typed 你好")
    chat.wait_for(r"^> typed 你 ?好")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\].*^> typed 你 ?好")


def test_a_backslash_before_enter_makes_a_new_line(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = started(terminal, speaking_model)
    chat.type("one\\\rtwo\r")
    chat.wait_for(re.escape(SAYS))
    chat.wait_for_prompt(2)
    assert journal().load_thread(1).path[0].text == "one\ntwo"


def test_commands_settings_and_files_are_completed(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "chapter-one.txt").write_text("x")
    chat = started(terminal, speaking_model)
    chat.type("/vers\t")
    chat.wait_for(r"^> /versions")
    chat.type("\x15/set temp\t")
    chat.wait_for(r"^> /set temperature")
    chat.type("\x15look at @chap\t")
    chat.wait_for(r"^> look at @chapter-one.txt")


def test_a_paste_of_a_megabyte_is_folded(terminal: Open, speaking_model: Path) -> None:
    chat = started(terminal, speaking_model)
    chat.type("\x1b[200~" + ("x" * 79 + "\n") * 12_500 + "\x1b[201~")
    chat.wait_for(r"^> \[paste 1: 12,501 lines\]")
    chat.type("\r")
    chat.wait_for("tokens")
    chat.wait_for(r"does not fit|tokens of context|/clear starts afresh")


@pytest.mark.slow
def test_a_paste_of_ten_megabytes_is_refused_with_a_sentence_and_the_chat_goes_on(
    terminal: Open, speaking_model: Path
) -> None:
    chat = started(terminal, speaking_model)
    chat.paste(("x" * 79 + "\n") * 131_072)
    chat.wait_for(r"^> \[paste 1: 131,073 lines\]", 120)
    chat.type("\r")
    chat.wait_for(r"letters long; no model here reads\s+more than", 120)
    said(chat, "Hi", "Paris")


def test_a_window_that_changes_its_size_during_an_answer_shows_it_whole(terminal: Open, endless_model: Path) -> None:
    chat = started(terminal, endless_model, "-n", "400", "--no-lookup")
    said(chat, "Go", "abcdefgh abcdefgh")
    chat.resize(40, 24)
    chat.read(0.3)
    chat.resize(100, 30)
    chat.wait_for(r"\[token limit\]")
    chat.wait_for_prompt()


def test_a_terminal_of_twenty_columns_will_do(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model))
    chat.resize(20, 10)
    chat.wait_for_prompt()
    said(chat, "Hi", "Paris")
    chat.type("/help\r")
    chat.wait_for("//")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_typewriter_gets_plain_text(
    term: str, terminal: Open, speaking_model: Path, environment: dict[str, str]
) -> None:
    chat = terminal("run", str(speaking_model), "--no-markdown", term=term)
    chat.wait_for("^>")
    chat.read(0.3)
    said(chat, "Hi", re.escape(SAYS))
    assert b"\x1b[2m" not in chat.raw
    chat.type("\x04")
    assert chat.ended() == 0


def test_every_command_is_found_by_its_name_and_none_has_two() -> None:
    names = [command.name for command in COMMANDS]
    assert len(names) == len(set(names))
    assert all(find_command(name) for name in names)
    quit_, nothing = find_command("/quit"), find_command("/nothing")
    assert quit_ and quit_.name == "/exit" and nothing is None


# --- the commands outside


def test_what_a_damaged_journal_wrote_last_is_kept_beside_it(qwenlocal: Run, environment: dict[str, str]) -> None:
    home = Path(environment["QWENLOCAL_HOME"])
    home.mkdir(parents=True)
    code = (
        "import sys, os; from pathlib import Path; from qwenlocal.chat.journal import Journal\n"
        "from qwenlocal.chat.thread import Thread\n"
        "journal, thread = Journal(Path(sys.argv[1])), Thread()\n"
        "writer = journal.open_writer(thread, model='m'); thread.add('user', 'my words'); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(home / "chats.db")], check=True)
    log = home / "chats.db-wal"
    data = bytearray(log.read_bytes())
    assert b"my words" in data
    data[40] ^= 0xFF
    log.write_bytes(data)
    assert qwenlocal("chats", "recover").returncode == 0
    (kept,) = home.glob("chats.db.damaged-*-wal")
    assert kept.read_bytes() == data


def test_chats_are_listed_shown_searched_renamed_exported_and_forgotten(
    terminal: Open, speaking_model: Path, qwenlocal: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    assert "There are no chats yet" in qwenlocal("chats").stdout
    chat = started(terminal, speaking_model)
    said(chat, "什么是分词器？", re.escape(SAYS))
    chat.type("\x04")
    chat.ended()
    assert re.search(r"1 +\d{4}-\d\d-\d\d .*2 +什么是分词器", qwenlocal("chats", "list").stdout)
    assert json.loads(qwenlocal("chats", "list", "--json").stdout)[0]["messages"] == 2
    assert SAYS in qwenlocal("chats", "show", "1").stdout
    assert "…什么是分词器？…" in qwenlocal("chats", "search", "分词").stdout
    assert qwenlocal("chats", "rename", "1", "About", "tokens").returncode == 0
    assert qwenlocal("chats", "export", "last", "-o", "x.html").returncode == 0
    assert "About tokens" in (tmp_path / "x.html").read_text("utf-8")
    again = qwenlocal("chats", "export", "last", "-o", "x.html")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    states = Path(environment["QWENLOCAL_HOME"]) / "states"
    states.mkdir(exist_ok=True)
    assert qwenlocal("chats", "rm", "1", "1").returncode == 0
    assert not states.exists(), "they have the words in them"
    gone = qwenlocal("chats", "show", "1")
    assert (gone.returncode, "There is no chat 1" in gone.stderr) == (3, True)
    nothing = qwenlocal("run", "--continue")
    assert nothing.returncode in (2, 3)
