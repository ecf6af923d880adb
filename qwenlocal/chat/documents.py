"""
Attached files: find their names in a message (`@notes.txt`), read their text, and cut it to a number of tokens.

Text and code are read as they are; PDF, DOCX and HTML through libraries.
"""

from __future__ import annotations

import bisect
import collections
import math
import mimetypes
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.errors import ModelNotFound, QwenlocalError, UsageError
from qwenlocal.i18n import tr
from qwenlocal.paths import unquote_path
from qwenlocal.text_encoding import MAX_BYTES, decode_text

ANSWER_SHARE = 0.1  # of the context, reserved for the answer to a message with documents
_MIN_TOKENS = 64  # of a document that is cut
_QUOTES = {'"': '"', "'": "'", "“": "”"}  # opening and closing ones
_AT, _DOUBLE, _SINGLE, _CURLY = r"(?<![A-Za-z0-9_./@-])@", r'(?:\\"|[^"\n])', r"[^'\n]", r"[^”\n]"
# A name in quotes, in which \" is a quote, or the word that a name begins with.
_MENTION = re.compile(rf"""{_AT}(?:"({_DOUBLE}+)"|'({_SINGLE}+)'|“({_CURLY}+)”|(\S{{1,4096}}))""")
# The same at the end of a text without the closing quote; in the word, a backslash may come before a space.
_OPEN_MENTION = re.compile(rf"""{_AT}(?:"({_DOUBLE}*)|'({_SINGLE}*)|“({_CURLY}*)|((?!["'“])(?:\\.|[^\s\\])*\\?))\Z""")
_MORE_WORDS = re.compile(r"(?:[^\S\n]+\S{1,100}){0,7}")  # of a name with spaces that is not in quotes
_MAX_MISSING_WORDS = 4
_CLOSING = ".,;:!?)]}'\"，。；：？！、）】」』”’"  # punctuation that may follow a file name without a space
# A character of Chinese, Japanese or Korean is a word of its own.
_WORD = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]|\w+")
_K1, _B = 1.2, 0.75  # Robertson, Zaragoza: The Probabilistic Relevance Framework: BM25 and Beyond, 2009
_PASSAGE = 1200  # characters, about 300 tokens
_MAX_MISFITS = 50  # passages too long for the rest of the limit, after which no more are tried


@dataclass(frozen=True)
class Document:
    """A file's name and its text."""

    name: str
    text: str

    def to_markdown(self) -> str:
        """Return the name and the text in a code block, whose fence is longer than any in the text."""
        longest = max((len(run) for run in re.findall(r"`{3,}", self.text)), default=2)
        fence = "`" * (longest + 1)
        return f"{self.name}:\n{fence}{Path(self.name).suffix.lstrip('.')}\n{self.text.rstrip()}\n{fence}"


# --- reading


