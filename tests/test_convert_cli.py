"""The commands that make GGUF files and look into them: what they print and write, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import SAYS, Run
from hub import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import data_of
from test_checkpoint import gguf_file, mutations
from test_repairs import changed, old_kinds
from test_writing import inside, poke
from typer.testing import CliRunner

from qwenlocal import ggml
from qwenlocal.cli.app import app
from qwenlocal.testing import MOE_CONFIG, write_checkpoint, write_model
from qwenlocal.weights import gguf
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.header import read_header, read_pairs, tensor_bytes
from qwenlocal.weights.mix import file_type
from qwenlocal.weights.numbers import errors_by_row
from qwenlocal.weights.repair import backup_bytes
from qwenlocal.weights.writing import carry_out

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
TENSORS = 15
REPO = "owner/Tiny-Qwen-0.1B"


def clean(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error output of a run that must have ended with `code`, and never with a traceback."""
    assert "Traceback" not in result.stderr + result.stdout
    assert result.returncode == code, result.stderr + result.stdout
    return result.stderr


def strictly(text: str) -> Any:
    """JSON as every program reads it: without NaN."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "Tiny-Qwen-0.1B", config=SIZES)


def written(source: Path, target: Path, kind: str, **options: Any) -> Path:
    plan = plan_conversion(Checkpoint.open(source), [(target, file_type(kind))], Options(**options))
    carry_out(plan.job, threads=1)
    return target


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    """A GGUF file in which nothing is wrong, all of it f32."""
    return written(source, source.parent / "good.gguf", "f32")


@pytest.fixture(scope="module")
def half(source: Path) -> Path:
    """The same, as bf16."""
    return written(source, source.parent / "half.gguf", "bf16")


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(source, tmp_path / source.name))


def fetched(hub: HubServer) -> list[str]:
    """The files of which bytes were asked for."""
    return [path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path]


def test_every_command_runs_as_a_process_of_its_own(source: Path, qwenlocal: Run, tmp_path: Path) -> None:
    made, half = str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf")
    for command, code, said in (
        (("convert", str(source), "-o", made, "--type", "f16"), 0, "Wrote"),
        (("quantize", made, half, "q8_0"), 0, "Wrote"),
        (("inspect", half, "--json"), 0, '"architecture": "qwen2"'),
        (("diff", made, half), 1, "Q8_0"),
        (("verify", half, "--against", str(source)), 0, "is true to"),
        (("run", half, "--raw", "abc", "-n", "2"), 0, ""),
    ):
        result = qwenlocal(*command)
        clean(result, code)
        assert said in result.stdout + result.stderr


# --- convert


class TestConvert:
    def test_writes_a_file_that_runs_and_says_which(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("convert", str(source))
        assert "Wrote Tiny-Qwen-0.1B-q4_k_m.gguf: q4_k_m" in clean(result, 0)
        assert result.stdout == ""
        assert inside(tmp_path) == {"Tiny-Qwen-0.1B-q4_k_m.gguf"}
        clean(invoke("run", "./Tiny-Qwen-0.1B-q4_k_m.gguf", "Hi", "-n", "2", "--temp", "0"), 0)

    def test_leaves_the_checkpoint_as_it_was(self, mine: Path, invoke: Run) -> None:
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in mine.iterdir()}
        clean(invoke("convert", str(mine)), 0)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in mine.iterdir()} == before

    def test_dry_says_what_it_would_write_and_writes_nothing(
        self, source: Path, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("convert", str(source), "--dry-run", "--type", "q8_0")
        clean(result, 0)
        lines = result.stdout.splitlines()
        assert lines[0].split() == ["TENSOR", "SHAPE", "FROM", "TO", "SIZE", "WHY"]
        table = {line.split()[0]: line.split() for line in lines[1 : TENSORS + 1]}
        assert set(table) == {tensor.name for tensor in read_header(good).tensors}
        assert table["blk.0.ffn_up.weight"][1:6] == ["64", "x", "64", "bf16", "q8_0"]
        assert re.search(rf"^Tiny-Qwen-0.1B-q8_0.gguf: q8_0, .* bits a weight, {TENSORS} tensors$", result.stdout, re.M)
        assert result.stdout.endswith("nothing was written\n")
        assert inside(tmp_path) == set()

    def test_dry_as_json_announces_just_what_is_written_then(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        command = ("convert", str(source), "--type", "q4_k_m,f16", "-o", "out/", "--json")
        result = invoke(*command, "--dry-run")
        assert clean(result, 0) == ""
        plan = strictly(result.stdout)
        assert set(plan) == {"seconds", "memory", "threads", "read", "files", "notes"}
        assert inside(tmp_path) == set()
        result = invoke(*command)
        clean(result, 0)
        written = strictly(result.stdout)
        assert (written["zeroed"], written["resumed"], written["notes"]) == (0, 0, plan["notes"])
        files = written["files"]
        for announced, file in zip(plan["files"], files, strict=True):
            path = tmp_path / file["path"]
            assert (announced["path"], announced["size"]) == (file["path"], path.stat().st_size)
            found = [(t.name, list(t.shape), ggml.tensor_type_numbered(t.type)) for t in read_header(path).tensors]
            assert [(t["name"], t["shape"], ggml.tensor_type(t["to"])) for t in announced["tensors"]] == found
            assert all(t["why"] for t in announced["tensors"])
        assert plan["read"] == sum(tensor.size for tensor in Checkpoint.open(source).tensors.values())

    def test_gives_files_their_names(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        for out, names in (
            ("there", {"Tiny-Qwen-0.1B-f16.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}),
            ("new/", {"Tiny-Qwen-0.1B-f16.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}),
            ("a/{type}/m-{type}", {"m-f16.gguf", "m-q8_0.gguf"}),
            ("b/x.{type}.gguf", {"x.f16.gguf", "x.q8_0.gguf"}),
        ):
            clean(invoke("convert", str(source), "--type", "f16,q8_0", "-o", out), 0)
            assert {path.name for path in (tmp_path / out.split("{")[0].split("/")[0]).rglob("*.gguf")} == names
        clean(invoke("convert", str(source), "--type", "q8_0", "-o", "c/plain"), 0)
        assert inside(tmp_path / "c") == {"plain.gguf"}
        assert not list(tmp_path.rglob("*.part*"))

    def test_goes_by_the_name_that_is_given(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        clean(invoke("convert", str(source), "--name", "Other/Model 7B", "--type", "q8_0"), 0)
        assert inside(tmp_path) == {"Other-Model 7B-q8_0.gguf"}

    @pytest.mark.skipif(sys.platform == "win32", reason="names are text there")
    def test_takes_a_name_that_is_no_text(self, source: Path, qwenlocal: Run) -> None:
        strict = {"PYTHONIOENCODING": "utf-8:strict"}
        command = ("convert", str(source), "--name", "\udcff", "--dry-run")
        for options in ([], ["--json"]):
            clean(qwenlocal(*command, *options, environment=strict), 0)

    @pytest.mark.parametrize("types", ["q8_0,q8_0", "q4_k,q4_k_m", "Q8_0,q8-0"])
    def test_writes_a_type_once_however_often_it_is_named(
        self, types: str, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        clean(invoke("convert", str(source), "--type", types), 0)
        assert len(inside(tmp_path)) == 1

    def test_leaves_files_that_are_there_unless_forced(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        message = clean(invoke("convert", str(source), "-o", "x.gguf"), 2)
        assert "x.gguf is there already" in message
        assert "--force" in message
        assert (tmp_path / "x.gguf").read_bytes() == b"old"
        clean(invoke("convert", str(source), "-o", "x.gguf", "--force"), 0)
        assert read_header(tmp_path / "x.gguf").architecture == "qwen2"
        assert inside(tmp_path) == {"x.gguf"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--type", "q4_k_x"], "Did you mean q4_k_"),
            (["--type", "nonsense"], "There are: f32, f16"),
            (["--type", ""], "is not a type"),
            (["--type", ","], "is not a type"),
            (["--type", "f16,q8_0", "-o", "x.gguf"], "2 types would all be written to x.gguf"),
            (["--tensor-type", "ffn_down"], "not of the form EXPRESSION=TYPE"),
            (["--tensor-type", "=q8_0"], "not of the form EXPRESSION=TYPE"),
            (["--tensor-type", "(=q8_0"], "is not a regular expression"),
            (["--tensor-type", "a=q4_k_m"], "is not a tensor's type"),
            (["-t", "0"], "-t must be at least 1"),
            (["-t", "-5"], "-t must be at least 1"),
            (["--like", "ollama"], "there is only --like llama.cpp"),
            (["--limit-rate", "x"], "“x” is not a rate"),
        ],
    )
    def test_says_what_is_wrong_with_its_options(
        self, options: list[str], message: str, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        assert message in clean(invoke("convert", str(source), *options), 2)
        assert inside(tmp_path) == set()

    @pytest.mark.parametrize(
        ("text", "code", "message"),
        [
            ("./nowhere", 3, "There is no file nowhere"),
            ("nonsense", 3, "There is no model called"),
            ("hf:owner/nothing", 3, "has no repository “owner/nothing”"),
            ("./empty", 5, "this is a directory"),
            ("./model.gguf", 2, "is not a checkpoint"),
            ("https://127.0.0.1:1/x.gguf", 2, "is not a checkpoint"),
            ("./file.safetensors", 5, "it has no config.json"),
        ],
    )
    def test_says_what_is_wrong_with_its_source(
        self, text: str, code: int, message: str, invoke: Run, hub: HubServer, tmp_path: Path, speaking_model: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.safetensors").write_bytes(bytes(8))
        shutil.copy(speaking_model, tmp_path / "model.gguf")
        before = inside(tmp_path)
        assert message in clean(invoke("convert", text), code)
        assert inside(tmp_path) == before

    def test_takes_one_safetensors_file_of_a_folder(self, mine: Path, invoke: Run, good: Path) -> None:
        shutil.copy(mine / "model.safetensors", mine / "other.safetensors")
        assert "no model.safetensors.index.json to say" in clean(invoke("convert", str(mine)), 5)
        clean(invoke("convert", str(mine / "other.safetensors"), "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(mine.parent / "x.gguf") == data_of(good)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("model.safetensors", b"", "the file is empty"),
            ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("config.json", b"{", "not readable JSON"),
            ("config.json", b"{}", "“architectures” does not say"),
            ("tokenizer.json", b"[]", "not a JSON object"),
        ],
    )
    def test_of_a_damaged_checkpoint_names_the_file(
        self, file: str, content: bytes, message: str, mine: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (mine / file).write_bytes(content)
        said = clean(invoke("convert", str(mine)), 5)
        assert message in said
        assert file in said
        assert inside(tmp_path) == {mine.name}

    def test_of_weights_that_are_not_numbers_names_tensor_and_row_and_the_way_out(
        self, mine: Path, invoke: Run, tmp_path: Path
    ) -> None:
        poke(mine, "model.layers.0.mlp.up_proj.weight", 40, numpy.nan, numpy.inf)
        message = clean(invoke("convert", str(mine), "-o", "x.gguf"), 5)
        assert "“blk.0.ffn_up.weight” has weights that are NaN or infinite, the first in row 40" in message
        assert "--allow-nan" in message
        assert not (tmp_path / "x.gguf").exists()
        assert "2 weights were NaN or infinite; zero now" in clean(
            invoke("convert", str(mine), "-o", "x.gguf", "--allow-nan"), 0
        )
        assert inside(tmp_path) == {mine.name, "x.gguf"}

    def test_of_weights_that_do_not_fit_says_what_would(self, mine: Path, invoke: Run) -> None:
        poke(mine, "model.layers.0.mlp.up_proj.weight", 0, 1e9)
        message = clean(invoke("convert", str(mine), "--type", "f16"), 5)
        assert "too large for f16" in message
        assert "Take bf16 or f32" in message

    def test_into_a_place_that_cannot_be_written_ends_with_six(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "cannot be written" in clean(invoke("convert", str(source), "-o", "file/x.gguf"), 6)

    def test_with_other_types_for_some_tensors_gives_them_those(
        self, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        options = (
            "--type",
            "q8_0",
            "--tensor-type",
            "ffn_up=f16",
            "--tensor-type",
            "ffn_(up|down)=q4_0",
            "-o",
            "x.gguf",
        )
        clean(invoke("convert", str(source), *options), 0)
        types = {t.name: ggml.tensor_type_numbered(t.type).name for t in read_header(tmp_path / "x.gguf").tensors}
        chosen = [types[f"blk.0.ffn_{name}.weight"] for name in ("up", "down", "gate")]
        assert chosen == ["f16", "q4_0", "q8_0"], "the first that fits counts"

    def test_purely_gives_all_the_same_type(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        wide = write_checkpoint(tmp_path / "wide", config=config)
        clean(invoke("convert", str(wide), "--type", "q4_k_m", "--pure", "-o", "x.gguf"), 0)
        kinds = {ggml.tensor_type_numbered(t.type).name for t in read_header(tmp_path / "x.gguf").tensors}
        assert kinds == {"q4_k", "f32"}

    def test_keeps_what_is_not_needed_where_llama_cpps_own_converter_would(self, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SIZES, "tie_word_embeddings": True}, store_tied_head=True)
        assert "Left out: lm_head.weight" in clean(invoke("convert", str(tied), "-o", "ours.gguf"), 0)
        clean(invoke("convert", str(tied), "--like", "llama.cpp", "-o", "theirs.gguf"), 0)
        heads = ["output.weight" in data_of(tmp_path / f"{name}.gguf") for name in ("ours", "theirs")]
        assert heads == [False, True]

    def test_with_an_unknown_way_to_cut_text_needs_its_name(self, mine: Path, invoke: Run, tmp_path: Path) -> None:
        document = json.loads((mine / "tokenizer.json").read_text())
        (mine / "tokenizer.json").write_text(json.dumps({**document, "pre_tokenizer": None}))
        assert "--pre NAME" in clean(invoke("convert", str(mine), "-o", "x.gguf"), 5)
        clean(invoke("convert", str(mine), "-o", "x.gguf", "--pre", "qwen2"), 0)
        assert read_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.pre"] == "qwen2"

    def test_of_a_mixture_of_experts_works_likewise(self, invoke: Run, tmp_path: Path) -> None:
        config = {**MOE_CONFIG, **SIZES, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        write_checkpoint(tmp_path / "moe", config=config)
        clean(invoke("convert", "./moe", "--type", "q8_0", "-o", "x.gguf"), 0)
        assert read_header(tmp_path / "x.gguf").architecture == "qwen2moe"
        clean(invoke("run", "./x.gguf", "Hi", "-n", "2"), 0)


class TestImportance:
    def matrix(self, path: Path, columns: int) -> Path:
        names = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate")]
        tensors = {}
        for name in (*names, "blk.0.ffn_down.weight"):
            tensors[f"{name}.in_sum2"] = numpy.ones((1, columns))
            tensors[f"{name}.counts"] = numpy.ones((1, 1))
        return gguf_file(path, {"general.type": gguf.string("imatrix")}, tensors)

    def test_is_needed_for_the_smallest_types(self, invoke: Run, tmp_path: Path) -> None:
        config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        wide = str(write_checkpoint(tmp_path / "wide", config=config))
        message = clean(invoke("convert", wide, "--type", "iq2_xxs", "-o", "x.gguf"), 2)
        assert "garbage without an importance matrix" in message
        assert "--imatrix FILE" in message
        self.matrix(tmp_path / "im.gguf", 256)
        clean(invoke("convert", wide, "--type", "iq2_xxs", "-o", "x.gguf", "--imatrix", "im.gguf"), 0)
        assert read_header(tmp_path / "x.gguf").metadata["quantize.imatrix.file"] == "im.gguf"

    def test_of_another_model_is_refused(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        self.matrix(tmp_path / "im.gguf", 32)
        message = clean(invoke("convert", str(source), "--imatrix", "im.gguf", "-o", "x.gguf"), 5)
        assert "measured with another model" in message

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"\x01\0\0\0old"])
    def test_that_is_none_is_refused(self, content: bytes, source: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "im.gguf").write_bytes(content)
        assert "im.gguf" in clean(invoke("convert", str(source), "--imatrix", "im.gguf", "-o", "x.gguf"), 5)
        assert not (tmp_path / "x.gguf").exists()


# --- quantize


class TestQuantize:
    def test_gives_the_tensors_that_converting_gives(
        self, source: Path, half: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("quantize", str(half), "x.gguf", "q4_k_m")
        assert "Wrote x.gguf: q4_k_m" in clean(result, 0)
        assert result.stdout == ""
        assert data_of(tmp_path / "x.gguf") == data_of(written(source, tmp_path / "y.gguf", "q4_k_m"))

    def test_carries_everything_else_over(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        own = changed_pairs(half, tmp_path / "own.gguf", {"my.own.key": gguf.strings(["a", "b"])})
        clean(invoke("quantize", str(own), "x.gguf", "q8_0"), 0)
        before, after = read_pairs(own), read_pairs(tmp_path / "x.gguf")
        different = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert different == {"general.file_type"}

    def test_writes_several_files_into_a_folder(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        clean(invoke("quantize", str(half), "out/", "q8_0,q4_0"), 0)
        assert inside(tmp_path / "out") == {"half-q8_0.gguf", "half-q4_0.gguf"}

    def test_of_weights_that_are_quantized_already_wants_to_be_told(
        self, half: Path, invoke: Run, tmp_path: Path
    ) -> None:
        clean(invoke("quantize", str(half), "q8.gguf", "q8_0"), 0)
        message = clean(invoke("quantize", "./q8.gguf", "q4.gguf", "q4_0"), 2)
        assert "is quantized already (q8_0)" in message
        assert "--requantize" in message
        assert not (tmp_path / "q4.gguf").exists()
        clean(invoke("quantize", "./q8.gguf", "q4.gguf", "q4_0", "--requantize"), 0)

    def test_never_replaces_its_own_source(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        shutil.copy(half, tmp_path / "x.gguf")
        clean(invoke("quantize", "./x.gguf", "x.gguf", "q8_0"), 2)
        assert (tmp_path / "x.gguf").read_bytes() == half.read_bytes()
        clean(invoke("quantize", "./x.gguf", "x.gguf", "q8_0", "--force"), 2)
        assert (tmp_path / "x.gguf").read_bytes() == half.read_bytes()
        assert inside(tmp_path) == {"x.gguf"}

    def test_dry_writes_nothing(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("quantize", str(half), "x.gguf", "q8_0", "--dry-run", "--json")
        assert clean(result, 0) == ""
        assert len(strictly(result.stdout)["files"][0]["tensors"]) == TENSORS
        assert "nothing was written" in invoke("quantize", str(half), "x.gguf", "q8_0", "--dry-run").stdout
        assert inside(tmp_path) == set()

    def test_of_weights_that_are_not_numbers_is_refused(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        with_numbers(good, tmp_path / "nan.gguf", "blk.0.ffn_up.weight", numpy.nan)
        message = clean(invoke("quantize", "./nan.gguf", "x.gguf", "q8_0"), 5)
        assert "“blk.0.ffn_up.weight” has weights that are NaN or infinite, the first in row 0" in message
        clean(invoke("quantize", "./nan.gguf", "x.gguf", "q8_0", "--allow-nan"), 0)

    def test_of_another_architecture_works_purely(self, invoke: Run, tmp_path: Path) -> None:
        write_model(tmp_path / "llama.gguf", architecture="llama")
        message = clean(invoke("quantize", "./llama.gguf", "x.gguf", "q8_0"), 5)
        assert "the architecture “llama”" in message
        assert "--pure" in message
        clean(invoke("quantize", "./llama.gguf", "x.gguf", "q8_0", "--pure"), 0)

    def test_of_a_split_file_needs_all_its_parts(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        shutil.copy(half, tmp_path / "x-00001-of-00002.gguf")
        message = clean(invoke("quantize", "./x-00001-of-00002.gguf", "y.gguf", "q8_0"), 5)
        assert "x-00002-of-00002.gguf is not beside it" in message

    def test_of_a_split_file_makes_one(self, half: Path, invoke: Run, tmp_path: Path) -> None:
        split(half, tmp_path)
        clean(invoke("quantize", "./x-00001-of-00002.gguf", "y.gguf", "q8_0"), 0)
        clean(invoke("quantize", str(half), "z.gguf", "q8_0"), 0)
        assert data_of(tmp_path / "y.gguf") == data_of(tmp_path / "z.gguf")
        assert not [key for key in read_pairs(tmp_path / "y.gguf") if key.startswith("split.")]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("./nowhere.gguf", "x.gguf", "q8_0"), 3, "There is no file"),
            (("./text.gguf", "x.gguf", "q8_0"), 5, "this is not a GGUF file"),
            (("./cut.gguf", "x.gguf", "q8_0"), 5, "cut off"),
            (("./half.gguf", "x.gguf", "nonsense"), 2, "is not a type"),
            (("./half.gguf", "x.gguf", "f16,q8_0"), 2, "2 types would all be written"),
            (("./half.gguf", "file/x.gguf", "q8_0"), 6, "cannot be written"),
            (("./half.gguf", "x.gguf"), 2, "Missing argument"),
        ],
    )
    def test_says_what_is_wrong(
        self, arguments: tuple[str, ...], code: int, message: str, half: Path, invoke: Run, tmp_path: Path
    ) -> None:
        shutil.copy(half, tmp_path / "half.gguf")
        (tmp_path / "text.gguf").write_text("hello")
        (tmp_path / "cut.gguf").write_bytes(half.read_bytes()[:-1000])
        (tmp_path / "file").touch()
        before = inside(tmp_path)
        assert message in clean(invoke("quantize", *arguments), code)
        assert inside(tmp_path) == before

    def test_of_a_checkpoint_says_that_there_is_convert_for_that(
        self, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        message = clean(invoke("quantize", str(source), "x.gguf", "q8_0"), 2)
        assert "qwenlocal convert" in message
        assert json.loads(invoke("list", "--json").stdout) == []


# --- broken files


def changed_pairs(source: Path, target: Path, pairs: Mapping[str, bytes | None]) -> Path:
    """A copy of a GGUF file of any types with other values in its header; None takes one away."""
    header, said = read_header(source), read_pairs(source)
    said = {key: value for key, value in {**said, **pairs}.items() if value is not None}
    kinds = {tensor.name: ggml.tensor_type_numbered(tensor.type) for tensor in header.tensors}
    described = [gguf.Described(t.name, t.shape, kinds[t.name]) for t in header.tensors if kinds[t.name]]
    target.write_bytes(gguf.lay_out(said, described).header + source.read_bytes()[header.data_offset :])
    return target


def described_otherwise(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy in which the header describes one tensor otherwise: another `type` (a number) or `shape`."""
    header, found = read_header(source), []
    for tensor in header.tensors:
        shape = changes.get("shape", tensor.shape) if tensor.name == name else tensor.shape
        number = changes.get("type", tensor.type) if tensor.name == name else tensor.type
        text = tensor.name.encode()
        found.append(
            len(text).to_bytes(8, "little") + text
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, tensor.offset)
        )  # fmt: skip
    front = gguf.lay_out(read_pairs(source), []).header
    pairs = front[24 : 24 + sum(8 + len(k.encode()) + len(v) for k, v in read_pairs(source).items())]
    content = b"GGUF" + struct.pack("<IQQ", 3, len(found), len(read_pairs(source))) + pairs + b"".join(found)
    content += bytes(-len(content) % 32)
    target.write_bytes(content + source.read_bytes()[header.data_offset :])
    return target


