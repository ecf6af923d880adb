"""qwenlocal inspect: its output, its findings, and --fix in place and into a copy."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from checkpoint_files import SMALL, convert_checkpoint, file_names
from commands import TENSOR_COUNT, expect_exit, parse_json
from conftest import Run
from fuzzing import fuzz, mutations
from gguf_files import copy_with_metadata, copy_with_weights, old_token_types
from hub import HubServer
from hypothesis import given
from hypothesis import strategies as st
from oracle import data_of

from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import read_header, read_raw_metadata
from qwenlocal.weights.repair import encode_backup


class TestInspect:
    def test_an_undamaged_file_has_no_findings(self, tiny_f32: Path, invoke: Run) -> None:
        result = invoke("inspect", str(tiny_f32))
        assert expect_exit(result, 0) == ""
        for words in ("architecture", "qwen2", "rope base", "1,000,000", "pre-tokenizer", "No problems found."):
            assert words in result.stdout
        assert "blk.0" not in result.stdout

    def test_tensors_lists_every_tensor(self, tiny_bf16: Path, invoke: Run) -> None:
        result = invoke("inspect", str(tiny_bf16), "--tensors")
        expect_exit(result, 0)
        for tensor in read_header(tiny_bf16).tensors:
            assert re.search(rf"^{re.escape(tensor.name)} +{tensor.shape[0]}", result.stdout, re.MULTILINE)

    def test_json_contains_everything(self, tiny_bf16: Path, invoke: Run) -> None:
        result = invoke("inspect", str(tiny_bf16), "--json")
        assert expect_exit(result, 0) == ""
        report = parse_json(result.stdout)
        assert (report["architecture"], report["type"], report["layers"]) == ("qwen2", "bf16", 1)
        assert report["size"] == tiny_bf16.stat().st_size
        assert len(report["tensor list"]) == TENSOR_COUNT
        assert report["metadata"]["tokenizer.ggml.pre"] == "qwen2"
        assert report["findings"] == []

    def test_findings_say_whether_they_can_be_fixed(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        pairs = {"qwen2.rope.freq_base": None, "tokenizer.ggml.token_type": old_token_types(tiny_f32),
                 "tokenizer.chat_template": None}  # fmt: skip
        old = str(copy_with_metadata(tiny_f32, tmp_path / "old.gguf", pairs))
        result = invoke("inspect", old)
        expect_exit(result, 5)
        error, *notes = [line for line in result.stdout.splitlines() if line.startswith(("error ", "note "))]
        assert "RoPE base is missing" in error
        assert "(repairable: --fix)" in error
        assert any("“[PAD261]”" in note and "(repairable: --fix)" in note for note in notes)
        assert any("chat template is missing" in note and "--fix" not in note for note in notes)
        report = parse_json(invoke("inspect", old, "--json").stdout)["findings"]
        assert [(f["serious"], f["fixable"]) for f in report] == [(True, True), (False, True), (False, False)]

    def test_quick_does_not_read_the_weights(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        broken = str(copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan, 1.0, numpy.inf))
        assert "“blk.0.ffn_up.weight” has 2 values that are NaN or infinite" in invoke("inspect", broken).stdout
        assert "No problems found" in invoke("inspect", broken, "--quick").stdout

    def test_a_duplicate_output_matrix_is_found_and_left_out_of_a_copy(self, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SMALL, "tie_word_embeddings": True}, store_tied_head=True)
        convert_checkpoint(tied, tmp_path / "x.gguf", "f16", like_llama_cpp=True)
        assert "The output matrix is a copy of the embeddings" in invoke("inspect", "./x.gguf").stdout
        assert "--fix -o FILE" in expect_exit(invoke("inspect", "./x.gguf", "--fix"), 2)
        assert "Wrote y.gguf" in expect_exit(invoke("inspect", "./x.gguf", "--fix", "-o", "y.gguf"), 0)
        assert "output.weight" not in data_of(tmp_path / "y.gguf")
        assert "No problems found" in invoke("inspect", "./y.gguf").stdout
        assert file_names(tmp_path) == {"tied", "x.gguf", "y.gguf"}

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            ("blk.0.ffn_up.weight", "“blk.0.ffn_up.weight” is missing"),
            ("output_norm.weight", "“output_norm.weight” is"),
        ],
    )
    def test_a_missing_tensor_is_found(
        self, tensor: str, message: str, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        content = tiny_f32.read_bytes().replace(tensor.encode(), tensor.replace("weight", "wright").encode())
        (tmp_path / "x.gguf").write_bytes(content)
        result = invoke("inspect", "./x.gguf")
        expect_exit(result, 5)
        assert message in result.stdout
        assert "llama.cpp cannot run the file" in result.stdout

    def test_an_eos_token_outside_the_vocabulary_is_found(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        path = copy_with_metadata(
            tiny_f32, tmp_path / "x.gguf", {"tokenizer.ggml.eos_token_id": gguf_writer.u32(99_999)}
        )
        assert "The eos token has the id 99,999" in invoke("inspect", str(path), "--quick").stdout

    def test_the_exit_code_is_5_for_a_serious_finding(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        base = "qwen2.rope.freq_base"
        no_base = copy_with_metadata(tiny_f32, tmp_path / "x.gguf", {base: None})
        expect_exit(invoke("inspect", str(no_base)), 5)
        expect_exit(invoke("inspect", str(no_base), "--json"), 5)
        expect_exit(invoke("inspect", str(no_base), "--fix", "-o", "fixed.gguf"), 0)
        expect_exit(invoke("inspect", "./fixed.gguf"), 0)

    def test_the_model_in_a_folder_is_suggested_but_no_hidden_file(
        self, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "models").mkdir()
        for name in ("._x.gguf", "x.gguf"):
            shutil.copy(tiny_f32, tmp_path / "models" / name)
        assert "Did you mean models/x.gguf?" in expect_exit(invoke("inspect", "./models"), 5)

    @pytest.mark.parametrize(
        ("text", "code", "message"),
        [
            ("./nowhere.gguf", 3, "There is no file"),
            ("./loop.gguf", 3, "There is no file"),
            ("./cut.gguf", 5, "it is incomplete"),
            ("./cut-in-header.gguf", 5, "it is incomplete or damaged"),
            ("./empty.gguf", 5, "the file is empty"),
            ("./text.gguf", 5, "not a GGUF file"),
            ("nonsense", 3, "No model is called"),
            ("qwen1.5:7b", 3, "on this disk"),
            ("hf:owner/repo", 3, "on this disk"),
            ("./checkpoint", 3, "on this disk"),
        ],
    )
    def test_a_source_that_is_not_a_model_is_refused(
        self, text: str, code: int, message: str, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
        content = tiny_f32.read_bytes()
        for name, data in (("cut", content[:-100]), ("cut-in-header", content[:1000]), ("empty", b""), ("text", b"hi")):
            (tmp_path / f"{name}.gguf").write_bytes(data)
        (tmp_path / "loop.gguf").symlink_to("loop.gguf")
        output = expect_exit(invoke("inspect", text), code)
        assert message in output

    @pytest.mark.parametrize(
        "pairs",
        [
            {"tokenizer.ggml.tokens": gguf_writer.u32(7)},
            {"tokenizer.ggml.tokens": gguf_writer.string("text")},
            {"tokenizer.ggml.tokens": gguf_writer.i32s([1, 2, 3])},
            {"tokenizer.ggml.token_type": gguf_writer.u32(1)},
            {"tokenizer.ggml.token_type": gguf_writer.string("text")},
            {"tokenizer.ggml.token_type": gguf_writer.strings(["1"] * 288)},
            {"tokenizer.chat_template": gguf_writer.u32(5)},
            {"tokenizer.chat_template": gguf_writer.strings(["a"])},
            {"tokenizer.ggml.eos_token_id": gguf_writer.string("x"), "tokenizer.ggml.eot_token_id": None},
            {"tokenizer.ggml.eos_token_id": gguf_writer.i32s([1]), "tokenizer.ggml.eot_token_id": gguf_writer.f32(1)},
            {"general.architecture": gguf_writer.u32(5)},
            {"general.architecture": gguf_writer.strings(["qwen2"])},
            {"general.file_type": gguf_writer.string("x")},
            {"general.file_type": gguf_writer.u32(1 << 31)},
            {"general.name": gguf_writer.strings(["a", "b"])},
            {"general.license": gguf_writer.u32(5)},
            {"qwen2.attention.head_count": gguf_writer.u32(0)},
            {"qwen2.attention.head_count": gguf_writer.i32s([4, 4])},
            {"qwen2.attention.head_count": gguf_writer.string("x")},
            {"qwen2.attention.head_count_kv": gguf_writer.u32(0)},
            {"qwen2.embedding_length": gguf_writer.u32(0)},
            {"qwen2.embedding_length": gguf_writer.string("x")},
            {"qwen2.context_length": gguf_writer.string("x")},
            {"qwen2.context_length": gguf_writer.i32(-5)},
            {"qwen2.block_count": gguf_writer.i32(-1)},
            {"qwen2.block_count": gguf_writer.f32(1.0)},
            {"qwen2.rope.freq_base": gguf_writer.string("x")},
            {"qwen2.rope.freq_base": gguf_writer.f32(float("nan"))},
            {"my.key": gguf_writer.f32(float("inf"))},
            {"my.key": gguf_writer.f32s([float("nan")])},
        ],
        ids=" ".join,
    )
    def test_values_of_the_wrong_type_do_not_crash(
        self, pairs: dict[str, bytes | None], tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        path = str(copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs))
        for options in ([], ["--json"], ["--fix", "-o", str(tmp_path / "y.gguf")]):
            result = invoke("inspect", path, *options)
            assert result.returncode in (0, 2, 5), result.stderr
            if options == ["--json"] and result.returncode == 0:
                parse_json(result.stdout)

    @pytest.mark.skipif(sys.platform == "win32", reason="memory cannot be limited there")
    def test_four_billion_layers_need_neither_time_nor_memory(
        self, tiny_f32: Path, qwenlocal: Run, tmp_path: Path
    ) -> None:
        import resource

        copy_with_metadata(tiny_f32, tmp_path / "x.gguf", {"qwen2.block_count": gguf_writer.u32((1 << 32) - 1)})
        limit = 2 << 30
        result = qwenlocal(
            "inspect", "./x.gguf", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        )
        expect_exit(result, 5)
        assert "“qwen2.block_count” is 4,294,967,295" in result.stdout

    def test_the_exit_code_survives_a_closed_stderr(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "qwenlocal", "inspect", str(tmp_path / "nowhere.gguf")]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=write).returncode == 3
        os.close(write)


class TestFix:
    @pytest.fixture
    def old_padding(self, tiny_f32: Path, tmp_path: Path) -> Path:
        """A file with a fault whose fix keeps the size of the header."""
        return copy_with_metadata(
            tiny_f32, tmp_path / "old.gguf", {"tokenizer.ggml.token_type": old_token_types(tiny_f32)}
        )

    def test_a_fix_in_place_changes_only_the_fault(
        self, old_padding: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("inspect", str(old_padding), "--fix")
        assert f"Repaired {old_padding} in place." in expect_exit(result, 0)
        assert (read_raw_metadata(old_padding), data_of(old_padding)) == (
            read_raw_metadata(tiny_f32),
            data_of(tiny_f32),
        )
        assert "No problems found" in invoke("inspect", str(old_padding)).stdout
        assert file_names(tmp_path) == {old_padding.name}

    def test_a_fix_into_a_copy_keeps_the_file(
        self, no_rope_base: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        before = no_rope_base.read_bytes()
        message = expect_exit(invoke("inspect", str(no_rope_base), "--fix", "-o", "new.gguf"), 0)
        assert "Wrote new.gguf" in message
        assert "repaired 1 of 1 problem." in message
        assert no_rope_base.read_bytes() == before
        assert read_raw_metadata(tmp_path / "new.gguf") == read_raw_metadata(tiny_f32)
        assert data_of(tmp_path / "new.gguf") == data_of(tiny_f32)
        assert not list(tmp_path.glob("*.part*"))

    def test_a_fix_in_place_is_refused_if_the_header_grows(self, no_rope_base: Path, invoke: Run) -> None:
        before = no_rope_base.read_bytes()
        assert "the weights would have to move" in expect_exit(invoke("inspect", str(no_rope_base), "--fix"), 2)
        assert no_rope_base.read_bytes() == before

    def test_an_undamaged_file_is_not_changed(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        before = tiny_f32.read_bytes()
        for options in ([], ["-o", "new.gguf"]):
            assert "nothing that --fix can repair" in expect_exit(
                invoke("inspect", str(tiny_f32), "--fix", *options), 0
            )
        assert tiny_f32.read_bytes() == before
        assert not (tmp_path / "new.gguf").exists()

    def test_an_existing_output_is_refused(self, no_rope_base: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "there.gguf").write_bytes(b"old")
        for out in ("there.gguf", str(no_rope_base)):
            assert "already exists" in expect_exit(invoke("inspect", str(no_rope_base), "--fix", "-o", out), 2)
        assert (tmp_path / "there.gguf").read_bytes() == b"old"

    def test_an_output_needs_fix(self, tiny_f32: Path, invoke: Run) -> None:
        assert "Add --fix" in expect_exit(invoke("inspect", str(tiny_f32), "-o", "x.gguf"), 2)

    def test_an_output_that_cannot_be_written_exits_6(self, no_rope_base: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "Cannot write to" in expect_exit(invoke("inspect", str(no_rope_base), "--fix", "-o", "file/x.gguf"), 6)

    def test_a_downloaded_file_is_fixed_only_into_a_copy(self, no_rope_base: Path, invoke: Run, hub: HubServer) -> None:
        hub.repository("o/old-GGUF").files = {"old-f32.gguf": no_rope_base.read_bytes()}
        expect_exit(invoke("pull", "hf:o/old-GGUF"), 0)
        message = expect_exit(invoke("inspect", "hf:o/old-GGUF", "--fix"), 2)
        assert "--fix does not change it" in message
        assert "--fix -o FILE" in message
        expect_exit(invoke("inspect", "hf:o/old-GGUF", "--fix", "-o", "new.gguf"), 0)
        assert "is intact" in expect_exit(invoke("verify", "hf:o/old-GGUF"), 0)

    def test_verify_is_no_hint_for_a_file_given_by_path(self, no_rope_base: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "cut.gguf").write_bytes(no_rope_base.read_bytes()[:100])
        message = expect_exit(invoke("inspect", "./cut.gguf"), 5)
        assert "Copy or download the file again." in message
        assert "qwenlocal verify" not in message

    def test_json_prints_only_json(self, old_padding: Path, invoke: Run) -> None:
        result = invoke("inspect", str(old_padding), "--fix", "--json")
        assert expect_exit(result, 0) == ""
        assert parse_json(result.stdout)["findings"]

    def test_an_interrupted_fix_is_undone_by_the_next_inspect(
        self, old_padding: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        content = old_padding.read_bytes()
        (tmp_path / "old.gguf.old-header").write_bytes(encode_backup(old_padding, content[:4096]))
        old_padding.write_bytes(tiny_f32.read_bytes()[:100] + bytes(1000) + content[1100:])
        result = invoke("inspect", str(old_padding))
        assert "its changes were undone" in expect_exit(result, 0)
        assert old_padding.read_bytes() == content

    def test_a_merged_file_is_fixed_in_place(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        """llama-gguf-split leaves its keys in the files that it merges."""
        none = struct.pack("<IH", 2, 0)
        of_one = {"split.no": none, "split.count": none, "tokenizer.ggml.token_type": old_token_types(tiny_f32)}
        path = copy_with_metadata(tiny_f32, tmp_path / "merged.gguf", of_one)
        assert "in place" in expect_exit(invoke("inspect", str(path), "--fix"), 0)


@fuzz
@given(data=st.data())
def test_any_damaged_header_is_read_or_refused_by_every_command(
    data: st.DataObject, tiny_f32: Path, invoke: Run, tmp_path: Path
) -> None:
    content, begin = tiny_f32.read_bytes(), read_header(tiny_f32).data_offset
    path = tmp_path / "x.gguf"
    path.write_bytes(data.draw(mutations(content[:begin])) + content[begin:])
    for command in (["inspect", str(path)], ["diff", str(tiny_f32), str(path)],
                    ["quantize", str(path), str(tmp_path / "y.gguf"), "q8_0", "--dry-run"]):  # fmt: skip
        assert invoke(*command).returncode in (0, 1, 5), command


class TestRunningDamagedFiles:
    def test_run_reports_a_model_that_computes_nan(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        result = invoke("run", "./x.gguf", "Hi")
        assert "NaN; its weights or metadata are damaged" in expect_exit(result, 5)
        assert result.stdout == ""
