"""The lower end of a terminal, read back from a real terminal emulator."""

from __future__ import annotations

import io

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenlocal.terminal.ansi import width_of
from qwenlocal.terminal.markdown import Look, MarkdownStream
from qwenlocal.terminal.screen import Screen, Size, rows_of


class Terminal:
    """A screen of `columns` by `rows`, its history, and everything that was written to it."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self.emulator = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self.emulator)
        self.out = io.StringIO()
        self.screen = Screen(self, lambda: Size(self.emulator.columns, self.emulator.lines))  # type: ignore[arg-type]

    def write(self, text: str) -> None:
        self.out.write(text)
        self._stream.feed(text.replace("\n", "\r\n"))

    def flush(self) -> None:
        pass

    @property
    def lines(self) -> list[str]:
        """What scrolled away and what is on the screen, without empty lines at the end."""
        old = ["".join(line[x].data for x in range(self.emulator.columns)) for line in self.emulator.history.top]
        found = [line.rstrip() for line in [*old, *self.emulator.display]]
        while found and not found[-1]:
            found.pop()
        return found


def test_open_lines_change_in_place_and_finished_ones_stay() -> None:
    terminal = Terminal()
    terminal.screen.update([], ["one"], ["status"])
    terminal.screen.update([], ["one two"], ["status"])
    assert terminal.lines == ["one two", "status"]
    terminal.screen.update(["one two three"], ["four"], ["status 2"])
    assert terminal.lines == ["one two three", "four", "status 2"]
    terminal.screen.end(["four five"])
    assert terminal.lines == ["one two three", "four five"]
    assert terminal.emulator.cursor.x == 0


def test_what_did_not_change_is_not_written_again() -> None:
    terminal = Terminal()
    terminal.screen.update([], ["a" * 30, "b" * 30, "c"], [])
    before = len(terminal.out.getvalue())
    terminal.screen.update([], ["a" * 30, "b" * 30, "cd"], [])
    assert "a" not in terminal.out.getvalue()[before:]
    before = len(terminal.out.getvalue())
    terminal.screen.update([], ["a" * 30, "b" * 30, "cd"], [])
    assert len(terminal.out.getvalue()) == before


def test_lines_wider_than_the_terminal_are_counted_as_it_folds_them() -> None:
    terminal = Terminal(columns=10)
    terminal.screen.update([], ["x" * 25, "y"], [])
    terminal.screen.update([], ["x" * 26, "y"], [])
    terminal.screen.update([], ["中" * 7, "y"], [])
    terminal.screen.end(["z"])
    assert terminal.lines == ["z"]


def test_what_does_not_fit_scrolls_away_once() -> None:
    terminal = Terminal(rows=6)
    for count in range(1, 21):
        terminal.screen.update([], [f"line {n}" for n in range(count)], ["status"])
    terminal.screen.end([f"line {n}" for n in range(20)])
    assert terminal.lines == [f"line {n}" for n in range(20)]


def test_a_terminal_that_changes_its_width_is_followed() -> None:
    terminal = Terminal(columns=40)
    terminal.screen.update(["kept"], ["x" * 30], ["status"])
    terminal.emulator.resize(columns=80)
    terminal.screen.update([], ["x" * 30 + "y"], ["status"])
    terminal.screen.end(["x" * 31])
    assert terminal.lines == ["kept", "x" * 31]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.text("ab中 ", max_size=12), max_size=5), min_size=1, max_size=8),
    st.integers(4, 9),
)
def test_whatever_is_shown_in_between_the_finished_lines_are_there_in_the_end(
    blocks: list[list[str]], rows: int
) -> None:
    """Each block is shown line by line, then finished while the next one begins."""
    terminal, wanted = Terminal(columns=20, rows=rows), []
    finished: list[str] = []
    for block in blocks:
        for count in range(len(block) + 1):
            terminal.screen.update(finished, block[:count], ["status"])
            finished = []
        finished = block
        wanted += [line.rstrip() for line in block]
    terminal.screen.end(finished)
    while wanted and not wanted[-1]:
        wanted.pop()
    assert [line.replace("\0", "") for line in terminal.lines] == wanted


@pytest.mark.parametrize(
    ("line", "width"), [("abc", 3), ("\x1b[1;35mabc\x1b[0m", 3), ("你好", 4), ("e\u0301", 1), ("😀", 2), ("", 0)]
)
def test_the_width_of_a_line_is_its_columns(line: str, width: int) -> None:
    assert width_of(line) == width
    assert rows_of(line, 2) == max(1, -(-width // 2))


# --- Markdown


ANSWER = """# Title

