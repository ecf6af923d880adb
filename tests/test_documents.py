"""Attached files: read as text, refused with a reason, cut to a number of tokens."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenlocal.chat.documents import (
    Document,
    find_mentions,
    find_missing_mentions,
    format_mention,
    read_document,
    select_passages,
    truncate_to_tokens,
)
from qwenlocal.chat.thread import Thread
from qwenlocal.errors import ModelNotFound, QwenlocalError, UsageError
from qwenlocal.terminal.attachments import attach_documents, replace_pastes
from qwenlocal.terminal.pastes import Paste
from qwenlocal.terminal.session import Session


def words(text: str) -> int:
    """Count words in place of tokens."""
    return len(text.split())


# --- reading


def test_text_and_code_are_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("\ufeffdef f():\n    return '你好'\n", "utf-8")
    assert read_document(tmp_path / "a.py") == Document("a.py", "def f():\n    return '你好'\n")
    (tmp_path / "wide.txt").write_bytes("héllo".encode("utf-16"))
    assert read_document(tmp_path / "wide.txt").text == "héllo"


def test_the_fence_is_longer_than_any_in_the_document() -> None:
    message = Document("a.md", "x\n````\ny\n````\n").to_markdown()
    assert message.startswith("a.md:\n`````md\nx")
    assert message.endswith("\n`````")


def test_html_is_converted_to_text(tmp_path: Path) -> None:
    page = "<html><head><style>p{}</style><script>evil()</script></head><body><h1>Title</h1><p>Some <b>text</b></p>"
    (tmp_path / "a.html").write_text(page)
    text = read_document(tmp_path / "a.html").text
    assert "Title" in text and "Some **text**" in text
    assert "evil" not in text and "p{}" not in text


def test_docx_is_converted_to_text(tmp_path: Path) -> None:
    import docx

    document = docx.Document()
    document.add_paragraph("First paragraph.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.save(str(tmp_path / "a.docx"))
    assert read_document(tmp_path / "a.docx").text == "First paragraph.\nleft | right"


def pdf(text: str) -> bytes:
    """A page with one line on it."""
    stream = f"BT /F1 18 Tf 10 100 Td ({text}) Tj ET".encode()
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        page,
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        font,
    ]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end


def test_pdf_is_converted_to_text(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Hello from a PDF"))
    assert read_document(tmp_path / "a.pdf").text.strip() == "Hello from a PDF"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n....", "is a PNG image"),
        ("a.jpg", b"\xff\xd8\xff\xe0..", "is a JPEG image"),
        ("a.txt", b"abc\0\0def", "is a binary file"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text; it looks like WINDOWS-1252"),
        ("a.gguf", b"GGUF\3\0\0\0", "is a GGUF model"),
        ("a.txt", b"  \n ", "contains no text"),
        ("a.pdf", b"%PDF-1.4 nonsense", "Cannot read a.pdf"),
        ("a.docx", b"PK\3\4nonsense", "Cannot read a.docx"),
    ],
)
def test_files_without_text_are_refused_with_the_reason(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=reason):
        read_document(tmp_path / name)


def test_missing_files_and_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="There is no file"):
        read_document(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="is a folder"):
        read_document(tmp_path)


@given(st.sampled_from([".txt", ".pdf", ".docx", ".html", ".py"]), st.binary(max_size=200))
def test_any_bytes_are_text_or_raise_a_qwenlocal_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("d") / f"x{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(QwenlocalError):
        assert read_document(path).text.strip()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no /dev/zero")
def test_a_device_is_refused() -> None:
    with pytest.raises(UsageError, match="is a device or a pipe"):
        read_document(Path("/dev/zero"))


def test_files_are_mentioned_with_an_at_sign(tmp_path: Path) -> None:
    for name in ("a.txt", "b c.txt", "d.md"):
        (tmp_path / name).write_text("x")
    text = 'mail me@a.txt, ask @alice: compare @a.txt, @"b c.txt" and @d.md. Again @a.txt'
    assert [path.name for path in find_mentions(text, tmp_path)] == ["a.txt", "b c.txt", "d.md"]


@pytest.mark.parametrize(
    "text",
    [
        "总结@a.txt",
        "总结 @a.txt，谢谢",
        "请总结@a.txt谢谢",
        "@a.txt。",
        "(@a.txt)",
        "@a.txt's",
        "“@a.txt”",
        "@a.txt?!",
        "@a.txt...",
    ],
)
def test_punctuation_and_chinese_end_a_file_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert [path.name for path in find_mentions(text, tmp_path)] == ["a.txt"]
    assert find_missing_mentions(text, tmp_path) == []
    assert find_missing_mentions(text.replace("a.txt", "b.txt"), tmp_path) == ["b.txt"]


@pytest.mark.parametrize(
    "text",
    [
        '@"my notes.txt"',
        "@'my notes.txt'",
        "@“my notes.txt”？",
        "see @my notes.txt, please",
        "(@my notes.txt)",
        "@my\\ notes.txt and more",
        '@"my notes.txt',
        "总结@my notes.txt谢谢",
    ],
)
def test_a_name_with_spaces_is_found_with_and_without_quotes(text: str, tmp_path: Path) -> None:
    (tmp_path / "my notes.txt").write_text("x")
    assert [path.name for path in find_mentions(text, tmp_path)] == ["my notes.txt"]
    assert find_missing_mentions(text, tmp_path) == []
    assert find_missing_mentions(text.replace("my", "your"), tmp_path) == ["your notes.txt"]


def test_words_in_code_are_no_missing_files(tmp_path: Path) -> None:
    code = "@property def x.py\n@import theme.css\n@media print and style.css"
    assert find_missing_mentions(code, tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "my notes.txt",
        "it's.txt",
        "it's (1) #2.txt",
        '"x" y.txt',
        "'a'.txt",
        "größe 文件.txt",
        "9.41\u202fAM.txt",
    ],
)
def test_a_formatted_mention_is_found_again(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    assert [path.name for path in find_mentions(f"see {format_mention(name)}, please", tmp_path)] == [name]


@pytest.mark.parametrize("text", ["GGUF is a file format.", "MZ", "SQLite stores tables.", "GIF89a or PNG?"])
def test_text_may_begin_like_a_binary_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text)
    assert read_document(tmp_path / "a.md").text == text


def test_another_encoding_is_reported(tmp_path: Path) -> None:
    (tmp_path / "p.html").write_bytes(b"<p>caf\xe9</p>")
    with pytest.raises(UsageError, match=r"^p.html is not UTF-8 text") as caught:
        read_document(tmp_path / "p.html")
    assert "iconv" in caught.value.hint


def test_missing_files_are_distinguished_from_other_words_with_an_at_sign(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    text = '@a.txt @b.txt, @"my notes" @./Makefile and @alice, @app.get, @types/node, me@c.txt, https://x.org/@c.html'
    assert find_missing_mentions(text, tmp_path) == ["b.txt", "my notes", "./Makefile"]


@given(st.text())
@example("x" * 5000)
@example("~nobody-of-this-name/a.txt")
@example("a\0b.txt")
def test_any_word_with_an_at_sign_is_handled(name: str) -> None:
    folder = Path(__file__).parent
    text = f'see @{name} and @"{name}"'
    files, missing = find_mentions(text, folder), find_missing_mentions(text, folder)
    assert all(path.is_file() for path in files)
    assert len(files) + len(missing) <= text.count("@")


def test_a_paste_that_contains_another_is_shortened_as_a_whole() -> None:
    inner, outer = Paste("paste 1", "x\n"), Paste("paste 2", "a\nx\nb\n")
    parts = [replace(inner, text="[1]"), replace(outer, text="[2]")]
    assert replace_pastes("x\n vs a\nx\nb\n", [inner, outer], parts) == "[1] vs [2]"


# --- cutting

LONG = "\n\n".join(f"Paragraph {n}. " + f"word{n} " * 120 for n in range(20))


def test_passages_match_the_question_and_keep_their_order() -> None:
    text = LONG.replace("word7", "tokenizer").replace("word15", "分词器")
    selected = select_passages(text, "What does the Tokenizer do? 分词器", 300, words)
    assert "tokenizer" in selected and "分词器" in selected
    assert selected.index("tokenizer") < selected.index("分词器")
    assert "…" in selected
    assert words(selected) <= 300


@given(st.text(max_size=400), st.text(max_size=30), st.integers(1, 60))
def test_passages_stay_within_the_token_limit(text: str, question: str, max_tokens: int) -> None:
    selected = select_passages(text, question, max_tokens, words)
    assert words(selected.replace("…", "")) <= max_tokens


def test_truncation_keeps_whole_lines() -> None:
    text = "\n".join(f"line number {n}" for n in range(100))
    short = truncate_to_tokens(text, 30, words)
    assert short == "\n".join(f"line number {n}" for n in range(10)) + "\n…"
    assert truncate_to_tokens("x" * 10_000, 20, lambda t: len(t)).startswith("xxxx")


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
    window = SimpleNamespace(n_ctx=2048, count_prompt_tokens=lambda thread: 20, count_tokens=count_tokens)
    session.loaded_conversation = SimpleNamespace(window=window, thread=Thread())  # type: ignore[assignment]
    document = Document("big.txt", "".join(lines))
    message = attach_documents(session, "Where is the needle?", [document])
    assert message and kept in message
    assert 500 < len(message.split()) < 2048
    assert "more than any context holds" in said[0]
    assert "% of the text" in said[-1]
    assert counted < len(document.text) / 20
