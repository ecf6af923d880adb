"""Text of files that people attach: text and code as they are, PDF, DOCX and HTML by libraries that know them."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.errors import ModelNotFound, QwenlocalError, UsageProblem
from qwenlocal.language import mark, tr

MOST_BYTES = 64 << 20
_LOOKED_AT = 8192
_MENTION = re.compile(r'(?<![A-Za-z0-9_./@-])@(?:"([^"\n]+)"|(\S{1,4096}))')
_ENDS = ".,;:!?)]}'\"，。；：？！、）】」』”’"  # what may follow a file's name without a space
_PICTURES = {
    b"\x89PNG": mark("a picture (PNG)"),
    b"\xff\xd8\xff": mark("a picture (JPEG)"),
    b"GIF8": mark("a picture (GIF)"),
    b"RIFF": mark("sound, a film or a picture (RIFF)"),
    b"\x1f\x8b": mark("compressed (gzip)"),
    b"PK\x03\x04": mark("a ZIP archive"),
    b"\x7fELF": mark("a program"),
    b"MZ": mark("a program"),
    b"GGUF": mark("a model"),
    b"SQLite": mark("a database"),
}


@dataclass(frozen=True)
class Document:
    """A file's name and its text."""

    name: str
    text: str

    def as_message(self) -> str:
        """Its text for the model, fenced by more backticks than it has itself."""
        longest = max((len(run) for run in re.findall(r"`{3,}", self.text)), default=2)
        fence = "`" * (longest + 1)
        return f"{self.name}:\n{fence}{Path(self.name).suffix.lstrip('.')}\n{self.text.rstrip()}\n{fence}"


def read_document(path: Path) -> Document:
    """
    The text of a file.

    Raises
    ------
    ModelNotFound: there is no such file, or it cannot be read. UsageProblem: it holds no text; the reason is said.
    """
    try:
        if path.is_dir():
            raise UsageProblem(tr("{path} is a folder.", path=path), hint=tr("Give one of its files."))
        if path.exists() and not path.is_file():
            raise UsageProblem(tr("{path} is a device or a pipe, not a file.", path=path))
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UsageProblem(
                tr(
                    "{name} has {size:,.0f} MB; {most} MB are read at most.",
                    name=path.name,
                    size=size / 1e6,
                    most=MOST_BYTES >> 20,
                )
            )
        data = path.read_bytes()
    except OSError as reason:
        why = tr("The file {path} cannot be read: {reason}.", path=path, reason=reason.strerror)
        raise ModelNotFound(str(path), reason=why, hint=tr("Check the path.")) from reason
    reader = _READERS.get(path.suffix.lower())
    text = _read_with(reader, path) if reader else _plain(path, data)
    if not text.strip():
        raise UsageProblem(
            tr("{name} holds no text.", name=path.name),
            hint=tr("A scanned page is a picture; this model reads text only."),
        )
    return Document(path.name, text)


def mentioned(text: str, folder: Path) -> list[Path]:
    """
    The files that `text` mentions as `@path` or `@"a path"`; what is no file ("@alice") is left alone.

    `mentioned("compare @a.txt with (@b.txt)", folder)` are those two, where they exist. Chinese needs no spaces:
    `mentioned("总结@a.txt，谢谢", folder)` is a.txt.
    """
    found = [path for word in _words(text) if (path := _file(word, folder))]
    return list(dict.fromkeys(found))


def missing(text: str, folder: Path) -> list[str]:
    """
    What `text` mentions as a file and is none: `@"in quotes"`, `@./with/a/folder`, `@with.an.ending` of a known kind.

    "@alice", "@app.get" and "@types/node" are no files, and were not meant to be.
    """
    quoted = {match[1] for match in _MENTION.finditer(text) if match[1]}
    absent = [word for word in _words(text) if _file(word, folder) is None]
    names = [word if word in quoted else _name_in(word) for word in absent]
    return list(dict.fromkeys(name for name in names if name))


def _words(text: str) -> Iterator[str]:
    for match in _MENTION.finditer(text):
        yield match[1] or match[2]


def _file(word: str, folder: Path) -> Path | None:
    """The longest beginning of `word` that is a file, where a name may end: before a full stop, before 中文."""
    for end in range(len(word), 0, -1):
        if end == len(word) or word[end] in _ENDS or not word[end].isascii():
            try:
                path = (folder / Path(word[:end]).expanduser()).resolve()
                if path.is_file():
                    return path
            except (OSError, RuntimeError, ValueError):  # too long, nobody's home, letters that no name has: no file
                continue
    return None


def _name_in(word: str) -> str:
    """What of `word` was meant as a file's name; "" where nothing was."""
    until_end = re.split(f"['\"’”]|[{re.escape(_ENDS)}](?![A-Za-z0-9/.])", word.rstrip(_ENDS), maxsplit=1)[0]
    plain = re.match(r"[!-~]*", until_end)
    return next((name for name in (until_end, plain[0] if plain else "") if _looks_like_a_file(name)), "")


def _looks_like_a_file(name: str) -> bool:
    return name.startswith(("./", "../", "/", "~/")) or mimetypes.guess_type(name.rstrip("."))[0] is not None


def _plain(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data[:_LOOKED_AT]:
        raise _no_text(path, data) or UsageProblem(
            tr("{name} is a binary file; this model reads text only.", name=path.name)
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise _no_text(path, data) or UsageProblem(
            tr(
                "{name} is not UTF-8 text (byte {start:,} is 0x{data:02X}).",
                name=path.name,
                start=wrong.start + 1,
                data=data[wrong.start],
            ),
            hint=tr("If it is text in another encoding, convert it: iconv -f GB18030 -t UTF-8 {name}", name=path.name),
        ) from wrong


def _no_text(path: Path, data: bytes) -> UsageProblem | None:
    """What a file without text is, by its first bytes; text may begin with "GGUF", too."""
    for magic, what in _PICTURES.items():
        if data.startswith(magic):
            return UsageProblem(tr("{name} is {what}; this model reads text only.", name=path.name, what=tr(what)))
    return None


def _read_with(reader: Callable[[Path], str], path: Path) -> str:
    try:
        return reader(path)
    except QwenlocalError:
        raise
    except Exception as reason:  # whatever a library stumbles over in somebody's file
        raise UsageProblem(
            tr(
                "{name} cannot be read: {kind}: {reason}.",
                name=path.name,
                kind=type(reason).__name__,
                reason=reason,
            ),
            hint=tr("Export its text, and attach that."),
        ) from reason


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    return "\n\n".join(page.extract_text() or "" for page in PdfReader(path).pages)


def _docx(path: Path) -> str:
    import docx

    document = docx.Document(str(path))
    parts = [paragraph.text for paragraph in document.paragraphs]
    for table in document.tables:
        parts += [" | ".join(cell.text for cell in row.cells) for row in table.rows]
    return "\n".join(parts)


def _html(path: Path) -> str:
    import html2text

    converter = html2text.HTML2Text(bodywidth=0)
    converter.ignore_images = True
    return str(converter.handle(_plain(path, path.read_bytes())))


_READERS: Mapping[str, Callable[[Path], str]] = {".pdf": _pdf, ".docx": _docx, ".html": _html, ".htm": _html}
