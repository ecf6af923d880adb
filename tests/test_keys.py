"""Keys in a real pseudo-terminal: the same ones give the same line at every moment, and nothing typed is lost."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from conftest import SAYS
from terminal import Open, Terminal, save_messages, start_chat

PASTE = "\n".join(f"line {number}" for number in range(201))
STUB = "[paste 1: 201 lines]"


def read_questions(chat: Terminal, folder: Path) -> list[str]:
    return [message["content"] for message in save_messages(chat, folder) if message["role"] == "user"]


# --- the same keys at every moment


def test_keys_typed_before_the_prompt_count(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model))
    chat.type("Hiii\x7f\x7f 1\x1b\rtwo\r/exit\r")
    assert chat.wait_for_exit(60) == 0
    assert re.search(rf"^> Hi 1\n  two$.*^{SAYS}$.*^> /exit$", chat.text, re.M | re.S)


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ("a\u3000b\u200cc\u200dd\u00a0e\r", ["a\u3000b\u200cc\u200dd\u00a0e"]),
        ("ad\x1b[Db\x1b[Cc\x01-\x05+\r", ["-abdc+"]),
        ("one word\x17two\x01\x0b\x19!\r", ["one two!"]),
        ("first\r\x1b[A again\r", ["first", "first again"]),
        ("/tok\t\r/mark\t\rHi\r", ["Hi"]),
        ("see \x1b[200~" + PASTE.replace("\n", "\r") + "\x1b[201~!\r", [f"see {PASTE}!"]),
    ],
)
def test_keys_typed_during_an_answer_give_the_same_line(
    keys: str, sent: list[str], terminal: Open, endless_model: Path, tmp_path: Path
) -> None:
    chat = start_chat(terminal, endless_model, "-n", "200", "--no-lookup", "-c", "8000")
    chat.enter("Go", "abcdefgh")
    data = keys.encode()
    for start in range(0, len(data), 1 if len(data) < 100 else 7):  # cuts characters and sequences
        chat.type(data[start : start + (1 if len(data) < 100 else 7)])
        time.sleep(0.001)  # reads nothing: the terminal would answer a request in the middle of a key
    chat.wait_for("token limit.*" * (1 + len(sent)))
    assert read_questions(chat, tmp_path) == ["Go", *sent]


def test_keys_typed_before_a_menu_are_not_its_answer(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 9000)
    chat = terminal("run", str(speaking_model), "-c", "1024")
    chat.enter("@long.txt what?\rhello", "h, p, w or c")
    chat.enter("c", "Your message is below.*Not sent: 1 message typed ahead.*^> @long.txt what\\?$")
    chat.type("\x15\x1b[A")
    chat.wait_for(r"^> hello$")


def test_ctrl_c_drops_waiting_messages(terminal: Open, endless_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, endless_model, "-c", "60000", "--no-lookup")
    chat.enter("Go", "abcdefgh")
    chat.type("two\rthree\rhalf")
    chat.wait_for("^> two\n> three\n> half")
    chat.type("\x03")
    chat.wait_for(r"\[interrupted\].*Not sent: 2 messages typed ahead.*^> half$")
    assert read_questions(chat, tmp_path) == ["Go"]
    chat.type("\x1b[A\x1b[A")
    chat.wait_for("^> three$")


# --- pastes


@pytest.mark.parametrize("line_end", ["\r", "\n", "\r\n"])
def test_a_paste_in_a_terminal_without_bracketed_paste_is_one_message(
    line_end: str, terminal: Open, speaking_model: Path, tmp_path: Path
) -> None:
    chat = start_chat(terminal, speaking_model, "-c", "8000")
    chat.type(PASTE.replace("\n", line_end))
    chat.wait_for(r"^> \[paste 1: 201 lines\]$")
    chat.type("\r")
    assert re.search(rf"paste 1: {len(PASTE):,} tokens, \d+% of the free context", chat.wait_for(SAYS))
    assert read_questions(chat, tmp_path) == [PASTE]


@pytest.mark.slow
def test_a_folded_paste_is_one_character(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    cases = {
        "\x7f.": "ab .",
        "\x1b[D\x1b[3~.": "ab .",
        "\x1b[Dcd ": f"ab cd {PASTE}",
        "\x17\x19!": f"ab {PASTE}!",
        "\x15x\x19": f"xab {PASTE}",
        "\x01\x1bd\x1bdx": "x",
        "\x7f\x1f": f"ab {PASTE}",
        STUB: f"ab {PASTE}{STUB}",
        "\x03\x1b[A": f"ab {PASTE}",
    }
    chat = terminal("run", str(speaking_model), "-c", "30000")
    for count, keys in enumerate(cases, start=1):
        chat.wait_for_prompt(count)
        chat.type("ab ")
        chat.paste(PASTE)
        chat.wait_for(r"^> ab \[paste 1: 201 lines\][^\n]*\n*[^\n]*\Z")
        chat.type(keys + "\r")
    chat.wait_for_prompt(len(cases) + 1)
    assert read_questions(chat, tmp_path) == list(cases.values())


def test_a_folded_paste_is_edited_in_full(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor.py"
    editor.write_text("import sys\nwith open(sys.argv[1], 'a') as file:\n    file.write(' edited')\n")
    chat = start_chat(terminal, speaking_model, "-c", "8000", EDITOR=f"{sys.executable} {editor}")
    chat.paste(PASTE)
    chat.wait_for("201 lines")
    chat.type("\x18\x05")
    chat.wait_for(SAYS)
    assert read_questions(chat, tmp_path) == [f"{PASTE} edited"]


def test_keys_wait_until_the_editor_has_ended(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nsleep 1\nprintf edited > $1\n")
    editor.chmod(0o755)
    chat = start_chat(terminal, str(speaking_model), EDITOR=str(editor))
    chat.enter("draft\x18\x05next", rf"^> edited$.*{SAYS}.*^> next$.*{SAYS}")
    assert read_questions(chat, tmp_path) == ["edited", "next"]


def test_a_paste_is_recalled_in_a_later_chat(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    first = start_chat(terminal, speaking_model, "-c", "8000")
    first.paste(PASTE)
    first.wait_for("201 lines")
    first.type("\r")
    first.wait_for(SAYS)
    first.exit()
    second = start_chat(terminal, speaking_model, "-c", "8000")
    second.enter("\x1b[A", SAYS)
    assert read_questions(second, tmp_path) == [PASTE]


def test_a_paste_that_is_too_long_is_cut_or_kept(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, speaking_model, "-c", "1024")
    chat.type("sum up ")
    chat.paste(PASTE * 5)
    chat.wait_for(r"\[paste 1: [\d,]+ lines\]")
    chat.type("\r")
    chat.wait_for("Too long for the context.*h, p, w or c")
    chat.enter("c", r"Your message is below.*^> sum up \[paste 1: [\d,]+ lines\]$")
    chat.type("\r")
    chat.wait_for("Too long for the context.*Too long for the context.*h, p, w or c")
    chat.enter("h", SAYS)
    (sent,) = read_questions(chat, tmp_path)
    assert sent.startswith("sum up line 0\nline 1\n")
    assert sent.endswith("\n…")


# --- other keys


def test_a_line_found_by_ctrl_r_is_taken(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    chat = terminal("run", str(speaking_model))
    lines = ["alpha one\r", "beta two\r", "\x12alph\rX\r", "\x12bet\x1b[CY\r", "\x12Xalp\x05Z\r"]
    for count, line in enumerate(lines, start=1):
        chat.wait_for_prompt(count)
        chat.type(line)
    chat.wait_for_prompt(len(lines) + 1)
    assert read_questions(chat, tmp_path)[2:] == ["Xalpha one", "bYeta two", "Xalpha oneZ"]


def test_enter_sends_after_escape_in_vi_mode(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model, QWENLOCAL_KEYS="vi")
    chat.type("abc\x1b")
    chat.read(0.4)
    chat.enter("0x", rf"^> bc$.*{SAYS}")
    chat.wait_for_prompt(2)
    chat.type("two\x1b\rlines\x1b")
    chat.read(0.4)
    chat.type("\r")
    chat.wait_for(rf"^> two\n  lines$.*{SAYS}")


def test_three_quotes_enclose_several_lines(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter('"""\r/help', 'To end the message, end a line with """')
    chat.enter('is a word"""', SAYS)
    assert read_questions(chat, tmp_path) == ["/help\nis a word"]


