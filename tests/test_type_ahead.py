"""Keys, type-ahead, pastes and slashes at the start of a line."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

from qwenlocal.terminal.commands.table import is_command, unescape_slashes
from qwenlocal.terminal.pastes import InputDisplay, Paste, PasteStore
from qwenlocal.terminal.type_ahead import LinePreview, is_open_block, unquote_block

if sys.platform == "win32":
    pytest.skip("needs a POSIX terminal", allow_module_level=True)

from qwenlocal.terminal.keys import KeyParser


def press(text: str) -> list[KeyPress]:
    parser = KeyParser()
    return [*parser.feed(text), *parser.flush()]


def preview(text: str) -> LinePreview:
    return LinePreview(press(text), PasteStore().fold)


@pytest.mark.parametrize(
    ("keys", "submitted", "text"),
    [
        ("ab\x7fc\rd", ["ac"], "d"),
        ("你好\x7f", [], "你"),
        ("one\rtwo\r", ["one", "two"], ""),
        ("\r\r", [], ""),
        ("a\nb\r", ["a\nb"], ""),
        ("a\x1b\rb\r", ["a\nb"], ""),
        ("a\\\rb\r", ["a\nb"], ""),
        ('"""a\rb\rc"""\rd', ['"""a\nb\nc"""'], "d"),
        ("some words\x17\x17x", [], "x"),
        ("gone\x15here", [], "here"),
        ("ad\x1b[Db\x1b[Cc\x01-\x05+", [], "-abdc+"),
        ("abc\x1b[D\x1b[D\x0b\x19\x19", [], "abcbc"),
        ("two words\x1bb\x1bd\x1b[1;5Dx", [], "xtwo "),
        ("a\x1bOPb\x1bfc\x1b[31md\x1b]11;rgb:0/0/0\x07e\x1b[<0;1;1Mf\x1b[3;4Rg", [], "abcdefg"),
        ("a\u3000b\u200cc\u200dd\u00a0e\u202ff\ufeffg", [], "a\u3000b\u200cc\u200dd\u00a0e\u202ff\ufeffg"),
        ("\x1b[200~two\rlines\x1b[201~!\r", ["two\nlines!"], ""),
        ("\x1b[200~\x04\x1b[31mred\x1b[201~", [], "␄␛[31mred"),
        ("1\r2\r3\r4\r5\r", [], "1\n2\n3\n4\n5\n"),  # nobody types as fast: a paste
    ],
)
def test_keys_act_as_in_the_input_line(keys: str, submitted: list[str], text: str) -> None:
    shown = preview(keys)
    assert ([line for line, _ in shown.queue], shown.text) == (submitted, text)
    if "1\r2" not in keys:
        parser = KeyParser()
        shown = LinePreview([key for character in keys for key in parser.feed(character)], PasteStore().fold)
        assert ([line for line, _ in shown.queue], shown.text) == (submitted, text)


@given(st.text(alphabet=st.sampled_from("ab\n\x1b[201~O;?3m\x7f\x17\x01\u3000你"), max_size=60), st.integers(1, 9))
def test_a_cut_between_reads_changes_nothing(text: str, step: int) -> None:
    one, two = KeyParser(), KeyParser()
    whole = [key for start in range(0, len(text), step) for key in one.feed(text[start : start + step])]
    assert whole == [key for character in text for key in two.feed(character)]
    assert one.flush() == two.flush()


@given(st.text(max_size=100))
def test_any_text_is_accepted(text: str) -> None:
    shown = preview(text)
    assert all(line.strip() for line, _ in shown.queue)


def test_a_lone_escape_is_a_key_once_nothing_follows() -> None:
    parser = KeyParser()
    assert parser.feed("\x1b") == []
    assert [key.key for key in parser.flush()] == [Keys.Escape]
    assert [key.key for key in parser.feed("[A")] == ["[", "A"]


def test_a_paste_without_an_end_ends_after_a_pause() -> None:
    now = [0.0]
    parser = KeyParser(lambda: now[0])
    assert parser.feed("\x1b[200~pasted") == []
    now[0] = 10
    assert parser.feed(" and more") == []  # nobody has read meanwhile
    assert parser.flush() == []
    now[0] = 20
    assert [(key.key, key.data) for key in parser.feed("x")] == [(Keys.BracketedPaste, "pasted and more"), ("x", "x")]


def test_a_paste_in_many_pieces_takes_linear_time() -> None:
    parser, piece = KeyParser(), ("x" * 79 + "\n") * 50
    start = time.process_time()
    assert parser.feed("\x1b[200~") == []
    assert not any(parser.feed(piece) for _ in range(2500))
    (key,) = parser.feed("\x1b[201~")
    assert len(key.data) == 10_000_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("burst", "pasted"),
    [
        ("\r".join("abcde"), "a\rb\rc\rd\re"),
        ("\r\n".join("abcde") + "\r\n", "a\r\nb\r\nc\r\nd\r\ne\r\n"),
        ("\x1b[2;3R" + "\r".join("abcde"), "a\rb\rc\rd\re"),  # after the terminal's reply to a question
        ("x" * 2000 + "\r", "x" * 2000),  # Enter sends it
    ],
)
def test_a_burst_of_lines_is_a_paste(burst: str, pasted: str) -> None:
    assert [key.data for key in press(burst) if key.key is Keys.BracketedPaste] == [pasted]


@pytest.mark.parametrize("typed", ["one\rtwo\r/exit\r", "a\x1b\rb\x1b\rc\x1b\rd\x1b\re\r", "\r\r\r\r\r\r"])
def test_a_few_lines_at_once_are_keys(typed: str) -> None:
    assert all(key.key is not Keys.BracketedPaste for key in press(typed))


# --- messages of several lines


@pytest.mark.parametrize(
    ("text", "is_open", "content"),
    [
        ('"""', True, None),
        ('"""a\nb', True, None),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""  ', False, "a"),
        ('"""a"""', False, "a"),
        ('""""""', False, ""),
        ('"""Docstring."""\nimport os', False, None),
        ('"""a"""\nb = """c"""', False, None),
        ('say """a"""', False, None),
    ],
)
def test_three_quotes_enclose_a_message(text: str, is_open: bool, content: str | None) -> None:
    assert is_open_block(text) == is_open
    assert unquote_block(text) == content


