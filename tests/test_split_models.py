"""Models that are split into several GGUF files: their headers count, whatever the files are called."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import expect_exit
from conftest import Run
from gguf_files import split_gguf
from hub import HubServer

from qwenlocal.errors import BadWeights
from qwenlocal.weights.split_model import read_split_model, shard_paths

COMMANDS = [("inspect",), ("plan",), ("run", "Hi", "-n", "1"), ("quantize", "out.gguf", "q8_0")]
each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
FIRST, SECOND = "x-00001-of-00002.gguf", "x-00002-of-00002.gguf"


def call(run: Run, command: tuple[str, ...], path: Path) -> subprocess.CompletedProcess[str]:
    return run(command[0], str(path), *command[1:])


@pytest.fixture
def parts(random_model: Path, tmp_path: Path) -> Path:
    """A folder with the two parts of a model."""
    split_gguf(random_model, tmp_path)
    return tmp_path


@each_command
@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_any_part_stands_for_the_model(command: tuple[str, ...], file: str, parts: Path, invoke: Run) -> None:
    expect_exit(call(invoke, command, parts / file), 0)


@each_command
@pytest.mark.parametrize("name", ["x-00001-of-00013.gguf", "x-00013-of-00013.gguf", "x-00001-of-00001.gguf"])
def test_a_whole_file_may_be_called_like_a_part(
    command: tuple[str, ...], name: str, random_model: Path, tmp_path: Path, invoke: Run
) -> None:
    path = Path(shutil.copy(random_model, tmp_path / name))
    assert shard_paths(path) == [path]
    expect_exit(call(invoke, command, path), 0)


@each_command
@pytest.mark.parametrize(
    ("file", "name", "number"),
    [
        (FIRST, "my model.gguf", 1),
        (SECOND, "model.gguf", 2),
        (FIRST, "x-00001-of-00003.gguf", 1),
        (SECOND, "y-00001-of-00002.gguf", 2),
    ],
)
def test_a_misnamed_part_is_named_with_the_command_that_renames_it(
    command: tuple[str, ...], file: str, name: str, number: int, parts: Path, invoke: Run
) -> None:
    path = (parts / file).rename(parts / name)
    message = expect_exit(call(invoke, command, path), 5)
    assert f"it is part {number} of 2 of a split model, but its name does not say so" in message
    stem = name.removesuffix(".gguf").partition("-0")[0]
    right = parts / f"{stem}-0000{number}-of-00002.gguf"
    assert f"mv {shlex.quote(str(path))} {shlex.quote(str(right))}" in message


@each_command
def test_swapped_names_are_noticed(command: tuple[str, ...], parts: Path, invoke: Run) -> None:
    (parts / FIRST).rename(parts / "other")
    (parts / SECOND).rename(parts / FIRST)
    (parts / "other").rename(parts / SECOND)
    assert "it is part 2 of 2" in expect_exit(call(invoke, command, parts / FIRST), 5)


@each_command
@pytest.mark.parametrize("order", [(FIRST, SECOND), (SECOND, FIRST)])
def test_joined_parts_are_recognized(
    command: tuple[str, ...], order: tuple[str, str], parts: Path, invoke: Run
) -> None:
    path = parts / "joined.gguf"
    path.write_bytes(b"".join((parts / name).read_bytes() for name in order))
    assert "it is 2 parts of a split model, joined into one file" in expect_exit(call(invoke, command, path), 5)


@each_command
def test_a_missing_part_is_named(command: tuple[str, ...], parts: Path, invoke: Run) -> None:
    (parts / SECOND).unlink()
    assert f"split into 2 files, and {SECOND} is missing" in expect_exit(call(invoke, command, parts / FIRST), 5)


@each_command
@pytest.mark.parametrize(
    "ending", [".{letter}", "-split-a{letter}", ".{number:03}", ".part{number}", ".part{number}of11"]
)
def test_pieces_are_joined_with_the_suggested_command(
    command: tuple[str, ...], ending: str, random_model: Path, tmp_path: Path, invoke: Run
) -> None:
    content, size = random_model.read_bytes(), -(-random_model.stat().st_size // 11)
    names = [f"x.gguf{ending.format(letter=chr(96 + number), number=number)}" for number in range(1, 12)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(content[number * size : (number + 1) * size])
    for number in (1, 2):
        message = expect_exit(call(invoke, command, tmp_path / names[number - 1]), 5)
        assert f"it is piece {number} of x.gguf" in message
    subprocess.run(message.partition("Join all pieces: ")[2], shell=True, check=True)
    assert (tmp_path / "x.gguf").read_bytes() == content


@pytest.mark.parametrize("names", [["x.gguf.a"], ["x.gguf.part1of3", "x.gguf.part3of3"]])
def test_pieces_are_not_joined_if_one_is_missing(
    names: list[str], random_model: Path, tmp_path: Path, invoke: Run
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(random_model.read_bytes()[:1000])
    message = expect_exit(invoke("run", str(tmp_path / names[0]), "Hi"), 5)
    assert "Download the other pieces into the same folder" in message


@each_command
def test_a_whole_file_may_be_called_like_a_piece(
    command: tuple[str, ...], random_model: Path, tmp_path: Path, invoke: Run
) -> None:
    expect_exit(call(invoke, command, Path(shutil.copy(random_model, tmp_path / "x.gguf.b"))), 0)


def test_a_part_of_another_model_is_noticed(parts: Path) -> None:
    shutil.copy(parts / FIRST, parts / SECOND)
    with pytest.raises(BadWeights, match="it is part 1 of 2"):
        read_split_model(parts / FIRST)


@pytest.mark.parametrize("number", [1, 2])
def test_the_url_of_one_shard_stands_for_all(number: int, parts: Path, hub: HubServer, invoke: Run) -> None:
    for name in (FIRST, SECOND):
        hub.files[f"/w/{name}"] = (parts / name).read_bytes()
    result = invoke("run", f"{hub.url}/w/{(FIRST, SECOND)[number - 1]}?download=true", "Hi", "-n", "1")
    expect_exit(result, 0)
    del hub.files[f"/w/{SECOND}"]
    assert f"There is nothing at {hub.url}/w/{SECOND}" in expect_exit(invoke("pull", f"{hub.url}/w/{FIRST}"), 3)
