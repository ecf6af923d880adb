"""Checks of a checkpoint on a hub before its weights are downloaded, and --dry-run, which downloads none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import SMALL, UP_PROJ, convert_checkpoint, file_names, set_weights
from commands import expect_exit, list_models, model_states, parse_json, parse_plan
from conftest import Run
from hub import HubServer, cut, only_on, whole_file
from hub_checkpoints import (
    CHECKPOINT,
    COMMANDS,
    HF_NAME,
    REPO,
    WeightRequests,
    each_command,
    fetched_files,
    publish,
    read_tree,
)
from oracle import data_of

from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint


class TestDryRun:
    def test_a_dry_run_downloads_only_the_headers_of_the_weights(
        self, hub_checkpoint: str, hub: HubServer, weight_requests: WeightRequests, invoke: Run, tmp_path: Path
    ) -> None:
        weights = hub.repository(REPO).files["model.safetensors"]
        result = invoke("convert", hub_checkpoint, "--dry-run")
        assert f"{len(weights) / 1e3:.0f} kB to download" in expect_exit(result, 0)
        assert "nothing was written" in result.stdout
        assert weight_requests.files == {"model.safetensors"}
        assert weight_requests.saw_headers_only
        assert hub.sent < sum(len(c) for n, c in hub.repository(REPO).files.items() if n != "model.safetensors") + 8192
        assert file_names(tmp_path) == {"person"}

    def test_headers_are_read_over_a_line_that_breaks_every_connection(
        self, hub_checkpoint: str, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        hub.always.append(only_on("model.safetensors", cut(600)))
        expect_exit(invoke("convert", hub_checkpoint, "--dry-run"), 0)
        assert weight_requests.saw_headers_only
        assert [start for _, start, _ in weight_requests.spans][:4] == [0, 8, 608, 1208]

    @pytest.mark.parametrize(
        "options",
        [{"shards": 3, "dtype": "F32"}, {"config": {**SMALL, "tie_word_embeddings": True}, "store_tied_head": True},
         {"tensors": {"model.layers.0.mlp.up_proj.bias": (64,)}}],
        ids=str,
    )  # fmt: skip
    def test_the_plan_equals_that_of_a_local_checkpoint(
        self, options: dict[str, Any], hub: HubServer, weight_requests: WeightRequests, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / REPO.rpartition("/")[2], **{"config": SMALL, **options})
        for name in options.get("tensors", {}):
            set_weights(folder, name, 0, *[0.0] * 64)
        publish(hub, folder)
        command = ("--dry-run", "--json", "--type", "q4_k_m,q8_0")
        remote, local = invoke("convert", HF_NAME, *command), invoke("convert", str(folder), *command)
        expect_exit(remote, 0)
        expect_exit(local, 0)
        assert parse_plan(remote.stdout) == parse_plan(local.stdout)
        assert weight_requests.saw_headers_only
        table = [invoke("convert", text, "--dry-run").stdout.split("\n\n")[0] for text in (HF_NAME, str(folder))]
        assert table[0] == table[1]

    def test_the_announced_size_is_the_size_that_is_written(
        self, hub_checkpoint: str, invoke: Run, tmp_path: Path
    ) -> None:
        (announced,) = parse_json(invoke("convert", hub_checkpoint, "--dry-run", "--json", "--type", "q8_0").stdout)[
            "files"
        ]
        (done,) = parse_json(invoke("convert", hub_checkpoint, "--json", "--type", "q8_0").stdout)["files"]
        assert announced["size"] == done["size"] == (tmp_path / done["path"]).stat().st_size

    def test_a_dry_run_ignores_an_existing_output(self, hub_checkpoint: str, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        expect_exit(invoke("convert", hub_checkpoint, "--dry-run", "-o", "x.gguf"), 0)
        assert (tmp_path / "x.gguf").read_bytes() == b"old"

    def test_a_dry_run_installs_nothing_and_its_files_can_be_removed(
        self, hub_checkpoint: str, invoke: Run, folders: Folders
    ) -> None:
        expect_exit(invoke("convert", hub_checkpoint, "--dry-run"), 0)
        assert set(model_states(invoke).values()) <= {"partial"}
        expect_exit(invoke("show", hub_checkpoint + CHECKPOINT), 3)
        assert "freed" in expect_exit(invoke("rm", hub_checkpoint + CHECKPOINT), 0)
        assert list_models(invoke) == {}
        assert read_tree(folders.hub_cache) == {}

    def test_a_pull_after_a_dry_run_can_be_removed_completely(
        self, hub_checkpoint: str, invoke: Run, folders: Folders
    ) -> None:
        expect_exit(invoke("convert", hub_checkpoint, "--dry-run"), 0)
        expect_exit(invoke("pull", hub_checkpoint), 0)
        for name in (hub_checkpoint, hub_checkpoint + CHECKPOINT):
            assert "freed" in expect_exit(invoke("rm", name), 0)
        assert read_tree(folders.hub_cache) == {}

    def test_a_hub_without_range_requests_fails_a_dry_run(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        content = hub.repository(REPO).files["model.safetensors"]
        hub.always.append(only_on("model.safetensors", whole_file(content)))
        for options in ((), ("--json",)):
            result = invoke("convert", hub_checkpoint, "--dry-run", *options)
            assert "sends whole files only" in expect_exit(result, 4)
            assert result.stdout == ""

    def test_a_dry_run_of_a_downloaded_checkpoint_sends_no_request(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        expect_exit(invoke("pull", hub_checkpoint), 0)
        before = len(hub.requests)
        expect_exit(invoke("convert", hub_checkpoint, "--dry-run"), 0)
        assert len(hub.requests) == before


class TestBeforeTheDownload:
    @each_command
    def test_the_size_is_announced_before_the_download(
        self,
        command: tuple[str, ...],
        hub_checkpoint: str,
        hub: HubServer,
        weight_requests: WeightRequests,
        invoke: Run,
    ) -> None:
        size = len(hub.repository(REPO).files["model.safetensors"])
        message = expect_exit(invoke(*command), 0)
        cost = re.search(rf"{size / 1e3:.0f} kB to download, then about \d+ s to convert it \(q4_k_m \d+ kB\)", message)
        assert cost
        assert cost.start() < message.index("Downloading the checkpoint")
        assert not weight_requests.saw_headers_only

    def test_the_announcement_lists_every_output_with_its_size(self, hub_checkpoint: str, invoke: Run) -> None:
        message = expect_exit(invoke("convert", hub_checkpoint, "--type", "q8_0,f16"), 0)
        assert re.search(r"about \d+ s to convert it \(q8_0 \d+ kB, f16 \d+ kB\)", message)

    def test_an_existing_output_is_refused(
        self, hub_checkpoint: str, weight_requests: WeightRequests, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "x.gguf").write_bytes(b"old")
        for options in ((), ("--json",), ("--type", "q8_0")):
            assert "x.gguf already exists" in expect_exit(
                invoke("convert", hub_checkpoint, "-o", "x.gguf", *options), 2
            )
        assert weight_requests.saw_headers_only
        assert (tmp_path / "x.gguf").read_bytes() == b"old"

    def test_an_existing_second_output_is_refused(
        self, hub_checkpoint: str, weight_requests: WeightRequests, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "x-q8_0.gguf").write_bytes(b"old")
        expect_exit(invoke("convert", hub_checkpoint, "--type", "f16,q8_0", "-o", "x-{type}.gguf"), 2)
        assert weight_requests.saw_headers_only
        assert not (tmp_path / "x-f16.gguf").exists()

    def test_a_damaged_file_is_refused_by_every_command(
        self, hub_checkpoint: str, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        for command in (*COMMANDS, ("convert", HF_NAME, "--dry-run")):
            assert "tokenizer.json: it is not valid JSON" in expect_exit(invoke(*command), 5), command
        assert weight_requests.saw_headers_only

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {}}}', "its tokenizer is not BPE"),
            ("tokenizer_config.json", b'{"chat_template": 5}', "“chat_template” is malformed"),
        ],
    )
    def test_a_broken_tokenizer_is_refused(
        self, file: str, content: bytes, message: str, hub_checkpoint: str, hub: HubServer,
        weight_requests: WeightRequests, invoke: Run,
    ) -> None:  # fmt: skip
        hub.repository(REPO).files[file] = content
        assert message in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.saw_headers_only
        assert set(model_states(invoke).values()) <= {"partial"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tensors": {UP_PROJ: None}}, f"“{UP_PROJ}” is missing"),
            ({"tensors": {UP_PROJ: (64, 32)}}, "has the shape [64, 32]; config.json implies [64, 64]"),
            ({"tensors": {"model.layers.7.mlp.up_proj.weight": (64, 64)}}, "this architecture does not have"),
            ({"config": {**SMALL, "vocab_size": 300}}, "“vocab_size” is 300, but"),
        ],
        ids=["missing", "shape", "surplus", "config"],
    )
    def test_headers_that_contradict_the_config_are_refused(
        self, options: dict[str, Any], message: str, tiny_checkpoint: Path, hub: HubServer,
        weight_requests: WeightRequests, invoke: Run, tmp_path: Path,
    ) -> None:  # fmt: skip
        config, tensors = options.get("config", SMALL), options.get("tensors")
        folder = write_checkpoint(tmp_path / "other", config=config, tensors=tensors)
        publish(hub, tiny_checkpoint)
        file = "config.json" if "config" in options else "model.safetensors"
        hub.repository(REPO).files[file] = (folder / file).read_bytes()
        assert message in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.files == {"model.safetensors"}
        assert weight_requests.saw_headers_only
        assert set(model_states(invoke).values()) <= {"partial"}

    def test_a_header_longer_than_its_file_is_refused(self, hub_checkpoint: str, hub: HubServer, invoke: Run) -> None:
        hub.repository(REPO).files["model.safetensors"] = b"\xff" * 7 + b"\x00" + b"{" * 1000
        assert "it is not a safetensors file, or incomplete" in expect_exit(invoke("pull", HF_NAME), 5)
        assert set(model_states(invoke).values()) <= {"partial"}

    def test_a_git_lfs_pointer_is_refused(self, hub_checkpoint: str, hub: HubServer, invoke: Run) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
        hub.repository(REPO).files["model.safetensors"] = pointer
        assert "git-lfs pointer" in expect_exit(invoke("pull", HF_NAME), 5)

    def test_a_disk_with_room_for_the_download_but_not_the_output_is_refused(
        self, hub_checkpoint: str, hub: HubServer, weight_requests: WeightRequests, invoke: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        size = len(hub.repository(REPO).files["model.safetensors"])
        free = shutil.disk_usage("/")._replace(free=size + 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: free)
        assert "MB needed" in expect_exit(invoke("pull", HF_NAME), 6)
        assert weight_requests.saw_headers_only

    def test_a_hub_without_range_requests_does_not_prevent_a_conversion(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        content = hub.repository(REPO).files["model.safetensors"]
        hub.always.append(only_on("model.safetensors", whole_file(content)))
        expect_exit(invoke("convert", hub_checkpoint, "--type", "q8_0", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(convert_checkpoint(tiny_checkpoint, tmp_path / "y.gguf", "q8_0"))

    def test_a_pull_succeeds_after_the_hub_has_replaced_a_broken_file(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        whole = hub.repository(REPO).files["tokenizer.json"]
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        expect_exit(invoke("pull", hub_checkpoint), 5)
        hub.repository(REPO).files["tokenizer.json"] = whole
        expect_exit(invoke("pull", hub_checkpoint), 0)
        for name in (hub_checkpoint, hub_checkpoint + CHECKPOINT):
            assert "freed" in expect_exit(invoke("rm", name), 0)
        left = read_tree(folders.hub_cache)
        assert [name for name in left if "snapshots" in name] == []

    def test_a_tensor_type_that_matches_no_tensor_is_refused(
        self, hub_checkpoint: str, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        expect_exit(invoke("convert", hub_checkpoint, "--tensor-type", "nonsense=q8_0"), 2)
        assert weight_requests.saw_headers_only

    def test_quantized_weights_are_refused(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, tiny_checkpoint: Path
    ) -> None:
        config = json.loads((tiny_checkpoint / "config.json").read_text())
        packed = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
        hub.repository(REPO).files["config.json"] = json.dumps(packed).encode()
        for command in (("pull", hub_checkpoint), ("run", hub_checkpoint, "Hi"), ("convert", hub_checkpoint)):
            message = expect_exit(invoke(*command), 5)
            assert "quantized already (bitsandbytes)" in message
            assert "Convert the original checkpoint: qwenlocal convert hf:OWNER/REPO" in message
        assert "config.json" in fetched_files(hub)
        assert "model.safetensors" not in fetched_files(hub)

    @pytest.mark.parametrize("change", [{"model_type": "llama"}, {"hidden_act": "gelu"}, {"hidden_size": -1}])
    def test_an_unsupported_config_is_refused(
        self, change: dict[str, Any], hub_checkpoint: str, hub: HubServer, invoke: Run, tiny_checkpoint: Path
    ) -> None:
        config = json.loads((tiny_checkpoint / "config.json").read_text())
        hub.repository(REPO).files["config.json"] = json.dumps({**config, **change}).encode()
        expect_exit(invoke("pull", hub_checkpoint), 5)
        assert "model.safetensors" not in fetched_files(hub)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
    def test_pickled_weights_are_refused_before_any_file_is_downloaded(
        self, name: str, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        files = hub.repository(REPO).files
        files[name] = files.pop("model.safetensors")
        for command in (("pull", hub_checkpoint), ("convert", hub_checkpoint)):
            message = expect_exit(invoke(*command), 3)
            assert REPO in message
        assert fetched_files(hub) == []
        assert "pickled" in expect_exit(invoke("convert", hub_checkpoint), 3)

    def test_a_repository_without_a_config_is_refused(self, hub_checkpoint: str, hub: HubServer, invoke: Run) -> None:
        del hub.repository(REPO).files["config.json"]
        assert "has no config.json" in expect_exit(invoke("convert", hub_checkpoint), 3)
        assert fetched_files(hub) == []
