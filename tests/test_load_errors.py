"""Files that llama.cpp refuses: every command finds out, and none calls a file bad that llama.cpp runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import SMALL, convert_checkpoint
from commands import expect_exit
from conftest import Run
from gguf_files import split_gguf
from gguf_mutations import GgufParts, damaged_files, read_parts
from typer.testing import CliRunner

from qwenlocal.cli.app import app
from qwenlocal.errors import BadWeights
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import read_raw_metadata
from qwenlocal.weights.load_errors import find_load_errors
from qwenlocal.weights.split_model import read_split_model

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="llama.cpp ends its process over some files")

# Damages over which llama.cpp ends the process, or for which its own reason would mislead.
FATAL = {
    "qwen2.block_count: u32 600": "“qwen2.block_count” is 600; it must be between 1 and 512",
    "qwen2.expert_used_count: u32 3": "it must be between 1 and the number of experts (0)",
    "qwen2.attention.layer_norm_rms_epsilon: f32 -1": "epsilon” is -1; it must be 0 or greater",
    "qwen2.attention.key_length: u32 max": "key_length” is 4,294,967,295, but the heads have 16 dimensions",
    "qwen2.rope.scaling.type: string x": "“qwen2.rope.scaling.type” is “x”, which is unknown",
    "qwen2.context_length: i32 -1": "“qwen2.context_length” is of type int32, not uint32",
    "qwen2.rope.freq_base: f32s 2": "“qwen2.rope.freq_base” is of type array of float32, not float32",
    "tokenizer.ggml.pre: string x": "its pre-tokenizer “x” is unknown",
    "tokenizer.ggml.token_type: 287 entries": "has 288 tokens, but “tokenizer.ggml.token_type” has 287 entries",
    "tokenizer.ggml.token_type: 6 at 0": "the token “Ā” is a byte by its type, but not by its name",
    "tokenizer.ggml.tokens: one entry twice": "the vocabulary has the token “Ā” twice",
    "alignment 1, longer header": "not at a multiple of 32",
    "alignment 48, as written": "“general.alignment” is 48, not a power of two",
    "blk.0.ffn_up.weight: type 26": "“blk.0.ffn_up.weight” has the type I32, which it cannot compute with",
    "output_norm.weight: type 1, laid out": "“output_norm.weight” has the type F16, but must be F32",
    "blk.0.ffn_down.weight: type 12": "has rows of 64 values, not a multiple of the 256 in a block of q4_k",
    "qwen2.nextn_predict_layers: u32 3": "layers” is 3; it must be less than the number of layers (1)",
    "qwen2.expert_group_count: u32 3": "is 3; it must be less than the number of experts (0), and divide it",
    "extra my.weight (8, 4)": "the tensor “my.weight” does not belong to this architecture",
}  # fmt: skip


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return convert_checkpoint(write_checkpoint(folder / "dense", config=SMALL), folder / "dense.gguf", "f32")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    checkpoint = write_checkpoint(folder / "tied", config={**SMALL, "tie_word_embeddings": True})
    return convert_checkpoint(checkpoint, folder / "tied.gguf", "q8_0")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    checkpoint = write_checkpoint(folder / "moe", config={**MOE_CONFIG, "num_hidden_layers": 1})
    return convert_checkpoint(checkpoint, folder / "moe.gguf", "bf16")


@pytest.fixture(params=["dense", "tied", "moe"])
def good(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def damaged(dense: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes the file with a damage."""

    def write(description: str) -> Path:
        files = dict(damaged_files(read_parts(dense)))
        (tmp_path / "x.gguf").write_bytes(files[description].encode())
        return tmp_path / "x.gguf"

    return write


def load_errors(path: Path) -> Sequence[str]:
    try:
        model = read_split_model(path)
        return find_load_errors(model, read_raw_metadata(model.paths[0]))
    except BadWeights as error:
        return [str(error)]


def every(step: int, good: Path) -> Iterator[tuple[str, GgufParts]]:
    """Yield every `step`-th damaged file, and those whose problems the tests below name."""
    for number, (description, parts) in enumerate(damaged_files(read_parts(good))):
        if number % step == 0 or description in FATAL:
            yield description, parts


