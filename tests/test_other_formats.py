"""Checkpoints in other formats: adapters, wrapped, quantized and rearranged weights, trainers' folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import MINIMAL_MOE, convert_checkpoint, make_plan, rename_tensors, set_json, write_minimal
from commands import expect_exit
from conftest import Run
from hub import HubServer
from hub_checkpoints import HF_NAME, REPO
from oracle import data_of

from qwenlocal.errors import BadCheckpoint, BadWeights, UnsupportedCheckpoint
from qwenlocal.weights.checkpoint import Checkpoint

UP = "model.layers.0.mlp.up_proj"

COMMANDS = [
    ("convert", "{}"), ("run", "{}", "Hi"), ("inspect", "{}"), ("verify", "{}"), ("pull", "{}"), ("rm", "{}"),
    ("verify", "./x.gguf", "--against", "{}"),
]  # fmt: skip

each_command = pytest.mark.parametrize("command", COMMANDS, ids=" ".join)


def write_adapter(folder: Path, **config: object) -> Path:
    """Write the folder of an adapter: its configuration and its weights."""
    source = write_minimal(folder)
    target = folder / "adapter"
    target.mkdir()
    shutil.copy(source / "model.safetensors", target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return target


class TestAdapters:
    @each_command
    def test_every_command_says_what_an_adapter_is(
        self, command: tuple[str, ...], tiny_f32: Path, tmp_path: Path, invoke: Run
    ) -> None:
        shutil.copy(tiny_f32, tmp_path / "x.gguf")
        folder = write_adapter(tmp_path, base_model_name_or_path="Qwen/Qwen1.5-0.5B")
        if command[0] == "convert":  # which takes adapters
            (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        message = expect_exit(invoke(*(word.replace("{}", str(folder)) for word in command)), 5)
        assert "it is a LoRA adapter for Qwen/Qwen1.5-0.5B, not a model" in message
        assert f"qwenlocal run hf:Qwen/Qwen1.5-0.5B --adapter {folder}" in message
        assert f"qwenlocal convert hf:Qwen/Qwen1.5-0.5B --merge {folder}" in message

    @pytest.mark.parametrize("config", ["", "[]", '{"base_model_name_or_path": 5}', "[" * 100_000])
    def test_an_adapter_with_a_damaged_configuration_is_still_one(self, config: str, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path)
        (folder / "adapter_config.json").write_text(config)
        with pytest.raises(BadCheckpoint, match="it is a LoRA adapter, not a model"):
            Checkpoint.open(folder)

    def test_another_kind_of_adapter_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="it is an IA3 adapter, not a model"):
            Checkpoint.open(write_adapter(tmp_path, peft_type="IA3"))

    def test_an_adapter_of_mlx_is_refused_with_the_command_that_merges_it(self, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path, fine_tune_type="dora", model="Qwen/Qwen1.5-0.5B", lora_parameters={"rank": 8})
        (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
        with pytest.raises(BadCheckpoint, match=r"it is a dora adapter of MLX for Qwen/Qwen1\.5-0\.5B") as caught:
            Checkpoint.open(folder)
        assert f"mlx_lm.fuse --model Qwen/Qwen1.5-0.5B --adapter-path {folder} " in caught.value.hint

    @pytest.mark.parametrize(
        ("config", "shown"),
        [
            ('{"peft_type": "LORA"}', "run BASE --adapter '{}'"),
            ('{"fine_tune_type": "lora"}', "'my adapter-merged'"),
        ],
    )
    def test_an_adapter_in_the_current_folder_is_named(
        self, config: str, shown: str, tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "my adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config)
        monkeypatch.chdir(folder)
        assert shown.replace("{}", str(folder)) in expect_exit(invoke("convert", "."), 5)

    def test_the_file_of_an_adapter_is_refused_like_its_folder(self, tmp_path: Path, invoke: Run) -> None:
        path = write_adapter(tmp_path) / "adapter_model.safetensors"
        assert "it is a LoRA adapter, not a model" in expect_exit(invoke("run", str(path), "Hi"), 5)

    @pytest.mark.parametrize("command", [("convert", HF_NAME), ("pull", HF_NAME), ("run", HF_NAME, "Hi")])
    def test_an_adapter_on_a_hub_is_refused_before_any_download(
        self, command: tuple[str, ...], hub: HubServer, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path)
        hub.repository(REPO).files = {path.name: path.read_bytes() for path in folder.iterdir()}
        message = expect_exit(invoke(*command), 3)
        assert f"{REPO} is a LoRA adapter, not a model." in message
        name = REPO.rpartition("/")[2]
        assert f"hf download {REPO} --local-dir {name}" in message
        assert f"qwenlocal run BASE --adapter ./{name}" in message
        assert not [path for path in hub.requests if "/resolve/" in path]

    @pytest.mark.parametrize(
        ("rename", "more"),
        [
            (lambda name: f"base_model.model.{name}", {}),
            (lambda name: name.replace("q_proj.", "q_proj.base_layer."), {}),
            (lambda name: name, {"model.layers.0.self_attn.q_proj.lora_A.default.weight": (2, 32)}),
            (lambda name: name, {"model.layers.0.self_attn.q_proj.lora_B.weight": (32, 2)}),
            (lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."), {}),
        ],
    )
    def test_a_model_with_an_adapter_inside_is_refused(
        self, rename: Callable[[str], str], more: dict[str, tuple[int, ...]], tmp_path: Path
    ) -> None:
        folder = rename_tensors(write_minimal(tmp_path), rename, more)
        with pytest.raises(BadCheckpoint, match="it has an adapter that is not merged") as caught:
            Checkpoint.open(folder)
        assert "merge_and_unload" in caught.value.hint


class TestWrappers:
    @pytest.mark.parametrize(
        ("rename", "part"),
        [
            (lambda name: f"_orig_mod.{name}", "“_orig_mod.”"),
            (lambda name: f"module.{name}", "“module.”"),
            (lambda name: f"module._orig_mod.{name}", "“module.”, “_orig_mod.”"),
            (lambda name: f"_orig_mod.module.{name}", "“_orig_mod.module.”"),
            (lambda name: name.replace("model.", "model._orig_mod."), "“_orig_mod.”"),
            (lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "“_fsdp_wrapped_module.”"),
            (
                lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
                "“_checkpoint_wrapped_module.”",
            ),
        ],
    )
    def test_a_checkpoint_of_a_wrapped_model_is_converted_with_a_note(
        self, rename: Callable[[str], str], part: str, tmp_path: Path
    ) -> None:
        folder = write_minimal(tmp_path)
        expected = data_of(convert_checkpoint(folder, tmp_path / "x.gguf", "f16"))
        (note,) = make_plan(rename_tensors(folder, rename)).notes
        assert note == f"Left out of tensor names: {part}, which PyTorch adds in training."
        assert data_of(convert_checkpoint(folder, tmp_path / "y.gguf", "f16")) == expected

    def test_a_tensor_with_and_without_the_name_of_a_wrapper_is_refused(self, tmp_path: Path) -> None:
        folder = rename_tensors(write_minimal(tmp_path), lambda name: name, {"_orig_mod.model.norm.weight": (32,)})
        with pytest.raises(BadCheckpoint, match=r"“model\.norm\.weight” is there twice"):
            Checkpoint.open(folder)


class TestQuantizedAndRearranged:
    @pytest.mark.parametrize(
        ("rename", "more", "method"),
        [
            (lambda name: name, {f"{UP}.scales": (32, 1), f"{UP}.biases": (32, 1)}, "MLX"),
            (lambda name: name, {f"{UP}.weight_scale_inv": (1, 1)}, f"“{UP}.weight_scale_inv”"),
            (lambda name: name.replace(f"{UP}.weight", f"{UP}.weight_packed"), {}, f"“{UP}.weight_packed”"),
            (lambda name: name.replace(f"{UP}.weight", f"{UP}.W_q"), {}, f"“{UP}.W_q”"),
            (lambda name: name.replace(f"{UP}.weight", f"{UP}.weight._data"), {}, f"“{UP}.weight._data”"),
        ],
    )
    def test_quantized_weights_are_recognized_by_their_names(
        self, rename: Callable[[str], str], more: dict[str, tuple[int, ...]], method: str, tmp_path: Path
    ) -> None:
        folder = rename_tensors(write_minimal(tmp_path), rename, more)
        with pytest.raises(UnsupportedCheckpoint) as caught:
            Checkpoint.open(folder)
        assert f"quantized already ({method})" in caught.value.reason
        assert "original checkpoint" in caught.value.hint

    def test_packed_weights_without_their_settings_are_refused(self, tmp_path: Path) -> None:
        folder = rename_tensors(
            write_minimal(tmp_path),
            lambda name: name.replace(f"{UP}.weight", f"{UP}.qweight"),
            {f"{UP}.scales": (1, 32)},
        )
        with pytest.raises(BadCheckpoint, match=r"packed \(“.*\.qweight”\), but no file says how") as caught:
            Checkpoint.open(folder)
        assert "quantize_config.json" in caught.value.hint

    @pytest.mark.parametrize("key", ["quantization", "quantization_config"])
    def test_quantization_by_mlx_is_recognized_by_its_config(self, key: str, tmp_path: Path) -> None:
        settings = {"quantization": {"group_size": 64, "bits": 4}, key: {"group_size": 64, "bits": 4}}
        with pytest.raises(UnsupportedCheckpoint, match=r"quantized already \(MLX\)"):
            Checkpoint.open(write_minimal(tmp_path, settings))

    def test_experts_that_mlx_stacked_are_recognized(self, tmp_path: Path) -> None:
        folder = rename_tensors(
            write_minimal(tmp_path, MINIMAL_MOE), lambda name: name.replace("experts.0.", "switch_mlp.")
        )
        with pytest.raises(UnsupportedCheckpoint, match=r"stored as MLX stacks them \(switch_mlp\)"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("command", [("inspect", "{}"), ("verify", "{}")], ids=" ".join)
    def test_inspect_and_verify_say_what_a_quantized_checkpoint_is(
        self, command: tuple[str, ...], tmp_path: Path, invoke: Run
    ) -> None:
        folder = write_minimal(tmp_path, {"quantization_config": {"quant_method": "bitsandbytes"}})
        message = expect_exit(invoke(*(word.replace("{}", str(folder)) for word in command)), 5)
        assert "quantized already (bitsandbytes)" in message


class TestHeads:
    def test_a_value_head_is_left_out(self, tmp_path: Path) -> None:
        """As by transformers; only training with rewards uses it."""
        folder = rename_tensors(write_minimal(tmp_path), lambda name: name, {"v_head.summary.weight": (1, 32)})
        (note,) = make_plan(folder).notes
        assert note == "Left out v_head.summary.weight (64 B): a value head, which only training uses."

    @pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"])
    def test_a_classifier_is_refused(self, architecture: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"architectures": [architecture]})
        rename_tensors(folder, lambda name: name.replace("lm_head.", "score."))
        with pytest.raises(UnsupportedCheckpoint, match=r"it is a classifier \(“score\.weight”\)"):
            Checkpoint.open(folder)


class TestTrainersFolders:
    @pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
    @each_command
    def test_the_newest_checkpoint_in_a_folder_is_suggested(
        self, command: tuple[str, ...], file: str, tiny_f32: Path, tmp_path: Path, invoke: Run
    ) -> None:
        shutil.copy(tiny_f32, tmp_path / "x.gguf")
        for step in (500, 1000, 750):
            (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
            (tmp_path / "out" / f"checkpoint-{step}" / file).write_text("{}")
        message = expect_exit(invoke(*(word.replace("{}", "./out") for word in command)), 5)
        assert "out is not a checkpoint: it has no config.json." in message
        assert "Did you mean out/checkpoint-1000?" in message

    def test_a_checkpoint_inside_a_folder_without_weights_is_suggested(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        shutil.copytree(folder, folder / "checkpoint-20")
        (folder / "model.safetensors").unlink()
        with pytest.raises(BadCheckpoint, match="it contains no safetensors files") as caught:
            Checkpoint.open(folder)
        assert caught.value.hint == f"Did you mean {folder / 'checkpoint-20'}?"

    def test_checkpoints_in_folders_of_a_repository_are_named(
        self, hub: HubServer, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_minimal(tmp_path)
        hub.repository(REPO).files = {
            f"checkpoint-{step}/{path.name}": path.read_bytes() for path in folder.iterdir() for step in (1000, 500)
        }
        message = expect_exit(invoke("convert", HF_NAME), 3)
        assert f"{REPO} has its checkpoints in folders (checkpoint-1000, checkpoint-500)" in message
        assert f"hf download {REPO} --include 'checkpoint-1000/*' --local-dir Tiny-Qwen-0.1B" in message

    def test_shards_of_deepspeed_are_refused_with_the_command_that_joins_them(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "zero_to_fp32.py").write_text("")
        with pytest.raises(BadWeights, match="in the shards of DeepSpeed") as caught:
            Checkpoint.open(folder)
        assert "python zero_to_fp32.py . . --safe_serialization" in caught.value.hint

    @pytest.mark.parametrize("inside", ["", "pytorch_model_fsdp_0"])
    @pytest.mark.parametrize("has_config", [True, False])
    def test_shards_of_fsdp_are_refused_with_the_command_that_joins_them(
        self, has_config: bool, inside: str, tmp_path: Path, invoke: Run
    ) -> None:
        folder = write_minimal(tmp_path)
        for file in ("model.safetensors", *(() if has_config else ("config.json",))):
            (folder / file).unlink()
        for shards in (folder / inside, folder / "optimizer_0"):
            shards.mkdir(exist_ok=True)
            (shards / "__0_0.distcp").write_bytes(b"")
        message = expect_exit(invoke("convert", str(folder)), 5)
        assert "in the shards of PyTorch's FSDP" in message
        assert f"accelerate merge-weights {folder / inside} model-merged." in message


def test_an_index_with_wrapped_names_is_checked_as_it_is(tmp_path: Path) -> None:
    folder = write_minimal(tmp_path)
    rename_tensors(folder, lambda name: f"_orig_mod.{name}")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = [f"_orig_mod.{name}" for name in Checkpoint.open(folder / "a.safetensors").tensors]
    set_json(folder, "model.safetensors.index.json", weight_map=dict.fromkeys(names, "a.safetensors"))
    assert make_plan(folder).files
