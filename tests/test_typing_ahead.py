"""Keys that are pressed while an answer comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.terminal.commands.table import is_command, unescaped
from qwenlocal.terminal.input import Pastes
from qwenlocal.terminal.type_ahead import TypedAhead


@pytest.mark.parametrize(
    ("keys", "sent", "text"),
    [
        (b"ab\x7fc\rd", ["ac"], "d"),
        ("你好\x7f".encode(), [], "你"),
        (b"one\rtwo\r", ["one", "two"], ""),
        (b"\r\r", [], ""),
        (b"a\nb\r", ["a\nb"], ""),
        (b"some words\x17\x17x", [], "x"),
        (b"gone\x15here", [], "here"),
        (b"a\x1b[Db\x1b[1;5Cc\x1bOPd\x1bfe", [], "abcde"),
        (b"\x1b[200~two\rlines\x1b[201~!\r", ["two\nlines!"], ""),
        (b"\x1b[200~\x04\x1b[31mred\x1b[201~", [], "\x04\x1b[31mred"),
    ],
)
def test_keys_do_what_they_do_in_the_line(keys: bytes, sent: list[str], text: str) -> None:
    for step in (1, 2, len(keys)):
        typed = TypedAhead()
        for at in range(0, len(keys), step):
            typed.feed(keys[at : at + step])
        assert (typed.sent, typed.text) == (sent, text)


def test_ctrl_d_on_an_empty_line_leaves() -> None:
    typed = TypedAhead()
    typed.feed(b"a\x04")
    assert not typed.leaves
    typed.feed(b"\x7f\x04")
    assert typed.leaves


@given(st.binary(max_size=100))
def test_any_bytes_at_all_are_taken(data: bytes) -> None:
    typed = TypedAhead()
    typed.feed(data)
    assert "\r" not in typed.text + "".join(typed.sent)
    assert all(line.strip() for line in typed.sent)


# --- pastes


def test_a_long_paste_is_folded_and_unfolded() -> None:
    pastes = Pastes()
    long = "\n".join(f"line {n}" for n in range(240))
    assert pastes.fold("short\npaste") == "short\npaste"
    assert pastes.fold(long) == "[paste 1: 240 lines]"
    assert pastes.fold("x" * 5000) == "[paste 2: 5,000 letters]"
    line = "look: [paste 1: 240 lines] and [paste 2: 5,000 letters]; [paste 9: 3 lines]"
    assert pastes.unfold(line) == f"look: {long} and {'x' * 5000}; [paste 9: 3 lines]"


def test_the_history_keeps_pastes_whole_and_another_chats_are_not_taken_for_them() -> None:
    pastes = Pastes()
    line = "look: " + pastes.fold("x\n" * 30)
    assert pastes.remembered(line) == "look: " + "x\n" * 30
    assert Pastes().unfold(line) == line
    other = Pastes()
    other.fold("secret\n" * 200)
    assert other.unfold(line) == line
    huge = pastes.remembered(pastes.fold("y" * 200_000))
    assert huge == "[a paste 2: 200,000 letters]"
    assert pastes.unfold(huge) == huge


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("//help", "/help"),
        ("// a comment", "// a comment"),
        ("//etc/fstab", "/etc/fstab"),
        ("//TODO\nf();", "//TODO\nf();"),
        ("//system\nis a word", "/system\nis a word"),
        ("//", "//"),
        ("/* sum */\nint f(int a);", "/* sum */\nint f(int a);"),
        ("/etc/fstab", "/etc/fstab"),
        ("a /help", "a /help"),
    ],
)
def test_a_line_that_is_no_command_is_sent(line: str, sent: str) -> None:
    assert not is_command(line)
    assert unescaped(line) == sent


@given(st.text(alphabet="/ a\n", max_size=6))
def test_any_line_is_sent_but_for_a_slash_at_most(line: str) -> None:
    assert unescaped(line) in (line, line[1:])


def test_commands_are_words_behind_a_slash() -> None:
    assert all(is_command(line) for line in ("/help", "/?", "/system You are\nkind", "/hlep x"))
