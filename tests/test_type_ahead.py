"""Type-ahead, folded pastes and slashes at the start of a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.terminal.commands.table import is_command, unescape_slashes
from qwenlocal.terminal.input import PasteStore
from qwenlocal.terminal.type_ahead import TypeAhead


@pytest.mark.parametrize(
    ("keys", "submitted", "text"),
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
def test_keys_act_as_in_the_input_line(keys: bytes, submitted: list[str], text: str) -> None:
    for step in (1, 2, len(keys)):
        typed = TypeAhead()
        for at in range(0, len(keys), step):
            typed.feed(keys[at : at + step])
        assert (typed.submitted, typed.text) == (submitted, text)


def test_ctrl_d_on_an_empty_line_is_eof() -> None:
    typed = TypeAhead()
    typed.feed(b"a\x04")
    assert not typed.eof
    typed.feed(b"\x7f\x04")
    assert typed.eof


@given(st.binary(max_size=100))
def test_any_bytes_are_accepted(data: bytes) -> None:
    typed = TypeAhead()
    typed.feed(data)
    assert "\r" not in typed.text + "".join(typed.submitted)
    assert all(line.strip() for line in typed.submitted)


# --- pastes


def test_a_long_paste_is_folded_and_expanded() -> None:
    pastes = PasteStore()
    long = "\n".join(f"line {n}" for n in range(240))
    assert pastes.fold("short\npaste") == "short\npaste"
    assert pastes.fold(long) == "[paste 1: 240 lines]"
    assert pastes.fold("x" * 5000) == "[paste 2: 5,000 characters]"
    line = "look: [paste 1: 240 lines] and [paste 2: 5,000 characters]; [paste 9: 3 lines]"
    assert pastes.expand(line) == f"look: {long} and {'x' * 5000}; [paste 9: 3 lines]"


def test_the_history_keeps_pastes_and_foreign_placeholders_stay_text() -> None:
    pastes = PasteStore()
    line = "look: " + pastes.fold("x\n" * 30)
    assert pastes.expand_for_history(line) == "look: " + "x\n" * 30
    assert PasteStore().expand(line) == line
    other = PasteStore()
    other.fold("secret\n" * 200)
    assert other.expand(line) == line
    huge = pastes.expand_for_history(pastes.fold("y" * 200_000))
    assert huge == "[omitted paste 2: 200,000 characters]"
    assert pastes.expand(huge) == huge


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
def test_a_line_that_is_not_a_command_is_sent(line: str, sent: str) -> None:
    assert not is_command(line)
    assert unescape_slashes(line) == sent


@given(st.text(alphabet="/ a\n", max_size=6))
def test_at_most_one_slash_is_removed(line: str) -> None:
    assert unescape_slashes(line) in (line, line[1:])


def test_commands_are_words_after_a_slash() -> None:
    assert all(is_command(line) for line in ("/help", "/?", "/system You are\nkind", "/hlep x"))
