"""Checkpoints in several shards on a hub: the index, downloads that fail, and repairs that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoint_files import INDEX, SMALL, UP_PROJ, convert_checkpoint, flip_bit
from commands import expect_exit, list_models, model_states
from conftest import Run
from hub import HubServer, Response, only_on, refuse
from hub_checkpoints import CHECKPOINT, COMMANDS, HF_NAME, REPO, UNREACHABLE, WeightRequests, publish, read_tree
from oracle import data_of

from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint


@pytest.fixture
def sharded(hub: HubServer, tmp_path: Path) -> Path:
    """A checkpoint in two shards, which is on the hub."""
    folder = write_checkpoint(tmp_path / "shards", config=SMALL, shards=2)
    publish(hub, folder)
    return folder


def refuse_weights(hub: HubServer, *files: str) -> None:
    """Refuse the weights of these files from now on; their headers are still sent."""
    for file in files:
        end = 8 + int.from_bytes(hub.repository(REPO).files[file][:8], "little")

        def refused(answer: Response, file: str = file, end: int = end) -> None:
            if answer.path.endswith(file) and answer.start + len(answer.body) > end:
                refuse(404)(answer)

        hub.always.append(refused)


class TestIndex:
    def test_only_the_files_of_the_index_are_downloaded(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run, tmp_path: Path
    ) -> None:
        for stray in ("consolidated.safetensors", "model.fp16.safetensors", "zzz-00001-of-00002.safetensors"):
            hub.repository(REPO).files[stray] = (sharded / "model-00001-of-00002.safetensors").read_bytes()
        expect_exit(invoke("convert", HF_NAME, "--type", "f32", "-o", "x.gguf"), 0)
        assert weight_requests.files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        assert data_of(tmp_path / "x.gguf") == data_of(convert_checkpoint(sharded, tmp_path / "y.gguf", "f32"))

    def test_the_announced_size_counts_only_the_files_of_the_index(
        self, sharded: Path, hub: HubServer, invoke: Run
    ) -> None:
        size = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
        hub.repository(REPO).files["consolidated.safetensors"] = bytes(10_000_000)
        message = expect_exit(invoke("convert", HF_NAME), 0)
        assert f"{size / 1e3:.0f} kB to download" in message
        assert "2 file(s)" in message

    def test_a_missing_shard_is_refused_before_the_weights_are_downloaded(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        del hub.repository(REPO).files["model-00002-of-00002.safetensors"]
        missing = f"1 of the 2 files in {INDEX} is missing: model-00002-of-00002.safetensors"
        for command in (*COMMANDS, ("convert", HF_NAME, "--dry-run")):
            assert missing in expect_exit(invoke(*command), 5), command
        assert weight_requests.spans == []

    def test_a_tensor_in_the_wrong_shard_is_refused_before_the_weights_are_downloaded(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        index = json.loads((sharded / INDEX).read_text())
        index["weight_map"][UP_PROJ] = next(
            f for f in set(index["weight_map"].values()) if f != index["weight_map"][UP_PROJ]
        )
        hub.repository(REPO).files[INDEX] = json.dumps(index).encode()
        assert "is in another file" in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.saw_headers_only

    def test_an_index_with_a_path_outside_the_repository_is_refused(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        index = json.loads((sharded / INDEX).read_text())["weight_map"]
        for path in ("../../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ""):
            hub.repository(REPO).files[INDEX] = json.dumps({"weight_map": {**index, UP_PROJ: path}}).encode()
            assert "which is not the name of a file in the same folder" in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.spans == []

    def test_numbered_shards_without_an_index_must_be_complete(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        del hub.repository(REPO).files[INDEX]
        expect_exit(invoke("convert", HF_NAME, "-o", "x.gguf"), 0)
        hub.repository("o/half").files = {**hub.repository(REPO).files}
        del hub.repository("o/half").files["model-00001-of-00002.safetensors"]
        weight_requests.spans.clear()
        assert "part 1 of 2 is missing" in expect_exit(invoke("convert", "hf:o/half", "-o", "y.gguf"), 5)
        assert weight_requests.spans == []


class TestFailedDownloads:
    def test_the_next_pull_downloads_only_the_missing_shard(
        self, sharded: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        before = list(hub.always)
        refuse_weights(hub, "model-00002-of-00002.safetensors")
        expect_exit(invoke("pull", HF_NAME), 4)
        assert set(model_states(invoke).values()) == {"partial"}
        hub.always = before
        weight_requests.spans.clear()
        message = expect_exit(invoke("pull", HF_NAME), 0)
        first, second = (path.stat().st_size for path in sorted(sharded.glob("*.safetensors")))
        assert f"{second / 1e3:.0f} kB to download" in message
        assert first != second
        assert weight_requests.weights == {"model-00002-of-00002.safetensors"}

    @pytest.mark.parametrize("then", ["weights are refused", "headers are refused"])
    def test_a_failed_download_can_be_removed_completely(
        self, then: str, sharded: Path, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        refuse_weights(hub, "model-00002-of-00002.safetensors")
        for _ in range(2):
            expect_exit(invoke("pull", HF_NAME), 4)
            if then == "headers are refused":
                hub.always.append(only_on("model-00002", refuse(404)))
        for name in list_models(invoke):
            expect_exit(invoke("rm", name), 0)
        assert list_models(invoke) == {}
        assert read_tree(folders.hub_cache) == {}


class TestFailedRepairs:
    def test_a_failed_repair_keeps_shards_with_a_new_modification_time(
        self, sharded: Path, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        expect_exit(invoke("pull", HF_NAME), 0)
        (folder,) = folders.hub_cache.glob("*/snapshots/*")
        first, second = ((folder / f"model-0000{part}-of-00002.safetensors").resolve() for part in (1, 2))
        flip_bit(first)
        os.utime(second)
        before = list(hub.always)
        refuse_weights(hub, "model-00001-of-00002.safetensors")
        expect_exit(invoke("verify", HF_NAME + CHECKPOINT), 4)
        assert list_models(invoke)[HF_NAME + CHECKPOINT]["state"] == "partial"
        hub.always = before
        expect_exit(invoke("pull", HF_NAME), 0)
        for name in list_models(invoke):
            expect_exit(invoke("rm", name), 0)
        assert read_tree(folders.hub_cache) == {}

    @pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "config.json"])
    def test_a_repair_without_network_leaves_the_checkpoint_incomplete(
        self, file: str, sharded: Path, invoke: Run, environment: dict[str, str]
    ) -> None:
        expect_exit(invoke("pull", HF_NAME), 0)
        (folder,) = Path(environment["HF_HUB_CACHE"]).glob("*/snapshots/*")
        flip_bit((folder / file).resolve())
        expect_exit(invoke("verify", HF_NAME + CHECKPOINT, environment=UNREACHABLE), 4)
        assert list_models(invoke)[HF_NAME + CHECKPOINT]["state"] == "partial"
        expect_exit(invoke("pull", HF_NAME + CHECKPOINT), 0)
        assert list_models(invoke)[HF_NAME + CHECKPOINT]["state"] == "checkpoint"
        expect_exit(invoke("verify", HF_NAME + CHECKPOINT), 0)

    @pytest.mark.parametrize("part", [1, 2])
    def test_a_failed_repair_leaves_the_checkpoint_listed_and_removable(
        self, part: int, sharded: Path, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        expect_exit(invoke("pull", HF_NAME), 0)
        (folder,) = folders.hub_cache.glob("*/snapshots/*")
        flip_bit((folder / f"model-0000{part}-of-00002.safetensors").resolve())
        refuse_weights(hub, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        expect_exit(invoke("verify", HF_NAME + CHECKPOINT), 4)
        assert list_models(invoke)[HF_NAME + CHECKPOINT]["state"] == "partial"
        for name in list_models(invoke):
            expect_exit(invoke("rm", name), 0)
        assert read_tree(folders.hub_cache) == {}
