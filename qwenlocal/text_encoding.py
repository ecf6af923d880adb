"""Text from files and pipes: byte order marks, UTF-8, and the likely encoding of anything else."""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import Path

from qwenlocal.errors import ModelNotFound, UsageError
from qwenlocal.i18n import mark, tr

MAX_BYTES = 64 << 20  # 32,768 tokens of text have about 150,000 bytes
_SNIFFED_BYTES = 8192
# The longest first: that of UTF-32 begins with that of UTF-16. Python's decoders remove them, except that of UTF-8.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY_TYPES = {
    b"\x89PNG": mark("a PNG image"),
    b"\xff\xd8\xff": mark("a JPEG image"),
    b"GIF8": mark("a GIF image"),
    b"RIFF": mark("an audio, video or image file (RIFF)"),
    b"\x1f\x8b": mark("a gzip archive"),
    b"PK\x03\x04": mark("a ZIP archive"),
    b"\x7fELF": mark("a program"),
    b"MZ": mark("a program"),
    b"GGUF": mark("a GGUF model"),
    b"SQLite": mark("a SQLite database"),
    b"%PDF": mark("a PDF document"),
}
_KANA = "あいうえおかがきくけこさしすせそただちつてでとどなにのはひへほまみもやよらりるれろわをんっゃゅょ、。ー・"
_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
_HANGUL = "이다의는을에가고하한기도로지은사어리자있나그들시인해서대일보수부아것전정를상과여주소만라스장원조간"
# The encodings of Chinese, Japanese and Korean by their names in iconv: the first bytes of the characters that their
# standards list first, because they are common, and the commonest of these.
_DOUBLE_BYTE = {
    "GB18030": ((0xA1, 0xA3, 0xB0, 0xD7), "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你，。"),
    "BIG5": ((0xA1, 0xA2, 0xA4, 0xC6), "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你，。"),
    "SHIFT_JIS": ((0x81, 0x83, 0x88, 0x97), _KANA),
    "EUC-JP": ((0xA1, 0xA5, 0xB0, 0xCF), _KANA),
    "EUC-KR": ((0xA1, 0xA1, 0xB0, 0xC8), _HANGUL),
}
# Encodings of Cyrillic, whose words have no ASCII letters: all small letters, and the commonest.
_CYRILLIC_ENCODINGS = {
    "WINDOWS-1251": (_CYRILLIC + "їієґё", "оеаинтсрвлкмдпу"),
    "KOI8-R": (_CYRILLIC + "ё", "оеаинтсрвлкмдпу"),
}
# Encodings of Latin letters, which stand among ASCII letters.
_LATIN = {
    "WINDOWS-1252": "éèêëàâáãåäæçìíîïñòóôõöøùúûüýÿßœÉÈÀÂÁÅÄÆÇÍÑÓÔÖØÚÜ¿¡«»‘’“”–—…€£°§·©®",
    "WINDOWS-1250": "ąćęłńóśźżáčďéěíňřšťúůýžőűăâîşţöüäĄĆĘŁŃŚŹŻČĚŘŠŤŮŽ„”–",
}
_MIN_SCORE = 0.8  # of 2


def read_text(path: Path, *, limit: int = MAX_BYTES) -> str:
    """
    Read the text of a file, which may be a pipe (`<(command)`).

    Raises
    ------
    ModelNotFound: it cannot be read. UsageError: it is a folder, larger than `limit` bytes, or not text.
    """
    try:
        if path.is_dir():
            raise UsageError(tr("{path} is a folder.", path=path), hint=tr("Name one of its files."))
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelNotFound.unreadable(path, error) from error
    return decode_text(data, str(path), file=path, limit=limit)