def with_numbers(source: Path, target: Path, name: str, *numbers: float) -> Path:
    """A copy of a file of f32 with other numbers at the beginning of a tensor."""
    header = read_header(source)
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    content = bytearray(source.read_bytes())
    at = header.data_offset + tensor.offset
    content[at : at + 4 * len(numbers)] = numpy.array(numbers, numpy.float32).tobytes()
    target.write_bytes(content)
    return target


def split(source: Path, folder: Path) -> None:
    """As llama-gguf-split does: all keys in the first part, tensors in both."""
    header, content = read_header(source), source.read_bytes()
    for number, tensors in enumerate((header.tensors[:5], header.tensors[5:])):
        pairs = read_pairs(source) if number == 0 else {}
        count = struct.pack("<IH", 2, 2)
        pairs |= {"split.no": struct.pack("<IH", 2, number), "split.count": count}
        pairs["split.tensors.count"] = struct.pack("<Ii", 5, len(header.tensors))
        described = [gguf.Described(t.name, t.shape, ggml.tensor_type_numbered(t.type)) for t in tensors]
        layout = gguf.lay_out(pairs, described)
        with (folder / f"x-0000{number + 1}-of-00002.gguf").open("wb") as file:
            file.write(layout.header)
            for tensor, place in zip(tensors, described, strict=True):
                begin = header.data_offset + tensor.offset
                file.seek(layout.offsets[tensor.name])
                file.write(content[begin : begin + place.size])
            file.truncate(layout.size)


