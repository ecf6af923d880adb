"""Sentences and tables of the program in terminals of 20 columns and more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.formatting import display_width
from qwenlocal.terminal.wrapping import join_fitting, wrap_line

ROW = "  /copy [code|N]     Copy the last answer, its last code block, or answer N"


@pytest.mark.parametrize(
    ("line", "width", "rows"),
    [
        ("The draft model was unloaded.", 20, ["The draft model was", "unloaded."]),
        ("short", 20, ["short"]),
        ("", 20, [""]),
        ("a/path/longer/than/the/line is", 20, ["a/path/longer/than/the/line", "is"]),
        ("  indented text stays indented", 20, ["  indented text", "  stays indented"]),
        (ROW, 80, [ROW]),
        (ROW, 50, ["  /copy [code|N]     Copy the last answer, its", " " * 21 + "last code block, or answer N"]),
        ("            37 tokens                  system prompt", 20, ["  37 tokens  system", "    prompt"]),
        (
            ROW,
            30,
            ["  /copy [code|N]  Copy the", "    last answer, its last code", "    block, or answer N"],
        ),
        ("打开的文件太长，请先缩短它。再试一次", 20, ["打开的文件太长，请先", "缩短它。再试一次"]),
        ("上下文共 4,096 个词元，已用 12 个", 20, ["上下文共 4,096 个词", "元，已用 12 个"]),
    ],
)
def test_lines_are_wrapped_between_words(line: str, width: int, rows: list[str]) -> None:
    assert wrap_line(line, width) == rows


@given(st.text("ab 中，-", max_size=60), st.integers(20, 40))
def test_wrapping_loses_nothing_and_keeps_to_the_width(line: str, width: int) -> None:
    rows = wrap_line(line, width)
    assert "".join("".join(rows).split()) == "".join(line.split())
    assert all(display_width(row) <= width or " " not in row.strip() for row in rows)


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (60, "37.2 tokens/s, 512 of 8,192 tokens of context"),
        (30, "37.2 tokens/s"),
        (10, "37.2…"),
    ],
)
def test_a_status_line_is_shortened_between_its_parts(width: int, text: str) -> None:
    assert join_fitting(["37.2 tokens/s", "512 of 8,192 tokens of context"], ", ", width) == text
