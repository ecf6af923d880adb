"""In-place updates and rendered Markdown, read back from a terminal emulator."""

from __future__ import annotations

import io
import os
import re

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenlocal.formatting import display_width
from qwenlocal.terminal.markdown import MarkdownStream, RenderOptions
from qwenlocal.terminal.screen import Screen, rows_of

_ESCAPES = re.compile("\x1b\\[[0-9;]*m")


class Terminal:
    """An emulated terminal with `columns` and `rows`, its scrollback, and everything written to it."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self.emulator = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self.emulator)
        self.out = io.StringIO()
        self.screen = Screen(self, lambda: os.terminal_size((self.emulator.columns, self.emulator.lines)))  # type: ignore[arg-type]

    def write(self, text: str) -> None:
        self.out.write(text)
        self._stream.feed(text.replace("\n", "\r\n"))

    def flush(self) -> None:
        pass

    @property
    def lines(self) -> list[str]:
        """The lines that scrolled away and those on the screen, without empty lines at the end."""
        history = ["".join(line[x].data for x in range(self.emulator.columns)) for line in self.emulator.history.top]
        lines = [line.rstrip() for line in [*history, *self.emulator.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def test_pending_lines_change_in_place_and_finished_ones_stay() -> None:
    terminal = Terminal()
    terminal.screen.update([], ["one"], ["status"])
    terminal.screen.update([], ["one two"], ["status"])
    assert terminal.lines == ["one two", "status"]
    terminal.screen.update(["one two three"], ["four"], ["status 2"])
    assert terminal.lines == ["one two three", "four", "status 2"]
    terminal.screen.end(["four five"])
    assert terminal.lines == ["one two three", "four five"]
    assert terminal.emulator.cursor.x == 0


def test_unchanged_lines_are_not_written_again() -> None:
    terminal = Terminal()
    terminal.screen.update([], ["a" * 30, "b" * 30, "c"], [])
    before = len(terminal.out.getvalue())
    terminal.screen.update([], ["a" * 30, "b" * 30, "cd"], [])
    assert "a" not in terminal.out.getvalue()[before:]
    before = len(terminal.out.getvalue())
    terminal.screen.update([], ["a" * 30, "b" * 30, "cd"], [])
    assert len(terminal.out.getvalue()) == before


def test_output_of_another_program_stays_on_the_screen() -> None:
    terminal = Terminal()
    terminal.screen.update([], ["one", "two"], ["status"])
    terminal.screen.leave()
    terminal.write("\nsuspended\n$ fg\n")
    terminal.screen.update([], ["one", "two three"], ["status"])
    terminal.screen.end(["one", "two three four"])
    assert terminal.lines[-5:] == ["status", "suspended", "$ fg", "one", "two three four"]


def test_wrapped_lines_count_as_several_rows() -> None:
    terminal = Terminal(columns=10)
    terminal.screen.update([], ["x" * 25, "y"], [])
    terminal.screen.update([], ["x" * 26, "y"], [])
    terminal.screen.update([], ["中" * 7, "y"], [])
    terminal.screen.end(["z"])
    assert terminal.lines == ["z"]


def test_lines_that_do_not_fit_scroll_away_once() -> None:
    terminal = Terminal(rows=6)
    for count in range(1, 21):
        terminal.screen.update([], [f"line {n}" for n in range(count)], ["status"])
    terminal.screen.end([f"line {n}" for n in range(20)])
    assert terminal.lines == [f"line {n}" for n in range(20)]


def test_lines_are_inserted_above_those_that_may_change() -> None:
    terminal = Terminal(rows=6)
    terminal.screen.update(["done"], [f"line {n}" for n in range(8)], ["status"])
    terminal.screen.insert(["a note", "of two lines"])
    terminal.screen.update([], [f"line {n}" for n in range(9)], ["status"])
    terminal.screen.end([f"line {n}" for n in range(9)])
    before = [f"line {n}" for n in range(4)]
    assert terminal.lines == ["done", *before, "a note", "of two lines", *(f"line {n}" for n in range(4, 9))]
    terminal.screen.insert(["below"])
    assert terminal.lines[-1] == "below"


def test_a_resized_terminal_is_redrawn() -> None:
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
def test_finished_lines_survive_any_sequence_of_updates(blocks: list[list[str]], rows: int) -> None:
    """Each block is shown line by line, then finished while the next one begins."""
    terminal, expected = Terminal(columns=20, rows=rows), []
    finished: list[str] = []
    for block in blocks:
        for count in range(len(block) + 1):
            terminal.screen.update(finished, block[:count], ["status"])
            finished = []
        finished = block
        expected += [line.rstrip() for line in block]
    terminal.screen.end(finished)
    while expected and not expected[-1]:
        expected.pop()
    assert [line.replace("\0", "") for line in terminal.lines] == expected


TABLE = """| setting | description | default |
|---|---|---|
| repeat_penalty | penalizes repetition of tokens | 1.1 |
| 温度 | 回答的随机程度 | 0.7 |
"""


@pytest.mark.parametrize("width", [20, 26, 32, 40, 50, 80])
def test_tables_break_no_words_in_narrow_terminals(width: int) -> None:
    stream = MarkdownStream()
    stream.feed(TABLE)
    lines = [_ESCAPES.sub("", line) for line in stream.finish(RenderOptions(width, color=True)).finished]
    assert all(display_width(line) <= width for line in lines)
    words = " ".join(lines)
    for word in ("setting", "description", "repeat_penalty", "penalizes", "repetition", "tokens", "1.1", "温度"):
        assert word in words
    assert "…" not in words
    assert ("setting: repeat_penalty" in " ".join(words.split())) == (width < 40)


@pytest.mark.parametrize(
    ("line", "width"), [("abc", 3), ("\x1b[1;35mabc\x1b[0m", 3), ("你好", 4), ("e\u0301", 1), ("😀", 2), ("", 0)]
)
def test_wide_and_colored_text_is_measured_in_columns(line: str, width: int) -> None:
    assert display_width(line) == width
    assert rows_of(line, 2) == max(1, -(-width // 2))


# --- Markdown


ANSWER = """# Title

