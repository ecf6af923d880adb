"""Long pastes and documents that are cut to fit."""

from __future__ import annotations

from dataclasses import replace

from qwenlocal.terminal.attachments import replace_pastes
from qwenlocal.terminal.pastes import Paste


def test_a_paste_that_contains_another_is_shortened_as_a_whole() -> None:
    inner, outer = Paste("paste 1", "x\n"), Paste("paste 2", "a\nx\nb\n")
    parts = [replace(inner, text="[1]"), replace(outer, text="[2]")]
    assert replace_pastes("x\n vs a\nx\nb\n", [inner, outer], parts) == "[1] vs [2]"
