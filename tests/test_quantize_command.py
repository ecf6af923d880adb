"""qwenlocal quantize: its outputs, messages and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
from checkpoint_files import convert_checkpoint, file_names
from commands import TENSOR_COUNT, expect_exit, parse_json
from conftest import Run
from gguf_files import copy_with_metadata, copy_with_weights, split_gguf
from oracle import data_of

from qwenlocal.testing import write_model
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import read_raw_metadata


class TestQuantize:
    def test_tensors_equal_those_of_convert(
        self, tiny_checkpoint: Path, tiny_bf16: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("quantize", str(tiny_bf16), "x.gguf", "q4_k_m")
        assert "Wrote x.gguf: q4_k_m" in expect_exit(result, 0)
        assert result.stdout == ""
        assert data_of(tmp_path / "x.gguf") == data_of(
            convert_checkpoint(tiny_checkpoint, tmp_path / "y.gguf", "q4_k_m")
        )

    def test_all_other_keys_are_copied(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        own = copy_with_metadata(tiny_bf16, tmp_path / "own.gguf", {"my.own.key": gguf_writer.strings(["a", "b"])})
        expect_exit(invoke("quantize", str(own), "x.gguf", "q8_0"), 0)
        before, after = read_raw_metadata(own), read_raw_metadata(tmp_path / "x.gguf")
        different = {key for key in {*before, *after} if before.get(key) != after.get(key)}
        assert different == {"general.file_type"}

    def test_a_fault_of_the_metadata_that_is_copied_is_named(self, no_rope_base: Path, invoke: Run) -> None:
        message = expect_exit(invoke("quantize", str(no_rope_base), "x.gguf", "q8_0"), 0).replace("\n", " ")
        assert "The metadata has a fault, which is copied: The RoPE base is missing." in message
        assert "qwenlocal inspect" in message
        expect_exit(invoke("inspect", "./x.gguf"), 5)

    def test_no_repair_is_suggested_for_a_fault_that_has_none(
        self, tiny_bf16: Path, invoke: Run, tmp_path: Path
    ) -> None:
        template = {"tokenizer.chat_template": gguf_writer.string("{{ messages")}
        path = copy_with_metadata(tiny_bf16, tmp_path / "no-chat.gguf", template)
        message = expect_exit(invoke("quantize", str(path), "x.gguf", "q8_0"), 0)
        assert "The chat template is invalid" in message
        assert "qwenlocal inspect" not in message

    def test_several_types_are_written_into_a_folder(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        expect_exit(invoke("quantize", str(tiny_bf16), "out/", "q8_0,q4_0"), 0)
        assert file_names(tmp_path / "out") == {"half-q8_0.gguf", "half-q4_0.gguf"}

    def test_quantized_weights_need_requantize(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        expect_exit(invoke("quantize", str(tiny_bf16), "q8.gguf", "q8_0"), 0)
        message = expect_exit(invoke("quantize", "./q8.gguf", "q4.gguf", "q4_0"), 2)
        assert "is quantized already (q8_0)" in message
        assert "--requantize" in message
        assert not (tmp_path / "q4.gguf").exists()
        expect_exit(invoke("quantize", "./q8.gguf", "q4.gguf", "q4_0", "--requantize"), 0)

    def test_the_source_is_never_replaced(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        shutil.copy(tiny_bf16, tmp_path / "x.gguf")
        expect_exit(invoke("quantize", "./x.gguf", "x.gguf", "q8_0"), 2)
        assert (tmp_path / "x.gguf").read_bytes() == tiny_bf16.read_bytes()
        expect_exit(invoke("quantize", "./x.gguf", "x.gguf", "q8_0", "--force"), 2)
        assert (tmp_path / "x.gguf").read_bytes() == tiny_bf16.read_bytes()
        assert file_names(tmp_path) == {"x.gguf"}

    def test_a_dry_run_writes_nothing(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("quantize", str(tiny_bf16), "x.gguf", "q8_0", "--dry-run", "--json")
        assert expect_exit(result, 0) == ""
        assert len(parse_json(result.stdout)["files"][0]["tensors"]) == TENSOR_COUNT
        assert "nothing was written" in invoke("quantize", str(tiny_bf16), "x.gguf", "q8_0", "--dry-run").stdout
        assert file_names(tmp_path) == set()

    def test_nan_is_refused(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        copy_with_weights(tiny_f32, tmp_path / "nan.gguf", "blk.0.ffn_up.weight", numpy.nan)
        message = expect_exit(invoke("quantize", "./nan.gguf", "x.gguf", "q8_0"), 5)
        assert "“blk.0.ffn_up.weight” has weights that are NaN or infinite, the first in row 0" in message
        expect_exit(invoke("quantize", "./nan.gguf", "x.gguf", "q8_0", "--allow-nan"), 0)

    def test_another_architecture_needs_pure(self, invoke: Run, tmp_path: Path) -> None:
        write_model(tmp_path / "llama.gguf", architecture="llama")
        message = expect_exit(invoke("quantize", "./llama.gguf", "x.gguf", "q8_0"), 5)
        assert "the architecture “llama”" in message
        assert "--pure" in message
        expect_exit(invoke("quantize", "./llama.gguf", "x.gguf", "q8_0", "--pure"), 0)

    def test_a_split_file_needs_all_its_parts(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        split_gguf(tiny_bf16, tmp_path)
        (tmp_path / "x-00002-of-00002.gguf").unlink()
        message = expect_exit(invoke("quantize", "./x-00001-of-00002.gguf", "y.gguf", "q8_0"), 5)
        assert "x-00002-of-00002.gguf is missing" in message

    def test_a_split_file_becomes_one_file(self, tiny_bf16: Path, invoke: Run, tmp_path: Path) -> None:
        split_gguf(tiny_bf16, tmp_path)
        expect_exit(invoke("quantize", "./x-00001-of-00002.gguf", "y.gguf", "q8_0"), 0)
        expect_exit(invoke("quantize", str(tiny_bf16), "z.gguf", "q8_0"), 0)
        assert data_of(tmp_path / "y.gguf") == data_of(tmp_path / "z.gguf")
        assert not [key for key in read_raw_metadata(tmp_path / "y.gguf") if key.startswith("split.")]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("./nowhere.gguf", "x.gguf", "q8_0"), 3, "There is no file"),
            (("./text.gguf", "x.gguf", "q8_0"), 5, "is not a GGUF file"),
            (("./cut.gguf", "x.gguf", "q8_0"), 5, "incomplete"),
            (("./half.gguf", "x.gguf", "nonsense"), 2, "TYPE must be f32, f16"),
            (("./half.gguf", "x.gguf", "f16,q8_0"), 2, "All 2 types would be written"),
            (("./half.gguf", "file/x.gguf", "q8_0"), 6, "Cannot write to"),
            (("./half.gguf", "x.gguf"), 2, "Missing argument"),
        ],
    )
    def test_wrong_arguments_are_refused_with_the_reason(
        self, arguments: tuple[str, ...], code: int, message: str, tiny_bf16: Path, invoke: Run, tmp_path: Path
    ) -> None:
        shutil.copy(tiny_bf16, tmp_path / "half.gguf")
        (tmp_path / "text.gguf").write_text("hello")
        (tmp_path / "cut.gguf").write_bytes(tiny_bf16.read_bytes()[:-1000])
        (tmp_path / "file").touch()
        before = file_names(tmp_path)
        assert message in expect_exit(invoke("quantize", *arguments), code)
        assert file_names(tmp_path) == before

    def test_a_checkpoint_is_refused_with_a_hint_to_convert(self, tiny_checkpoint: Path, invoke: Run) -> None:
        message = expect_exit(invoke("quantize", str(tiny_checkpoint), "x.gguf", "q8_0"), 2)
        assert "qwenlocal convert" in message
        assert json.loads(invoke("list", "--json").stdout) == []
