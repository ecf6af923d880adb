"""Text that a command reads: files, pipes and prompts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

from qwenlocal.errors import ModelNotFound, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import bundled_folder, parse_path

_MAX_BYTES = 64 << 20  # 32,768 tokens of text have about 150,000 bytes


def read_text(name: str, *, limit: int = _MAX_BYTES) -> str:
    """
    Read the file `name`, which may be a pipe (`<(command)`), as UTF-8; a byte order mark is removed.

    Raises
    ------
    ModelNotFound: it cannot be read. UsageError: it is a folder, not UTF-8, or larger than `limit` bytes.
    """
    path = parse_path(name)
    try:
        if path.is_dir():
            raise UsageError(tr("{path} is a folder.", path=path), hint=tr("Name one of its files."))
        with path.open("rb") as file:
            return _decode(file, str(path), limit)
    except OSError as error:
        raise ModelNotFound.unreadable(name, error) from error


def read_stdin() -> str:
    """
    Read all of standard input.

    Raises
    ------
    UsageError: it is not UTF-8, or longer than any model can read.
    """
    return _decode(sys.stdin.buffer, tr("The text on standard input"), _MAX_BYTES)


def read_prompt_file(name: str) -> str:
    """
    Read a file of the user's, or one of the prompts that come with qwenlocal.

    Raises
    ------
    ModelNotFound: there is neither. UsageError: it is not text.
    """
    own = bundled_folder("prompts") / Path(name).name
    if not os.path.exists(parse_path(name)) and own.is_file():
        return read_text(str(own))
    try:
        return read_text(name)
    except ModelNotFound as error:
        names = ", ".join(sorted(path.name for path in bundled_folder("prompts").glob("*.txt")))
        raise ModelNotFound(name, reason=str(error), hint=tr("Prompts that come with qwenlocal: ") + names) from error


def _decode(file: BinaryIO, label: str, limit: int) -> str:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise UsageError(
            tr("{what} is longer than {limit} MB; no model reads that much.", what=label, limit=limit >> 20)
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            tr(
                "{what} is not UTF-8 text (byte {start:,} is 0x{data:02X}).",
                what=label,
                start=error.start + 1,
                data=data[error.start],
            ),
            hint=tr("To convert it from another encoding: iconv -f LATIN1 -t UTF-8"),
        ) from error
