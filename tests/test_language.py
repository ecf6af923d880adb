"""Translations: the choice of a language, complete catalogs, and messages in Chinese."""

from __future__ import annotations

import ast
import string
from gettext import GNUTranslations
from pathlib import Path

import pytest
from babel.messages import Catalog
from babel.messages.pofile import read_po
from conftest import SAYS, Run
from terminal import Open
from tool_modules import load_tool

from qwenlocal.formatting import join_sentences
from qwenlocal.i18n import tr
from qwenlocal.terminal.commands.table import COMMANDS, KEYS

messages = load_tool("messages")
LANGUAGES = sorted(path.name for path in messages.LOCALE.iterdir())


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANGUAGE", raising=False)
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")


def placeholders(text: str) -> set[str]:
    """Return the placeholders of a sentence with their formats: `{count:,}` is "count:,!None"."""
    return {f"{name}:{spec}!{how}" for _, name, spec, how in string.Formatter().parse(text) if name is not None}


def test_without_a_locale_messages_are_english(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert tr("{count:,} tokens", count=1234) == "1,234 tokens"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "en_GB.UTF-8", "xx_YY", "POSIX", "../../etc", "zh\x01"])
def test_a_locale_without_a_translation_gives_english(locale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGUAGE", locale)
    assert tr("send") == "send"


@pytest.mark.parametrize("locale", ["zh_CN.UTF-8", "zh", "zh_SG", "xx:zh"])
def test_a_chinese_locale_gives_chinese(locale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGUAGE", locale)
    assert tr("{count:,} tokens", count=1234) == "1,234 个词元"


def test_a_sentence_without_a_translation_stays_english(chinese: None) -> None:
    assert tr("No such sentence with {places}.", places="a place") == "No such sentence with a place."
    assert tr("") == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_is_translated_and_keeps_its_placeholders(language: str) -> None:
    for message in messages.collect(language):
        if message.id:
            assert message.string, f"not translated: {message.id}"
            assert placeholders(str(message.string)) == placeholders(str(message.id)), message.id


def test_every_sentence_of_the_code_is_found_by_the_tool() -> None:
    found = {message.id for message in messages.collect(LANGUAGES[0])}
    for file in sorted((messages.ROOT / "qwenlocal").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in messages.KEYWORDS:
                sentence = call.args[0]
                assert not isinstance(sentence, ast.JoinedStr), f"{file}:{call.lineno}"
                assert not isinstance(sentence, ast.Constant) or sentence.value in found, f"{file}:{call.lineno}"


def entries(catalog: Catalog) -> dict[str, object]:
    """Return the messages of a catalog with their translations and source files, without the tool's own header."""
    return {
        str(message.id): (message.string, message.locations, message.auto_comments) for message in catalog if message.id
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_catalogs_are_up_to_date(language: str) -> None:
    catalog, po = messages.collect(language), messages.po_path(language)
    with po.open("rb") as file:
        assert entries(read_po(file, language)) == entries(catalog), "run: .venv/bin/python tools/messages.py"
    with po.with_suffix(".mo").open("rb") as file:
        compiled = GNUTranslations(file)
    for message in catalog:
        if message.id:
            assert compiled.gettext(str(message.id)) == message.string, "run: .venv/bin/python tools/messages.py"


def test_every_command_and_key_is_explained_in_chinese(chinese: None) -> None:
    for english in [command.help for command in COMMANDS] + [what for _, what in KEYS]:
        assert tr(english) != english


def test_chinese_sentences_have_no_space_between_them(chinese: None) -> None:
    assert join_sentences("没有文件。", "", "换一个名称。") == "没有文件。换一个名称。"
    assert join_sentences("", "One.", "", "Two.", "") == "One. Two."


def test_a_chat_speaks_the_language_of_the_terminal(terminal: Open, speaking_model: Path) -> None:
    chat = terminal("run", str(speaking_model), LANG="zh_CN.UTF-8")
    chat.wait_for("查看命令，Ctrl-D 离开")
    chat.wait_for_prompt()
    chat.enter("Hi", SAYS)
    chat.wait_for("个词元")
    chat.enter("/hlp", "没有 /hlp 这个命令")
    chat.enter("/ctx", "已用 ")


def test_an_error_uses_the_language_of_the_terminal(qwenlocal: Run) -> None:
    result = qwenlocal("run", "./nothing.gguf", "Hi", environment={"LANG": "zh_CN.UTF-8"})
    assert result.returncode == 3
    assert "qwenlocal: " in result.stderr
    assert "没有" in result.stderr