def contradictions(good: Path, folder: Path, step: int) -> list[str]:
    """List damages that we judge differently than llama.cpp."""
    descriptions = []
    for number, (description, parts) in enumerate(every(step, good)):
        (folder / f"{number}.gguf").write_bytes(parts.encode())
        descriptions.append(description)
    paths = [folder / f"{number}.gguf" for number in range(len(descriptions))]
    command = [sys.executable, str(Path(__file__).parent / "load_judge.py"), *map(str, paths)]
    verdicts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [
        f"{description}: llama.cpp says “{verdict}”, we say {errors}"
        for description, path, verdict in zip(descriptions, paths, verdicts, strict=True)
        if bool(errors := load_errors(path)) == (verdict == "ok") and verdict != "NaN"
    ]


@needs_fork
def test_a_file_is_called_bad_exactly_if_llama_cpp_does_not_run_it(good: Path, tmp_path: Path) -> None:
    assert contradictions(good, tmp_path, 29) == []


@needs_fork
@pytest.mark.slow
def test_many_files_are_called_bad_exactly_if_llama_cpp_does_not_run_them(good: Path, tmp_path: Path) -> None:
    assert contradictions(good, tmp_path, 4) == []


@pytest.mark.parametrize(("damage", "problem"), FATAL.items(), ids=FATAL)
def test_the_problem_is_named(damage: str, problem: str, damaged: Callable[[str], Path]) -> None:
    assert problem in load_errors(damaged(damage))[0]


def test_every_command_ends_with_a_documented_code(good: Path, tmp_path: Path) -> None:
    path, copy = tmp_path / "x.gguf", str(tmp_path / "y.gguf")
    for description, parts in every(211, good):
        path.write_bytes(parts.encode())
        is_bad = bool(load_errors(path))
        for command, codes in (
            (["inspect", str(path)], {5} if is_bad else {0, 5}),
            (["verify", str(path)], {5} if is_bad else {0}),
            (["quantize", str(path), copy, "q4_0", "--requantize", "--dry-run"], {5} if is_bad else {0}),
            (["plan", str(path)], {5} if is_bad else {0}),
            (["show", str(path), "--json"], {0, 5}),
            (["diff", str(good), str(path)], {0, 1, 5}),
        ):
            result = CliRunner().invoke(app, command)
            assert result.exception is None or isinstance(result.exception, SystemExit), (description, command)
            assert result.exit_code in codes, (description, command, result.output)


@pytest.mark.parametrize("damage", [*FATAL][:12:2])
def test_run_says_what_is_wrong_with_the_file(damage: str, damaged: Callable[[str], Path], qwenlocal: Run) -> None:
    result = qwenlocal("run", str(damaged(damage)), "Hi", "-n", "2")
    error = expect_exit(result, 5)
    assert FATAL[damage] in error.replace("\n", " ")
    assert "qwenlocal inspect" in error.replace("\n", " ")


def test_the_file_over_which_llama_cpp_ends_a_chat_is_named_even_if_another_model_was_loaded_later(
    terminal: Callable[..., Any], speaking_model: Path, damaged: Callable[[str], Path]
) -> None:
    damage = "output_norm.weight: type 1, laid out"
    chat = terminal("run", str(damaged(damage)))
    chat.wait_for_prompt()
    chat.enter(f"/model {speaking_model}", "Switched to speaking.gguf")
    chat.enter("/model ./x.gguf", "Switched to x.gguf")
    chat.type("Hi\r")
    assert chat.wait_for_exit() == 5
    text, sentence = ("".join(words.split()) for words in (chat.text, FATAL[damage]))  # the window wraps anywhere
    assert text.count(sentence) == 1, chat.text


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_measuring_refuses_a_file_over_which_llama_cpp_would_end_the_process(
    command: str, damaged: Callable[[str], Path], invoke: Run
) -> None:
    path = damaged("qwen2.block_count: u32 600")
    assert "it must be between 1 and 512" in expect_exit(invoke(command, str(path)), 5)


def test_a_split_model_whose_parts_contradict_each_other_is_bad(tied: Path, tmp_path: Path) -> None:
    split_gguf(tied, tmp_path)
    first, second = (tmp_path / f"x-0000{number}-of-00002.gguf" for number in (1, 2))
    assert load_errors(first) == []
    parts = read_parts(second)
    swapped = {**parts.pairs, "split.no": gguf_writer.u32(1)}
    second.write_bytes(GgufParts(swapped, parts.tensors, parts.data).encode())
    assert "“split.no” of x-00002-of-00002.gguf is not 1" in load_errors(first)[0]
