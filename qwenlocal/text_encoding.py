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
_LOW_BYTES, _HIGH_BYTES = rb"[\0-\x08]", rb"[\x80-\xff]+"
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
_HAN = "的一是不了在人有我中上大和到以就出可也你文下面，。"  # the same in both scripts
# The encodings that people have, by their names in iconv: their commonest characters, and the share of these among all
# that are not ASCII.
_COMMON_CHARACTERS = {
    "GB18030": (_HAN + "他这个们来为国地说时要会请", 0.2),
    "BIG5": (_HAN + "他這個們來為國地說時要會請", 0.2),
    "SHIFT_JIS": (
        "あいうえおかがきくけこさしすせそただちつてでとどなにのはひへほまみもやよらりるれろわをんっゃゅょ、。"
        "アイウエオカキクグケコサシジスズセタダチッツテデトドナニネハバパビフブプベポマミムメモャュョラリルレロワンー・",
        0.4,
    ),
    "EUC-KR": ("이다의는을에가고하한기도로지은사어리자있나그들시인해서대일보수부아것전정를상과여주만라요습니글", 0.3),
    "WINDOWS-1251": ("оеаинтсрвлкмдпуыяОЕАИНТСРВЛКМДПУЫЯ", 0.7),
    "WINDOWS-1252": ("éèêëàâáãåäæçìíîïñòóôõöøùúûüýÿßœÉÈÀÂÁÅÄÆÇÍÑÓÔÖØÚÜ¿¡«»‘’“”–—…€£°§·©®", 0.9),
}
_COMMON_IN_UTF16 = (
    "\t\r\n" + "".join(map(chr, range(0x20, 0x7F))) + "".join(row[0] for row in _COMMON_CHARACTERS.values())
)


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
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        place = tr("byte {start:,} is 0x{data:02X}", start=error.start + 1, data=data[error.start])
        if encoding:
            raise UsageError(
                tr("{what} is damaged {encoding} text ({place}).", what=label, encoding=encoding.upper(), place=place),
                hint=tr("Save it as UTF-8."),
            ) from error
        raise _not_utf8(data, label, place, file) from error
    beginning = data[:_SNIFFED_BYTES]
    has_low_bytes = re.search(_LOW_BYTES, beginning) and not encoding
    if has_low_bytes and (b"\0\0" in beginning or _guess_utf16(beginning, 0.5)):  # single zeros: `find -print0`
        raise _not_utf8(data, label, "", file)
    return text[1:] if encoding == "utf-8" else text


def _not_utf8(data: bytes, label: str, place: str, file: Path | None) -> UsageError:
    """Build the error that says what data is: another kind of file, or text in another encoding."""
    beginning = data[:_SNIFFED_BYTES]
    kind = next((kind for magic, kind in _BINARY_TYPES.items() if data.startswith(magic)), "")
    encoding = "" if kind else _guess_utf16(beginning, 0.2 if place else 0.5)
    if kind or (b"\0\0" in beginning and not encoding):
        return UsageError(tr("{what} is {kind}, not text.", what=label, kind=tr(kind or mark("a binary file"))))
    if not encoding and not re.search(_LOW_BYTES, beginning):
        encoding = _guess_encoding(data)
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


def _guess_utf16(data: bytes, min_share: float) -> str:
    """Return the byte order of what looks like UTF-16 without a byte order mark; "" if it does not look so."""
    names = ("UTF-16LE", "UTF-16BE")
    return next((name for name in names if _share(_decode(data, name), _COMMON_IN_UTF16) > min_share), "")


def _guess_encoding(data: bytes) -> str:
    """Return the likely encoding of text with one or two bytes per character; "" if none is likely."""
    sample = re.sub(rb"\A[\0-\x7f]+", b"", data)[:_SNIFFED_BYTES]
    runs = re.findall(_HIGH_BYTES, sample)
    has_single_accents = sum(map(len, runs)) < 1.8 * len(runs)
    shares = {"": 0.0}
    for name, (common, min_share) in _COMMON_CHARACTERS.items():
        share = _share(re.sub(r"[\0-\x7f]", "", _decode(sample, name)), common)
        if share >= min_share and name != ("WINDOWS-1251" if has_single_accents else "WINDOWS-1252"):
            shares[name] = share
    if len(shares) == 1 and re.fullmatch(r"[\0-\x7f\u4e00-\u9fff]+", _decode(sample, "gb2312")):
        return "GB18030"  # a few words
    return max(shares, key=lambda name: shares[name])


def _decode(sample: bytes, encoding: str) -> str:
    """Decode text whose last character may be cut; "" if it has another encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return ""


def _share(text: str, characters: str) -> float:
    return sum(character in characters for character in text) / max(1, len(text))