def test_a_message_with_an_error_is_not_lost(terminal: Open, speaking_model: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    chat = start_chat(terminal, speaking_model)
    chat.enter("What is in @picture.png?", r"PNG image.*^> What is in @picture.png\?$")


BYTES = (
    b"\x1b[31m\x1b[<35;1;1M\x1b[M!!!\x1b[99M\x1b[1;2;3m",
    b"\x1b]11;rgb:0000/0000\x07\x1bP1$r0m\x1b\\\x1b[?62;c\x1b[I\x1b[O\x1b[999;999R",
    b"\xff\xfe\x80\xe4\xbd\xf0\x9f\x00\x9b\xc2\x9b",
    b"\x12\x12\x12abc\x1b[C\x07\x13\x13\r\x16\x0f\x1d\x1e\x1f",
    b"\x1bx\x1b\x1b\x1b[\x1bO\x1b[[A\x1b[1;5;7~\x1b(\x1b)\x18\x18",
)


@pytest.mark.parametrize("is_answering", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_bytes_end_the_chat(is_answering: bool, terminal: Open, endless_model: Path) -> None:
    chat = start_chat(terminal, endless_model, "-n", "100", "--no-lookup")
    for data in BYTES:
        if is_answering:
            chat.type("Go\r")
        chat.type(data)
        chat.read(0.8)
        chat.type("\x07\x03" if not is_answering else "\x07\x1b\r\x15\x15")
        chat.read(0.3)
    chat.type("\x07/stats\r")
    chat.read(2)
    assert not re.search("Traceback|Unhandled|Press ENTER", chat.text)
    for _ in range(60):  # on a busy machine, some answers have not ended yet
        if chat.is_running:
            chat.type("\x15\x04")  # not Ctrl-C, which would kill a chat that is already ending
            chat.read(0.25)
    assert chat.wait_for_exit() == 0


@pytest.mark.parametrize("seconds", [0.06, 0.12, 0.2, 0.35])
def test_ctrl_c_at_the_start_prints_no_traceback(seconds: float, terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model))
    chat.read(seconds)
    chat.type("\x03")
    chat.read(1)
    chat.exit()
    assert not re.search("Traceback|Exception|Warning", chat.text)
