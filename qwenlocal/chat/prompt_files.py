"""System prompts in files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from qwenlocal.errors import QwenlocalError
from qwenlocal.text_encoding import read_text


def find_prompt_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the `*.txt` and `*.md` files in `folders` by name without suffix; later folders win."""
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return {path.stem: path for path in files if path.suffix in (".txt", ".md") and path.is_file()}


def read_prompt_files(folders: Sequence[Path]) -> dict[str, str]:
    """Return the texts of the files that `find_prompt_files` finds."""
    texts = {}
    for name, path in find_prompt_files(folders).items():
        with contextlib.suppress(QwenlocalError):  # one file that is not text does not hide the others
            texts[name] = read_text(path).strip()
    return texts