# --- pastes


def test_a_long_paste_is_folded_and_expanded() -> None:
    pastes = PasteStore()
    long = "\n".join(f"line {n}" for n in range(240))
    assert pastes.fold("short\npaste") == "short\npaste"
    line = f"look: {pastes.fold(long)} and {pastes.fold('x' * 5000)}; [paste 1: 240 lines]"
    assert pastes.describe(line) == "look: [paste 1: 240 lines] and [paste 2: 5,000 characters]; [paste 1: 240 lines]"
    text = f"look: {long} and {'x' * 5000}; [paste 1: 240 lines]"
    assert pastes.expand(line) == text
    assert pastes.collapse(text) == line
    assert pastes.find(text) == [Paste("paste 1", long), Paste("paste 2", "x" * 5000)]


def test_the_same_paste_has_one_number() -> None:
    pastes = PasteStore()
    assert pastes.fold("a\n" * 20) == pastes.fold("a\n" * 20)
    assert pastes.describe(pastes.fold("a\n" * 20)) == "[paste 1: 20 lines]"


def test_the_cursor_is_at_the_right_column_after_pastes_and_emoji() -> None:
    pastes = PasteStore()
    line = f"a{pastes.fold('x' * 2000)}b👩\u200d💻c👍🏽d🇩🇪e"
    source: Any = SimpleNamespace(fragments=[("", line)])
    shown = InputDisplay(pastes).apply_transformation(source)
    text = shown.fragments[0][1]
    assert text == "a[paste 1: 2,000 characters]b👩💻c👍dDEe"
    for character in "b👩💻cde":
        assert shown.source_to_display(line.index(character)) == text.rindex(character)
        assert shown.display_to_source(text.rindex(character)) == line.index(character)
    assert shown.source_to_display(len(line) + 1) == len(text) + 1


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
