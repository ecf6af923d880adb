"""Pulls that are interrupted while a checkpoint is converted: list, rm, and continuing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import convert_checkpoint, file_names, set_json, set_weights
from commands import expect_exit, installed_path, list_models, model_states, parse_json
from conftest import Run
from hub import HubServer
from hub_checkpoints import CHECKPOINT, HF_NAME, PINNED_NAME, publish, read_tree
from interruptions import on_posix, stop_before_rename
from oracle import data_of

from qwenlocal.library import checkpoint_converter
from qwenlocal.paths import Folders
from qwenlocal.weights import write_workers
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.write_workers import WriteResult, run_job

# Each write takes 50 ms, which leaves time to stop the process.
SLOW_PULL = """
import sys, time
from qwenlocal.cli.app import app
from qwenlocal.weights import write_workers
write_all = write_workers.write_all

def slow(*arguments):
    time.sleep(0.05)
    write_all(*arguments)

write_workers.write_all = slow
app(sys.argv[1:])
"""


def count_journal_chunks(folders: Folders) -> int:
    """Count the finished chunks in the journal of the only conversion."""
    for journal in (folders.files / "converted").glob("*/*.journal"):
        return journal.read_text().count("\n") - 1
    return 0


@pytest.fixture
def interrupt_pull(invoke: Run) -> Callable[..., None]:
    """Press Ctrl-C during a pull, when the file is complete but not renamed yet."""

    def cut(name: str, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            stop_before_rename(patched)
            expect_exit(invoke("pull", name, **options), 130)

    return cut


@contextlib.contextmanager
def interrupted_checksums() -> Iterator[None]:
    """Press Ctrl-C when the checksums of a converted file are about to be computed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint_converter, "hash_blocks", stop)
        yield


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[WriteResult]:
    """The results of all conversions in this process."""
    results: list[WriteResult] = []

    def record(*arguments: Any, **options: Any) -> WriteResult:
        results.append(run_job(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(write_workers, "run_job", record)
    return results


class TestInterruptedPulls:
    @on_posix
    def test_a_killed_pull_is_listed_and_continued(
        self, hub_checkpoint: str, tiny_checkpoint: Path, environment: dict[str, str], folders: Folders, invoke: Run,
        conversions: list[WriteResult], tmp_path: Path,
    ) -> None:  # fmt: skip
        name = f"{hub_checkpoint}:q8_0"
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW_PULL, "pull", name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while count_journal_chunks(folders) < 3 and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGSTOP)
        assert model_states(invoke)[name] == "converting"
        assert re.search(rf"^{re.escape(name)} .*converting$", invoke("list").stdout, re.MULTILINE)
        child.kill()
        message = child.communicate(timeout=60)[1]
        assert child.returncode == -signal.SIGKILL, message
        assert model_states(invoke) == {name: "cut short", hub_checkpoint + CHECKPOINT: "checkpoint"}
        assert list_models(invoke)[name]["size"] > 0
        assert re.search(
            rf"^{re.escape(name)} .*conversion interrupted; pull continues it", invoke("list").stdout, re.MULTILINE
        )
        assert "Downloading the checkpoint" not in expect_exit(invoke("pull", name), 0)
        weights = (tiny_checkpoint / "model.safetensors").stat().st_size
        assert [0 < each.resumed < weights for each in conversions] == [True]
        assert model_states(invoke)[name] == "here"
        path = Path(list_models(invoke)[name]["path"])
        assert file_names(path.parent) == {path.name}
        assert data_of(path) == data_of(convert_checkpoint(tiny_checkpoint, tmp_path / "whole.gguf", "q8_0"))

    @pytest.mark.parametrize("text", [HF_NAME, f"{HF_NAME}:q4_k_m"])
    def test_rm_takes_the_name_with_or_without_the_type(
        self, text: str, hub_checkpoint: str, invoke: Run, interrupt_pull: Callable[..., None], folders: Folders
    ) -> None:
        interrupt_pull(hub_checkpoint)
        assert "Removed the unfinished conversion" in expect_exit(invoke("rm", text), 0)
        assert set(list_models(invoke)) == {hub_checkpoint + CHECKPOINT}
        assert not list((folders.files / "converted").iterdir())
        expect_exit(invoke("rm", text), 3)

    def test_rm_of_another_type_keeps_it(
        self, hub_checkpoint: str, invoke: Run, interrupt_pull: Callable[..., None]
    ) -> None:
        interrupt_pull(hub_checkpoint)
        interrupt_pull(f"{hub_checkpoint}:q8_0")
        expect_exit(invoke("rm", f"{hub_checkpoint}:q8_0"), 0)
        assert list_models(invoke)[f"{hub_checkpoint}:q4_k_m"]["state"] == "cut short"
        assert f"{hub_checkpoint}:q8_0" not in list_models(invoke)

    def test_rm_of_the_branch_keeps_a_pinned_revision(
        self, hub_checkpoint: str, invoke: Run, interrupt_pull: Callable[..., None]
    ) -> None:
        interrupt_pull(PINNED_NAME)
        assert list_models(invoke)[f"{PINNED_NAME}:q4_k_m"]["state"] == "cut short"
        expect_exit(invoke("rm", hub_checkpoint), 3)
        expect_exit(invoke("rm", PINNED_NAME), 0)
        assert set(list_models(invoke)) == {PINNED_NAME + CHECKPOINT}

    def test_an_interrupted_pull_of_a_folder_is_listed_continued_and_removed(
        self, checkpoint_copy: Path, invoke: Run, interrupt_pull: Callable[..., None], conversions: list[WriteResult]
    ) -> None:
        interrupt_pull(str(checkpoint_copy))
        assert model_states(invoke) == {str(checkpoint_copy): "cut short"}
        expect_exit(invoke("pull", f"./{checkpoint_copy.name}"), 0)
        assert conversions[-1].resumed
        assert model_states(invoke) == {str(checkpoint_copy): "here"}
        expect_exit(invoke("rm", str(checkpoint_copy)), 0)
        interrupt_pull(str(checkpoint_copy))
        assert "Removed the unfinished conversion" in expect_exit(invoke("rm", f"./{checkpoint_copy.name}"), 0)
        assert list_models(invoke) == {}

    def test_an_interrupted_pull_of_a_deleted_folder_can_be_removed(
        self, checkpoint_copy: Path, invoke: Run, interrupt_pull: Callable[..., None], folders: Folders
    ) -> None:
        interrupt_pull(str(checkpoint_copy))
        shutil.rmtree(checkpoint_copy)
        (name,) = list_models(invoke)
        assert "Removed the unfinished conversion" in expect_exit(invoke("rm", name), 0)
        assert list_models(invoke) == {}
        assert read_tree(folders.files) == {}

    def test_an_earlier_conversion_stays_usable(
        self, checkpoint_copy: Path, invoke: Run, interrupt_pull: Callable[..., None]
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        before = Path(list_models(invoke)[str(checkpoint_copy)]["path"]).read_bytes()
        set_json(checkpoint_copy, "config.json", rope_theta=10000.0)
        interrupt_pull(str(checkpoint_copy))
        states = [entry["state"] for entry in parse_json(invoke("list", "--json").stdout)]
        assert sorted(states) == ["cut short", "here"]
        assert Path(installed_path(invoke)).read_bytes() == before
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert read_metadata(Path(installed_path(invoke)))["qwen2.rope.freq_base"] == 10000.0
        assert [entry["state"] for entry in parse_json(invoke("list", "--json").stdout)] == ["here"]

    @pytest.mark.parametrize("stage", ["written", "checked"])
    def test_rm_during_a_pull_is_refused(
        self,
        stage: str,
        checkpoint_copy: Path,
        invoke: Run,
        environment: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        module, name = (Path, "replace") if stage == "written" else (checkpoint_converter, "hash_blocks")
        original, removals = getattr(module, name), list[subprocess.CompletedProcess[str]]()

        def remove_first(*arguments: Any) -> Any:
            if not removals:
                command = [sys.executable, "-m", "qwenlocal", "rm", str(checkpoint_copy)]
                removals.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60))
            return original(*arguments)

        monkeypatch.setattr(module, name, remove_first)
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        expect_exit(removals[0], 1)
        assert model_states(invoke) == {str(checkpoint_copy): "here"}


class TestInterruptedChecksums:
    @pytest.mark.parametrize("command", ["list", "rm", "pull"])
    def test_list_rm_and_pull_know_a_pull_interrupted_during_checksums(
        self, command: str, checkpoint_copy: Path, invoke: Run, folders: Folders, conversions: list[WriteResult]
    ) -> None:
        with interrupted_checksums():
            expect_exit(invoke("pull", str(checkpoint_copy)), 130)
        assert command != "list" or str(checkpoint_copy) in list_models(invoke)
        if command == "rm":
            expect_exit(invoke("rm", str(checkpoint_copy)), 0)
            assert read_tree(folders.files) == {}
        if command == "pull":
            expect_exit(invoke("pull", str(checkpoint_copy)), 0)
            assert file_names(Path(installed_path(invoke)).parent) == {Path(installed_path(invoke)).name}
            assert len(conversions) == 1 or conversions[1].resumed, "the file was complete"

    def test_a_change_after_interrupted_checksums_is_converted(
        self, checkpoint_copy: Path, invoke: Run, interrupt_pull: Callable[..., None]
    ) -> None:
        with interrupted_checksums():
            expect_exit(invoke("pull", str(checkpoint_copy)), 130)
        set_json(checkpoint_copy, "config.json", rope_theta=10000.0)
        interrupt_pull(str(checkpoint_copy))
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert read_metadata(Path(installed_path(invoke)))["qwen2.rope.freq_base"] == 10000.0


class TestNonFiniteWeights:
    def test_a_refusal_for_nan_leaves_no_file(
        self, checkpoint_copy: Path, hub: HubServer, invoke: Run, folders: Folders
    ) -> None:
        set_weights(checkpoint_copy, "model.norm.weight", 0, numpy.nan)
        publish(hub, checkpoint_copy)
        assert f"qwenlocal convert {checkpoint_copy} --allow-nan" in expect_exit(
            invoke("pull", str(checkpoint_copy)), 5
        )
        assert list_models(invoke) == {}
        assert f"qwenlocal convert {HF_NAME} --allow-nan" in expect_exit(invoke("pull", HF_NAME), 5)
        assert set(list_models(invoke)) == {HF_NAME + CHECKPOINT}
        assert not list((folders.files / "converted").iterdir())

    def test_a_refusal_for_nan_keeps_an_earlier_conversion(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        path = Path(installed_path(invoke))
        before = path.read_bytes()
        set_weights(checkpoint_copy, "model.norm.weight", 0, numpy.nan)
        os.utime(checkpoint_copy / "model.safetensors", ns=(10**18, 10**18))
        expect_exit(invoke("pull", str(checkpoint_copy)), 5)
        assert file_names(path.parent) == {path.name}
        assert path.read_bytes() == before
