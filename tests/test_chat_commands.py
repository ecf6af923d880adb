"""Slash commands, the journal, attachments and keys, in a real pseudo-terminal."""

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
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SAYS, Run
from terminal import Open, start_chat

from qwenlocal.chat.chat_template import CHATML
from qwenlocal.chat.conversation import GenerationConfig
from qwenlocal.chat.journal import Journal
from qwenlocal.chat.thread import ASSISTANT, USER, Thread
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import UsageError
from qwenlocal.paths import Folders
from qwenlocal.terminal.commands.models import SETTINGS, change_setting
from qwenlocal.terminal.commands.table import COMMANDS, find_command
from qwenlocal.terminal.markdown import find_code_blocks
from qwenlocal.terminal.session import Session
from qwenlocal.testing import write_model


@pytest.fixture
def speaking_session() -> Session:
    """A chat with one question and its answer, without a model."""
    thread = Thread()
    for role, text in ((USER, "Hi"), (ASSISTANT, SAYS)):
        thread.add(role, text)
    nothing: Any = None
    return Session(thread, "m", nothing, lambda sentence: None, lambda question: "", [], Path())


# --- turns


def test_retry_keeps_versions_to_choose_from(terminal: Open, random_model: Path) -> None:
    chat = start_chat(terminal, random_model, "-n", "5", "--temp", "2", "--seed", "1")
    chat.enter("Hi", "token limit")
    chat.enter("/retry 2", r"token limit.*token limit.*token limit")
    text = chat.enter("/versions", r"\* 3 ")
    assert re.search(r"^  1 ", text, re.M) and re.search(r"^  2 ", text, re.M)
    chat.enter("/versions 1", "Version 1 of 3")
    chat.enter("/versions", r"^\* 1 ")
    chat.enter("/versions 7", "“7” is not a number from 1 to 3")