# --- inspect


@pytest.fixture
def rootless(good: Path, tmp_path: Path) -> Path:
    """A file that lacks the rope base."""
    return changed(good, tmp_path / "old.gguf", {"qwen2.rope.freq_base": None})


class TestWhatATesterMet:
    def test_one_of_several_files_is_no_source(self, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SIZES, shards=2)
        said = clean(invoke("convert", str(folder / "model-00001-of-00002.safetensors")), 5)
        assert "one of 2 files" in said
        assert "Give the folder" in said

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders there")
    def test_a_pipe_is_not_waited_for(self, mine: Path, invoke: Run) -> None:
        (mine / "model.safetensors").unlink()
        os.mkfifo(mine / "model.safetensors")
        assert "not a regular file" in clean(invoke("convert", str(mine)), 5)

    def test_a_folder_of_the_outputs_name_is_refused_before_anything_is_read(
        self, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "x.gguf" / "inside").mkdir(parents=True)
        (tmp_path / "out" / f"{source.name}-f16.gguf").mkdir(parents=True)
        said = clean(invoke("convert", str(source), "--type", "f16", "-o", "out", "--force"), 2)
        assert "is a folder" in said
        assert inside(tmp_path / "out") == {f"{source.name}-f16.gguf"}

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that takes no files")
    def test_a_folder_that_takes_no_files_is_not_said_to_be_written_by_another(self, source: Path, invoke: Run) -> None:
        said = clean(invoke("convert", str(source), "--type", "f16", "-o", "/proc/x.gguf"), 6)
        assert "Another" not in said

    def test_end_tokens_that_the_vocabulary_lacks_are_found(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        path = changed(good, tmp_path / "x.gguf", {"tokenizer.ggml.eos_token_id": gguf.u32(99_999)})
        assert "Its eos token is 99,999" in invoke("inspect", str(path), "--quick").stdout

    @pytest.mark.parametrize("kind", ["q1_0", "tq1_0"])
    def test_a_matrix_of_zeros_is_explained_by_no_type(
        self, kind: str, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        path = convert_with(invoke, source, tmp_path, kind)
        clean(invoke("verify", str(path), "--against", str(source)), 0)
        tensor = next(t for t in read_header(path).tensors if t.name == "token_embd.weight")
        with path.open("r+b") as file:
            file.seek(read_header(path).data_offset + tensor.offset)
            file.write(bytes(tensor_bytes(tensor) or 0))
        said = invoke("verify", str(path), "--against", str(source))
        clean(said, 5)
        assert "“token_embd.weight”" in said.stdout

    def test_packed_weights_are_known_by_their_names_too(self, mine: Path, invoke: Run) -> None:
        path = mine / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b"mlp.up_proj.weight", b"mlp.up_pro.qweight"))
        assert "packed already (GPTQ or AWQ)" in clean(invoke("convert", str(mine)), 5)

    def test_an_adapter_is_told_from_a_model(self, mine: Path, invoke: Run) -> None:
        (mine / "model.safetensors").rename(mine / "adapter_model.safetensors")
        assert "it is an adapter (LoRA)" in clean(invoke("convert", str(mine)), 5)

    def test_an_importance_matrix_that_is_not_there_is_not_found(self, source: Path, invoke: Run) -> None:
        assert "There is no file nowhere" in clean(invoke("convert", str(source), "--imatrix", "nowhere"), 3)

    @pytest.mark.parametrize("kind", ["q4_k", "q2_k"])
    def test_one_row_in_anothers_place_is_noticed(self, kind: str, invoke: Run, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "wide", config={**SIZES, "hidden_size": 256})
        path = convert_with(invoke, source, tmp_path, {"q4_k": "q4_k_s"}.get(kind, kind))
        header = read_header(path)
        tensor = next(t for t in header.tensors if t.name == "token_embd.weight")
        width = ggml.tensor_type(kind).row_bytes(256)
        with path.open("r+b") as file:
            file.seek(header.data_offset + tensor.offset + 7 * width)
            row = file.read(width)
            file.seek(header.data_offset + tensor.offset + 100 * width)
            file.write(row)
        said = invoke("verify", str(path), "--against", str(source))
        clean(said, 5)
        assert "row 100 of “token_embd.weight”" in said.stdout


