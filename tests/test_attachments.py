"""Long pastes and documents that are cut to fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenlocal.chat.documents import Document
from qwenlocal.chat.thread import Thread
from qwenlocal.terminal.attachments import attach_documents, replace_pastes
from qwenlocal.terminal.pastes import Paste
from qwenlocal.terminal.session import Session


def test_a_paste_that_contains_another_is_shortened_as_a_whole() -> None:
    inner, outer = Paste("paste 1", "x\n"), Paste("paste 2", "a\nx\nb\n")
    parts = [replace(inner, text="[1]"), replace(outer, text="[2]")]
    assert replace_pastes("x\n vs a\nx\nb\n", [inner, outer], parts) == "[1] vs [2]"


@pytest.mark.parametrize(("letter", "kept"), [("h", "line 0 is long"), ("p", "the needle is here")])
def test_a_part_of_a_huge_document_is_chosen_without_counting_all_of_it(letter: str, kept: str) -> None:
    lines = [f"line {n} is long\n" for n in range(400_000)]
    lines[300_000] = "\n\nthe needle is here\n\n"
    counted = 0

    def count_tokens(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text.split())

    said: list[str] = []
    nothing: Any = None
    session = Session(Thread(), "m", nothing, said.append, lambda question: letter, [], Path())
    session.loaded_conversation = SimpleNamespace(n_ctx=2048, prompt_tokens=20, count_tokens=count_tokens)  # type: ignore[assignment]
    document = Document("big.txt", "".join(lines))
    message = attach_documents(session, "Where is the needle?", [document])
    assert message and kept in message
    assert 500 < len(message.split()) < 2048
    assert "more than any context holds" in said[0]
    assert "% of the text" in said[-1]
    assert counted < len(document.text) / 20
