"""Journals of resumable files: written, appended to, and read back after damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import fuzz, mutations
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.resumable import JournalAppender, JournalContent, journal_path, part_path, read_journal, write_journal


def test_the_names_are_next_to_the_file() -> None:
    assert part_path(Path("a/x.gguf")) == Path("a/x.gguf.part")
    assert journal_path(Path("a/x.gguf")) == Path("a/x.gguf.part.journal")


def test_appended_entries_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    write_journal(path, {"name": "é", "size": 5}, [(0, 7), (1, 8)])
    journal = JournalAppender(path)
    journal.append(2, -1)
    assert read_journal(path) == JournalContent({"name": "é", "size": 5}, [[0, 7], [1, 8], [2, -1]])
    journal.close()


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(b'{"a": 1}\n0 7\n1 12345')
    assert read_journal(path) == JournalContent({"a": 1}, [[0, 7]])


@pytest.mark.parametrize(
    "line", ["", "x", "1  2", "1 2 ", "1 -", "--1 2", "1.5 2", "1 " + "9" * 16, "² 1", "\0", "1\t2"]
)
def test_a_garbled_line_is_ignored(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_text('{"a": 1}\n0 7\n' + line + "\n1 8\n", encoding="utf-8")
    assert read_journal(path) == JournalContent({"a": 1}, [[0, 7], [1, 8]])


@pytest.mark.parametrize("first", ["", "{", "[]", "5", "null", "[" * 100_000])
def test_a_journal_without_identity_is_ignored(first: str, tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_text(first + "\n0 7\n")
    assert read_journal(path) is None
    assert read_journal(tmp_path / "missing.journal") is None


@fuzz
@given(data=st.data())
def test_any_damage_is_read_or_ignored(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    write_journal(path, {"a": 1}, [(number, number * 1000) for number in range(5)])
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    content = read_journal(path)
    assert content is None or all(isinstance(number, int) for entry in content.entries for number in entry)