def decode_text(data: bytes, label: str, *, file: Path | None = None, limit: int = MAX_BYTES) -> str:
    """
    Decode UTF-8, or what a byte order mark announces (UTF-8, UTF-16 or UTF-32), as PowerShell and Notepad write it.

    Errors call the text `label`; if it comes from `file`, they say how to convert that.

    Raises
    ------
    UsageError: it is not text, has another encoding, or more than `limit` bytes.
    """
    if len(data) > limit:
        raise UsageError(
            tr("{what} is longer than {limit} MB; no model reads that much.", what=label, limit=limit >> 20)
        )
    encoding = next((name for bom, name in _BYTE_ORDER_MARKS if data.startswith(bom)), "")
    try:
        if not encoding:
            _check_zero_bytes(data, label, file)
        text = data.decode(encoding or "utf-8")
        return text[1:] if encoding == "utf-8" else text
    except UnicodeDecodeError as error:
        if kind := next((kind for magic, kind in _BINARY_TYPES.items() if data.startswith(magic)), ""):
            raise UsageError(tr("{what} is {kind}, not text.", what=label, kind=tr(kind))) from error
        place = tr("byte {start:,} is 0x{data:02X}", start=error.start + 1, data=data[error.start])
        if encoding:
            raise UsageError(
                tr("{what} is damaged {encoding} text ({place}).", what=label, encoding=encoding.upper(), place=place),
                hint=tr("Save it as UTF-8."),
            ) from error
        raise _wrong_encoding(label, place, _guess_encoding(data, error.start), file) from error


def _check_zero_bytes(data: bytes, label: str, file: Path | None) -> None:
    """
    Raises
    ------
    UsageError: it is UTF-16 without a byte order mark, or binary. Single zero bytes are text (`find -print0`).
    """
    beginning = data[:_SNIFFED_BYTES]
    if b"\0" not in beginning:
        return
    even, odd = beginning[::2].count(0), beginning[1::2].count(0)
    if b"\0\0" not in beginning and max(even, odd) > len(beginning) // 4 and min(even, odd) == 0:
        raise _wrong_encoding(label, "", "UTF-16LE" if odd else "UTF-16BE", file)
    if b"\0\0" in beginning:
        kind = next((tr(kind) for magic, kind in _BINARY_TYPES.items() if data.startswith(magic)), "")
        raise UsageError(tr("{what} is {kind}, not text.", what=label, kind=kind or tr("a binary file")))


def _wrong_encoding(label: str, place: str, encoding: str, file: Path | None) -> UsageError:
    if not encoding:
        return UsageError(
            tr("{what} is not UTF-8 text ({place}).", what=label, place=place), hint=tr("Save it as UTF-8.")
        )
    message = tr("{what} is not UTF-8 text; it looks like {encoding}.", what=label, encoding=encoding)
    command = f"iconv -f {encoding} -t UTF-8"
    if file is not None:
        target = file.with_name(f"{file.stem}.utf8{file.suffix}")
        command += f" {shlex.quote(str(file))} > {shlex.quote(str(target))}"
    return UsageError(message, hint=tr("To convert it: {command}", command=command))


def _guess_encoding(data: bytes, error: int) -> str:
    """Return the likely encoding of text that is not UTF-8 from byte `error` on; "" if none is likely."""
    while error and data[error - 1] >= 0x80:
        error -= 1
    sample = data[max(0, error - 1) : error + _SNIFFED_BYTES]
    runs = re.findall(rb"[\x80-\xff]+", sample)
    touching = re.findall(rb"[A-Za-z][\x80-\xff]+|[\x80-\xff]+[A-Za-z]", sample)  # ASCII letters
    candidates = {name: (_characters(name, *leads), common) for name, (leads, common) in _DOUBLE_BYTE.items()}
    length = sum(map(len, runs)) / len(runs)
    if length == 1 or (length < 2.5 and len(touching) >= len(runs) / 2):
        candidates |= {name: (letters, letters) for name, letters in _LATIN.items()}
    elif length >= 2:
        candidates |= _CYRILLIC_ENCODINGS
    scores = {
        name: _share(sample, name, known) * (1 + _share(sample, name, common))
        for name, (known, common) in candidates.items()
    }
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= _MIN_SCORE else ""


def _characters(encoding: str, first: int, last: int, first_han: int, last_han: int) -> str:
    """Return the characters of two bytes whose first byte is in one of two ranges."""
    leads = (*range(first, last + 1), *range(first_han, last_han + 1))
    return b"".join(bytes((lead, trail)) for lead in leads for trail in range(0x40, 0xFF)).decode(encoding, "ignore")


def _share(sample: bytes, encoding: str, characters: str) -> float:
    """Return the share of `characters` among those that are not ASCII; 0 if `sample` has another encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
    except UnicodeDecodeError:
        return 0.0
    others, known = [character for character in text if not character.isascii()], set(characters)
    return sum(character in known for character in others) / max(1, len(others))