def read_document(path: Path) -> Document:
    """
    Read the text of a file.

    Raises
    ------
    ModelNotFound: the file does not exist or cannot be read. UsageError: it contains no text, or is too large.
    """
    try:
        if path.is_dir():
            raise UsageError(tr("{path} is a folder.", path=path), hint=tr("Name a file in it."))
        if path.exists() and not path.is_file():
            raise UsageError(tr("{path} is a device or a pipe, not a file.", path=path))
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UsageError(
                tr(
                    "{name} is {size:,.0f} MB; the limit is {limit} MB.",
                    name=path.name,
                    size=size / 1e6,
                    limit=MAX_BYTES >> 20,
                )
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelNotFound.unreadable(path, error) from error
    reader = _READERS.get(path.suffix.lower())
    text = _read_with(reader, path) if reader else decode_text(data, path.name, file=path)
    if not text.strip():
        raise UsageError(
            tr("{name} contains no text.", name=path.name),
            hint=tr("Scanned pages are images; this model reads only text."),
        )
    return Document(path.name, text)


def _read_with(reader: Callable[[Path], str], path: Path) -> str:
    try:
        return reader(path)
    except QwenlocalError:
        raise
    except Exception as error:  # the libraries raise all kinds of exceptions on damaged files
        raise UsageError(
            tr("Cannot read {name}: {kind}: {reason}.", name=path.name, kind=type(error).__name__, reason=error),
            hint=tr("Export it as plain text and attach that file."),
        ) from error


def _read_pdf(path: Path) -> str:
    from pypdf import PdfReader

    return "\n\n".join(page.extract_text() or "" for page in PdfReader(path).pages)


def _read_docx(path: Path) -> str:
    import docx

    document = docx.Document(str(path))
    parts = [paragraph.text for paragraph in document.paragraphs]
    for table in document.tables:
        parts += [" | ".join(cell.text for cell in row.cells) for row in table.rows]
    return "\n".join(parts)


def _read_html(path: Path) -> str:
    import html2text

    converter = html2text.HTML2Text(bodywidth=0)
    converter.ignore_images = True
    return str(converter.handle(decode_text(path.read_bytes(), path.name, file=path)))


_READERS: Mapping[str, Callable[[Path], str]] = {
    ".pdf": _read_pdf,
    ".docx": _read_docx,
    ".html": _read_html,
    ".htm": _read_html,
}


# --- mentions


def format_mention(name: str, quote: str = "") -> str:
    """Return `@notes.txt`, or `@"my notes.txt"` for a name that needs quotes; they open with `quote` if possible."""
    if quote and _QUOTES[quote] not in name:
        return f"@{quote}{name}{_QUOTES[quote]}"
    if name[:1] not in _QUOTES and not re.search(r"\s", name):
        return f"@{name}"
    escaped = name.replace('"', '\\"')
    return f'@"{escaped}"'


def split_open_mention(text: str) -> tuple[str, str, str] | None:
    """
    Return the mention at the end of `text` whose name may go on, its opening quote or "", and the name so far.

    `split_open_mention('see @"my n')` is `('@"my n', '"', "my n")`.
    """
    match = _OPEN_MENTION.search(text)
    if match is None:
        return None
    quote = match[0][1:2] if match[4] is None else ""
    return match[0], quote, _quoted_name(match) or match[4] or ""


def find_mentions(text: str, folder: Path) -> list[Path]:
    """
    Return the files that `text` mentions as `@path` or `@"a path"`; other words with an @ ("@alice") are ignored.

    `find_mentions("compare @a.txt with (@b.txt)", folder)` returns both if they exist. Quotes can be left out, and
    Chinese needs no spaces: `find_mentions("总结@a.txt，谢谢", folder)` returns a.txt.
    """
    paths = (_find_file(quoted or rest, folder) for quoted, rest in _split_mentions(text))
    return list(dict.fromkeys(path for path in paths if path))


def find_missing_mentions(text: str, folder: Path) -> list[str]:
    """
    Return the names that `text` mentions like files although there are none.

    Those are `@"in quotes"`, `@./with/a/folder` and `@name.txt`, with a suffix of a known type; also `@my name.txt` in
    a text of one line, since code has other words with an @. "@alice" and "@app.get" do not look like files.
    """
    is_prose = "\n" not in text
    missing = ((quoted, rest) for quoted, rest in _split_mentions(text) if not _find_file(quoted or rest, folder))
    names = (quoted or _extract_name(rest, max_words=_MAX_MISSING_WORDS if is_prose else 1) for quoted, rest in missing)
    return list(dict.fromkeys(name for name in names if name))


def _split_mentions(text: str) -> Iterator[tuple[str, str]]:
    """Yield for each mention its name in quotes, or "" and the words that may be one."""
    for match in _MENTION.finditer(text):
        quoted = _quoted_name(match)
        more = _MORE_WORDS.match(text, match.end())
        yield quoted, "" if quoted else (match[4] + (more[0] if more else "")).lstrip("".join(_QUOTES))


def _quoted_name(match: re.Match[str]) -> str:
    return (match[1] or "").replace('\\"', '"') or match[2] or match[3] or ""


def _find_file(text: str, folder: Path) -> Path | None:
    """Return the file with the longest name that `text` begins with, as typed or with the backslashes of a shell."""
    for version in dict.fromkeys((text, unquote_path(text))):
        for end in range(len(version), 0, -1):
            if end == len(version) or _may_end_name(version[end]):
                path = os.path.join(folder, os.path.expanduser(version[:end]))  # noqa: PTH118 - fast, never raises
                if os.path.isfile(path):
                    return Path(path).resolve()
    return None


def _may_end_name(following: str) -> bool:
    """True if the name of a file may end before this character."""
    return following in _CLOSING or following.isspace() or not following.isascii()


def _extract_name(text: str, max_words: int) -> str:
    """Return the beginning of `text` that looks like a file name, at most `max_words`, "" if there is none."""
    words = text.replace("\\ ", " ").split()[:max_words]
    for count, word in enumerate(words):
        if count and (words[count - 1][-1] in _CLOSING or word.startswith("@")):
            break
        for last in _cut_word(word):
            name = " ".join([*words[:count], last])
            if _looks_like_file(name):
                return name
    return ""


def _cut_word(word: str) -> tuple[str, str]:
    """Return `word` up to punctuation that ends a file name, and its ASCII characters up to there."""
    before_punctuation = re.split(
        f"['\"’”]|[{re.escape(_CLOSING)}](?![A-Za-z0-9/.])", word.rstrip(_CLOSING), maxsplit=1
    )[0]
    ascii_only = re.match(r"[!-~]*", before_punctuation)
    return before_punctuation, ascii_only[0] if ascii_only else ""


def _looks_like_file(name: str) -> bool:
    return name.startswith(("./", "../", "/", "~/")) or mimetypes.guess_type(name.rstrip("."))[0] is not None


# --- cutting


def cut_documents(
    documents: Sequence[Document],
    join: Callable[[Sequence[Document]], str],
    question: str,
    room: int,
    count_tokens: Callable[[str], int],
    *,
    select: bool,
) -> list[Document]:
    """
    Cut the documents of a message, which `join` makes of them, so that it has `room` tokens.

    Each document that is too long is cut to the passages that match the question (`select`), or to its beginning.
    """
    overhead = count_tokens(join([replace(document, text="") for document in documents]))
    limit = max(_MIN_TOKENS, (room - overhead) // len(documents) - 16)
    return [_cut(document, question, limit, count_tokens, select=select) for document in documents]


def _cut(
    document: Document, question: str, limit: int, count_tokens: Callable[[str], int], *, select: bool
) -> Document:
    text, size = document.text, 2 * limit
    while (tokens := count_tokens(text[:size])) <= limit and size < len(text):
        size *= 2
    if tokens <= limit:
        return document
    if select:
        return replace(document, text=select_passages(text, question, limit, count_tokens))
    return replace(document, text=truncate_to_tokens(text[:size], limit, count_tokens))


def truncate_to_tokens(text: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Return the beginning of `text` in whole lines, at most `max_tokens`, followed by "…"."""
    lines = text.splitlines()
    counts = range(1, len(lines) + 1)
    fitting = bisect.bisect_right(counts, max_tokens, key=lambda count: count_tokens("\n".join(lines[:count])))
    if fitting:
        return "\n".join(lines[:fitting]) + "\n…"
    return text[: max_tokens * 2] + "…"  # the first line is too long: two characters a token is a low estimate


def select_passages(text: str, question: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """
    Return the passages of `text` that match `question` best (BM25), in the order of the text.

    They have at most `max_tokens` tokens together. A line with … marks each gap.
    """
    passages = _split_passages(text)
    scores = _bm25_scores(passages, question)
    selected: set[int] = set()
    remaining, misfits = max_tokens, 0
    for index in sorted(range(len(passages)), key=lambda index: (-scores[index], index)):
        tokens = count_tokens(passages[index]) + 2
        if tokens <= remaining:
            selected.add(index)
            remaining -= tokens
        elif (misfits := misfits + 1) == _MAX_MISFITS:
            break
    parts, previous = [], -1
    for index in sorted(selected):
        if index != previous + 1:
            parts.append("…")
        parts.append(passages[index])
        previous = index
    if previous != len(passages) - 1:
        parts.append("…")
    return "\n\n".join(parts)


def _split_passages(text: str) -> list[str]:
    """Split `text` into paragraphs; join short ones, cut long ones."""
    passages: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for start in range(0, max(1, len(paragraph)), _PASSAGE * 2):
            piece = paragraph[start : start + _PASSAGE * 2].strip("\n")
            if passages and len(passages[-1]) + len(piece) < _PASSAGE:
                passages[-1] += f"\n\n{piece}"
            elif piece.strip():
                passages.append(piece)
    return passages


def _bm25_scores(passages: Sequence[str], question: str) -> list[float]:
    counts = [collections.Counter(_words(passage)) for passage in passages]
    lengths = [sum(counter.values()) for counter in counts]
    average = sum(lengths) / max(1, len(lengths)) or 1.0
    scores = [0.0] * len(passages)
    for term in set(_words(question)):
        matching = sum(term in counter for counter in counts)
        if not matching:
            continue
        idf = math.log(1 + (len(passages) - matching + 0.5) / (matching + 0.5))
        for index, counter in enumerate(counts):
            frequency = counter[term]
            norm = frequency + _K1 * (1 - _B + _B * lengths[index] / average)
            scores[index] += idf * frequency * (_K1 + 1) / norm
    return scores


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
