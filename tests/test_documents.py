"""Files that people attach: read as text, refused with a reason, cut to what fits."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenlocal.chat.documents import Document, mentioned, missing, read_document
from qwenlocal.chat.passages import head, pick_passages
from qwenlocal.errors import ModelNotFound, QwenlocalError, UsageProblem


def words(text: str) -> int:
    """What stands in for counting tokens."""
    return len(text.split())


# --- reading


def test_text_and_code_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("\ufeffdef f():\n    return '你好'\n", "utf-8")
    assert read_document(tmp_path / "a.py") == Document("a.py", "def f():\n    return '你好'\n")
    (tmp_path / "wide.txt").write_bytes("héllo".encode("utf-16"))
    assert read_document(tmp_path / "wide.txt").text == "héllo"


def test_a_documents_fence_is_longer_than_any_in_it() -> None:
    message = Document("a.md", "x\n````\ny\n````\n").as_message()
    assert message.startswith("a.md:\n`````md\nx")
    assert message.endswith("\n`````")


def test_a_page_of_html_becomes_text(tmp_path: Path) -> None:
    page = "<html><head><style>p{}</style><script>evil()</script></head><body><h1>Title</h1><p>Some <b>text</b></p>"
    (tmp_path / "a.html").write_text(page)
    text = read_document(tmp_path / "a.html").text
    assert "Title" in text and "Some **text**" in text
    assert "evil" not in text and "p{}" not in text


def test_a_word_document_becomes_text(tmp_path: Path) -> None:
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


def test_a_pdf_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Hello from a PDF"))
    assert read_document(tmp_path / "a.pdf").text.strip() == "Hello from a PDF"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n....", "is a picture \\(PNG\\)"),
        ("a.jpg", b"\xff\xd8\xff\xe0..", "is a picture \\(JPEG\\)"),
        ("a.txt", b"abc\0def", "is a binary file"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 text \\(byte 4 is 0xE9\\)"),
        ("a.gguf", b"GGUF\3\0\0\0", "is a model"),
        ("a.txt", b"  \n ", "holds no text"),
        ("a.pdf", b"%PDF-1.4 nonsense", "a.pdf cannot be read"),
        ("a.docx", b"PK\3\4nonsense", "a.docx cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_with_the_reason(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageProblem, match=reason):
        read_document(tmp_path / name)


def test_what_is_not_there_or_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="No such file"):
        read_document(tmp_path / "none.txt")
    with pytest.raises(UsageProblem, match="is a folder"):
        read_document(tmp_path)


@given(st.sampled_from([".txt", ".pdf", ".docx", ".html", ".py"]), st.binary(max_size=200))
def test_any_bytes_at_all_are_text_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("d") / f"x{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(QwenlocalError):
        assert read_document(path).text.strip()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no /dev/zero")
def test_a_device_is_refused() -> None:
    with pytest.raises(UsageProblem, match="is a device or a pipe"):
        read_document(Path("/dev/zero"))


def test_files_are_mentioned_with_an_at_sign(tmp_path: Path) -> None:
    for name in ("a.txt", "b c.txt", "d.md"):
        (tmp_path / name).write_text("x")
    text = 'mail me@a.txt, ask @alice: compare @a.txt, @"b c.txt" and @d.md. Again @a.txt'
    assert [path.name for path in mentioned(text, tmp_path)] == ["a.txt", "b c.txt", "d.md"]


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
def test_a_name_ends_where_another_word_begins(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert [path.name for path in mentioned(text, tmp_path)] == ["a.txt"]
    assert missing(text, tmp_path) == []
    assert missing(text.replace("a.txt", "b.txt"), tmp_path) == ["b.txt"]


@pytest.mark.parametrize("text", ["GGUF is a file format.", "MZ", "SQLite stores tables.", "GIF89a or PNG?"])
def test_text_may_begin_like_a_binary_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text)
    assert read_document(tmp_path / "a.md").text == text


def test_a_page_in_another_encoding_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "p.html").write_bytes(b"<p>caf\xe9</p>")
    with pytest.raises(UsageProblem, match=r"^p.html is not UTF-8 text") as caught:
        read_document(tmp_path / "p.html")
    assert "iconv" in caught.value.hint


def test_a_file_that_is_not_there_is_told_apart_from_other_words_with_an_at_sign(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    text = '@a.txt @b.txt, @"my notes" @./Makefile and @alice, @app.get, @types/node, me@c.txt, https://x.org/@c.html'
    assert missing(text, tmp_path) == ["b.txt", "my notes", "./Makefile"]


@given(st.text())
@example("x" * 5000)
@example("~nobody-of-this-name/a.txt")
@example("a\0b.txt")
def test_no_word_with_an_at_sign_is_too_odd(name: str) -> None:
    folder = Path(__file__).parent
    text = f'see @{name} and @"{name}"'
    there, absent = mentioned(text, folder), missing(text, folder)
    assert all(path.is_file() for path in there)
    assert len(there) + len(absent) <= text.count("@")


# --- cutting

LONG = "\n\n".join(f"Paragraph {n}. " + f"word{n} " * 120 for n in range(20))


def test_passages_are_those_with_the_questions_words_in_the_order_of_the_text() -> None:
    text = LONG.replace("word7", "tokenizer").replace("word15", "分词器")
    picked = pick_passages(text, "What does the Tokenizer do? 分词器", 300, words)
    assert "tokenizer" in picked and "分词器" in picked
    assert picked.index("tokenizer") < picked.index("分词器")
    assert "…" in picked
    assert words(picked) <= 300


@given(st.text(max_size=400), st.text(max_size=30), st.integers(1, 60))
def test_passages_are_never_more_than_there_is_room_for(text: str, question: str, most: int) -> None:
    picked = pick_passages(text, question, most, words)
    assert words(picked.replace("…", "")) <= most


def test_the_head_is_whole_lines() -> None:
    text = "\n".join(f"line number {n}" for n in range(100))
    short = head(text, 30, words)
    assert short == "\n".join(f"line number {n}" for n in range(10)) + "\n…"
    assert head("x" * 10_000, 20, lambda t: len(t)).startswith("xxxx")
