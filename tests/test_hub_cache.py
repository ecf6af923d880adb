"""Checkpoints that another program has put into the Hugging Face cache."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
from checkpoint_files import SMALL, flip_bit
from commands import expect_exit, list_models
from conftest import Run
from hub import COMMIT, HubServer
from hub_checkpoints import (
    CHECKPOINT,
    COMMANDS,
    HF_NAME,
    OFFLINE,
    PINNED_NAME,
    REPO,
    UNREACHABLE,
    each_command,
    fetched_files,
    read_tree,
)

from qwenlocal.paths import Folders
from qwenlocal.testing import write_checkpoint


def add_to_hub_cache(folders: Folders, source: Path, *, without: tuple[str, ...] = (), main: bool = True) -> Path:
    """Put a checkpoint into the Hugging Face cache; returns its snapshot folder."""
    repo = folders.hub_cache / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        if path.name not in without:
            content = path.read_bytes()
            in_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            digest = hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else in_git
            (repo / "blobs" / digest).write_bytes(content)
            (snapshot / path.name).symlink_to(os.path.relpath(repo / "blobs" / digest, snapshot))
    if main:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the cache has no links there")


class TestUse:
    @pytest.mark.parametrize("environment_", [OFFLINE, UNREACHABLE], ids=["offline", "nobody answers"])
    @each_command
    def test_a_cached_checkpoint_is_found_without_network(
        self, command: tuple[str, ...], environment_: dict[str, str], tiny_checkpoint: Path, folders: Folders,
        hub: HubServer, invoke: Run, qwenlocal: Run,
    ) -> None:  # fmt: skip
        snapshot = add_to_hub_cache(folders, tiny_checkpoint)
        before = read_tree(snapshot.parents[1])
        process = qwenlocal if command[0] == "run" else invoke
        expect_exit(process(*command, environment=environment_), 0)
        assert hub.requests == []
        assert read_tree(snapshot.parents[1]) == before

    def test_another_type_is_converted_once(self, tiny_checkpoint: Path, folders: Folders, invoke: Run) -> None:
        add_to_hub_cache(folders, tiny_checkpoint)
        assert "Converting it once to q8_0" in expect_exit(invoke("pull", f"{HF_NAME}:q8_0", environment=OFFLINE), 0)
        assert "Converting" not in expect_exit(invoke("pull", f"{HF_NAME}:q8_0", environment=OFFLINE), 0)

    def test_a_cached_checkpoint_is_not_downloaded_again(
        self,
        tiny_checkpoint: Path,
        folders: Folders,
        hub_checkpoint: str,
        hub: HubServer,
        invoke: Run,
    ) -> None:
        add_to_hub_cache(folders, tiny_checkpoint)
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert fetched_files(hub) == []

    def test_a_branch_is_found_by_name(self, tiny_checkpoint: Path, folders: Folders, invoke: Run) -> None:
        add_to_hub_cache(folders, tiny_checkpoint)
        expect_exit(invoke("pull", f"{HF_NAME}@main", environment=OFFLINE), 0)
        expect_exit(invoke("pull", f"{HF_NAME}@other", environment=OFFLINE), 4)

    @pytest.mark.parametrize("name", [PINNED_NAME, PINNED_NAME.removesuffix(COMMIT[8:]), HF_NAME, HF_NAME.lower()])
    def test_a_checkpoint_that_was_fetched_by_commit_is_found(
        self, name: str, tiny_checkpoint: Path, folders: Folders, invoke: Run
    ) -> None:
        add_to_hub_cache(folders, tiny_checkpoint, main=False)
        for command in ("pull", "convert"):
            expect_exit(invoke(command, name, environment=OFFLINE), 0)
        expect_exit(invoke("pull", f"{HF_NAME}@main", environment=OFFLINE), 4)

    def test_a_complete_snapshot_is_preferred_to_an_incomplete_one_of_the_branch(
        self, tiny_checkpoint: Path, folders: Folders, invoke: Run
    ) -> None:
        snapshot = add_to_hub_cache(folders, tiny_checkpoint)
        (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
        newer = snapshot.parent / ("1" * 40)
        newer.mkdir()
        (newer / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
        expect_exit(invoke("pull", HF_NAME, environment=OFFLINE), 0)

    def test_removing_the_converted_model_keeps_the_cached_checkpoint(
        self, tiny_checkpoint: Path, folders: Folders, invoke: Run
    ) -> None:
        snapshot = add_to_hub_cache(folders, tiny_checkpoint)
        before = read_tree(snapshot.parents[1])
        expect_exit(invoke("pull", HF_NAME, environment=OFFLINE), 0)
        assert set(list_models(invoke)) == {f"{HF_NAME}:q4_k_m"}
        expect_exit(invoke("rm", HF_NAME), 0)
        assert list_models(invoke) == {}
        assert read_tree(snapshot.parents[1]) == before


class TestIncompleteCheckpoints:
    @pytest.mark.parametrize("without", ["tokenizer.json", "config.json", "model.safetensors"])
    def test_a_checkpoint_without_a_required_file_is_ignored(
        self, without: str, tiny_checkpoint: Path, folders: Folders, invoke: Run
    ) -> None:
        add_to_hub_cache(folders, tiny_checkpoint, without=(without,))
        for command in COMMANDS:
            assert "can be reached" in expect_exit(invoke(*command, environment=OFFLINE), 4), command
        assert list_models(invoke) == {}

    def test_a_checkpoint_without_a_shard_is_ignored(self, folders: Folders, invoke: Run, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "shards", config=SMALL, shards=2)
        add_to_hub_cache(folders, folder, without=("model-00002-of-00002.safetensors",))
        expect_exit(invoke("pull", HF_NAME, environment=OFFLINE), 4)

    def test_a_checkpoint_with_a_broken_link_is_ignored(
        self, tiny_checkpoint: Path, folders: Folders, invoke: Run
    ) -> None:
        (add_to_hub_cache(folders, tiny_checkpoint) / "model.safetensors").resolve().unlink()
        expect_exit(invoke("pull", HF_NAME, environment=OFFLINE), 4)

    def test_a_missing_file_is_downloaded(
        self, tiny_checkpoint: Path, folders: Folders, hub_checkpoint: str, invoke: Run
    ) -> None:
        snapshot = add_to_hub_cache(folders, tiny_checkpoint, without=("tokenizer.json",))
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert (snapshot / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()

    def test_removing_a_completed_checkpoint_keeps_the_files_of_others(
        self, tiny_checkpoint: Path, folders: Folders, hub_checkpoint: str, invoke: Run
    ) -> None:
        snapshot = add_to_hub_cache(folders, tiny_checkpoint, without=("tokenizer.json",))
        before = read_tree(snapshot)
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert "and stays: " in expect_exit(invoke("rm", hub_checkpoint + CHECKPOINT), 0)
        assert before.items() <= read_tree(snapshot).items()

    def test_a_damaged_file_of_others_is_not_repaired(
        self, tiny_checkpoint: Path, folders: Folders, hub_checkpoint: str, invoke: Run
    ) -> None:
        snapshot = add_to_hub_cache(folders, tiny_checkpoint, without=("tokenizer.json",))
        expect_exit(invoke("pull", hub_checkpoint), 0)
        weights = (snapshot / "model.safetensors").resolve()
        flip_bit(weights)
        content, state = weights.read_bytes(), weights.stat()
        expect_exit(invoke("verify", hub_checkpoint + CHECKPOINT), 5)
        assert (weights.read_bytes(), weights.stat().st_ino) == (content, state.st_ino)
