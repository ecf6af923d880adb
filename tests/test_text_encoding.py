"""Encodings of text that commands and chats read: files, pipes, batches, schemas, grammars, prompts."""

from __future__ import annotations

import codecs
import contextlib
import json
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SAYS, Run
from hypothesis import given
from hypothesis import strategies as st
from terminal import Open, start_chat

from qwenlocal.chat.documents import read_document
from qwenlocal.errors import ModelNotFound, UsageError
from qwenlocal.paths import Folders
from qwenlocal.text_encoding import decode_text, read_text

MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def encode(text: str, encoding: str) -> bytes:
    """Encode with a byte order mark, as PowerShell and Notepad do."""
    return MARKED[encoding] + text.encode(encoding)


class TestDecoding:
    @pytest.mark.parametrize("encoding", MARKED)
    @given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
    def test_byte_order_marks_are_obeyed_and_removed(self, encoding: str, text: str) -> None:
        assert decode_text(encode(text, encoding), "x") == text

    # Characters below U+0009 do not occur in texts, but in UTF-16: "\x040" is the letter а there.
    @given(st.text(st.characters(min_codepoint=9, exclude_characters="\ufeff", exclude_categories=["Cs"])))
    def test_text_without_a_byte_order_mark_is_utf8(self, text: str) -> None:
        assert decode_text(text.encode(), "x") == text

    @given(st.binary(max_size=100))
    def test_any_bytes_are_text_or_a_usage_error_in_one_sentence(self, data: bytes) -> None:
        try:
            decode_text(data, "x")
        except UsageError as error:
            assert str(error).startswith("x is ")

    @pytest.mark.parametrize(
        ("text", "codec", "name"),
        [
            ("请总结这篇文章", "gbk", "GB18030"),
            ("联通", "gbk", "GB18030"),
            ("Summary: 深度学习模型 (2024)", "gb18030", "GB18030"),
            ("請總結這篇文章", "big5", "BIG5"),
            ("こんにちは世界", "shift_jis", "SHIFT_JIS"),
            ("テスト", "shift_jis", "SHIFT_JIS"),
            ("이 글을 요약해 주세요", "euc_kr", "EUC-KR"),
            ("Привет, мир", "cp1251", "WINDOWS-1251"),
            ("ДОГОВОР", "cp1251", "WINDOWS-1251"),
            ("café", "cp1252", "WINDOWS-1252"),
            ("Größe und Höhe", "latin-1", "WINDOWS-1252"),
            ("It’s “quoted” – here", "cp1252", "WINDOWS-1252"),
            ("plain text", "utf-16-le", "UTF-16LE"),
            ("plain text", "utf-16-be", "UTF-16BE"),
            ("请把下面的合同翻译成英文。", "utf-16-le", "UTF-16LE"),
            ("次の文章を要約して", "utf-16-be", "UTF-16BE"),
            ("다음 글을 요약해 줘\n", "utf-16-le", "UTF-16LE"),
            ("Перевод", "utf-16-le", "UTF-16LE"),
        ],
    )
    def test_another_encoding_is_named_with_the_command_that_converts_it(
        self, text: str, codec: str, name: str, tmp_path: Path
    ) -> None:
        source = tmp_path / "my notes.txt"
        source.write_bytes(text.encode(codec))
        with pytest.raises(UsageError, match=f"my notes.txt is not UTF-8 text; it looks like {name}") as caught:
            read_text(source)
        command = caught.value.hint.removeprefix("To convert it: ")
        subprocess.run(["sh", "-c", command], check=True)
        assert read_text(tmp_path / "my notes.utf8.txt") == text

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"\x89PNG\r\n\x1a\n\0\0", "is a PNG image, not text"),
            (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "is a PDF document, not text"),
            (b"ab\0\0cd", "is a binary file, not text"),
            (b"\xff\xfea\0b", r"is damaged UTF-16 text \(byte 5 is 0x62\)"),
            (b"\xef\xbb\xbfab\xff", r"is damaged UTF-8 text \(byte 6 is 0xFF\)"),
            (b"10 \x80\x81", r"is not UTF-8 text \(byte 4 is 0x80\)"),
            ("Μετάφρασε αυτό το κείμενο".encode("cp1253"), r"is not UTF-8 text \(byte 1 is 0xCC\)"),
            ("Přeložte tento text".encode("cp1250"), r"is not UTF-8 text \(byte 2 is 0xF8\)"),
        ],
    )
    def test_binary_data_is_refused(self, data: bytes, reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            decode_text(data, "x")

    def test_separate_zero_bytes_are_text(self) -> None:
        assert decode_text(b"a.txt\0b.txt\0", "x") == "a.txt\0b.txt\0"

    def test_folders_missing_and_long_files_are_reported(self, tmp_path: Path) -> None:
        (tmp_path / "long").write_bytes(b"x" * 11)
        with pytest.raises(UsageError, match="is a folder"):
            read_text(tmp_path)
        with pytest.raises(ModelNotFound, match="There is no file"):
            read_text(tmp_path / "none")
        with pytest.raises(UsageError, match="no model reads that much"):
            read_text(tmp_path / "long", limit=10)


@pytest.mark.parametrize("encoding", MARKED)
class TestReaders:
    def test_prompts_from_files_and_pipes_are_decoded(
        self, encoding: str, qwenlocal: Run, speaking_model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "p.txt").write_bytes(encode("Was hältst du davon?\r\n", encoding))
        plain = qwenlocal("run", str(speaking_model), "Was hältst du davon?", "--stats").stderr
        count = plain[plain.index("prompt ") :].split(" tokens")[0]
        with (tmp_path / "p.txt").open("rb") as pipe:
            piped = qwenlocal("run", str(speaking_model), "--stats", stdin=pipe)
        for result in (piped, qwenlocal("run", str(speaking_model), "--stats", "-f", "p.txt")):
            assert (result.returncode, result.stdout) == (0, f"{SAYS}\n")
            assert f"{count} tokens" in result.stderr

    def test_batches_schemas_and_grammars_are_decoded(
        self, encoding: str, invoke: Run, random_model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "in.jsonl").write_bytes(encode('{"prompt": "é", "id": "ü"}\r\nplain\r\n', encoding))
        (tmp_path / "s.json").write_bytes(encode('{"enum": ["é"]}\r\n', encoding))
        (tmp_path / "g.gbnf").write_bytes(encode('root ::= "é"\r\n', encoding))
        answers = invoke("run", str(random_model), "--batch", "in.jsonl", "--schema", "s.json").stdout.splitlines()
        assert [(line["id"], line["answer"], line["complete"]) for line in map(json.loads, answers)] == [
            ("ü", '"é"', True),
            (2, '"é"', True),
        ]
        assert invoke("run", str(random_model), "Hi", "--grammar", "g.gbnf").stdout == "é\n"

    def test_documents_are_decoded(self, encoding: str, tmp_path: Path) -> None:
        for name in ("a.txt", "a.html"):
            (tmp_path / name).write_bytes(encode("<p>né</p>", encoding))
            assert "né" in read_document(tmp_path / name).text


def test_chats_load_conversations_and_prompts_in_utf16(
    terminal: Open, speaking_model: Path, folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_bytes(encode('[{"role": "user", "content": "Grüße"}]', "utf-16-le"))
    (tmp_path / "l1.json").write_bytes('["é"]'.encode("latin-1"))
    prompts = folders.home / "prompts"
    prompts.mkdir(parents=True)
    (prompts / "kind.txt").write_bytes(encode("Sei nett zu Jürgen.", "utf-16-be"))
    chat = start_chat(terminal, speaking_model)
    chat.enter("/load c.json", "Last question: Grüße")
    chat.enter("/prompt kind", "System prompt set: kind")
    chat.enter("/system", "Sei nett zu Jürgen")
    chat.enter("/load l1.json", "looks like WINDOWS-1252")


# --- waiting for standard input


@contextlib.contextmanager
def open_pipe(seconds: float, text: str = ""):  # type: ignore[no-untyped-def]
    with subprocess.Popen(["sh", "-c", f"sleep {seconds}; printf '{text}'"], stdout=subprocess.PIPE) as process:
        yield process.stdout


@pytest.mark.parametrize(("prompt", "text"), [(("Hi",), ""), ((), "Hi")])
def test_a_note_says_that_the_end_of_standard_input_is_waited_for(
    prompt: tuple[str, ...], text: str, qwenlocal: Run, speaking_model: Path
) -> None:
    with open_pipe(3, text) as pipe:
        result = qwenlocal("run", "-m", str(speaking_model), *prompt, stdin=pipe)
    assert (result.returncode, result.stdout) == (0, f"{SAYS}\n")
    assert "Waiting for the end of standard input …" in result.stderr
    assert ("< /dev/null" in result.stderr) == bool(prompt)


def test_no_note_is_printed_if_standard_input_ends_soon(qwenlocal: Run, speaking_model: Path) -> None:
    started = time.monotonic()
    for options in ({"input": "text"}, {"stdin": subprocess.DEVNULL}):
        assert "Waiting" not in qwenlocal("run", str(speaking_model), "Hi", **options).stderr
    assert time.monotonic() - started < 30