Some **bold and *it* text** with `code`, 你好世界 and a [link](http://x.y) that makes it long.

1. first item that is long enough to be broken
2. second
   - nested

> quoted

| Name | TerminalSize |
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


def render_in_steps(text: str, options: RenderOptions, step: int) -> list[str]:
    stream, finished = MarkdownStream(), []
    for at in range(0, len(text), step):
        stream.feed(text[at : at + step])
        finished += stream.render(options).finished
    return [*finished, *stream.finish(options).finished]


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_chunk_size_does_not_change_the_rendering(step: int) -> None:
    options = RenderOptions(50, color=True)
    assert render_in_steps(ANSWER, options, step) == render_in_steps(ANSWER, options, 100_000)


def test_markdown_is_rendered() -> None:
    lines = render_in_steps(ANSWER, RenderOptions(50, color=True), 5)
    text = "\n".join(lines)
    assert "\x1b[1;4mTitle\x1b[0m" in lines
    assert "\x1b[1mbold and \x1b[0m\x1b[1;3mit\x1b[0m\x1b[1m text\x1b[0m" in text
    assert "\x1b[35mdef\x1b[0m \x1b[34mf\x1b[0m(x):" in lines
    assert any("── python ──" in line for line in lines)
    assert "2 * 3 * 4" in text
    assert max(display_width(line) for line in lines) <= 50


def test_bold_text_needs_no_colors() -> None:
    text = "\n".join(render_in_steps(ANSWER, RenderOptions(50, color=False), 5))
    assert "\x1b[1mbold and " in text
    assert "\x1b[3" not in text.replace("\x1b[3m", "")


def test_unclosed_marks_are_hidden() -> None:
    options, stream = RenderOptions(60, color=True), MarkdownStream()
    seen = []
    for letter in "A **bold** word, `code`, *it* and ~~out~~ here":
        stream.feed(letter)
        seen.append(" ".join(stream.render(options).pending))
    assert not any("**" in line or "`" in line or "~~" in line for line in seen)


def test_escape_sequences_in_an_answer_never_reach_the_terminal() -> None:
    text = "\x1b]0;title\x07 **\x1b[2Jx**\n\n```\x1b[1m\n\x1b[31mred\x9b2J\n```\n| \x1b[5m |\n|---|\n"
    lines = "\n".join(render_in_steps(text, RenderOptions(60, color=False), 3))
    assert "␛[2Jx" in lines
    assert not any(code in lines for code in ("\x1b]", "\x1b[2J", "\x1b[31m", "\x1b[5m", "\x9b", "\x07"))


def test_chinese_text_wraps_between_characters_but_not_before_punctuation() -> None:
    text = "这个函数 `is_palindrome` 检查一个给定的单词是否是回文（即读起来与原样相同）。它首先将输入的单词转换为小写。"
    lines = render_in_steps(text, RenderOptions(40, color=False), 3)
    assert "".join(lines).replace(" ", "") == text.replace("`", "").replace(" ", "")
    assert all(30 <= display_width(line) <= 40 for line in lines[:-1])
    assert not any(line.startswith(("。", "）", "，")) or line.endswith("（") for line in lines)


def test_right_to_left_text_and_combining_characters_keep_their_order() -> None:
    """Only the terminal reorders text, and a letter stays with its combining marks."""
    text = "مرحبا بالعالم، هذا نص طويل يكتب من اليمين إلى اليسار. בְּרֵאשִׁית בָּרָא e\u0301a\u0308 नमस्ते น้ำ 👨‍👩‍👧‍👦 ✊🏽"
    lines = render_in_steps(text, RenderOptions(30, color=False), 1)
    assert " ".join(lines).split() == text.split()
    assert all(display_width(line) <= 30 for line in lines)


def test_text_after_code_is_shown_before_its_line_ends() -> None:
    stream, options = MarkdownStream(), RenderOptions(60, color=False)
    stream.feed("```\na\n```\n\nThe end is")
    assert list(stream.render(options).pending)[-1] == "The end is"


@settings(max_examples=80, deadline=None)
@example("1\n#1", 1)
@example("1. a\n\n2. b", 1)
@given(st.text(st.sampled_from("ab *_`#>-|\n1.[]()~中"), max_size=60), st.integers(1, 9))
def test_chunk_size_does_not_change_the_rendering_of_any_text(text: str, step: int) -> None:
    options = RenderOptions(30, color=False)
    assert render_in_steps(text, options, step) == render_in_steps(text, options, 1000)


def test_code_is_finished_line_by_line() -> None:
    stream, options = MarkdownStream(), RenderOptions(60, color=False)
    stream.feed("```py\na = 1\nb")
    lines = stream.render(options)
    assert lines.finished[-1] == "a = 1"
    assert list(lines.pending) == ["b"]
    stream.feed(" = 2\n")
    assert list(stream.render(options).finished) == ["b = 2"]
