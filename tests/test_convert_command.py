"""qwenlocal convert: its outputs, options, messages and exit codes for a checkpoint on this disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
from checkpoint_files import SMALL, file_names, set_weights
from commands import TENSOR_COUNT, expect_exit, parse_json
from conftest import Run
from hub import HubServer
from hub_checkpoints import HF_NAME, PINNED_NAME
from oracle import data_of

from qwenlocal import ggml
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.gguf_reader import read_header


def test_every_conversion_command_runs_as_a_process(tiny_checkpoint: Path, qwenlocal: Run, tmp_path: Path) -> None:
    f16, q8_0 = str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf")
    for command, code, output in (
        (("convert", str(tiny_checkpoint), "-o", f16, "--type", "f16"), 0, "Wrote"),
        (("quantize", f16, q8_0, "q8_0"), 0, "Wrote"),
        (("inspect", q8_0, "--json"), 0, '"architecture": "qwen2"'),
        (("diff", f16, q8_0), 1, "Q8_0"),
        (("verify", q8_0, "--against", str(tiny_checkpoint)), 0, "matches"),
        (("run", q8_0, "--raw", "abc", "-n", "2"), 0, ""),
    ):
        result = qwenlocal(*command)
        expect_exit(result, code)
        assert output in result.stdout + result.stderr


class TestOutputs:
    def test_a_converted_file_runs(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        result = invoke("convert", str(tiny_checkpoint))
        assert "Wrote Tiny-Qwen-0.1B-q4_k_m.gguf: q4_k_m" in expect_exit(result, 0)
        assert result.stdout == ""
        assert file_names(tmp_path) == {"Tiny-Qwen-0.1B-q4_k_m.gguf"}
        expect_exit(invoke("run", "./Tiny-Qwen-0.1B-q4_k_m.gguf", "Hi", "-n", "2", "--temp", "0"), 0)

    def test_the_checkpoint_stays_unchanged(self, checkpoint_copy: Path, invoke: Run) -> None:
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint_copy.iterdir()}
        expect_exit(invoke("convert", str(checkpoint_copy)), 0)
        assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint_copy.iterdir()} == before

    def test_output_may_be_a_folder_a_pattern_or_a_name(
        self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "there").mkdir()
        for out, names in (
            ("there", {"Tiny-Qwen-0.1B-f16.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}),
            ("new/", {"Tiny-Qwen-0.1B-f16.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}),
            ("a/{type}/m-{type}", {"m-f16.gguf", "m-q8_0.gguf"}),
            ("b/x.{type}.gguf", {"x.f16.gguf", "x.q8_0.gguf"}),
        ):
            expect_exit(invoke("convert", str(tiny_checkpoint), "--type", "f16,q8_0", "-o", out), 0)
            assert {path.name for path in (tmp_path / out.split("{")[0].split("/")[0]).rglob("*.gguf")} == names
        expect_exit(invoke("convert", str(tiny_checkpoint), "--type", "q8_0", "-o", "c/plain"), 0)
        assert file_names(tmp_path / "c") == {"plain.gguf"}
        assert not list(tmp_path.rglob("*.part*"))

    def test_name_sets_the_file_name(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        expect_exit(invoke("convert", str(tiny_checkpoint), "--name", "Other/Model 7B", "--type", "q8_0"), 0)
        assert file_names(tmp_path) == {"Other-Model 7B-q8_0.gguf"}

    @pytest.mark.skipif(sys.platform == "win32", reason="names are text there")
    def test_a_name_that_is_not_unicode_is_accepted(self, tiny_checkpoint: Path, qwenlocal: Run) -> None:
        strict = {"PYTHONIOENCODING": "utf-8:strict"}
        command = ("convert", str(tiny_checkpoint), "--name", "\udcff", "--dry-run")
        for options in ([], ["--json"]):
            expect_exit(qwenlocal(*command, *options, environment=strict), 0)

    def test_an_existing_file_is_kept_without_force(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        message = expect_exit(invoke("convert", str(tiny_checkpoint), "-o", "x.gguf"), 2)
        assert "x.gguf already exists" in message
        assert "--force" in message
        assert (tmp_path / "x.gguf").read_bytes() == b"old"
        expect_exit(invoke("convert", str(tiny_checkpoint), "-o", "x.gguf", "--force"), 0)
        assert read_header(tmp_path / "x.gguf").architecture == "qwen2"
        assert file_names(tmp_path) == {"x.gguf"}

    def test_a_folder_with_the_name_of_the_output_is_refused(
        self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "x.gguf" / "inside").mkdir(parents=True)
        (tmp_path / "out" / f"{tiny_checkpoint.name}-f16.gguf").mkdir(parents=True)
        message = expect_exit(invoke("convert", str(tiny_checkpoint), "--type", "f16", "-o", "out", "--force"), 2)
        assert "is a folder" in message
        assert file_names(tmp_path / "out") == {f"{tiny_checkpoint.name}-f16.gguf"}

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that takes no files")
    def test_a_folder_that_takes_no_files_is_not_reported_as_busy(self, tiny_checkpoint: Path, invoke: Run) -> None:
        message = expect_exit(invoke("convert", str(tiny_checkpoint), "--type", "f16", "-o", "/proc/x.gguf"), 6)
        assert "Another" not in message

    def test_an_output_that_cannot_be_written_exits_6(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "Cannot write to" in expect_exit(invoke("convert", str(tiny_checkpoint), "-o", "file/x.gguf"), 6)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may look into every folder")
    def test_a_folder_without_permission_is_named(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o000)
        assert "The folder locked is not accessible" in expect_exit(invoke("inspect", "locked/x.gguf"), 3)
        assert "Cannot write to locked: permission denied" in expect_exit(
            invoke("convert", str(tiny_checkpoint), "-o", "locked/x.gguf"), 6
        )


class TestDryRun:
    def test_a_dry_run_lists_the_tensors_and_writes_nothing(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("convert", str(tiny_checkpoint), "--dry-run", "--type", "q8_0")
        expect_exit(result, 0)
        lines = result.stdout.splitlines()
        assert lines[0].split() == ["TENSOR", "SHAPE", "FROM", "TO", "SIZE", "REASON"]
        table = {line.split()[0]: line.split() for line in lines[1 : TENSOR_COUNT + 1]}
        assert set(table) == {tensor.name for tensor in read_header(tiny_f32).tensors}
        assert table["blk.0.ffn_up.weight"][1:6] == ["64", "x", "64", "bf16", "q8_0"]
        assert re.search(
            rf"^Tiny-Qwen-0.1B-q8_0.gguf: q8_0, .* bits per weight, {TENSOR_COUNT} tensors$", result.stdout, re.M
        )
        assert result.stdout.endswith("nothing was written\n")
        assert file_names(tmp_path) == set()

    def test_a_dry_run_shows_small_sizes_in_bytes_and_reasons_other_than_the_type(
        self, tiny_checkpoint: Path, invoke: Run
    ) -> None:
        lines = invoke("convert", str(tiny_checkpoint), "--dry-run", "--type", "f16").stdout.splitlines()
        table = {line.split()[0]: line for line in lines[1 : TENSOR_COUNT + 1]}
        assert table["blk.0.ffn_up.weight"].endswith("f16  8 kB   default")
        assert " 128 B " in table["blk.0.attn_k.bias"]

    def test_a_dry_run_says_that_the_file_exists(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").touch()
        command = ("convert", str(tiny_checkpoint), "--dry-run", "-o", "x.gguf")
        assert "already exists; to overwrite it, add --force" in invoke(*command).stdout
        assert "already exists; it will be overwritten" in invoke(*command, "--force").stdout
        assert parse_json(invoke(*command, "--json").stdout)["files"][0]["exists"] is True
        assert (tmp_path / "x.gguf").read_bytes() == b""

    def test_the_json_plan_matches_the_written_files(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        command = ("convert", str(tiny_checkpoint), "--type", "q4_k_m,f16", "-o", "out/", "--json")
        result = invoke(*command, "--dry-run")
        assert expect_exit(result, 0) == ""
        plan = parse_json(result.stdout)
        assert set(plan) == {"seconds", "memory", "threads", "read", "files", "notes"}
        assert file_names(tmp_path) == set()
        result = invoke(*command)
        expect_exit(result, 0)
        written = parse_json(result.stdout)
        assert (written["zeroed"], written["resumed"], written["notes"]) == (0, 0, plan["notes"])
        files = written["files"]
        for announced, file in zip(plan["files"], files, strict=True):
            path = tmp_path / file["path"]
            assert (announced["path"], announced["size"]) == (file["path"], path.stat().st_size)
            tensors = [(t.name, list(t.shape), t.type) for t in read_header(path).tensors]
            assert [(t["name"], t["shape"], ggml.tensor_type(t["to"])) for t in announced["tensors"]] == tensors
            assert all(t["why"] for t in announced["tensors"])
        assert plan["read"] == sum(tensor.size for tensor in Checkpoint.open(tiny_checkpoint).tensors.values())


class TestTypes:
    @pytest.mark.parametrize("types", ["q8_0,q8_0", "q4_k,q4_k_m", "Q8_0,q8-0"])
    def test_a_repeated_type_is_written_once(
        self, types: str, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        expect_exit(invoke("convert", str(tiny_checkpoint), "--type", types), 0)
        assert len(file_names(tmp_path)) == 1

    def test_type_may_be_given_several_times(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        expect_exit(
            invoke(
                "convert", str(tiny_checkpoint), "--type", "q8_0", "--type", "f16", "--type", "q4_0,q8_0", "-o", "out/"
            ),
            0,
        )
        assert file_names(tmp_path / "out") == {
            f"{tiny_checkpoint.name}-{kind}.gguf" for kind in ("q8_0", "f16", "q4_0")
        }

    def test_a_trailing_comma_in_the_types_is_ignored(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        expect_exit(invoke("convert", str(tiny_checkpoint), "--type", "q4_k_m, q8_0,"), 0)
        assert file_names(tmp_path) == {"Tiny-Qwen-0.1B-q4_k_m.gguf", "Tiny-Qwen-0.1B-q8_0.gguf"}

    def test_tensor_type_overrides_the_type_of_matching_tensors(
        self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
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
        expect_exit(invoke("convert", str(tiny_checkpoint), *options), 0)
        types = {t.name: t.type.name for t in read_header(tmp_path / "x.gguf").tensors}
        chosen = [types[f"blk.0.ffn_{name}.weight"] for name in ("up", "down", "gate")]
        assert chosen == ["f16", "q4_0", "q8_0"], "the first match counts"

    def test_tensor_type_applies_to_unquantized_files(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        command = ("convert", str(tiny_checkpoint), "--tensor-type", "ffn_down=q8_0", "--type", "f16", "-o", "x.gguf")
        expect_exit(invoke(*command), 0)
        types = {t.name: t.type.name for t in read_header(tmp_path / "x.gguf").tensors}
        assert types["blk.0.ffn_down.weight"] == "q8_0"
        assert {kind for name, kind in types.items() if "ffn_down" not in name} == {"f16", "f32"}

    @pytest.mark.parametrize("option", ["nonsense=q8_0", "attn_norm=q8_0", "ffn_up.bias=q8_0", "^ffn_down=q8_0"])
    def test_a_tensor_type_that_matches_no_tensor_is_refused(
        self, option: str, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        message = expect_exit(
            invoke("convert", str(tiny_checkpoint), "--tensor-type", option, "--type", "q4_0", "-o", "x.gguf"), 2
        )
        assert f"“{option.partition('=')[0]}”" in message
        assert not (tmp_path / "x.gguf").exists()

    def test_one_of_several_tensor_types_that_matches_no_tensor_is_refused(
        self, tiny_checkpoint: Path, invoke: Run
    ) -> None:
        options = ("--tensor-type", "ffn_down=q8_0", "--tensor-type", "nonsense=q8_0")
        assert "“nonsense”" in expect_exit(invoke("convert", str(tiny_checkpoint), *options, "--dry-run"), 2)

    def test_pure_gives_all_matrices_the_same_type(self, invoke: Run, tmp_path: Path) -> None:
        config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        wide = write_checkpoint(tmp_path / "wide", config=config)
        expect_exit(invoke("convert", str(wide), "--type", "q4_k_m", "--pure", "-o", "x.gguf"), 0)
        kinds = {t.type.name for t in read_header(tmp_path / "x.gguf").tensors}
        assert kinds == {"q4_k", "f32"}

    def test_like_llama_cpp_keeps_a_copy_of_the_tied_output_matrix(self, invoke: Run, tmp_path: Path) -> None:
        tied = write_checkpoint(tmp_path / "tied", config={**SMALL, "tie_word_embeddings": True}, store_tied_head=True)
        assert "Left out lm_head.weight" in expect_exit(invoke("convert", str(tied), "-o", "ours.gguf"), 0)
        expect_exit(invoke("convert", str(tied), "--like", "llama.cpp", "-o", "theirs.gguf"), 0)
        has_output = ["output.weight" in data_of(tmp_path / f"{name}.gguf") for name in ("ours", "theirs")]
        assert has_output == [False, True]

    def test_a_mixture_of_experts_is_converted_and_run(self, invoke: Run, tmp_path: Path) -> None:
        config = {**MOE_CONFIG, **SMALL, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        write_checkpoint(tmp_path / "moe", config=config)
        expect_exit(invoke("convert", "./moe", "--type", "q8_0", "-o", "x.gguf"), 0)
        assert read_header(tmp_path / "x.gguf").architecture == "qwen2moe"
        expect_exit(invoke("run", "./x.gguf", "Hi", "-n", "2"), 0)


class TestOptions:
    @pytest.mark.parametrize(
        "options", [["-t", "7" * 400], ["--type", "7" * 400], ["--like", "7" * 400], ["--" + "7" * 400], ["7" * 400]]
    )
    def test_an_endless_value_is_cut_in_the_message(
        self, options: list[str], tiny_checkpoint: Path, invoke: Run
    ) -> None:
        result = invoke("convert", str(tiny_checkpoint), *options)
        message = expect_exit(result, 2).replace("\n", "").replace(",", "")
        assert "77…" in message
        assert "7" * 151 not in message

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--type", "q4_k_x"], "Did you mean q4_k_"),
            (["--type", "nonsense"], "--type must be f32, f16"),
            (["--type", ""], "--type must be f32, f16"),
            (["--type", ","], "--type must be f32, f16"),
            (["--type", "f16,q8_0", "-o", "x.gguf"], "All 2 types would be written to x.gguf"),
            (["--tensor-type", "ffn_down"], "not of the form REGEX=TYPE"),
            (["--tensor-type", "=q8_0"], "not of the form REGEX=TYPE"),
            (["--tensor-type", "(=q8_0"], "is not a regular expression"),
            (["--tensor-type", "a=q4_k_m"], "The type of --tensor-type must be bf16"),
            (["-t", "0"], "-t must be between 1 and 512"),
            (["-t", "-5"], "-t must be between 1 and 512"),
            (["--like", "ollama"], "--like must be llama.cpp"),
            (["--limit-rate", "x"], "“x” is not a rate"),
        ],
    )
    def test_wrong_options_are_refused_with_the_reason(
        self, options: list[str], message: str, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        assert message in expect_exit(invoke("convert", str(tiny_checkpoint), *options), 2)
        assert file_names(tmp_path) == set()

    def test_a_type_in_the_name_is_refused_with_a_hint_to_the_option(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        assert "--type q8_0" in expect_exit(invoke("convert", f"{hub_checkpoint}:q8_0"), 2)
        assert hub.requests == []

    def test_a_type_in_a_catalog_name_is_refused_with_a_hint_to_the_option(self, hub: HubServer, invoke: Run) -> None:
        assert "--type q8_0" in expect_exit(invoke("convert", "qwen1.5:1.8b-base-q8_0"), 2)
        assert hub.requests == []


class TestSources:
    @pytest.mark.parametrize(
        ("text", "code", "message"),
        [
            ("./nowhere", 3, "There is no file nowhere"),
            ("nonsense", 3, "No model is called"),
            ("hf:owner/nothing", 3, "has no repository “owner/nothing”"),
            ("./empty", 5, "is not a checkpoint: it has no config.json"),
            ("./model.gguf", 2, "is not a checkpoint"),
            ("https://127.0.0.1:1/x.gguf", 2, "is not a checkpoint"),
            ("./file.safetensors", 5, "it has no config.json"),
        ],
    )
    def test_a_wrong_source_is_refused_with_the_reason(
        self, text: str, code: int, message: str, invoke: Run, hub: HubServer, tmp_path: Path, speaking_model: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file.safetensors").write_bytes(bytes(8))
        shutil.copy(speaking_model, tmp_path / "model.gguf")
        before = file_names(tmp_path)
        assert message in expect_exit(invoke("convert", text), code)
        assert file_names(tmp_path) == before

    @pytest.mark.parametrize(
        "text", [f"{HF_NAME}/x.gguf", f"{PINNED_NAME}/x.gguf", "https://example.org/x.safetensors"]
    )
    def test_a_file_of_a_repository_is_refused(
        self, text: str, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        assert "is not a checkpoint" in expect_exit(invoke("convert", text), 2)
        assert hub.requests == []

    def test_a_folder_without_config_json_is_refused(self, checkpoint_copy: Path, invoke: Run) -> None:
        (checkpoint_copy / "config.json").unlink()
        for command in ("convert", "pull"):
            for text in (str(checkpoint_copy), checkpoint_copy.name, f"./{checkpoint_copy.name}/"):
                assert "is not a checkpoint: it has no config.json" in expect_exit(invoke(command, text), 5)

    def test_one_safetensors_file_of_a_folder_is_converted(
        self, checkpoint_copy: Path, invoke: Run, tiny_f32: Path
    ) -> None:
        shutil.copy(checkpoint_copy / "model.safetensors", checkpoint_copy / "other.safetensors")
        (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / "one.safetensors")
        assert "no model.safetensors.index.json states" in expect_exit(invoke("convert", str(checkpoint_copy)), 5)
        expect_exit(invoke("convert", str(checkpoint_copy / "other.safetensors"), "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(checkpoint_copy.parent / "x.gguf") == data_of(tiny_f32)

    def test_a_single_shard_is_refused(self, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SMALL, shards=2)
        message = expect_exit(invoke("convert", str(folder / "model-00001-of-00002.safetensors")), 5)
        assert "one of 2 files" in message
        assert "Pass the folder" in message

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders there")
    def test_a_pipe_is_refused(self, checkpoint_copy: Path, invoke: Run) -> None:
        (checkpoint_copy / "model.safetensors").unlink()
        os.mkfifo(checkpoint_copy / "model.safetensors")
        assert "not a regular file" in expect_exit(invoke("convert", str(checkpoint_copy)), 5)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("model.safetensors", b"", "the file is empty"),
            ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("config.json", b"{", "not valid JSON"),
            ("config.json", b"{}", "“architectures” does not name"),
            ("tokenizer.json", b"[]", "not a JSON object"),
            ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ],
    )
    def test_a_damaged_file_is_named(
        self, file: str, content: bytes, message: str, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (checkpoint_copy / file).write_bytes(content)
        output = expect_exit(invoke("convert", str(checkpoint_copy)), 5)
        assert message in output
        assert file in output
        assert file_names(tmp_path) == {checkpoint_copy.name}

    def test_quantized_weights_are_recognized_by_tensor_names(self, checkpoint_copy: Path, invoke: Run) -> None:
        path = checkpoint_copy / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b"mlp.up_proj.weight", b"mlp.up_pro.qweight"))
        assert "its weights are packed" in expect_exit(invoke("convert", str(checkpoint_copy)), 5)

    def test_an_adapter_is_refused(self, checkpoint_copy: Path, invoke: Run) -> None:
        (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / "adapter_model.safetensors")
        assert "it is a LoRA adapter" in expect_exit(invoke("convert", str(checkpoint_copy)), 5)

    def test_nan_is_refused_with_tensor_row_and_hint(self, checkpoint_copy: Path, invoke: Run, tmp_path: Path) -> None:
        set_weights(checkpoint_copy, "model.layers.0.mlp.up_proj.weight", 40, numpy.nan, numpy.inf)
        message = expect_exit(invoke("convert", str(checkpoint_copy), "-o", "x.gguf"), 5)
        assert "“blk.0.ffn_up.weight” has weights that are NaN or infinite, the first in row 40" in message
        assert "--allow-nan" in message
        assert not (tmp_path / "x.gguf").exists()
        assert "2 weights were NaN or infinite, and set to zero" in expect_exit(
            invoke("convert", str(checkpoint_copy), "-o", "x.gguf", "--allow-nan"), 0
        )
        assert file_names(tmp_path) == {checkpoint_copy.name, "x.gguf"}

    def test_weights_too_large_for_f16_are_refused_with_a_hint(self, checkpoint_copy: Path, invoke: Run) -> None:
        set_weights(checkpoint_copy, "model.layers.0.mlp.up_proj.weight", 0, 1e9)
        message = expect_exit(invoke("convert", str(checkpoint_copy), "--type", "f16"), 5)
        assert "too large for f16" in message
        assert "Use bf16 or f32" in message