Some **bold and *it* text** with `code`, 你好世界 and a [link](http://x.y) that makes it long.

1. first item that is long enough to be broken
2. second
   - nested

> quoted

| Name | Size |
|------|-----:|
| **a** | 1 |
| 中文 | 22 |

```python
def f(x):
    \"\"\"Doc
    string\"\"\"
    return x + 1  # yes
```

The end of 2 * 3 * 4.
"""


def streamed(text: str, look: Look, step: int) -> list[str]:
    stream, finished = MarkdownStream(), []
    for at in range(0, len(text), step):
        stream.feed(text[at : at + step])
        finished += stream.lines(look).finished
    return [*finished, *stream.end(look).finished]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_an_answer_looks_the_same_however_it_comes(step: int) -> None:
    look = Look(50, colour=True)
    assert streamed(ANSWER, look, step) == streamed(ANSWER, look, 100_000)


def test_markdown_is_laid_out() -> None:
    lines = streamed(ANSWER, Look(50, colour=True), 5)
    text = "\n".join(lines)
    assert "\x1b[1;4mTitle\x1b[0m" in lines
    assert "\x1b[1mbold and \x1b[0m\x1b[1;3mit\x1b[0m\x1b[1m text\x1b[0m" in text
    assert "\x1b[35mdef\x1b[0m \x1b[34mf\x1b[0m(x):" in lines
    assert any("── python ──" in line for line in lines)
    assert "2 * 3 * 4" in text
    assert max(width_of(line) for line in lines) <= 50


def test_without_colours_there_are_still_bold_words() -> None:
    text = "\n".join(streamed(ANSWER, Look(50, colour=False), 5))
    assert "\x1b[1mbold and " in text
    assert "\x1b[3" not in text.replace("\x1b[3m", "")


def test_marks_that_are_still_open_are_not_shown() -> None:
    look, stream = Look(60, colour=True), MarkdownStream()
    seen = []
    for letter in "A **bold** word, `code`, *it* and ~~out~~ here":
        stream.feed(letter)
        seen.append(" ".join(stream.lines(look).open))
    assert not any("**" in line or "`" in line or "~~" in line for line in seen)


def test_escape_sequences_in_an_answer_never_reach_the_terminal() -> None:
    text = "\x1b]0;title\x07 **\x1b[2Jx**\n\n```\x1b[1m\n\x1b[31mred\x9b2J\n```\n| \x1b[5m |\n|---|\n"
    lines = "\n".join(streamed(text, Look(60, colour=False), 3))
    assert "␛[2Jx" in lines
    assert not any(code in lines for code in ("\x1b]", "\x1b[2J", "\x1b[31m", "\x1b[5m", "\x9b", "\x07"))


def test_chinese_lines_are_broken_between_letters_but_not_before_a_full_stop() -> None:
    text = "这个函数 `is_palindrome` 检查一个给定的单词是否是回文（即读起来与原样相同）。它首先将输入的单词转换为小写。"
    lines = streamed(text, Look(40, colour=False), 3)
    assert "".join(lines).replace(" ", "") == text.replace("`", "").replace(" ", "")
    assert all(30 <= width_of(line) <= 40 for line in lines[:-1])
    assert not any(line.startswith(("。", "）", "，")) or line.endswith("（") for line in lines)


def test_right_to_left_text_and_combined_letters_keep_their_order() -> None:
    """The terminal turns lines round, nobody else; a letter is not torn from its marks."""
    text = "مرحبا بالعالم، هذا نص طويل يكتب من اليمين إلى اليسار. בְּרֵאשִׁית בָּרָא e\u0301a\u0308 नमस्ते น้ำ 👨‍👩‍👧‍👦 ✊🏽"
    lines = streamed(text, Look(30, colour=False), 1)
    assert " ".join(lines).split() == text.split()
    assert all(width_of(line) <= 30 for line in lines)


def test_text_behind_code_is_shown_before_its_line_ends() -> None:
    stream, look = MarkdownStream(), Look(60, colour=False)
    stream.feed("```\na\n```\n\nThe end is")
    assert list(stream.lines(look).open)[-1] == "The end is"


@settings(max_examples=80, deadline=None)
@example("1\n#1", 1)
@example("1. a\n\n2. b", 1)
@given(st.text(st.sampled_from("ab *_`#>-|\n1.[]()~中"), max_size=60), st.integers(1, 9))
def test_any_text_at_all_ends_the_same_however_it_comes(text: str, step: int) -> None:
    look = Look(30, colour=False)
    assert streamed(text, look, step) == streamed(text, look, 1000)


def test_code_is_finished_line_by_line() -> None:
    stream, look = MarkdownStream(), Look(60, colour=False)
    stream.feed("```py\na = 1\nb")
    found = stream.lines(look)
    assert found.finished[-1] == "a = 1"
    assert list(found.open) == ["b"]
    stream.feed(" = 2\n")
    assert list(stream.lines(look).finished) == ["b = 2"]
