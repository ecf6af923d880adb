"""qwenlocal diff: keys and tensors that differ, as text and as JSON."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import SMALL, convert_checkpoint
from commands import expect_exit, parse_json
from conftest import Run
from gguf_files import copy_with_metadata, copy_with_tensor_info, copy_with_weights

from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata


class TestDiff:
    def test_identical_files_have_no_differences(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        shutil.copy(tiny_f32, tmp_path / "copy.gguf")
        result = invoke("diff", str(tiny_f32), "./copy.gguf")
        assert expect_exit(result, 0) == ""
        assert result.stdout == "The files have the same metadata and tensors.\n"

    def test_other_types_are_listed_with_the_error_of_each_tensor(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        convert_checkpoint(tiny_checkpoint, tmp_path / "q8.gguf", "q8_0")
        result = invoke("diff", str(tiny_f32), "./q8.gguf")
        expect_exit(result, 1)
        assert "general.file_type\n  < 0\n  > 7\n" in result.stdout
        (error,) = re.findall(
            r"^blk.0.ffn_up.weight: F32 \| Q8_0, relative RMSE ([\d.]+)%$", result.stdout, re.MULTILINE
        )
        assert 0 < float(error) < 2
        assert "ffn_norm" not in result.stdout

    def test_a_summary_counts_the_differences_and_names_the_largest_error(
        self, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", 5.0)
        (error,) = re.findall(
            r"^1 tensor differs. The largest relative RMSE is ([\d.]+)% "
            r"\(blk.0.ffn_up.weight\), measured against the first file.$",
            invoke("diff", str(tiny_f32), "./x.gguf").stdout,
            re.MULTILINE,
        )
        assert 0 < float(error) < 100
        copy_with_metadata(tiny_f32, tmp_path / "y.gguf", {"a": gguf_writer.string("1" * 400), "b": gguf_writer.u32(1)})
        text = invoke("diff", str(tiny_f32), "./y.gguf").stdout
        assert text.endswith("\n2 keys differ.\n")
        assert "1" * 101 not in text
        assert "(400 characters)" in text

    def test_different_keys_are_listed_with_both_values(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        kinds = decode_value(read_raw_metadata(tiny_f32)["tokenizer.ggml.token_type"])
        pairs = {
            "general.name": None,
            "my.key": gguf_writer.string("mine"),
            "tokenizer.ggml.token_type": gguf_writer.i32s([*kinds[:270], 4, *kinds[271:]]),
        }
        copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs)
        result = invoke("diff", str(tiny_f32), "./x.gguf")
        expect_exit(result, 1)
        assert re.search(r"^general.name\n  < .+\n  > \(missing\)$", result.stdout, re.MULTILINE)
        assert "my.key\n  < (missing)\n  > mine\n" in result.stdout
        assert "tokenizer.ggml.token_type\n  < 288 entries, 5 at 270\n  > 288 entries, 4 at 270\n" in result.stdout

    def test_tensors_of_only_one_file_are_listed(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SMALL, "tie_word_embeddings": True})
        convert_checkpoint(tied, tmp_path / "x.gguf", "f32")
        wide = write_checkpoint(tmp_path / "wide", config={**SMALL, "intermediate_size": 128})
        convert_checkpoint(wide, tmp_path / "y.gguf", "f32")
        result = invoke("diff", str(tiny_f32), "./x.gguf")
        expect_exit(result, 1)
        assert "output.weight: only in the first file (F32)" in result.stdout
        assert "output.weight: only in the second file (F32)" in invoke("diff", "./x.gguf", str(tiny_f32)).stdout
        assert "blk.0.ffn_up.weight: F32, 64 x 64 | 64 x 128" in invoke("diff", str(tiny_f32), "./y.gguf").stdout

    def test_json_lists_the_same_differences(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        convert_checkpoint(tiny_checkpoint, tmp_path / "q8.gguf", "q8_0")
        result = invoke("diff", str(tiny_f32), "./q8.gguf", "--json")
        assert expect_exit(result, 1) == ""
        report = parse_json(result.stdout)
        assert [key["key"] for key in report["keys"]] == ["general.file_type"]
        assert {tensor["name"]: tensor["right"] for tensor in report["tensors"]}["output.weight"] == "Q8_0"
        assert parse_json(invoke("diff", str(tiny_f32), str(tiny_f32), "--json").stdout) == {"keys": [], "tensors": []}

    def test_nan_gives_valid_json(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        assert "blk.0.ffn_up.weight" in invoke("diff", str(tiny_f32), "./x.gguf").stdout
        result = invoke("diff", str(tiny_f32), "./x.gguf", "--json")
        expect_exit(result, 1)
        assert parse_json(result.stdout)["tensors"]

    def test_large_weights_cause_no_warning(self, tiny_f32: Path, qwenlocal: Run, tmp_path: Path) -> None:
        copy_with_weights(tiny_f32, tmp_path / "large.gguf", "output.weight", 3e38, -3e38)
        result = qwenlocal("diff", str(tiny_f32), "./large.gguf")
        assert expect_exit(result, 1) == ""
        assert "output.weight" in result.stdout

    @pytest.mark.parametrize(
        ("right", "code"), [("./nowhere.gguf", 3), ("./text.gguf", 5), ("./cut.gguf", 5), ("qwen1.5:7b", 3)]
    )
    def test_a_source_that_is_not_a_model_is_refused(
        self, right: str, code: int, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "text.gguf").write_text("hello")
        (tmp_path / "cut.gguf").write_bytes(tiny_f32.read_bytes()[:-100])
        expect_exit(invoke("diff", str(tiny_f32), right), code)
        expect_exit(invoke("diff", right, str(tiny_f32)), code)

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
    def test_an_unusual_tensor_description_is_read_or_refused_by_every_command(
        self, changes: dict[str, Any], tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        name = "blk.0.ffn_up.weight"
        changed = str(copy_with_tensor_info(tiny_f32, tmp_path / "x.gguf", name, **changes))
        same_shape = {key: value for key, value in changes.items() if key == "shape"}
        other = str(copy_with_tensor_info(tiny_f32, tmp_path / "y.gguf", name, **same_shape))
        for command in (["diff", changed, other], ["diff", other, changed], ["diff", changed, str(tiny_f32)],
                        ["inspect", changed], ["inspect", changed, "--json"],
                        ["inspect", changed, "--fix", "-o", str(tmp_path / "z.gguf")],
                        ["verify", changed, "--against", str(tiny_checkpoint)],
                        ["quantize", changed, str(tmp_path / "q.gguf"), "q8_0"]):  # fmt: skip
            assert invoke(*command).returncode in (0, 1, 2, 5), command