def test_questions_and_answers_can_be_edited(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("First", re.escape(SAYS))
    chat.wait_for_prompt(2)
    chat.enter("/undo", r"Took back “First”.*^> First$")
    chat.enter(" and more", re.escape(SAYS) + ".*" + re.escape(SAYS))
    chat.wait_for_prompt(4)
    thread = journal().load_thread(1)
    assert [message.text for message in thread.path] == ["First and more", SAYS]
    chat.enter("/branch", r"^  2 ")
    chat.enter("/branch 2", "Continuing after")
    chat.enter("/edit 1", r"Edit it below.*^> First$")
    chat.enter("!", r"^> First!$.*" + re.escape(SAYS))
    chat.enter("/answer", f"Edit it below.*Edit it below.*^> {SAYS}$")
    chat.enter(" indeed", "Answer changed")
    assert [message.text for message in journal().load_thread(1).path] == ["First!", f"{SAYS} indeed"]


def test_an_empty_line_cancels_an_edit(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    chat.wait_for_prompt(2)
    chat.enter("/edit", r"Edit it below.*^> Hi$")
    chat.enter("\x15", "Nothing was changed")
    chat.enter("/edit 5", "There is no turn 5; this chat has 1")


def test_ctrl_c_or_a_command_cancels_an_edit(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    chat.enter("/answer", r"Edit it below.*^> " + re.escape(SAYS) + "$")
    chat.type("\x03")
    chat.wait_for("Nothing was changed")
    chat.enter("And you?", r"^> And you\?$.*" + re.escape(SAYS))
    chat.enter("/edit 1", r"Edit it below.*^> Hi$")
    chat.enter("\x15/tokens abc", "^3 tokens")
    chat.enter("More", r"^> More$.*" + re.escape(SAYS))
    chat.wait_for_prompt(6)
    assert [message.text for message in journal().load_thread(1).path] == ["Hi", SAYS, "And you?", SAYS, "More", SAYS]


def test_continue_resumes_a_cut_answer(terminal: Open, endless_model: Path, journal: Callable[[], Journal]) -> None:
    chat = start_chat(terminal, endless_model, "-n", "12")
    chat.enter("Go", r"\[token limit\] Type /continue for more")
    chat.enter("/continue", r"token limit.*token limit")
    assert journal().load_thread(1).path[1].text == ("abcdefgh " * 3)[:24]


def test_one_ctrl_c_stops_all_retries(terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "--no-lookup", "-n", "20000")
    chat.enter("Go", "abcdefgh abcdefgh")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\]")
    chat.wait_for_prompt(2)
    chat.enter("/retry 3", r"/retry 3.*abcdefgh abcdefgh")
    chat.type("\x03")
    chat.wait_for_prompt(3)
    chat.enter("/versions", r"^\* 2 .*^>$")
    assert not re.search(r"^[* ] 3 ", chat.text, re.M)


def test_fork_starts_a_new_chat_with_the_first_turns(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    for number in range(1, 3):
        chat.enter(f"Question {number}", rf"Question {number}.*" + re.escape(SAYS))
    chat.enter("/fork 1", "Started a new chat with 2 messages. It is chat 2")
    chat.enter("Other", r"^> Other$.*" + re.escape(SAYS))
    chat.wait_for_prompt(5)
    assert [m.text for m in journal().load_thread(2).path] == ["Question 1", SAYS, "Other", SAYS]
    assert [m.text for m in journal().load_thread(1).path] == ["Question 1", SAYS, "Question 2", SAYS]


# --- context


_CTX_PATTERNS = (r"\] (\d+) of 4,096 tokens", r"(\d+) tokens +system prompt", r"(\d+) tokens +pinned +First")


def test_the_context_is_shown_and_turns_can_be_pinned_and_dropped(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("First", re.escape(SAYS))
    chat.enter("Second", r"^> Second$.*" + re.escape(SAYS))
    chat.enter("/pin 1", "Pinned “First”: it stays in the context")
    chat.enter("/drop 2", "Dropped “Second”: the model no longer sees it")
    text = chat.enter("/ctx", r"dropped +Second")
    assert re.search(r"\[[#.]{40}\] [\d,]+ of 4,096 tokens", text)
    assert re.search(r"^ +1 +\d+ tokens +pinned +First", text, re.M)
    used, system, first = (int(re.search(what, text, re.M)[1]) for what in _CTX_PATTERNS)  # type: ignore[index]
    assert used == system + first, "dropped turns do not count"
    chat.enter("/tokens abc", "^3 tokens")
    chat.enter("/stats", r"prompt \d+ tokens")


@pytest.mark.parametrize("command", ["/ctx", "/tokens"])
def test_the_context_is_counted_in_the_same_way_everywhere(command: str, terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "512", "--overflow", "stop")
    chat.enter("Go", r"\[context full\]")
    chat.wait_for(r"^endless.gguf \| 512 of 512 tokens")
    chat.enter(command, r"512 of 512 tokens( \(100%\)|\.)$")


def test_commands_that_only_read_answer_during_an_answer(terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000", "--no-lookup")
    chat.enter("Go", "abcdefgh abcdefgh")
    chat.enter("queued", r"^> queued$")
    chat.enter("/ctx", r"^> /ctx\n\[[#.]{40}\] [\d,]+ of 60,160 tokens.*system prompt.*abcdefgh")
    chat.enter("/tokens abc", r"^> /tokens abc\n3 tokens$")
    chat.enter("/stats", r"^> /stats\nStatistics on.$")
    chat.enter("/help exit", r"^> /help exit\n/exit ")
    chat.enter("/help", r"^> /help\nTurns:")
    chat.wait_for("^> queued$")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\].*first token after")
    assert chat.text.count("/help exit") == 1


def test_a_long_system_prompt_is_noticed_at_the_start_and_when_it_is_set(
    terminal: Open, speaking_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "long prompt.txt").write_text("You are kind. " * 100)
    chat = terminal("run", str(speaking_model), "-c", "1024", "-i", "-f", "long prompt.txt")
    text = chat.wait_for(r"The system prompt has 1,\d\d\d tokens.*start\s+again\s+with\s+a\s+longer\s+context: -c 3072")
    assert text.count("The system prompt has") == 1
    chat.enter("/system Be brief.", "System prompt set")
    chat.enter('/system @"long prompt.txt"', r"The system prompt has.*The system prompt has")
    chat.enter("/system @short.txt", "There is no file short.txt")
    chat.enter("/system", "You are kind. You are kind.")


def test_a_template_without_system_messages_survives_a_summary(
    terminal: Open, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    write_model(tmp_path / "m.gguf", reply="Rome", template=template)
    chat = start_chat(terminal, tmp_path / "m.gguf", "-c", "1024", "--overflow", "summarize", "--system", "Be kind.")
    for number in range(1, 19):
        chat.enter(f"Question {number} of many, please?", rf"^> Question {number} .*^Rome")
        chat.wait_for_prompt(number + 1)
    assert "removed from the context. Summary: Rome" in " ".join(chat.text.split())
    assert [m.text for m in journal().load_thread(1).path][1::2] == ["Rome"] * 18


# --- model and settings


def test_another_model_continues_the_same_chat(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    write_model(tmp_path / "other.gguf", reply="Rome")
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    chat.enter("/model", r"Current model: \S+\.gguf\. There are no others\.")
    chat.enter("/model ./nowhere.gguf", "There is no file")
    chat.enter("/model ./other.gguf", "Switched to other.gguf with a context of 4,096 tokens")
    chat.enter("And you?", "^Rome")
    chat.wait_for_prompt(5)
    path = journal().load_thread(1).path
    assert [message.text for message in path] == ["Hi", SAYS, "And you?", "Rome"]
    assert path[3].model.endswith("other.gguf")
    chat.enter(f"/model {speaking_model}", "Switched to.*Switched to")
    chat.enter("Again", r"^> Again$.*" + re.escape(SAYS))


def test_a_space_at_the_end_of_a_file_name_is_kept_and_one_typed_by_mistake_is_not(
    terminal: Open, speaking_model: Path, tmp_path: Path
) -> None:
    for name, reply in (("other.gguf", "Rome"), ("spaced.gguf ", "Bern")):
        write_model(tmp_path / name, reply=reply)
    (tmp_path / "notes ").write_text("Some notes")
    chat = start_chat(terminal, speaking_model)
    chat.enter("/model ./spaced.gguf ", "Switched to spaced.gguf")
    chat.enter("Hi", "^Bern")
    chat.enter("/model ./other.gguf ", "Switched to other.gguf")
    chat.enter("Hi", "^Rome")
    chat.enter("/read ./notes ", "It is sent with the next message")


def test_models_are_named_with_spaces_and_completed_in_the_folder_of_the_current_one(
    terminal: Open, tmp_path: Path
) -> None:
    first = write_model(tmp_path / "models" / "first.gguf", reply="Bern")
    write_model(tmp_path / "models" / "my other.gguf", reply="Rome")
    (tmp_path / "models" / "broken.gguf").write_bytes(b"GGUF")
    chat = start_chat(terminal, first)
    chat.type("/model my\t")
    chat.wait_for(r"^> /model ./models/my other.gguf")
    chat.type("\r")
    chat.wait_for("Switched to my other.gguf")
    chat.enter('/model "models/first.gguf"', "Switched to first.gguf")
    text = chat.enter("/model ./models/broken.gguf", r"Copy or download\s+the file again")
    assert "verify" not in text


def test_a_rounded_context_is_reported(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model, "-c", "300")
    chat.enter("/tokens", r"\(512 tokens, f16\).*The context has 512 tokens instead of 300")


def test_options_apply_to_another_model_too(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    write_model(tmp_path / "other.gguf", reply="Rome")
    chat = start_chat(terminal, speaking_model, "--temp", "0", "--seed", "7")
    chat.enter("/model ./other.gguf", "Switched to")
    text = chat.enter("/set", "overflow +shift")
    assert re.search(r"temperature +0 ", text) and re.search(r"seed +7 ", text)
    chat.enter("And you?", "^Rome")
    chat.enter("/clear", "Started a new chat")
    chat.enter("Again?", "^Rome.*^Rome")
    chat.wait_for_prompt(5)
    assert {chat.model for chat in journal().list_chats()} == {str(tmp_path / "other.gguf")}, "found from any folder"


def test_settings_are_shown_changed_and_validated(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("/set temperature 0.3", "temperature is now 0.3")
    chat.enter("/set max-tokens 3", "max_tokens is now 3")
    chat.enter("/set temp 0.2", "temperature is now 0.2")
    chat.enter("/set --temp 0.3", "temperature is now 0.3.*temperature is now 0.3")
    chat.enter("/set n 3", "max_tokens is now 3.*max_tokens is now 3")
    text = chat.enter("/set", "overflow +shift")
    assert re.search(r"temperature +0\.3 ", text)
    chat.enter("/set temperature 99", "temperature must be between 0 and 10")
    chat.enter("/set overflow summarise", "overflow is now summarise")
    chat.enter("/set overflow drop", "overflow must be shift, summarize or stop, not drop")
    chat.enter("/set max-tokens -5", "“-5” is not a valid max_tokens")
    chat.enter("/set temprature 1", "No setting is called “temprature”")
    chat.enter("/set seed x", "“x” is not a valid seed")
    chat.enter("/set top_k 1,000", "top_k is now 1,000")
    chat.enter("/set temp 0,3", "temperature is now 0,3")
    chat.enter("Hi", r"^Par$.*token limit")


@pytest.mark.parametrize("setting", ["top_k 1,2", "max_tokens 1,0000", "seed 1_2", "temperature 0_5", "top_p 0,9,5"])
def test_a_number_with_misplaced_separators_is_refused(setting: str, speaking_session: Session) -> None:
    name, value = setting.split()
    session = speaking_session
    session.conversation = SimpleNamespace(config=GenerationConfig(), window=object())  # type: ignore[assignment]
    with pytest.raises(UsageError, match=f"“{value}” is not a valid {name}"):
        change_setting(session, setting)
    assert session.conversation.config == GenerationConfig()


def test_every_sampling_parameter_is_a_setting() -> None:
    for_programs = {"grammar", "answer_prefix", "logit_bias", "ignore_eos"}
    assert set(Sampling.__dataclass_fields__) - for_programs <= set(SETTINGS)


def test_prompts_are_the_bundled_ones_and_the_users(terminal: Open, speaking_model: Path, folders: Folders) -> None:
    own = folders.home / "prompts" / "pirate.txt"
    own.parent.mkdir(parents=True)
    own.write_text("Talk like a pirate.")
    chat = start_chat(terminal, speaking_model)
    chat.enter("/prompt", r"Prompts: .*programmer.*pirate")
    chat.enter("/prompt pirate", "System prompt set: pirate")
    chat.enter("/system", "Talk like a pirate.")
    chat.enter("/prompt captain", "No prompt is called “captain”")


# --- files


def test_a_mentioned_file_is_attached_and_its_cost_shown(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    chat = start_chat(terminal, speaking_model)
    text = chat.enter("What is in @notes.txt?", re.escape(SAYS))
    assert re.search(r"notes.txt: \d+ tokens, \d+% of the free\s+context", text)
    question = journal().load_thread(1).path[0].text
    assert question == "notes.txt:\n```txt\nremember the milk\n```\n\nWhat is in @notes.txt?"
    chat.enter("/read nowhere.txt", "There is no file nowhere.txt")
    (tmp_path / "pic.png").write_bytes(b"\x89PNG....")
    chat.enter("@pic.png?", "pic.png is a PNG image")
    chat.enter("\x15/read notes.txt", r"^> @notes.txt")


def test_files_with_spaces_are_read_saved_loaded_and_exported(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    (tmp_path / "my notes.txt").write_text("milk\n")
    chat = start_chat(terminal, speaking_model)
    chat.enter("@my\t", r'^> @"my notes.txt"$.*' + re.escape(SAYS))
    chat.wait_for_prompt(2)
    assert journal().load_thread(1).path[0].text == 'my notes.txt:\n```txt\nmilk\n```\n\n@"my notes.txt"'
    (tmp_path / "some folder").mkdir()
    (tmp_path / "some folder" / "a.txt").write_text("eggs\n")
    chat.type("@some\t")
    chat.wait_for(r'^> @"some folder/$')
    chat.type("\t")
    chat.wait_for(r'^> @"some folder/a.txt"$')
    chat.enter("\x15see @your notes.txt", "There is no file your notes.txt; sending the name as text")
    chat.enter('/read "my notes.txt"', r'^> @"my notes.txt"')
    chat.enter("\x15/save 'my talk.json'", r"Saved:\s.*my\s+talk.json")
    chat.enter('/export "my talk.html"', r"Saved:\s.*my\s+talk.html")
    chat.enter("/load my\\ talk.json", "Loaded 4 messages")
    assert {path.name for path in tmp_path.glob("my *")} == {"my notes.txt", "my talk.json", "my talk.html"}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Look:\n```python\nx = 1\n```\nand\n```\ny = 2\n```\n", ["x = 1\n", "y = 2\n"]),
        ("```python\nx = 1\ny =", ["x = 1\ny ="]),
        ("1. In a list:\n\n   ```sh\n   ls\n   ```\n", ["ls\n"]),
        ("Indented:\n\n    ls -l\n\nend", ["ls -l\n"]),
        ("~~~~\n```\n~~~~", ["```\n"]),
        ("`x` is no block", []),
    ],
)
def test_blocks_of_code_are_found_even_if_the_answer_was_cut(answer: str, code: list[str]) -> None:
    assert find_code_blocks(answer) == code


@pytest.mark.parametrize(("letter", "kept"), [("h", "line 0 "), ("p", "needle"), ("w", "line 32 "), ("c", "")])
def test_the_user_chooses_how_to_cut_a_long_file(
    letter: str, kept: str, terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    lines = [f"line {n} " + "x" * 30 for n in range(33)]
    lines[25] = "\nthe needle is here\n"
    (tmp_path / "long.txt").write_text("\n".join(lines))
    chat = start_chat(terminal, speaking_model, "-c", "1024")
    chat.enter("Where is the needle? @long.txt", r"^h, p, w or c\?")
    if letter == "c":
        chat.enter(letter, r"Nothing was sent. Your message is below.*^> Where is the needle")
        assert journal().list_chats() == []
        return
    text = chat.enter(letter, re.escape(SAYS))
    if letter in ("h", "p"):
        assert re.search(r"long.txt: sending \d\d+ tokens, \d\d.\d% of the\s+text", text)
    question = journal().load_thread(1).path[0].text
    assert kept in question
    assert question.endswith("Where is the needle? @long.txt")
    assert (len(question) > 1_200) == (letter == "w")


def test_answers_are_copied_through_the_terminal(terminal: Open, tmp_path: Path) -> None:
    chat = start_chat(terminal, write_model(tmp_path / "m.gguf", reply="copy me"))
    chat.enter("Hi", "copy me")
    chat.enter("/copy", "Copied 7 characters, if the terminal allows it")
    assert b"\x1b]52;c;" + base64.b64encode(b"copy me") + b"\x07" in chat.raw
    chat.enter("/copy code", "There is no code block in the last answer")


def test_a_chat_is_saved_loaded_exported_and_renamed(
    terminal: Open, speaking_model: Path, tmp_path: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    chat.enter("/save talk.json", "Saved:")
    chat.enter("/export talk.html", "Saved:.*Saved:")
    chat.enter("/export talk.doc", "Cannot export to talk.doc: use one of")
    chat.enter("/export nowhere/talk.md", r"Cannot\s+write\s+to.*nowher\s*e\s*:.*Choose\s+another\s+folder")
    chat.enter("/save " + "x" * 300, "Invalid file name")
    chat.enter("/title About Paris", "Renamed chat 1 to “About Paris”")
    chat.enter("/clear", "Started a new chat")
    chat.enter("/load talk.json", "Loaded 2 messages. Last question: Hi")
    chat.enter("/load 1", "Loaded 2 messages.*Loaded 2 messages")
    chat.enter("More", r"^> More$.*" + re.escape(SAYS))
    chat.wait_for_prompt(9)
    assert "<h1>Hi</h1>" in (tmp_path / "talk.html").read_text()
    found = {chat.id: (chat.title, chat.messages) for chat in journal().list_chats()}
    assert found[1] == ("About Paris", 4)
    (tmp_path / "bad.json").write_text("[1, 2]")
    chat.enter("/load " + "9" * 40, "There is no file 9")
    chat.enter("/load bad.json", "it has no list of messages")
    chat.enter("/load 99", "There is no chat 99")


# --- the journal


def test_a_killed_chat_can_be_continued(terminal: Open, endless_model: Path, journal: Callable[[], Journal]) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000")
    chat.enter("Remember this", r"(abcdefgh\s){20}")
    time.sleep(1.2)
    chat.read()
    shown = chat.text.count("abcdefgh")
    chat.kill()
    kept = journal().load_thread(1).path[1].text
    assert kept.count("abcdefgh") >= min(20, shown)
    again = terminal("run", "--continue", "-n", "9")
    again.wait_for("Continuing chat 1, “Remember this”: 2 messages")
    again.wait_for_prompt()
    again.enter("And?", r"^> And\?$.*abcdefgh")
    again.wait_for(r"token limit")
    assert [m.role for m in journal().load_thread(1).path] == ["user", "assistant", "user", "assistant"]


def test_closing_the_window_keeps_the_chat(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    chat.wait_for_prompt(2)
    chat.hang_up()
    assert [message.text for message in journal().load_thread(1).path] == ["Hi", SAYS]


def test_resume_picks_a_chat_from_a_list(terminal: Open, speaking_model: Path) -> None:
    for question in ("About cats", "About dogs"):
        chat = start_chat(terminal, speaking_model)
        chat.enter(question, re.escape(SAYS))
        chat.exit()
    chat = terminal("run", "--resume")
    chat.wait_for(r"2 .*About dogs.*\(2 messages, \S+\.gguf\).*1 .*About cats.*Which one\? \[2\]")
    chat.enter("3", r"Enter one of these numbers.*Which one\? \[2\]")
    chat.enter("1", "Continuing chat 1, “About cats”")
    direct = terminal("run", "--resume", "2")
    direct.wait_for("Continuing chat 2, “About dogs”")


def test_no_journal_keeps_nothing(terminal: Open, speaking_model: Path, folders: Folders) -> None:
    chat = start_chat(terminal, speaking_model, "--no-journal")
    chat.enter("Nobody may know. " + "Nobody. " * 20, re.escape(SAYS))
    chat.exit()
    home = folders.home
    assert not [path for path in home.rglob("*") if path.is_file() and b"Nobody" in path.read_bytes()]
    assert not (home / "chats.db").exists()
    assert not (home / "states").exists()


def test_a_damaged_journal_is_reported_and_left_alone(terminal: Open, speaking_model: Path, folders: Folders) -> None:
    path = folders.journal
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage" * 1000)
    chat = start_chat(terminal, speaking_model)
    text = chat.text.replace("\n", " ")
    assert "is damaged" in text and "This chat is not saved" in text
    chat.enter("Hi", re.escape(SAYS))
    assert chat.exit() == 0
    assert path.read_bytes() == b"garbage" * 1000


def test_a_journal_of_a_newer_version_is_left_alone(terminal: Open, speaking_model: Path, folders: Folders) -> None:
    path = folders.journal
    path.parent.mkdir(parents=True)
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    chat = start_chat(terminal, speaking_model)
    assert "newer version" in chat.text


# --- keys and terminals


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("exit 0", r"^> draft$"),
        ("echo changed > $1; exit 3", r"exit code 3\.\n> draft$"),
        ("printf 'caf\\351' > $1", r"is not\s+UTF-8\s+text.*^> draft$"),
        ("echo changed > $1", r"^> changed$.*" + re.escape(SAYS)),
    ],
)
def test_a_message_is_sent_after_the_editor_has_changed_it(
    script: str, answer: str, terminal: Open, speaking_model: Path, tmp_path: Path
) -> None:
    editor = tmp_path / "editor"
    editor.write_text(f"#!/bin/sh\n{script}\n")
    editor.chmod(0o755)
    chat = start_chat(terminal, str(speaking_model), EDITOR=str(editor))
    chat.type("draft\x18\x05")
    chat.wait_for(answer)
    chat.read(0.3)
    assert (SAYS in chat.text) == ("changed" in answer) and "exception" not in chat.text


def test_a_chat_that_can_be_continued_says_how(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))
    assert chat.exit() == 0
    assert chat.text.endswith("To continue this chat: qwenlocal run --continue")
    for options in ((), ("--no-journal",)):
        empty = start_chat(terminal, speaking_model, *options)
        assert empty.exit() == 0
        assert "To continue" not in empty.text


def test_type_ahead_is_shown_below_the_answer(terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000", "--no-lookup")
    chat.enter("Go", "abcdefgh abcdefgh")
    chat.type("typed 你好")
    chat.wait_for(r"^> typed 你 ?好")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\].*^> typed 你 ?好")


def test_a_backslash_before_enter_inserts_a_line_break(
    terminal: Open, speaking_model: Path, journal: Callable[[], Journal]
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("one\\\rtwo", re.escape(SAYS))
    chat.wait_for_prompt(2)
    assert journal().load_thread(1).path[0].text == "one\ntwo"


def test_commands_settings_and_files_are_completed(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "chapter-one.txt").write_text("x")
    chat = start_chat(terminal, speaking_model)
    chat.type("/vers\t")
    chat.wait_for(r"^> /versions")
    chat.type("\x15/set temp\t")
    chat.wait_for(r"^> /set temperature")
    chat.type("\x15look at @chap\t")
    chat.wait_for(r"^> look at @chapter-one.txt")


def test_a_paste_of_a_megabyte_is_folded(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.type("\x1b[200~" + ("x" * 79 + "\n") * 12_500 + "\x1b[201~")
    chat.wait_for(r"^> \[paste 1: 12,500 lines\]")
    chat.type("\r")
    chat.wait_for(r"paste 1: 1,000,\d\d\d tokens.*Too long for the context")


@pytest.mark.slow
def test_a_paste_of_ten_megabytes_is_refused_and_the_chat_continues(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.paste(("x" * 79 + "\n") * 131_072)
    chat.wait_for(r"^> \[paste 1: 131,072 lines\]", 120)
    chat.type("\r")
    chat.wait_for(r"more than any context holds.*^h, p, w or c\?", 120)
    chat.enter("c", "Nothing was sent")
    chat.enter("\x15Hi", "Paris")


def test_resizing_the_window_during_an_answer_loses_nothing(terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "-n", "400", "--no-lookup")
    chat.enter("Go", "abcdefgh abcdefgh")
    chat.resize(40, 24)
    chat.read(0.3)
    chat.resize(100, 30)
    chat.wait_for(r"\[token limit\]")
    chat.wait_for_prompt()


def test_twenty_columns_are_enough(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model))
    chat.resize(20, 10)
    chat.wait_for_prompt()
    chat.enter("Hi", "Paris")
    text = chat.enter("/help", r"//.*^>$")
    words = {word for command in COMMANDS for word in f"{command.usage} {command.help}".split()}
    shown = text[text.index("/undo") : text.index("Keys:")].split()
    assert words <= set(shown), "no word is broken"
    chat.enter("/ctx", r"tokens\n\(\d+%\)")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_text(term: str, terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model), "--no-markdown", term=term)
    chat.wait_for("^>")
    chat.read(0.3)
    chat.enter("Hi", re.escape(SAYS))
    assert b"\x1b[2m" not in chat.raw
    assert chat.exit() == 0


def test_command_names_are_unique() -> None:
    names = [command.name for command in COMMANDS]
    assert len(names) == len(set(names))
    assert all(find_command(name) for name in names)
    quit_, nothing = find_command("/quit"), find_command("/nothing")
    assert quit_ and quit_.name == "/exit" and nothing is None
    assert find_command("/Undo") is find_command("/undo")


@pytest.mark.parametrize("word", ["3 4", "x", "--1", "#", "-", "0", "9" * 5000])
@pytest.mark.parametrize("name", [command.name for command in COMMANDS if re.search(r"\[(N|TURN)\]", command.usage)])
def test_numbers_that_make_no_sense_are_errors(name: str, word: str, speaking_session: Session) -> None:
    command = find_command(name)
    assert command is not None
    with pytest.raises(UsageError, match=r"turn|number"):
        command.handler(speaking_session, word)


@pytest.mark.parametrize("name", ["/clear", "/continue", "/ctx", "/exit", "/markdown", "/stats", "/undo"])
def test_commands_without_parameters_are_known(name: str) -> None:
    command = find_command(name)
    assert command is not None and not command.takes_argument


def test_mistyped_commands_get_one_sentence(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("/stats now", "/stats takes no argument.$")
    chat.enter("/exit 1", "/exit takes no argument.$")
    chat.enter("/undo 3", "/undo takes no argument.$")
    chat.enter("/undo\x0a3", "/undo takes no argument.$.*/undo takes no argument.$")
    chat.enter("/help nosuch", "There is no command /nosuch.$")
    chat.enter("/help udno", r"There is no command /udno. Did you mean /undo\?$")
    chat.enter("/HELP Exit", r"^/exit  Exit.*\nAliases: /quit, /bye, /q$")


# --- qwenlocal chats


def test_recover_keeps_the_write_ahead_log_of_a_damaged_journal(qwenlocal: Run, folders: Folders) -> None:
    home = folders.home
    home.mkdir(parents=True)
    code = (
        "import sys, os; from pathlib import Path; from qwenlocal.chat.journal import Journal\n"
        "from qwenlocal.chat.journal_writer import JournalWriter; from qwenlocal.chat.thread import Thread\n"
        "journal, thread = Journal(Path(sys.argv[1])), Thread()\n"
        "writer = JournalWriter(journal, thread, 'm'); thread.add('user', 'my words'); os._exit(0)\n"
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


def test_chats_are_listed_shown_searched_renamed_exported_and_deleted(
    terminal: Open, speaking_model: Path, qwenlocal: Run, tmp_path: Path, folders: Folders
) -> None:
    assert "There are no chats yet" in qwenlocal("chats").stdout
    assert "There are no chats yet.\n  To start one: qwenlocal run" in qwenlocal("chats", "show", "last").stderr
    chat = start_chat(terminal, speaking_model)
    chat.enter("什么是分词器？", re.escape(SAYS))
    chat.exit()
    listed = qwenlocal("chats", "list").stdout
    assert re.search(r"1 +\d{4}-\d\d-\d\d .*2 +什么是分词器", listed)
    assert speaking_model.name in listed and str(speaking_model) not in listed
    assert json.loads(qwenlocal("chats", "list", "--json").stdout)[0]["messages"] == 2
    shown = qwenlocal("chats", "show", "1").stdout
    assert SAYS in shown and f"## {speaking_model.name}, " in shown
    assert qwenlocal("chats", "search", "分词").stdout.endswith("user: 什么是分词器？\n")
    assert qwenlocal("chats", "rename", "1", "About", "tokens").stderr == "Renamed chat 1 to “About tokens”.\n"
    assert qwenlocal("chats", "export", "last", "-o", "x.html").returncode == 0
    assert "About tokens" in (tmp_path / "x.html").read_text("utf-8")
    again = qwenlocal("chats", "export", "last", "-o", "x.html")
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    states = folders.home / "states"
    states.mkdir(exist_ok=True)
    assert qwenlocal("chats", "rm", "1", "1").returncode == 0
    assert not states.exists(), "they have the words in them"
    gone = qwenlocal("chats", "show", "1")
    assert (gone.returncode, "There is no chat 1" in gone.stderr) == (3, True)
    nothing = qwenlocal("run", "--continue")
    assert (nothing.returncode, "need a terminal" in nothing.stderr) == (2, True)
