"""Texts from files and pipes that a command names."""

from __future__ import annotations

import sys
from typing import BinaryIO

from qwenlocal.errors import ModelNotFound, UsageProblem
from qwenlocal.language import tr
from qwenlocal.paths import typed

_MOST = 64 << 20  # bytes; 32,768 tokens of text have about 150,000


def text_of(name: str, *, most: int = _MOST) -> str:
    """
    The text of the file `name`, which may be a pipe (`<(command)`); a byte order mark is left out.

    Raises
    ------
    ModelNotFound: it cannot be read. UsageProblem: it is a folder, not UTF-8, or of more than `most` bytes.
    """
    path = typed(name)
    try:
        if path.is_dir():
            raise UsageProblem(tr("{path} is a folder.", path=path), hint=tr("Give one of its files."))
        with path.open("rb") as file:
            return _text(file, str(path), most)
    except OSError as reason:
        why = tr("The file {name} cannot be read: {strerror}.", name=name, strerror=reason.strerror)
        raise ModelNotFound(name, reason=why, hint=tr("Check the path.")) from reason


def standard_input() -> str:
    """
    All of it.

    Raises
    ------
    UsageProblem: it is not UTF-8, or longer than any model reads.
    """
    return _text(sys.stdin.buffer, tr("The text on standard input"), _MOST)


def _text(file: BinaryIO, what: str, most: int) -> str:
    data = file.read(most + 1)
    if len(data) > most:
        raise UsageProblem(tr("{what} is longer than {most} MB; no model reads that much.", what=what, most=most >> 20))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise UsageProblem(
            tr(
                "{what} is not UTF-8 text (byte {start:,} is 0x{data:02X}).",
                what=what,
                start=wrong.start + 1,
                data=data[wrong.start],
            ),
            hint=tr("If it is text in another encoding, convert it: iconv -f LATIN1 -t UTF-8"),
        ) from wrong