def test_errors_are_told_of_each_row() -> None:
    true, other = (
        numpy.array([[3, 4, 6, 8, 1e-9, 0]], numpy.float32),
        numpy.array([[3, 4, 6, 9, 0, 0]], numpy.float32),
    )
    whole, row, worst = errors_by_row([true], [other], 2)
    assert (round(whole, 4), row, round(worst, 4)) == (0.0894, 1, 0.1)


def convert_with(invoke: Run, source: Path, folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    clean(invoke("convert", str(source), "--type", kind, "--pure", "-o", str(path)), 0)
    return path


class TestAFileThatWasMerged:
    def test_is_mended_in_place_all_the_same(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        """llama-gguf-split leaves its keys in what it puts together."""
        none = struct.pack("<IH", 2, 0)
        of_one = {"split.no": none, "split.count": none, "tokenizer.ggml.token_type": old_kinds(good)}
        path = changed(good, tmp_path / "merged.gguf", of_one)
        assert "in place" in clean(invoke("inspect", str(path), "--fix"), 0)


class TestDiffOfLargeNumbers:
    def test_is_told_without_a_warning(self, good: Path, qwenlocal: Run, tmp_path: Path) -> None:
        with_numbers(good, tmp_path / "large.gguf", "output.weight", 3e38, -3e38)
        result = qwenlocal("diff", str(good), "./large.gguf")
        assert clean(result, 1) == ""
        assert "output.weight" in result.stdout


class TestASplitFile:
    def test_is_looked_at_as_the_one_model_that_it_is(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        split(good, tmp_path)
        result = invoke("inspect", "./x-00001-of-00002.gguf", "--json")
        clean(result, 0)
        found, whole = strictly(result.stdout), strictly(invoke("inspect", str(good), "--json").stdout)
        for key in ("tensor list", "parameters", "findings"):
            assert found[key] == whole[key], key
        assert found["size"] == sum(path.stat().st_size for path in tmp_path.glob("x-0*.gguf"))

    def test_is_the_same_as_the_whole(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        split(good, tmp_path)
        result = invoke("diff", "./x-00001-of-00002.gguf", str(good))
        assert clean(result, 0) == ""
        assert "The same" in result.stdout

    def test_is_true_to_its_checkpoint(self, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        split(good, tmp_path)
        clean(invoke("verify", "./x-00001-of-00002.gguf", "--against", str(source)), 0)

    def test_with_damage_in_its_second_part_is_found_out(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        with_numbers(good, tmp_path / "nan.gguf", read_header(good).tensors[-1].name, numpy.nan)
        split(tmp_path / "nan.gguf", tmp_path)
        assert "NaN or infinite" in invoke("inspect", "./x-00001-of-00002.gguf").stdout

    @pytest.mark.parametrize("part", [1, 2])
    def test_is_mended_into_one_whole_file(
        self, part: int, good: Path, rootless: Path, invoke: Run, tmp_path: Path
    ) -> None:
        split(rootless, tmp_path)
        first = f"./x-0000{part}-of-00002.gguf"
        clean(invoke("inspect", first, "--fix", "-o", "y.gguf"), 0)
        assert clean(invoke("diff", "./y.gguf", str(good)), 0) == ""
        assert not [key for key in read_pairs(tmp_path / "y.gguf") if key.startswith("split.")]

    def test_is_not_mended_in_place(self, rootless: Path, invoke: Run, tmp_path: Path) -> None:
        split(rootless, tmp_path)
        before = [path.read_bytes() for path in sorted(tmp_path.glob("x-0*.gguf"))]
        assert "--fix -o FILE" in clean(invoke("inspect", "./x-00001-of-00002.gguf", "--fix"), 2)
        assert [path.read_bytes() for path in sorted(tmp_path.glob("x-0*.gguf"))] == before


class TestInspect:
    def test_of_a_good_file_shows_what_it_is_and_finds_nothing(self, good: Path, invoke: Run) -> None:
        result = invoke("inspect", str(good))
        assert clean(result, 0) == ""
        for words in ("architecture", "qwen2", "rope base", "1,000,000", "pre-tokenizer", "Nothing is wrong with it."):
            assert words in result.stdout
        assert "blk.0" not in result.stdout

    def test_lists_every_tensor_when_asked(self, half: Path, invoke: Run) -> None:
        result = invoke("inspect", str(half), "--tensors")
        clean(result, 0)
        for tensor in read_header(half).tensors:
            assert re.search(rf"^{re.escape(tensor.name)} +{tensor.shape[0]}", result.stdout, re.MULTILINE)

    def test_as_json_says_all_of_it(self, half: Path, invoke: Run) -> None:
        result = invoke("inspect", str(half), "--json")
        assert clean(result, 0) == ""
        found = strictly(result.stdout)
        assert (found["architecture"], found["type"], found["layers"]) == ("qwen2", "bf16", 1)
        assert found["size"] == half.stat().st_size
        assert len(found["tensor list"]) == TENSORS
        assert found["metadata"]["tokenizer.ggml.pre"] == "qwen2"
        assert found["findings"] == []

    def test_finds_what_is_wrong_and_says_what_can_be_put_right(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        pairs = {"qwen2.rope.freq_base": None, "tokenizer.ggml.token_type": old_kinds(good),
                 "tokenizer.chat_template": None}  # fmt: skip
        old = str(changed(good, tmp_path / "old.gguf", pairs))
        result = invoke("inspect", old)
        clean(result, 5)
        wrong, *notes = [line for line in result.stdout.splitlines() if line.startswith(("wrong ", "note "))]
        assert "rope base is missing" in wrong
        assert "(--fix puts it right)" in wrong
        assert any("“[PAD261]”" in note and "(--fix puts it right)" in note for note in notes)
        assert any("no chat template" in note and "--fix" not in note for note in notes)
        found = strictly(invoke("inspect", old, "--json").stdout)["findings"]
        assert [(f["serious"], f["fixable"]) for f in found] == [(True, True), (False, True), (False, False)]

    def test_reads_the_weights_unless_it_shall_be_quick(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        broken = str(with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan, 1.0, numpy.inf))
        assert "“blk.0.ffn_up.weight” has 2 numbers that are NaN or infinite" in invoke("inspect", broken).stdout
        assert "Nothing is wrong" in invoke("inspect", broken, "--quick").stdout

    def test_finds_a_repeated_head_and_a_copy_goes_without_it(self, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SIZES, "tie_word_embeddings": True}, store_tied_head=True)
        written(tied, tmp_path / "x.gguf", "f16", like_llama_cpp=True)
        assert "The head repeats the embeddings byte for byte" in invoke("inspect", "./x.gguf").stdout
        assert "--fix -o FILE" in clean(invoke("inspect", "./x.gguf", "--fix"), 2)
        assert "Wrote y.gguf" in clean(invoke("inspect", "./x.gguf", "--fix", "-o", "y.gguf"), 0)
        assert "output.weight" not in data_of(tmp_path / "y.gguf")
        assert "Nothing is wrong" in invoke("inspect", "./y.gguf").stdout
        assert inside(tmp_path) == {"tied", "x.gguf", "y.gguf"}

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            ("blk.0.ffn_up.weight", "“blk.0.ffn_up.weight” is missing"),
            ("output_norm.weight", "“output_norm.weight” is"),
        ],
    )
    def test_finds_a_tensor_that_is_missing(
        self, tensor: str, message: str, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        content = good.read_bytes().replace(tensor.encode(), tensor.replace("weight", "wright").encode())
        (tmp_path / "x.gguf").write_bytes(content)
        result = invoke("inspect", "./x.gguf")
        clean(result, 5)
        assert message in result.stdout
        assert "have no place" in result.stdout or "llama.cpp will not load the file" in result.stdout

    @pytest.mark.parametrize(
        ("text", "code", "message"),
        [
            ("./nowhere.gguf", 3, "There is no file"),
            ("./cut.gguf", 5, "it is cut off"),
            ("./cut-in-header.gguf", 5, "it is cut off or damaged"),
            ("./empty.gguf", 5, "the file is empty"),
            ("./text.gguf", 5, "not a GGUF file"),
            ("nonsense", 3, "There is no model called"),
            ("qwen1.5:7b", 3, "is not here"),
            ("hf:owner/repo", 3, "is not here"),
            ("./checkpoint", 3, "is not here"),
        ],
    )
    def test_of_what_is_no_model_says_so(
        self, text: str, code: int, message: str, source: Path, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        shutil.copytree(source, tmp_path / "checkpoint")
        content = good.read_bytes()
        for name, data in (("cut", content[:-100]), ("cut-in-header", content[:1000]), ("empty", b""), ("text", b"hi")):
            (tmp_path / f"{name}.gguf").write_bytes(data)
        said = clean(invoke("inspect", text), code)
        assert message in said

    @pytest.mark.parametrize(
        "pairs",
        [
            {"tokenizer.ggml.tokens": gguf.u32(7)},
            {"tokenizer.ggml.tokens": gguf.string("text")},
            {"tokenizer.ggml.tokens": gguf.i32s([1, 2, 3])},
            {"tokenizer.ggml.token_type": gguf.u32(1)},
            {"tokenizer.ggml.token_type": gguf.string("text")},
            {"tokenizer.ggml.token_type": gguf.strings(["1"] * 288)},
            {"tokenizer.chat_template": gguf.u32(5)},
            {"tokenizer.chat_template": gguf.strings(["a"])},
            {"tokenizer.ggml.eos_token_id": gguf.string("x"), "tokenizer.ggml.eot_token_id": None},
            {"tokenizer.ggml.eos_token_id": gguf.i32s([1]), "tokenizer.ggml.eot_token_id": gguf.f32(1)},
            {"general.architecture": gguf.u32(5)},
            {"general.architecture": gguf.strings(["qwen2"])},
            {"general.file_type": gguf.string("x")},
            {"general.file_type": gguf.u32(1 << 31)},
            {"general.name": gguf.strings(["a", "b"])},
            {"general.license": gguf.u32(5)},
            {"qwen2.attention.head_count": gguf.u32(0)},
            {"qwen2.attention.head_count": gguf.i32s([4, 4])},
            {"qwen2.attention.head_count": gguf.string("x")},
            {"qwen2.attention.head_count_kv": gguf.u32(0)},
            {"qwen2.embedding_length": gguf.u32(0)},
            {"qwen2.embedding_length": gguf.string("x")},
            {"qwen2.context_length": gguf.string("x")},
            {"qwen2.context_length": gguf.i32(-5)},
            {"qwen2.block_count": gguf.i32(-1)},
            {"qwen2.block_count": gguf.f32(1.0)},
            {"qwen2.rope.freq_base": gguf.string("x")},
            {"qwen2.rope.freq_base": gguf.f32(float("nan"))},
            {"my.key": gguf.f32(float("inf"))},
            {"my.key": gguf.f32s([float("nan")])},
        ],
        ids=" ".join,
    )
    def test_of_a_file_whose_values_have_the_wrong_type_does_not_stumble(
        self, pairs: dict[str, bytes | None], good: Path, tmp_path: Path
    ) -> None:
        path = str(changed(good, tmp_path / "x.gguf", pairs))
        for options in ([], ["--json"], ["--fix", "-o", str(tmp_path / "y.gguf")]):
            result = CliRunner().invoke(app, ["inspect", path, *options])
            assert result.exit_code in (0, 2, 5), result.exception
            assert result.exception is None or isinstance(result.exception, SystemExit)
            if options == ["--json"] and result.exit_code == 0:
                strictly(result.stdout)

    @pytest.mark.skipif(sys.platform == "win32", reason="memory cannot be limited there")
    def test_of_a_file_with_four_billion_layers_needs_neither_time_nor_memory_for_them(
        self, good: Path, qwenlocal: Run, tmp_path: Path
    ) -> None:
        import resource

        changed(good, tmp_path / "x.gguf", {"qwen2.block_count": gguf.u32((1 << 32) - 1)})
        limit = 2 << 30
        result = qwenlocal(
            "inspect", "./x.gguf", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        )
        clean(result, 5)
        assert "is missing" in result.stdout


class TestFix:
    @pytest.fixture
    def padded(self, good: Path, tmp_path: Path) -> Path:
        """A file with a fault that only changes bytes of the header."""
        return changed(good, tmp_path / "old.gguf", {"tokenizer.ggml.token_type": old_kinds(good)})

    def test_in_place_changes_only_what_is_wrong(self, padded: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("inspect", str(padded), "--fix")
        assert f"Repaired {padded} in place." in clean(result, 0)
        assert (read_pairs(padded), data_of(padded)) == (read_pairs(good), data_of(good))
        assert "Nothing is wrong" in invoke("inspect", str(padded)).stdout
        assert inside(tmp_path) == {padded.name}

    def test_in_a_copy_leaves_the_file_as_it_is(self, rootless: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        before = rootless.read_bytes()
        message = clean(invoke("inspect", str(rootless), "--fix", "-o", "new.gguf"), 0)
        assert "Wrote new.gguf" in message
        assert "with 1 of 1 mended" in message
        assert rootless.read_bytes() == before
        assert read_pairs(tmp_path / "new.gguf") == read_pairs(good)
        assert data_of(tmp_path / "new.gguf") == data_of(good)
        assert not list(tmp_path.glob("*.part*"))

    def test_in_place_is_refused_where_the_header_would_grow(self, rootless: Path, invoke: Run) -> None:
        before = rootless.read_bytes()
        assert "so that the rest moves" in clean(invoke("inspect", str(rootless), "--fix"), 2)
        assert rootless.read_bytes() == before

    def test_of_a_good_file_does_nothing(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        before = good.read_bytes()
        for options in ([], ["-o", "new.gguf"]):
            assert "nothing that --fix could put right" in clean(invoke("inspect", str(good), "--fix", *options), 0)
        assert good.read_bytes() == before
        assert not (tmp_path / "new.gguf").exists()

    def test_does_not_write_over_files(self, rootless: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "there.gguf").write_bytes(b"old")
        for out in ("there.gguf", str(rootless)):
            assert "is there already" in clean(invoke("inspect", str(rootless), "--fix", "-o", out), 2)
        assert (tmp_path / "there.gguf").read_bytes() == b"old"

    def test_needs_to_be_said_for_an_output(self, good: Path, invoke: Run) -> None:
        assert "Add --fix" in clean(invoke("inspect", str(good), "-o", "x.gguf"), 2)

    def test_into_a_place_that_cannot_be_written_ends_with_six(
        self, rootless: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        assert "cannot be written" in clean(invoke("inspect", str(rootless), "--fix", "-o", "file/x.gguf"), 6)

    def test_leaves_files_that_were_fetched_as_they_were_published(
        self, rootless: Path, invoke: Run, hub: HubServer
    ) -> None:
        hub.repository("o/old-GGUF").files = {"old-f32.gguf": rootless.read_bytes()}
        clean(invoke("pull", "hf:o/old-GGUF"), 0)
        message = clean(invoke("inspect", "hf:o/old-GGUF", "--fix"), 2)
        assert "it stays as it is" in message
        assert "--fix -o FILE" in message
        clean(invoke("inspect", "hf:o/old-GGUF", "--fix", "-o", "new.gguf"), 0)
        assert "is whole" in clean(invoke("verify", "hf:o/old-GGUF"), 0)

    def test_as_json_prints_nothing_but_json(self, padded: Path, invoke: Run) -> None:
        result = invoke("inspect", str(padded), "--fix", "--json")
        assert clean(result, 0) == ""
        assert strictly(result.stdout)["findings"]

    def test_that_was_cut_short_is_undone_the_next_time_somebody_looks(
        self, padded: Path, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        content = padded.read_bytes()
        (tmp_path / "old.gguf.old-header").write_bytes(backup_bytes(padded, content[:4096]))
        padded.write_bytes(good.read_bytes()[:100] + bytes(1000) + content[1100:])
        result = invoke("inspect", str(padded))
        assert "the file is as it was before" in clean(result, 0)
        assert padded.read_bytes() == content


# --- diff


class TestDiff:
    def test_of_the_same_is_nothing(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        shutil.copy(good, tmp_path / "copy.gguf")
        result = invoke("diff", str(good), "./copy.gguf")
        assert clean(result, 0) == ""
        assert result.stdout == "The same: every key, every tensor.\n"

    def test_of_types_names_the_error_of_each_tensor(
        self, source: Path, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        written(source, tmp_path / "q8.gguf", "q8_0")
        result = invoke("diff", str(good), "./q8.gguf")
        clean(result, 1)
        assert "general.file_type\n  < 0\n  > 7\n" in result.stdout
        (error,) = re.findall(r"^blk.0.ffn_up.weight: F32 \| Q8_0, error ([\d.]+)%$", result.stdout, re.MULTILINE)
        assert 0 < float(error) < 2
        assert "ffn_norm" not in result.stdout

    def test_of_keys_shows_both_values_and_where_lists_differ(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        kinds = gguf.decode(read_pairs(good)["tokenizer.ggml.token_type"])
        pairs = {
            "general.name": None,
            "my.key": gguf.string("mine"),
            "tokenizer.ggml.token_type": gguf.i32s([*kinds[:270], 4, *kinds[271:]]),
        }
        changed(good, tmp_path / "x.gguf", pairs)
        result = invoke("diff", str(good), "./x.gguf")
        clean(result, 1)
        assert re.search(r"^general.name\n  < .+\n  > \(not there\)$", result.stdout, re.MULTILINE)
        assert "my.key\n  < (not there)\n  > mine\n" in result.stdout
        assert "tokenizer.ggml.token_type\n  < 288 entries, 5 at 270\n  > 288 entries, 4 at 270\n" in result.stdout

    def test_of_tensors_says_which_file_has_them(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SIZES, "tie_word_embeddings": True})
        written(tied, tmp_path / "x.gguf", "f32")
        wide = write_checkpoint(tmp_path / "wide", config={**SIZES, "intermediate_size": 128})
        written(wide, tmp_path / "y.gguf", "f32")
        result = invoke("diff", str(good), "./x.gguf")
        clean(result, 1)
        assert "output.weight: only in the first file (F32)" in result.stdout
        assert "output.weight: only in the second file (F32)" in invoke("diff", "./x.gguf", str(good)).stdout
        assert "blk.0.ffn_up.weight: [64, 64] | [64, 128]" in invoke("diff", str(good), "./y.gguf").stdout

    def test_as_json_says_the_same(self, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        written(source, tmp_path / "q8.gguf", "q8_0")
        result = invoke("diff", str(good), "./q8.gguf", "--json")
        assert clean(result, 1) == ""
        found = strictly(result.stdout)
        assert [key["key"] for key in found["keys"]] == ["general.file_type"]
        assert {tensor["name"]: tensor["right"] for tensor in found["tensors"]}["output.weight"] == "Q8_0"
        assert strictly(invoke("diff", str(good), str(good), "--json").stdout) == {"keys": [], "tensors": []}

    def test_of_weights_that_are_not_numbers_is_json_all_the_same(
        self, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        assert "blk.0.ffn_up.weight" in invoke("diff", str(good), "./x.gguf").stdout
        result = invoke("diff", str(good), "./x.gguf", "--json")
        clean(result, 1)
        assert strictly(result.stdout)["tensors"]

    @pytest.mark.parametrize(
        ("right", "code"), [("./nowhere.gguf", 3), ("./text.gguf", 5), ("./cut.gguf", 5), ("qwen1.5:7b", 3)]
    )
    def test_of_what_is_no_model_says_so(self, right: str, code: int, good: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "text.gguf").write_text("hello")
        (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:-100])
        clean(invoke("diff", str(good), right), code)
        clean(invoke("diff", right, str(good)), code)

    @pytest.mark.parametrize(
        "changes",
        [
            {"type": 99},
            {"type": 12},
            {"type": 8, "shape": (4096,)},
            {"type": 26},
            {"type": 14, "shape": (100, 2)},
            {"shape": (64, 64, 0)},
            {"shape": (0,)},
            {"shape": ()},
        ],
        ids=str,
    )
    def test_of_a_tensor_that_is_described_strangely_says_so(
        self, changes: dict[str, Any], source: Path, good: Path, tmp_path: Path
    ) -> None:
        name = "blk.0.ffn_up.weight"
        strange = str(described_otherwise(good, tmp_path / "x.gguf", name, **changes))
        same_shape = {key: value for key, value in changes.items() if key == "shape"}
        other = str(described_otherwise(good, tmp_path / "y.gguf", name, **same_shape))
        for command in (["diff", strange, other], ["diff", other, strange], ["diff", strange, str(good)],
                        ["inspect", strange], ["inspect", strange, "--json"],
                        ["inspect", strange, "--fix", "-o", str(tmp_path / "z.gguf")],
                        ["verify", strange, "--against", str(source)],
                        ["quantize", strange, str(tmp_path / "q.gguf"), "q8_0"]):  # fmt: skip
            result = CliRunner().invoke(app, command)
            assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
            assert result.exit_code in (0, 1, 2, 5), command


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_bytes_of_a_header_are_damaged_no_command_stumbles(
    data: st.DataObject, good: Path, tmp_path: Path
) -> None:
    content, begin = good.read_bytes(), read_header(good).data_offset
    path = tmp_path / "x.gguf"
    path.write_bytes(data.draw(mutations(content[:begin])) + content[begin:])
    for command in (["inspect", str(path)], ["diff", str(good), str(path)],
                    ["quantize", str(path), str(tmp_path / "y.gguf"), "q8_0", "--dry-run"]):  # fmt: skip
        result = CliRunner().invoke(app, command)
        assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
        assert result.exit_code in (0, 1, 5), command


# --- verify --against


class TestAgainst:
    def test_its_checkpoint_a_file_is_true(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        written(source, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(source))
        assert "x.gguf is true to Tiny-Qwen-0.1B" in clean(result, 0)
        assert re.search(r"^weights +q8_0 ", result.stdout, re.MULTILINE)
        assert re.search(r"^tokens +(\d+) of \1 texts have the right ids$", result.stdout, re.MULTILINE)
        assert "logits   over" in result.stdout

    def test_another_checkpoint_it_is_not(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", config=SIZES, seed=1)
        written(other, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(source))
        assert "it is not what" in clean(result, 5)
        assert "wrong " in result.stdout

    def test_a_checkpoint_of_another_size_it_is_not(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", config={**SIZES, "intermediate_size": 128})
        written(other, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(source))
        assert "things differ" in clean(result, 5)
        assert "it was made from another model" in result.stdout
        assert "“qwen2.feed_forward_length” is 128; the checkpoint says 64" in result.stdout

    def test_one_changed_weight_is_enough(self, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", 5.0)
        result = invoke("verify", "./x.gguf", "--against", str(source))
        clean(result, 5)
        assert "“blk.0.ffn_up.weight” (f32) is off by" in result.stdout

    def test_as_json_says_the_same(self, source: Path, good: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("verify", str(good), "--against", str(source), "--json")
        assert clean(result, 0) == ""
        found = strictly(result.stdout)
        assert (len(found["tensors"]), found["problems"], found["wrong texts"]) == (TENSORS, [], [])
        with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        result = invoke("verify", "./x.gguf", "--against", str(source), "--json")
        clean(result, 5)
        assert strictly(result.stdout)["problems"]

    @pytest.mark.parametrize(
        ("file", "checkpoint", "code"),
        [
            ("./nowhere.gguf", "./tiny", 3),
            ("qwen1.5:7b", "./tiny", 3),
            ("./good.gguf", "./nowhere", 3),
            ("./good.gguf", "./good.gguf", 2),
            ("./text.gguf", "./tiny", 5),
            ("./speaking.gguf", "./tiny", 5),
            ("./good.gguf", "./broken", 5),
        ],
    )
    def test_what_is_not_there_or_damaged_is_said(
        self, file: str, checkpoint: str, code: int, source: Path, good: Path, speaking_model: Path, invoke: Run,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        shutil.copytree(source, tmp_path / "tiny")
        shutil.copytree(source, tmp_path / "broken")
        (tmp_path / "broken" / "tokenizer.json").write_text("{")
        shutil.copy(good, tmp_path / "good.gguf")
        shutil.copy(speaking_model, tmp_path / "speaking.gguf")
        (tmp_path / "text.gguf").write_text("hello")
        clean(invoke("verify", file, "--against", checkpoint), code)


# --- run and pull of a checkpoint on this disk


class TestACheckpointOnThisDisk:
    def test_is_converted_once_and_run(self, mine: Path, invoke: Run) -> None:
        first = invoke("run", str(mine), "Hi", "-n", "3", "--temp", "0")
        assert "is a checkpoint (" in clean(first, 0)
        assert "Converting it once to q4_k_m" in first.stderr
        again = invoke("run", str(mine), "Hi", "-n", "3", "--temp", "0")
        assert "Converting" not in clean(again, 0)
        assert again.stdout == first.stdout

    def test_is_converted_again_when_it_was_changed(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        assert "Converting" not in clean(invoke("pull", str(mine)), 0)
        os.utime(mine / "config.json", ns=(10**18, 10**18))
        assert "Converting" in clean(invoke("pull", str(mine)), 0)
        assert len(json.loads(invoke("list", "--json").stdout)) == 1

    def test_is_listed_shown_verified_and_removed_and_itself_stays(self, mine: Path, invoke: Run) -> None:
        before = {path.name: path.read_bytes() for path in mine.iterdir()}
        clean(invoke("pull", str(mine)), 0)
        (listed,) = strictly(invoke("list", "--json").stdout)
        assert (listed["name"], listed["state"]) == (str(mine), "here")
        path = Path(listed["path"])
        assert path.name == f"{mine.name}-q4_k_m.gguf"
        assert inside(path.parent) == {path.name}
        assert "here, converted" in invoke("list").stdout
        assert json.loads(invoke("show", str(mine), "--json").stdout)["type"] == "q4_k_m"
        assert "is whole: sha256" in clean(invoke("verify", str(mine)), 0)
        clean(invoke("inspect", str(mine)), 0)
        assert "the checkpoint is yours" in clean(invoke("rm", str(mine)), 0)
        assert not path.exists()
        assert strictly(invoke("list", "--json").stdout) == []
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == before

    def test_that_is_gone_can_still_be_removed(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        (listed,) = strictly(invoke("list", "--json").stdout)
        shutil.rmtree(mine)
        clean(invoke("rm", listed["name"]), 0)
        assert not Path(listed["path"]).exists()
        assert strictly(invoke("list", "--json").stdout) == []

    def test_damaged_conversions_are_made_anew(self, mine: Path, invoke: Run) -> None:
        clean(invoke("pull", str(mine)), 0)
        (listed,) = strictly(invoke("list", "--json").stdout)
        path = Path(listed["path"])
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "the file is damaged" in clean(invoke("verify", str(mine), "--no-repair"), 5)
        clean(invoke("verify", str(mine)), 0)
        assert path.read_bytes() == content

    def test_can_be_one_file_of_a_folder(self, mine: Path, invoke: Run) -> None:
        shutil.copy(mine / "model.safetensors", mine / "other.safetensors")
        clean(invoke("pull", str(mine)), 5)
        clean(invoke("pull", str(mine / "other.safetensors")), 0)

    def test_named_by_different_ways_to_it_is_one(self, mine: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(mine)
        for text in (str(mine), f"./{mine.name}", f"./{mine.name}/", "./link"):
            clean(invoke("pull", text), 0)
        assert len(json.loads(invoke("list", "--json").stdout)) == 1

    @pytest.mark.parametrize(
        ("file", "content"), [("model.safetensors", b""), ("config.json", b"{"), ("tokenizer.json", b"{}")]
    )
    def test_that_is_damaged_is_refused_and_nothing_is_kept(
        self, file: str, content: bytes, mine: Path, invoke: Run
    ) -> None:
        (mine / file).write_bytes(content)
        for command in (("run", str(mine), "Hi"), ("pull", str(mine))):
            assert file in clean(invoke(*command), 5)
        assert json.loads(invoke("list", "--json").stdout) == []


# --- checkpoints on a hub


@pytest.fixture
def on_hub(hub: HubServer, source: Path) -> str:
    """The name of a repository with a checkpoint."""
    hub.repository(REPO).files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.repository(REPO).files["README.md"] = b"---\nlicense: mit\n---\n"
    return f"hf:{REPO}"


class TestACheckpointOnAHub:
    def test_is_fetched_and_converted(
        self, on_hub: str, hub: HubServer, invoke: Run, tmp_path: Path, source: Path
    ) -> None:
        message = clean(invoke("convert", on_hub, "--type", "q8_0"), 0)
        assert "Fetching the checkpoint" in message
        path = tmp_path / "Tiny-Qwen-0.1B-q8_0.gguf"
        assert data_of(path) == data_of(written(source, tmp_path / "y.gguf", "q8_0"))
        metadata = read_header(path).metadata
        assert metadata["general.source.repo_url"] == f"https://huggingface.co/{REPO}"
        assert metadata["general.license"] == "mit"

    def test_is_fetched_once_for_several_conversions(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        clean(invoke("convert", on_hub, "--type", "q8_0"), 0)
        before = len(fetched(hub))
        clean(invoke("convert", on_hub, "--type", "f16"), 0)
        clean(invoke("run", on_hub, "Hi", "-n", "2"), 0)
        assert fetched(hub)[before:] == []

    def test_is_pulled_listed_and_removed(
        self, on_hub: str, hub: HubServer, invoke: Run, environment: dict[str, str]
    ) -> None:
        message = clean(invoke("pull", on_hub), 0)
        assert "Converting it once to q4_k_m" in message
        found = {entry["name"]: entry for entry in json.loads(invoke("list", "--json").stdout)}
        assert {name: entry["state"] for name, entry in found.items()} == {
            f"{on_hub}:q4_k_m": "here", f"{on_hub}@checkpoint": "checkpoint"
        }  # fmt: skip
        assert "a checkpoint; what was made of it is here, too" in invoke("list").stdout
        for name in (on_hub, f"{on_hub}@checkpoint"):
            assert "are free again" in clean(invoke("rm", name), 0)
        assert json.loads(invoke("list", "--json").stdout) == []
        for folder in ("QWENLOCAL_HOME", "HF_HUB_CACHE"):
            left = [path for path in Path(environment[folder]).rglob("*") if path.is_file() or path.is_symlink()]
            assert [path for path in left if path.parent.name != "locks"] == []

    def test_is_not_converted_twice(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        first = invoke("run", on_hub, "Hi", "-n", "3", "--temp", "0")
        clean(first, 0)
        before = len(hub.requests)
        again = invoke("run", on_hub, "Hi", "-n", "3", "--temp", "0")
        assert "Converting" not in clean(again, 0)
        assert "Fetching" not in again.stderr
        assert again.stdout == first.stdout
        assert len(hub.requests) == before, "nobody was asked"

    def test_can_be_asked_for_in_another_type(self, on_hub: str, invoke: Run) -> None:
        clean(invoke("pull", on_hub), 0)
        message = clean(invoke("pull", f"{on_hub}:q8_0"), 0)
        assert "Converting it once to q8_0" in message
        assert "Fetching the checkpoint" not in message
        names = {entry["name"] for entry in json.loads(invoke("list", "--json").stdout)}
        assert {f"{on_hub}:q4_k_m", f"{on_hub}:q8_0"} <= names

    def test_in_shards_is_one_model(self, hub: HubServer, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SIZES, shards=3)
        hub.repository(REPO).files = {path.name: path.read_bytes() for path in folder.iterdir()}
        clean(invoke("convert", f"hf:{REPO}", "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(written(folder, tmp_path / "y.gguf", "f32"))

    def test_that_is_packed_is_refused_before_its_weights_are_fetched(
        self, on_hub: str, hub: HubServer, invoke: Run, source: Path
    ) -> None:
        config = json.loads((source / "config.json").read_text())
        packed = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
        hub.repository(REPO).files["config.json"] = json.dumps(packed).encode()
        for command in (("pull", on_hub), ("run", on_hub, "Hi"), ("convert", on_hub)):
            message = clean(invoke(*command), 5)
            assert "packed already (gptq)" in message
            assert "-GPTQ" in message
        assert "config.json" in fetched(hub)
        assert "model.safetensors" not in fetched(hub)

    @pytest.mark.parametrize(
        "change", [{"architectures": ["LlamaForCausalLM"]}, {"hidden_act": "gelu"}, {"hidden_size": -1}]
    )
    def test_that_cannot_be_converted_is_refused_before_its_weights_are_fetched(
        self, change: dict[str, Any], on_hub: str, hub: HubServer, invoke: Run, source: Path
    ) -> None:
        config = json.loads((source / "config.json").read_text())
        hub.repository(REPO).files["config.json"] = json.dumps({**config, **change}).encode()
        clean(invoke("pull", on_hub), 5)
        assert "model.safetensors" not in fetched(hub)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
    def test_that_is_pickled_is_refused_before_anything_is_fetched(
        self, name: str, on_hub: str, hub: HubServer, invoke: Run
    ) -> None:
        files = hub.repository(REPO).files
        files[name] = files.pop("model.safetensors")
        for command in (("pull", on_hub), ("convert", on_hub)):
            message = clean(invoke(*command), 3)
            assert REPO in message
        assert fetched(hub) == []
        assert "pickled" in clean(invoke("convert", on_hub), 3)

    def test_without_a_config_is_none(self, on_hub: str, hub: HubServer, invoke: Run) -> None:
        del hub.repository(REPO).files["config.json"]
        assert "has no config.json" in clean(invoke("convert", on_hub), 3)
        assert fetched(hub) == []

    def test_that_cannot_be_reached_ends_with_four(self, invoke: Run) -> None:
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1"}
        assert "could be reached" in clean(invoke("convert", f"hf:{REPO}", environment=nowhere), 4)

    def test_with_weights_that_are_not_numbers_is_refused_and_not_listed_as_a_model(
        self, on_hub: str, hub: HubServer, mine: Path, invoke: Run
    ) -> None:
        poke(mine, "model.norm.weight", 0, numpy.nan)
        hub.repository(REPO).files["model.safetensors"] = (mine / "model.safetensors").read_bytes()
        assert "NaN or infinite" in clean(invoke("pull", on_hub), 5)
        assert [entry["state"] for entry in json.loads(invoke("list", "--json").stdout)] == ["checkpoint"]

    def test_beside_gguf_files_is_left_alone(
        self, on_hub: str, hub: HubServer, invoke: Run, speaking_model: Path
    ) -> None:
        hub.repository(REPO).files["tiny-q4_k_m.gguf"] = speaking_model.read_bytes()
        result = invoke("run", on_hub, "Hi")
        assert "Converting" not in clean(result, 0)
        assert result.stdout == SAYS + "\n"
        assert "model.safetensors" not in fetched(hub)


class TestWhatStandsInACheckpointThatIsNoUse:
    """It is passed over, or carried over, and said."""

    def test_a_template_that_cannot_be_read_is_said_by_convert_by_inspect_and_by_run(
        self, mine: Path, invoke: Run
    ) -> None:
        settings = mine / "tokenizer_config.json"
        broken = "{% for message in messages %}\n{{ message.content "
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": broken}))
        assert "The chat template cannot be read (line 2: " in clean(
            invoke("convert", str(mine), "-o", "x.gguf", "--type", "f32"), 0
        )
        assert "wrong  Its chat template cannot be read (line 2" in invoke("inspect", "./x.gguf").stdout
        assert "the chat template: it cannot be read" in clean(invoke("run", "./x.gguf", "Hi"), 5)

    @pytest.mark.parametrize(
        ("file", "key", "value", "said"),
        [
            ("config.json", "eos_token_id", "end", "config.json's eos_token_id, 'end', is no token's"),
            ("config.json", "pad_token_id", -5, "config.json's pad_token_id, -5, is no token's"),
            (
                "tokenizer_config.json",
                "eos_token",
                "<nope>",
                "tokenizer_config.json's eos_token, '<nope>', is no token",
            ),
        ],
    )
    def test_special_tokens_that_are_none_are_passed_over_and_said(
        self, file: str, key: str, value: Any, said: str, mine: Path, invoke: Run
    ) -> None:
        (mine / file).write_text(json.dumps({**json.loads((mine / file).read_text()), key: value}))
        assert said in clean(invoke("convert", str(mine), "--dry-run"), 0)

    @pytest.mark.parametrize("added", [5, {"a": 1}, [{"id": 258, "content": "", "special": True}]])
    def test_added_tokens_of_another_form_are_an_error(self, added: Any, mine: Path, invoke: Run) -> None:
        file = mine / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens": added}))
        assert "tokenizer.json: " in clean(invoke("convert", str(mine), "--dry-run"), 5)


class TestSmallThings:
    def test_a_comma_too_many_in_the_types_is_no_type(self, source: Path, invoke: Run, tmp_path: Path) -> None:
        clean(invoke("convert", str(source), "--type", "q4_k_m, q8_0,"), 0)
        assert inside(tmp_path) == {"Tiny-Qwen-0.1B-q4_k_m.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}

    def test_inspect_ends_with_five_while_something_is_wrong(self, good: Path, invoke: Run, tmp_path: Path) -> None:
        base = "qwen2.rope.freq_base"
        rootless = changed_pairs(good, tmp_path / "x.gguf", {base: None})
        clean(invoke("inspect", str(rootless)), 5)
        clean(invoke("inspect", str(rootless), "--json"), 5)
        clean(invoke("inspect", str(rootless), "--fix", "-o", "fixed.gguf"), 0)
        clean(invoke("inspect", "./fixed.gguf"), 0)

    def test_a_model_that_computes_nan_says_so_instead_of_nothing(
        self, good: Path, invoke: Run, tmp_path: Path
    ) -> None:
        with_numbers(good, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        result = invoke("run", "./x.gguf", "Hi")
        assert "NaN; weights are damaged" in clean(result, 5)
        assert result.stdout == ""

    def test_a_text_as_importance_matrix_is_told_what_makes_one(
        self, source: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "m.json").write_text('{"blk.0.ffn_up.weight": [1.0]}' * 9)
        assert "llama-imatrix makes one" in clean(invoke("convert", str(source), "--imatrix", "m.json"), 5)

    def test_where_nobody_reads_the_errors_the_exit_code_still_tells(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "qwenlocal", "inspect", str(tmp_path / "nowhere.gguf")]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=write).returncode == 3
        os.close(write)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_may_not_be_looked_into_is_named(source: Path, invoke: Run, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    assert "The folder locked may not be looked into" in clean(invoke("inspect", "locked/x.gguf"), 3)
    assert "locked cannot be written: permission denied" in clean(
        invoke("convert", str(source), "-o", "locked/x.gguf"), 6
    )
