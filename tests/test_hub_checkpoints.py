"""Checkpoints on Hugging Face and ModelScope: download, convert once, list, verify, repair, remove."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from checkpoint_files import SMALL, convert_checkpoint, flip_bit, set_weights
from commands import expect_exit, list_models, model_states, parse_json, parse_plan
from conftest import SAYS, Run
from hub import COMMIT, HubServer
from hub_checkpoints import (
    CHECKPOINT,
    HF_NAME,
    PINNED_NAME,
    REPO,
    UNREACHABLE,
    WeightRequests,
    fetched_files,
    publish,
    read_tree,
)
from oracle import data_of

from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights.gguf_reader import read_header


class TestHuggingFace:
    def test_convert_downloads_the_checkpoint_and_keeps_its_origin_and_license(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, tmp_path: Path, tiny_checkpoint: Path
    ) -> None:
        hub.repository(REPO).files["README.md"] = b"---\nlicense: mit\n---\n"
        message = expect_exit(invoke("convert", hub_checkpoint, "--type", "q8_0"), 0)
        assert "Downloading the checkpoint" in message
        path = tmp_path / "Tiny-Qwen-0.1B-q8_0.gguf"
        assert data_of(path) == data_of(convert_checkpoint(tiny_checkpoint, tmp_path / "y.gguf", "q8_0"))
        metadata = read_header(path).metadata
        assert metadata["general.source.repo_url"] == f"https://huggingface.co/{REPO}"
        assert metadata["general.license"] == "mit"

    def test_several_conversions_download_the_checkpoint_once(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        expect_exit(invoke("convert", hub_checkpoint, "--type", "q8_0"), 0)
        before = len(fetched_files(hub))
        expect_exit(invoke("convert", hub_checkpoint, "--type", "f16"), 0)
        expect_exit(invoke("run", hub_checkpoint, "Hi", "-n", "2"), 0)
        assert fetched_files(hub)[before:] == []

    def test_a_pulled_checkpoint_is_listed_and_removed(
        self, hub_checkpoint: str, invoke: Run, environment: dict[str, str]
    ) -> None:
        message = expect_exit(invoke("pull", hub_checkpoint), 0)
        assert "Converting it once to q4_k_m" in message
        assert model_states(invoke) == {f"{HF_NAME}:q4_k_m": "here", HF_NAME + CHECKPOINT: "checkpoint"}
        assert "checkpoint; its conversion is installed" in invoke("list").stdout
        for name in (hub_checkpoint, f"{hub_checkpoint}@checkpoint"):
            assert "freed" in expect_exit(invoke("rm", name), 0)
        assert list_models(invoke) == {}
        for folder in ("QWENLOCAL_HOME", "HF_HUB_CACHE"):
            left = [path for path in Path(environment[folder]).rglob("*") if path.is_file() or path.is_symlink()]
            assert [path for path in left if path.parent.name != "locks"] == []

    def test_a_second_run_converts_nothing_and_asks_no_server(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        first = invoke("run", hub_checkpoint, "Hi", "-n", "3", "--temp", "0")
        expect_exit(first, 0)
        before = len(hub.requests)
        second = invoke("run", hub_checkpoint, "Hi", "-n", "3", "--temp", "0")
        assert "Converting" not in expect_exit(second, 0)
        assert "Fetching" not in second.stderr
        assert second.stdout == first.stdout
        assert len(hub.requests) == before, "no request was sent"

    def test_another_type_is_converted_without_a_download(self, hub_checkpoint: str, invoke: Run) -> None:
        expect_exit(invoke("pull", hub_checkpoint), 0)
        message = expect_exit(invoke("pull", f"{hub_checkpoint}:q8_0"), 0)
        assert "Converting it once to q8_0" in message
        assert "Downloading the checkpoint" not in message
        assert {f"{hub_checkpoint}:q4_k_m", f"{hub_checkpoint}:q8_0"} <= set(list_models(invoke))

    def test_shards_become_one_model(self, hub: HubServer, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SMALL, shards=3)
        publish(hub, folder)
        expect_exit(invoke("convert", HF_NAME, "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(convert_checkpoint(folder, tmp_path / "y.gguf", "f32"))

    def test_an_unreachable_hub_exits_4(self, invoke: Run) -> None:
        assert "can be reached" in expect_exit(invoke("convert", HF_NAME, environment=UNREACHABLE), 4)

    def test_a_checkpoint_with_nan_is_refused_and_not_listed_as_a_model(
        self, hub_checkpoint: str, hub: HubServer, checkpoint_copy: Path, invoke: Run
    ) -> None:
        set_weights(checkpoint_copy, "model.norm.weight", 0, numpy.nan)
        hub.repository(REPO).files["model.safetensors"] = (checkpoint_copy / "model.safetensors").read_bytes()
        assert "NaN or infinite" in expect_exit(invoke("pull", hub_checkpoint), 5)
        assert list(model_states(invoke).values()) == ["checkpoint"]

    def test_a_checkpoint_beside_gguf_files_is_not_downloaded(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, speaking_model: Path
    ) -> None:
        hub.repository(REPO).files["tiny-q4_k_m.gguf"] = speaking_model.read_bytes()
        result = invoke("run", hub_checkpoint, "Hi")
        assert "Converting" not in expect_exit(result, 0)
        assert result.stdout == SAYS + "\n"
        assert "model.safetensors" not in fetched_files(hub)


class TestModelScope:
    NAME = f"ms:{REPO}"

    def test_a_dry_run_downloads_only_the_headers(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, tiny_checkpoint: Path
    ) -> None:
        result = invoke("convert", self.NAME, "--dry-run", "--json")
        expect_exit(result, 0)
        assert parse_plan(result.stdout) == parse_plan(
            invoke("convert", str(tiny_checkpoint), "--dry-run", "--json").stdout
        )
        whole = sum(map(len, hub.repository(REPO).files.values()))
        assert hub.sent < whole - len(hub.repository(REPO).files["model.safetensors"]) + 8192

    def test_a_checkpoint_is_pulled_once_listed_verified_and_removed(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        expect_exit(invoke("pull", self.NAME), 0)
        assert model_states(invoke) == {f"{self.NAME}:q4_k_m": "here", self.NAME + CHECKPOINT: "checkpoint"}
        before = len(hub.requests)
        expect_exit(invoke("convert", self.NAME, "-o", "x.gguf"), 0)
        expect_exit(invoke("verify", self.NAME + CHECKPOINT), 0)
        assert len(hub.requests) == before
        for name in (self.NAME, self.NAME + CHECKPOINT):
            assert "freed" in expect_exit(invoke("rm", name), 0)
        assert read_tree(folders.files) == {}

    def test_a_broken_checkpoint_is_refused_before_its_weights_are_downloaded(
        self, hub_checkpoint: str, hub: HubServer, invoke: Run
    ) -> None:
        hub.repository(REPO).files["tokenizer.json"] = b"{"
        before = hub.sent
        expect_exit(invoke("pull", self.NAME), 5)
        assert hub.sent - before < len(hub.repository(REPO).files["model.safetensors"])
        assert set(model_states(invoke).values()) <= {"partial"}


class TestPinnedRevision:
    @pytest.fixture
    def pinned_checkpoint(self, hub_checkpoint: str, invoke: Run) -> str:
        """The name of a downloaded checkpoint of a pinned revision."""
        expect_exit(invoke("pull", PINNED_NAME), 0)
        return PINNED_NAME + CHECKPOINT

    def test_a_pinned_checkpoint_is_listed_by_its_revision_and_not_as_a_branch(
        self, pinned_checkpoint: str, folders: Folders, invoke: Run
    ) -> None:
        assert model_states(invoke) == {f"{PINNED_NAME}:q4_k_m": "here", pinned_checkpoint: "checkpoint"}
        report = parse_json(invoke("show", pinned_checkpoint, "--json").stdout)
        assert (report["name"], report["state"], report["owned"]) == (pinned_checkpoint, "checkpoint", True)
        assert report["origin"] == f"hf:{REPO}@{COMMIT[:12]}"
        assert not list(folders.hub_cache.rglob("refs/*"))
        expect_exit(invoke("show", f"{HF_NAME}{CHECKPOINT}"), 3)
        expect_exit(invoke("rm", HF_NAME), 3)

    def test_a_pinned_checkpoint_is_converted_and_run_without_network(
        self, pinned_checkpoint: str, hub: HubServer, invoke: Run, qwenlocal: Run, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        before = len(hub.requests)
        expect_exit(invoke("convert", pinned_checkpoint, "--type", "f32", "-o", "x.gguf"), 0)
        assert data_of(tmp_path / "x.gguf") == data_of(convert_checkpoint(tiny_checkpoint, tmp_path / "y.gguf", "f32"))
        expect_exit(qwenlocal("run", pinned_checkpoint, "Hi", "-n", "1"), 0)
        assert len(hub.requests) == before

    def test_repair_downloads_only_the_damaged_file(
        self, pinned_checkpoint: str, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        assert "is intact" in expect_exit(invoke("verify", pinned_checkpoint, environment=UNREACHABLE), 0)
        weights = (
            Path(parse_json(invoke("show", pinned_checkpoint, "--json").stdout)["path"]).parent / "model.safetensors"
        )
        before = flip_bit(weights.resolve())
        assert "the file is damaged" in expect_exit(invoke("verify", pinned_checkpoint, "--no-repair"), 5)
        weight_requests.spans.clear()
        assert "is repaired" in expect_exit(invoke("verify", pinned_checkpoint), 0)
        assert weights.read_bytes() == before
        assert weight_requests.files == {"model.safetensors"}
        assert "is intact" in expect_exit(invoke("verify", pinned_checkpoint, environment=UNREACHABLE), 0)
        expect_exit(invoke("convert", pinned_checkpoint, environment=UNREACHABLE), 0)

    @pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
    def test_a_damaged_json_file_is_repaired(self, file: str, pinned_checkpoint: str, invoke: Run) -> None:
        path = Path(parse_json(invoke("show", pinned_checkpoint, "--json").stdout)["path"]).parent / file
        before = flip_bit(path.resolve(), find_digit(path.read_bytes()))
        expect_exit(invoke("verify", pinned_checkpoint, "--no-repair"), 5)
        expect_exit(invoke("verify", pinned_checkpoint), 0)
        assert path.read_bytes() == before

    def test_the_hint_for_a_deleted_file_restores_it(self, pinned_checkpoint: str, invoke: Run) -> None:
        weights = (
            Path(parse_json(invoke("show", pinned_checkpoint, "--json").stdout)["path"]).parent / "model.safetensors"
        )
        content = weights.read_bytes()
        weights.resolve().unlink()
        message = expect_exit(invoke("verify", pinned_checkpoint), 5)
        hint = re.search(r"qwenlocal (.+)", message.replace("\n", " "))
        assert hint
        expect_exit(invoke(*hint[1].split()), 0)
        assert weights.read_bytes() == content

    def test_a_pinned_checkpoint_is_removed_by_its_own_name(
        self, pinned_checkpoint: str, invoke: Run, folders: Folders
    ) -> None:
        assert "freed" in expect_exit(invoke("rm", pinned_checkpoint), 0)
        assert read_tree(folders.hub_cache) == {}
        assert set(list_models(invoke)) == {f"{PINNED_NAME}:q4_k_m"}
        assert "freed" in expect_exit(invoke("rm", PINNED_NAME), 0)
        assert list_models(invoke) == {}

    def test_a_pinned_checkpoint_and_its_branch_share_files(
        self,
        pinned_checkpoint: str,
        hub_checkpoint: str,
        weight_requests: WeightRequests,
        invoke: Run,
        environment: dict[str, str],
    ) -> None:
        weight_requests.spans.clear()
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert weight_requests.saw_headers_only, "the weights were in the cache"
        expect_exit(invoke("rm", pinned_checkpoint), 0)
        expect_exit(invoke("verify", f"{hub_checkpoint}{CHECKPOINT}", environment=UNREACHABLE), 0)
        expect_exit(invoke("convert", hub_checkpoint, environment=UNREACHABLE), 0)
        assert "freed" in expect_exit(invoke("rm", f"{hub_checkpoint}{CHECKPOINT}"), 0)
        assert read_tree(Path(environment["HF_HUB_CACHE"])) == {}

    def test_the_hint_for_nan_names_the_pinned_revision(
        self, hub: HubServer, checkpoint_copy: Path, invoke: Run
    ) -> None:
        set_weights(checkpoint_copy, "model.norm.weight", 0, numpy.nan)
        publish(hub, checkpoint_copy)
        assert f"qwenlocal convert {PINNED_NAME} --allow-nan" in expect_exit(invoke("pull", PINNED_NAME), 5)


def find_digit(content: bytes) -> int:
    """Return the offset of a digit in JSON: one flipped bit there leaves it readable, but different."""
    return next(match.start() for match in re.finditer(rb"[0-9](?=[,}])", content))
