"""The choice of a checkpoint's weight files, in the order of transformers, in a folder and on a hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_files import INDEX, convert_checkpoint, make_plan, set_json, write_minimal
from commands import expect_exit, model_states
from conftest import Run
from hub import HubServer
from hub_checkpoints import HF_NAME, REPO, WeightRequests, publish
from oracle import data_of

from qwenlocal.errors import BadCheckpoint
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_both(folder: Path) -> Path:
    """Write a checkpoint in one file, with the shards and the index of another model beside it."""
    whole = write_minimal(folder)
    shards = write_checkpoint(folder / "shards", config={**whole_config(whole)}, seed=7, shards=2)
    for name in (*SHARDS, INDEX):
        shutil.move(shards / name, whole / name)
    return whole


def whole_config(folder: Path) -> dict[str, object]:
    return dict(Checkpoint.open(folder).config)


def used_files(folder: Path) -> set[str]:
    return {tensor.file.name for tensor in Checkpoint.open(folder).tensors.values()}


class TestFolders:
    def test_one_file_comes_before_an_index_and_its_shards_with_a_note(self, tmp_path: Path) -> None:
        folder = write_both(tmp_path)
        assert used_files(folder) == {"model.safetensors"}
        (note,) = make_plan(folder).notes
        assert note == f"The weights are read from model.safetensors. Ignored: {SHARDS[0]}, {SHARDS[1]}."

    def test_ignored_files_are_named_if_tensors_are_missing(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        shutil.copy(folder / SHARDS[0], folder / "model.safetensors")
        with pytest.raises(BadCheckpoint, match="is missing") as caught:
            make_plan(folder)
        assert caught.value.hint == f"The weights are read from model.safetensors. Ignored: {SHARDS[0]}, {SHARDS[1]}."

    @pytest.mark.parametrize("index", ['{"weight_map": {"a": "gone.safetensors"}}', "{", "{}"])
    def test_a_stale_index_beside_one_file_is_not_read(self, index: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / INDEX).write_text(index)
        assert used_files(folder) == {"model.safetensors"}
        assert make_plan(folder).notes == []

    @pytest.mark.parametrize(
        "stray",
        ["model.fp16.safetensors", "consolidated.safetensors", "model-00003-of-00003.safetensors", "pytorch_model.bin",
         "pytorch_model-00001-of-00002.bin", "adapter_model.safetensors", "adapter_model.bin"],
    )  # fmt: skip
    @pytest.mark.parametrize("shards", [1, 2])
    def test_files_beside_the_model_are_ignored_with_a_note(self, shards: int, stray: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=shards)
        names = used_files(folder)
        (folder / stray).write_bytes(b"never read")
        assert used_files(folder) == names
        (note,) = make_plan(folder).notes
        assert note == f"The weights are read from {', '.join(sorted(names))}. Ignored: {stray}."

    @pytest.mark.parametrize("other", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"])
    def test_the_state_of_a_trainer_is_not_mentioned(self, other: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / other).write_bytes(b"")
        assert make_plan(folder).notes == []
        (folder / "model.safetensors").unlink()
        with pytest.raises(BadCheckpoint, match="it contains no safetensors files"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("shards", [1, 2])
    def test_hidden_files_are_not_mentioned(self, shards: int, tmp_path: Path) -> None:
        """macOS writes "._NAME" next to each file on a disk that is not its own."""
        folder = write_minimal(tmp_path, shards=shards)
        (folder / INDEX).unlink(missing_ok=True)
        for name in used_files(folder):
            (folder / f"._{name}").write_bytes(b"")
        assert make_plan(folder).notes == []

    def test_weights_in_subfolders_are_not_the_model(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        for name in ("original", "checkpoint-500"):
            (folder / name).mkdir()
            shutil.copy(folder / "model.safetensors", folder / name / "model.safetensors")
        assert used_files(folder) == {"model.safetensors"}
        assert make_plan(folder).notes == []

    def test_one_file_of_another_name_is_used_if_it_is_the_only_one(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
        assert used_files(folder) == {"model.fp16.safetensors"}

    @pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
    def test_pickled_weights_come_before_safetensors_of_another_name(self, pickled: str, tmp_path: Path) -> None:
        """transformers does not look at other.safetensors either."""
        folder = write_minimal(tmp_path)
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / pickled).write_bytes(b"{}")
        with pytest.raises(BadCheckpoint, match=rf"its weights are pickled \({pickled}\)"):
            Checkpoint.open(folder)

    def test_a_file_that_config_json_names_must_be_passed(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        shutil.copy(folder / "model.safetensors", folder / "named.safetensors")
        set_json(folder, "config.json", transformers_weights="named.safetensors")
        with pytest.raises(BadCheckpoint, match=r"the weights are in 'named\.safetensors'") as caught:
            Checkpoint.open(folder)
        assert "Pass that file" in caught.value.hint
        assert used_files(folder / "named.safetensors") == {"named.safetensors"}
        set_json(folder, "config.json", transformers_weights="model.safetensors")
        assert used_files(folder) == {"model.safetensors"}

    def test_convert_and_verify_use_the_same_file(self, tmp_path: Path, invoke: Run) -> None:
        folder = write_both(tmp_path)
        assert "Ignored: model-00001" in expect_exit(invoke("convert", str(folder), "--type", "f32", "-o", "x.gguf"), 0)
        alone = convert_checkpoint(folder / "model.safetensors", tmp_path / "y.gguf", "f32")
        assert data_of(tmp_path / "x.gguf") == data_of(alone)
        expect_exit(invoke("verify", "./x.gguf", "--against", str(folder)), 0)


class TestHubs:
    def test_only_the_file_that_transformers_loads_is_downloaded(
        self, hub: HubServer, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_both(tmp_path)
        publish(hub, folder)
        requests = WeightRequests(hub)
        message = expect_exit(invoke("convert", HF_NAME, "--type", "f32", "-o", "x.gguf"), 0)
        assert f"Ignored: {SHARDS[0]}, {SHARDS[1]}." in message
        assert requests.files == {"model.safetensors"}
        alone = convert_checkpoint(folder / "model.safetensors", tmp_path / "y.gguf", "f32")
        assert data_of(tmp_path / "x.gguf") == data_of(alone)

    def test_a_preview_says_which_files_are_ignored(self, hub: HubServer, invoke: Run, tmp_path: Path) -> None:
        publish(hub, write_both(tmp_path))
        assert "Ignored: model-00001" in expect_exit(invoke("convert", HF_NAME, "--dry-run"), 0)

    def test_only_what_is_needed_counts_as_missing(self, hub: HubServer, invoke: Run, tmp_path: Path) -> None:
        folder = write_both(tmp_path)
        publish(hub, folder)
        expect_exit(invoke("pull", HF_NAME), 0)
        assert set(model_states(invoke).values()) == {"here", "checkpoint"}

    def test_pickled_weights_come_before_safetensors_of_another_name(
        self, hub: HubServer, invoke: Run, tmp_path: Path
    ) -> None:
        publish(hub, write_minimal(tmp_path))
        files = hub.repository(REPO).files
        files["pytorch_model.bin"], files["other.safetensors"] = b"", files.pop("model.safetensors")
        assert "pickled weights (pytorch_model.bin)" in expect_exit(invoke("pull", HF_NAME), 3)
