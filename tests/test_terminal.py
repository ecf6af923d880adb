"""The chat in a real pseudo-terminal, and its screen read back."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import SAYS
from hub import HubServer, pace
from terminal import Open, Terminal, save_messages, start_chat

from qwenlocal.paths import Folders
from qwenlocal.testing import write_model


def test_a_chat_answers_twice_and_exits_on_ctrl_d(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model))
    assert "/help for commands, Ctrl-D to exit" in chat.wait_for_prompt()
    chat.type("What is the capital of France?\r")
    assert SAYS in chat.wait_for_prompt(2)
    chat.type("And again?\r")
    assert chat.wait_for_prompt(3).count(SAYS) == 2
    assert chat.exit() == 0


def test_help_lists_the_commands(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.type("/help\r")
    text = chat.wait_for(r"Ctrl-C +Stop an answer")
    for command in ("/help", "/clear", "/system [TEXT]", "/save [FILE]", "/exit"):
        assert command in text


def test_unknown_commands_suggest_similar_ones_and_two_slashes_send_one(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.type("/hlep\r")
    assert "Did you mean /help?" in chat.wait_for("Did you mean")
    chat.enter("//help is a word", re.escape(SAYS))
    chat.enter("/save talk.json", "Saved:")
    chat.type("/exit\r")
    assert chat.wait_for_exit() == 0


def test_save_writes_the_chat_with_its_system_prompt(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, speaking_model, "--system", "Be kind.")
    chat.enter("forgotten", re.escape(SAYS))
    chat.enter("/clear", "Started a new chat")
    chat.enter("/system Be brief.", "System prompt set")
    chat.enter("Hi", re.escape(SAYS) + ".*" + re.escape(SAYS))
    saved = save_messages(chat, tmp_path)
    assert [message["content"] for message in saved] == ["Be brief.", "Hi", SAYS]


def test_ctrl_c_stops_an_answer_and_keeps_its_text(terminal: Open, endless_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000")
    chat.enter("Go on", "abcdefgh abcdefgh")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\]")
    said = save_messages(chat, tmp_path)[-1]
    assert said["role"] == "assistant"
    assert said["content"].startswith("abcdefgh abcdefgh")
    assert chat.exit() == 0


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash for job control")
def test_ctrl_z_suspends_an_answer_and_fg_resumes_it(
    endless_model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    shell = Terminal(
        ["bash", "--norc", "--noprofile", "-i"], {**environment, "TERM": "xterm-256color", "PS1": "sh: "}, tmp_path
    )
    try:
        shell.wait_for("^sh:$")
        shell.type(f"{sys.executable} -m qwenlocal run {endless_model} -n 700 --no-lookup\r")
        shell.wait_for_prompt()
        shell.enter("Go", "abcdefgh abcdefgh")
        shell.type("\x1a")
        shell.wait_for(r"Stopped.*^sh:$")
        shell.type("echo still; stty -a | grep -c -- -echo\r")  # the terminal mode is restored
        shell.wait_for(r"^still$.*^sh:$")
        shell.enter("fg", r"\[token limit\]")
        shell.wait_for_prompt()
        shell.type("\x04")
        shell.wait_for(r"^sh:$")
    finally:
        shell.close()


def test_a_line_typed_during_an_answer_is_the_next_message(terminal: Open, endless_model: Path, tmp_path: Path) -> None:
    """It does not appear inside the answer."""
    chat = start_chat(terminal, endless_model, "-n", "300")
    chat.enter("Go", "abcdefgh abcdefgh")
    chat.enter("typed ahead", r"^> typed ahead$")
    chat.wait_for(r"^> typed ahead$.*abcdefgh.*token limit")
    messages = save_messages(chat, tmp_path)
    assert [message["content"] for message in messages if message["role"] == "user"] == ["Go", "typed ahead"]
    assert "typed" not in messages[1]["content"]
    assert chat.text.count("typed ahead") == 1


def test_save_does_not_overwrite_other_files(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("precious")
    chat = start_chat(terminal, speaking_model)
    chat.enter("/save mine.json", r"already\s+exists. Choose another name")
    assert (tmp_path / "mine.json").read_text() == "precious"
    chat.enter("/save /nonexistent/x.json", "Cannot write to /nonexistent: No such file or directory")


def test_ctrl_c_during_prefill_keeps_the_question(terminal: Open, endless_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "90000")
    chat.type("\x1b[200~" + "long " * 16_000 + "\x1b[201~")
    chat.read(2)
    chat.type("\r")
    chat.wait_for("reading prompt: [0-9,]+ of [0-9,]+ tokens")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\]")
    (message,) = save_messages(chat, tmp_path)
    assert message["role"] == "user"
    assert message["content"].startswith("long long")


def test_two_ctrl_c_on_an_empty_line_exit(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.type("\x03")
    chat.wait_for(re.escape("(Press Ctrl-C again or Ctrl-D to exit.)"))
    chat.type("\x03")
    assert chat.wait_for_exit() == 0


def test_ctrl_c_clears_a_line_and_the_up_arrow_recalls_it(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.type("half a thought")
    chat.wait_for("half a thought")
    chat.type("\x03\x03")
    chat.wait_for(re.escape("(Press Ctrl-C again or Ctrl-D to exit.)"))
    chat.wait_for_prompt(2)
    chat.type("\x1b[A")
    chat.wait_for("^> half a thought")
    chat.type("\x03\x04")
    assert chat.wait_for_exit() == 0


def test_a_paste_of_several_lines_is_one_message(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("\x1b[200~first line\nsecond line\n你好\x1b[201~", re.escape(SAYS))
    messages = save_messages(chat, tmp_path)
    assert messages[0]["content"] == "first line\nsecond line\n你好"


def test_alt_enter_inserts_a_line_break_and_arrows_move_the_cursor(
    terminal: Open, speaking_model: Path, tmp_path: Path
) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("onX\x1b[D\x1b[3~e\x1b\rtwo", re.escape(SAYS))
    assert save_messages(chat, tmp_path)[0]["content"] == "one\ntwo"


def test_the_history_of_an_earlier_chat_is_recalled(terminal: Open, speaking_model: Path) -> None:
    first = start_chat(terminal, speaking_model)
    first.enter("remember me", re.escape(SAYS))
    first.exit()
    second = start_chat(terminal, speaking_model)
    second.type("\x1b[A")
    second.wait_for("^> remember me")


def test_a_corrupt_history_file_does_not_stop_a_chat(terminal: Open, speaking_model: Path, folders: Folders) -> None:
    history = folders.home / "history"
    history.parent.mkdir(parents=True)
    history.write_bytes(b"\xff\x00\x01garbage\n+\xfe\n")
    chat = start_chat(terminal, speaking_model)
    chat.enter("Hi", re.escape(SAYS))


def test_the_announced_command_line_opens_a_chat(terminal: Open, speaking_model: Path) -> None:
    """./main -m qwen1.5-7b-chat-q2_k.gguf -n 512 --color -i -cml -f prompts/chat-with-qwen.txt"""
    arguments = ("-n", "512", "--color", "-i", "-cml", "-f", "prompts/chat-with-qwen.txt")
    chat = start_chat(terminal, "-m", speaking_model, *arguments)
    chat.enter("/system", re.escape("You are a helpful assistant."))


def test_escape_sequences_of_a_model_never_reach_the_terminal(terminal: Open, tmp_path: Path) -> None:
    write_model(tmp_path / "evil.gguf", reply="a\x1b]0;pwn\x07b")
    chat = start_chat(terminal, "./evil.gguf")
    chat.type("Hi\r")
    assert "a␛]0;pwn␇b" in chat.wait_for("a.*b")
    assert b"\x1b]0;pwn" not in chat.raw


def test_a_prompt_on_the_command_line_is_answered_once(terminal: Open, speaking_model: Path) -> None:
    one = terminal("run", str(speaking_model), "Hi")
    assert one.wait_for_exit() == 0
    assert one.text == SAYS


def test_ctrl_c_ends_a_single_answer_with_130(terminal: Open, endless_model: Path) -> None:
    one = terminal("run", str(endless_model), "Hi", "-c", "60000")
    one.wait_for("abcdefgh")
    one.type("\x03")
    assert one.wait_for_exit() == 130
    assert "Traceback" not in one.text


def test_ctrl_c_in_a_download_keeps_the_partial_file(terminal: Open, hub: HubServer) -> None:
    hub.repository("o/big").files = {"big-q4_0.gguf": b"GGUF" + bytes(40 << 20)}
    hub.always = [pace(8e6)]
    one = terminal("pull", "hf:o/big")
    one.wait_for(r"downloading big-q4_0.gguf.*MB/s")
    one.type("\x03")
    assert one.wait_for_exit() == 130
    assert "is kept. To continue, run the same command again." in one.text.replace("\n", " ")
