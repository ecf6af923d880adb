"""Completion of commands, models and files in the input line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from qwenlocal.chat.documents import find_mentions
from qwenlocal.chat.thread import Thread
from qwenlocal.paths import parse_typed_path
from qwenlocal.terminal.completer import ChatCompleter

NAMES = ["my notes.txt", "it's (1) #2.txt", "größe 文件.txt", "plain.txt", "other.gguf", "my model.gguf", ".hidden.txt"]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [*NAMES, "bad\nname.txt", "home/at home.txt", "my folder/a b.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")


def complete(text: str) -> list[str]:
    """Return the lines that completion makes of `text`."""
    models = SimpleNamespace(names=lambda: ["qwen1.5:7b"], nearby_files=lambda: ["./my model.gguf", "./other.gguf"])
    session = SimpleNamespace(models=models, thread=Thread(), prompt_folders=[])
    completions = ChatCompleter(session).get_completions(Document(text), CompleteEvent())  # type: ignore[arg-type]
    return [text[: len(text) + completion.start_position] + completion.text for completion in completions]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("see @my n", []),
        ("see @pl", ["see @plain.txt"]),
        ("(@pl", ["(@plain.txt"]),
        ("总结@gr", ['总结@"größe 文件.txt"']),
        ("@it", ['@"it\'s (1) #2.txt"']),
        ('@"my n', ['@"my notes.txt"']),
        ("@'my n", ["@'my notes.txt'"]),
        ("@my", ['@"my folder/', '@"my model.gguf"', '@"my notes.txt"']),
        ("see @my\\ n", ['see @"my notes.txt"']),
        ("@my\\ ", ['@"my folder/', '@"my model.gguf"', '@"my notes.txt"']),
        ("@my\\ folder/a\\ ", ['@"my folder/a b.txt"']),
        ('@"my\\ n', ['@"my notes.txt"']),
        ("@it\\'s\\ \\(", ['@"it\'s (1) #2.txt"']),
        ("@“my n", ["@“my notes.txt”"]),
        ("@“my f", ["@“my folder/"]),
        ('@"my folder/', ['@"my folder/a b.txt"']),
        ('@"my notes.txt" and @pl', ['@"my notes.txt" and @plain.txt']),
        ("@~/at", ['@"~/at home.txt"']),
        ("@.h", ["@.hidden.txt"]),
        ("@nowhere/", []),
        ("@bad", []),
        ("me@pl", []),
    ],
)
def test_mentioned_files_are_completed_with_the_quotes_they_need(typed: str, completed: list[str]) -> None:
    assert complete(typed) == completed


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/read my n", ["/read my notes.txt"]),
        ("/read my\\ n", ["/read my notes.txt"]),
        ('/load "my n', ['/load "my notes.txt"']),
        ("/export it", ["/export it's (1) #2.txt"]),
        ("/save my f", ["/save my folder/"]),
        ("/system @pl", ["/system @plain.txt"]),
        ("/read ~/at", ["/read ~/at home.txt"]),
        ("/vers", ["/versions"]),
        ("/model q", ["/model qwen1.5:7b"]),
        ("/model ot", ["/model ./other.gguf"]),
        ("/model my", ["/model ./my model.gguf"]),
        ("/model my\\ m", ["/model ./my model.gguf"]),
        ("/model ./o", ["/model ./other.gguf"]),
        ("/model ./p", []),
        ("/model ", ["/model qwen1.5:7b", "/model ./my model.gguf", "/model ./other.gguf"]),
    ],
)
def test_arguments_of_commands_are_completed(typed: str, completed: list[str]) -> None:
    assert complete(typed) == completed


@pytest.mark.parametrize("typed", ["@5", '@"5', '@"5\\"', '@"5\\" d', '@5\\"', '@5"\\ d'])
def test_quotes_in_mentioned_names_are_escaped(typed: str, tmp_path: Path) -> None:
    (tmp_path / '5" disk.txt').write_text("x")
    assert complete(typed) == ['@"5\\" disk.txt"']
    assert find_mentions(complete(typed)[0], tmp_path) == [tmp_path / '5" disk.txt']


def test_accents_are_completed_however_the_file_system_stores_them(tmp_path: Path) -> None:
    (tmp_path / "re\u0301sume\u0301.txt").write_text("x")
    assert complete("@rés") == ["@re\u0301sume\u0301.txt"]


def test_every_file_is_listed_but_hidden_ones() -> None:
    assert len(complete("@")) == len(NAMES) + 1


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("my notes.txt", "my notes.txt"),
        ('"my notes.txt"', "my notes.txt"),
        ("'my notes.txt'", "my notes.txt"),
        ("my\\ notes.txt", "my notes.txt"),
        ("it\\'s\\ \\(1\\)\\ \\#2.txt", "it's (1) #2.txt"),
        ("it's (1) #2.txt", "it's (1) #2.txt"),
        ('"new file.json"', "new file.json"),
    ],
)
def test_typed_paths_may_have_the_quotes_of_a_shell(typed: str, name: str) -> None:
    assert parse_typed_path(typed) == Path(name)


def test_quotes_in_a_name_stay(tmp_path: Path) -> None:
    (tmp_path / '"x"').write_text("x")
    assert parse_typed_path('"x"') == Path('"x"')
