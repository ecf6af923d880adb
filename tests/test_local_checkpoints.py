"""Local checkpoints: run and pull convert them once, and recognize them after a change or a deletion."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoint_files import file_names, flip_bit
from commands import expect_error, expect_exit, installed_path, list_models, parse_json
from conftest import Run

from qwenlocal.weights import CONVERTER_VERSION
from qwenlocal.weights.gguf_reader import read_header


class TestPull:
    def test_a_checkpoint_is_converted_once_and_run(self, checkpoint_copy: Path, invoke: Run) -> None:
        first = invoke("run", str(checkpoint_copy), "Hi", "-n", "3", "--temp", "0")
        assert "is a checkpoint (" in expect_exit(first, 0)
        assert "Converting it once to q4_k_m" in first.stderr
        second = invoke("run", str(checkpoint_copy), "Hi", "-n", "3", "--temp", "0")
        assert "Converting" not in expect_exit(second, 0)
        assert second.stdout == first.stdout

    def test_a_conversion_is_listed_shown_verified_and_removed_and_the_checkpoint_stays(
        self, checkpoint_copy: Path, invoke: Run
    ) -> None:
        before = {path.name: path.read_bytes() for path in checkpoint_copy.iterdir()}
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (model,) = parse_json(invoke("list", "--json").stdout)
        assert (model["name"], model["state"]) == (str(checkpoint_copy), "here")
        path = Path(model["path"])
        assert path.name == f"{checkpoint_copy.name}-q4_k_m.gguf"
        assert file_names(path.parent) == {path.name}
        assert "installed, converted here" in invoke("list").stdout
        assert json.loads(invoke("show", str(checkpoint_copy), "--json").stdout)["type"] == "q4_k_m"
        assert "is intact: SHA-256" in expect_exit(invoke("verify", str(checkpoint_copy)), 0)
        expect_exit(invoke("inspect", str(checkpoint_copy)), 0)
        assert "Your checkpoint stays" in expect_exit(invoke("rm", str(checkpoint_copy)), 0)
        assert not path.exists()
        assert parse_json(invoke("list", "--json").stdout) == []
        assert {path.name: path.read_bytes() for path in checkpoint_copy.iterdir()} == before

    def test_verify_converts_a_damaged_conversion_again(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (model,) = parse_json(invoke("list", "--json").stdout)
        path = Path(model["path"])
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "the file is damaged" in expect_exit(invoke("verify", str(checkpoint_copy), "--no-repair"), 5)
        expect_exit(invoke("verify", str(checkpoint_copy)), 0)
        assert path.read_bytes() == content

    def test_one_safetensors_file_of_a_folder_can_be_pulled(self, checkpoint_copy: Path, invoke: Run) -> None:
        shutil.copy(checkpoint_copy / "model.safetensors", checkpoint_copy / "other.safetensors")
        (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / "one.safetensors")
        expect_exit(invoke("pull", str(checkpoint_copy)), 5)
        expect_exit(invoke("pull", str(checkpoint_copy / "other.safetensors")), 0)

    def test_different_paths_to_a_checkpoint_give_one_conversion(
        self, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(checkpoint_copy)
        for text in (str(checkpoint_copy), f"./{checkpoint_copy.name}", f"./{checkpoint_copy.name}/", "./link"):
            expect_exit(invoke("pull", text), 0)
        assert len(json.loads(invoke("list", "--json").stdout)) == 1

    @pytest.mark.parametrize(
        ("file", "content"), [("model.safetensors", b""), ("config.json", b"{"), ("tokenizer.json", b"{}")]
    )
    def test_a_damaged_checkpoint_is_refused_and_leaves_no_file(
        self, file: str, content: bytes, checkpoint_copy: Path, invoke: Run
    ) -> None:
        (checkpoint_copy / file).write_bytes(content)
        for command in (("run", str(checkpoint_copy), "Hi"), ("pull", str(checkpoint_copy))):
            assert file in expect_exit(invoke(*command), 5)
        assert json.loads(invoke("list", "--json").stdout) == []


class TestDeletedCheckpoints:
    def test_a_deleted_checkpoint_still_runs(self, checkpoint_copy: Path, qwenlocal: Run) -> None:
        first = qwenlocal("run", str(checkpoint_copy), "Hi", "-n", "3", "--temp", "0")
        expect_exit(first, 0)
        shutil.rmtree(checkpoint_copy)
        for text in (str(checkpoint_copy), f"./{checkpoint_copy.name}"):
            second = qwenlocal("run", text, "Hi", "-n", "3", "--temp", "0")
            assert "was deleted; using the model converted from it" in expect_exit(second, 0)
            assert second.stdout == first.stdout

    def test_a_deleted_checkpoint_is_shown_verified_and_inspected_by_name(
        self, checkpoint_copy: Path, invoke: Run
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        shutil.rmtree(checkpoint_copy)
        assert parse_json(invoke("show", str(checkpoint_copy), "--json").stdout)["type"] == "q4_k_m"
        assert "is intact" in expect_exit(invoke("verify", str(checkpoint_copy)), 0)
        expect_exit(invoke("inspect", str(checkpoint_copy)), 0)

    @pytest.mark.parametrize("how", ["whole path", "name", "relative path"])
    def test_a_deleted_checkpoint_can_be_removed_by_any_path(
        self, how: str, checkpoint_copy: Path, invoke: Run
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        path = Path(installed_path(invoke))
        shutil.rmtree(checkpoint_copy)
        text = {
            "whole path": str(checkpoint_copy),
            "name": checkpoint_copy.name,
            "relative path": f"./{checkpoint_copy.name}",
        }[how]
        expect_exit(invoke("rm", text), 0)
        assert list_models(invoke) == {}
        assert not path.exists()

    def test_a_deleted_checkpoint_can_be_removed_by_its_listed_name(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (model,) = parse_json(invoke("list", "--json").stdout)
        shutil.rmtree(checkpoint_copy)
        expect_exit(invoke("rm", model["name"]), 0)
        assert not Path(model["path"]).exists()
        assert parse_json(invoke("list", "--json").stdout) == []

    def test_a_deleted_checkpoint_cannot_be_converted(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        shutil.rmtree(checkpoint_copy)
        assert f"{checkpoint_copy}" in expect_error(invoke("convert", str(checkpoint_copy)))

    @pytest.mark.parametrize(
        "command",
        [("pull", "{}"), ("run", "{}", "Hi"), ("convert", "{}", "-o", "x.gguf"), ("verify", "{}"),
         ("verify", "./y.gguf", "--against", "{}")],
        ids=" ".join,
    )  # fmt: skip
    def test_a_deleted_checkpoint_is_not_replaced_by_its_parent_folder(
        self,
        command: tuple[str, ...],
        tiny_checkpoint: Path,
        tiny_f32: Path,
        checkpoint_copy: Path,
        invoke: Run,
        tmp_path: Path,
    ) -> None:
        """Trainers write such folders: out/ is a checkpoint, and out/checkpoint-500 an earlier one."""
        shutil.copy(tiny_f32, tmp_path / "y.gguf")
        inner = Path(shutil.copytree(tiny_checkpoint, checkpoint_copy / "checkpoint-500"))
        expect_exit(invoke("pull", str(inner)), 0)
        shutil.rmtree(inner)
        path = Path(installed_path(invoke))
        if command[0] in ("pull", "run"):
            path.unlink()
        else:
            flip_bit(path)
        assert "checkpoint-500" in expect_error(invoke(*(word.replace("{}", str(inner)) for word in command)))
        assert not (tmp_path / "x.gguf").exists()

    @pytest.mark.parametrize("left", [(), ("training.log",), ("model.safetensors",)], ids=str)
    def test_an_incomplete_folder_counts_as_deleted(
        self, left: tuple[str, ...], checkpoint_copy: Path, invoke: Run
    ) -> None:
        (checkpoint_copy / "training.log").write_text("x")
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        for path in checkpoint_copy.iterdir():
            if path.name not in left:
                path.unlink()
        assert parse_json(invoke("show", str(checkpoint_copy), "--json").stdout or "{}").get("type") == "q4_k_m"
        expect_exit(invoke("rm", str(checkpoint_copy)), 0)
        assert list_models(invoke) == {}

    def test_a_deleted_checkpoint_is_known_by_a_link_to_it(
        self, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(checkpoint_copy)
        expect_exit(invoke("pull", "./link"), 0)
        shutil.rmtree(checkpoint_copy)
        assert "using the model converted from it" in expect_exit(invoke("pull", "./link"), 0)
        expect_exit(invoke("rm", "./link"), 0)

    def test_a_deleted_safetensors_file_is_known(self, checkpoint_copy: Path, invoke: Run) -> None:
        (checkpoint_copy / "model.safetensors").rename(checkpoint_copy / "other.safetensors")
        file = checkpoint_copy / "other.safetensors"
        expect_exit(invoke("pull", str(file)), 0)
        file.unlink()
        assert "using the model converted from it" in expect_exit(invoke("pull", str(file)), 0)
        expect_exit(invoke("rm", str(file)), 0)
        assert list_models(invoke) == {}


class TestChangedCheckpoints:
    def test_a_changed_checkpoint_is_converted_again(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert "Converting" not in expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        os.utime(checkpoint_copy / "config.json", ns=(10**18, 10**18))
        assert "Converting" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert len(json.loads(invoke("list", "--json").stdout)) == 1

    @pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json"])
    def test_a_changed_file_of_the_same_size_and_time_causes_a_new_conversion(
        self, file: str, checkpoint_copy: Path, invoke: Run
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        path = checkpoint_copy / file
        state = path.stat()
        if file == "model.safetensors":
            flip_bit(path, at=-2)
        else:
            path.write_text(path.read_text().replace("0.7", "0.6"))
        assert path.stat().st_size == state.st_size
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert "Converting" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)

    @pytest.mark.parametrize(
        ("file", "content", "key", "value"),
        [
            ("README.md", "---\nlicense: mit\n---\n", "general.license", "mit"),
            ("additional_chat_templates/x.jinja", "{{ 1 }}", "tokenizer.chat_template.x", "{{ 1 }}"),
            ("chat_template.jinja", "{{ 2 }}", "tokenizer.chat_template", "{{ 2 }}"),
        ],
    )
    def test_an_added_file_causes_a_new_conversion(
        self, file: str, content: str, key: str, value: str, checkpoint_copy: Path, invoke: Run
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (checkpoint_copy / file).parent.mkdir(exist_ok=True)
        (checkpoint_copy / file).write_text(content)
        assert "Converting it once" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert read_header(Path(installed_path(invoke))).metadata[key] == value
        assert "Converting it once" not in expect_exit(invoke("pull", str(checkpoint_copy)), 0)

    @pytest.mark.parametrize("file", ["README.md", "additional_chat_templates/x.jinja"])
    def test_a_changed_or_deleted_file_causes_a_new_conversion(
        self, file: str, checkpoint_copy: Path, invoke: Run
    ) -> None:
        (checkpoint_copy / file).parent.mkdir(exist_ok=True)
        (checkpoint_copy / file).write_text("before")
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (checkpoint_copy / file).write_text("and after")
        assert "Converting it once" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (checkpoint_copy / file).unlink()
        assert "Converting it once" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)

    @pytest.mark.parametrize("file", ["training.log", "optimizer.pt", "runs/events.out"])
    def test_unrelated_files_cause_no_new_conversion(self, file: str, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        (checkpoint_copy / file).parent.mkdir(exist_ok=True)
        (checkpoint_copy / file).write_text("x")
        assert "Converting it once" not in expect_exit(invoke("pull", str(checkpoint_copy)), 0)

    def test_another_converter_version_converts_a_local_checkpoint_again(
        self, checkpoint_copy: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        monkeypatch.setattr("qwenlocal.weights.CONVERTER_VERSION", CONVERTER_VERSION + 1)
        assert "Converting it once" in expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        assert "Converting it once" not in expect_exit(invoke("pull", str(checkpoint_copy)), 0)

    def test_another_converter_version_is_reported_for_a_hub_checkpoint(
        self, hub_checkpoint: str, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert "another version" not in expect_exit(invoke("pull", hub_checkpoint), 0)
        monkeypatch.setattr("qwenlocal.weights.CONVERTER_VERSION", CONVERTER_VERSION + 1)
        message = expect_exit(invoke("pull", hub_checkpoint), 0)
        assert "converted by another version of qwenlocal" in " ".join(message.split())
        expect_exit(invoke("rm", hub_checkpoint), 0)
        expect_exit(invoke("pull", hub_checkpoint), 0)
        assert "another version" not in expect_exit(invoke("pull", hub_checkpoint), 0)
