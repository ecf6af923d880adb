"""System prompts in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenlocal.errors import QwenlocalError
from qwenlocal.text_encoding import read_text


def read_prompt_files(folders: Sequence[Path]) -> dict[str, str]:
    """Return the texts of the `*.txt` and `*.md` files in `folders` by name without suffix; later folders win."""
    texts = {}
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix in (".txt", ".md") and path.is_file():
                try:
                    texts[path.stem] = read_text(path).strip()
                except QwenlocalError:  # one file that is not text does not hide the others
                    continue
    return texts
