"""Checkpoint folders: which files belong to one, unreadable JSON, and damage of any kind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    FRONT_MATTER,
    INDEX,
    MINIMAL,
    assert_planned_or_refused,
    expect_refusal,
    make_plan,
    set_json,
    write_minimal,
)
from fuzzing import fuzz, mutations
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.testing import CONFIG
from qwenlocal.weights.architecture import check_convertible
from qwenlocal.weights.checkpoint import Checkpoint


def weight_files(checkpoint: Checkpoint) -> set[Path]:
    return {tensor.file for tensor in checkpoint.tensors.values()}


class TestWeightFiles:
    @pytest.mark.parametrize("shards", [1, 2, 3])
    def test_one_file_and_several_shards_are_the_same_checkpoint(self, shards: int, tmp_path: Path) -> None:
        opened = Checkpoint.open(write_minimal(tmp_path, shards=shards))
        assert len(weight_files(opened)) == shards
        assert len(opened.tensors) == 15
        assert opened.has_weights

    def test_numbered_shards_without_an_index_are_found_and_a_missing_one_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=3)
        (folder / INDEX).unlink()
        assert len(Checkpoint.open(folder).tensors) == 15
        (folder / "model-00002-of-00003.safetensors").unlink()
        assert expect_refusal(Checkpoint.open, folder) == "part 2 of 3 is missing"

    def test_shards_of_several_models_are_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        (folder / INDEX).unlink()
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other-00001-of-00002.safetensors")
        assert "safetensors files (model-00001-of-00002" in expect_refusal(Checkpoint.open, folder)

    def test_a_missing_shard_is_refused_with_its_name(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=5)
        (folder / "model-00004-of-00005.safetensors").unlink()
        reason = f"1 of the 5 files in {INDEX} is missing: model-00004-of-00005.safetensors"
        assert expect_refusal(Checkpoint.open, folder) == reason

    def test_a_long_list_of_missing_shards_is_shortened(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=6)
        for path in list(folder.glob("*.safetensors"))[:5]:
            path.unlink()
        assert f"5 of the 6 files in {INDEX} are missing: " in expect_refusal(Checkpoint.open, folder)

    def test_a_shard_name_that_no_file_can_have_is_refused(self, tmp_path: Path) -> None:
        for name in ("x" * 300, "a\0b", "\ud800"):
            set_json(write_minimal(tmp_path, shards=2), INDEX, weight_map={"a": name})
            assert "missing" in expect_refusal(Checkpoint.open, tmp_path / "model")

    @pytest.mark.parametrize(
        "file", ["../x", "/etc/passwd", "a/b", "a\\b", "..\\x", "", ".", "..", "./x", "x/", 5, None, ["x"], {}]
    )
    def test_an_index_with_a_path_outside_the_folder_is_refused(self, file: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path, shards=2), INDEX, weight_map={"model.norm.weight": file})
        (tmp_path / "x").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
        with pytest.raises(BadCheckpoint, match="which is not the name of a file in the same folder") as caught:
            Checkpoint.open(folder)
        assert "malicious" in caught.value.hint

    def test_an_index_with_a_duplicate_tensor_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
        assert "“a” occurs twice" in expect_refusal(Checkpoint.open, folder)

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "model.safetensors"}])
    def test_an_index_without_a_weight_map_is_refused(self, index: object, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        (folder / INDEX).write_text(json.dumps(index))
        assert expect_refusal(Checkpoint.open, folder) == "it has no “weight_map”"

    def test_an_index_that_contradicts_the_shards_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        first, second = (next(name for name, file in index.items() if f"-0000{n}-" in file) for n in (1, 2))
        set_json(folder, INDEX, weight_map={**index, first: index[second]})
        assert f"“{first}” is in another file" in expect_refusal(Checkpoint.open, folder)
        set_json(folder, INDEX, weight_map={**index, "model.other.weight": index[first]})
        reason = expect_refusal(Checkpoint.open, folder)
        assert f"it does not contain “model.other.weight”, although {INDEX} says so" in reason

    def test_a_tensor_in_two_shards_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, shards=2)
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
        assert "is also in model-00001-of-00002.safetensors" in expect_refusal(Checkpoint.open, folder)

    def test_several_unrelated_weight_files_need_a_choice(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        assert "2 safetensors files (one.safetensors, other.safetensors)" in expect_refusal(Checkpoint.open, folder)
        assert weight_files(Checkpoint.open(folder / "other.safetensors")) == {folder / "other.safetensors"}

    def test_an_adapter_beside_the_weights_is_ignored_and_alone_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        assert weight_files(Checkpoint.open(folder)) == {folder / "model.safetensors"}
        (folder / "model.safetensors").unlink()
        assert expect_refusal(Checkpoint.open, folder) == "it is a LoRA adapter, not a model"
        (folder / "adapter_model.safetensors").unlink()
        assert expect_refusal(Checkpoint.open, folder) == "it contains no safetensors files"

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "epoch.ckpt"])
    def test_pickled_weights_are_refused_and_their_code_does_not_run(self, name: str, tmp_path: Path) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'harm'}",)

        folder = write_minimal(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(BadCheckpoint, match=f"pickled .{name}.*can execute code") as caught:
            Checkpoint.open(folder)
        assert "save_pretrained" in caught.value.hint
        assert not (tmp_path / "harm").exists()

    def test_a_broken_link_is_refused(self, tmp_path: Path) -> None:
        """The Hugging Face cache has such links after an interrupted download."""
        folder = write_minimal(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "blob")
        with pytest.raises(BadCheckpoint, match="There is no file"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "compressed-tensors"])
    def test_quantized_weights_are_refused_with_a_hint_to_the_original(self, method: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"quantization_config": {"quant_method": method, "bits": 4}})
        for read in (Checkpoint.open, check_convertible):
            with pytest.raises(UnsupportedCheckpoint, match=f"quantized already .{method}.") as caught:
                read(folder)
            assert caught.value.hint == "Convert the original checkpoint: qwenlocal convert hf:OWNER/REPO"

    def test_quantized_weights_of_an_unnamed_method_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="quantized already, but “quant_method” is missing"):
            Checkpoint.open(write_minimal(tmp_path, {"quantization_config": {"bits": 4}}))

    @pytest.mark.parametrize("config", ["gptq", [1]])
    def test_a_quantization_config_that_is_no_object_is_refused(self, config: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“quantization_config” must be an object, not"):
            Checkpoint.open(write_minimal(tmp_path, {"quantization_config": config}))

    @pytest.mark.parametrize("config", [None, {}, False])
    def test_an_empty_quantization_config_is_accepted(self, config: object, tmp_path: Path) -> None:
        assert Checkpoint.open(write_minimal(tmp_path, {"quantization_config": config}))


UNREADABLE = [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[]", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ("null", "not a JSON object"),
    ("<html>", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"a":' * 100_000, "not valid JSON"),
    ('{"a": 1, "a": 2}', "“a” occurs twice"),
    ('{"a": ' + "1" * 10_000 + "}", "not valid JSON"),
]


DOCUMENTS = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]


class TestJsonFiles:
    @pytest.mark.parametrize("file", DOCUMENTS)
    @pytest.mark.parametrize(("content", "reason"), UNREADABLE)
    def test_unreadable_json_is_refused_with_the_file_name(
        self, file: str, content: str, reason: str, tmp_path: Path
    ) -> None:
        path = write_minimal(tmp_path, shards=2) / file
        path.write_text(content)
        with pytest.raises(BadCheckpoint, match=reason) as caught:
            make_plan(path.parent)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("file", DOCUMENTS)
    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"a": "\xc3("}', b"\x80" * 8])
    def test_invalid_utf8_is_refused_with_the_file_name(self, file: str, content: bytes, tmp_path: Path) -> None:
        path = write_minimal(tmp_path, shards=2) / file
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint) as caught:
            make_plan(path.parent)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("file", DOCUMENTS)
    def test_a_file_over_200_mb_is_refused(self, file: str, tmp_path: Path) -> None:
        path = write_minimal(tmp_path, shards=2) / file
        with path.open("r+b" if path.exists() else "wb") as opened:
            opened.truncate(200_000_001)
        with pytest.raises(BadCheckpoint, match="200,000,001 bytes, more than any real one"):
            make_plan(path.parent)

    @pytest.mark.parametrize(
        ("file", "what"), [("config.json", "it has no config.json"), ("tokenizer.json", "it has no tokenizer.json")]
    )
    def test_a_missing_required_file_is_named(self, file: str, what: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / file).unlink()
        with pytest.raises(BadCheckpoint, match=what):
            make_plan(folder)

    @pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
    def test_an_optional_file_may_be_missing(self, file: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / file).unlink()
        assert make_plan(folder).files

    @pytest.mark.parametrize("file", DOCUMENTS)
    def test_a_folder_in_place_of_a_file_is_refused(self, file: str, tmp_path: Path) -> None:
        path = write_minimal(tmp_path, shards=2) / file
        path.unlink(missing_ok=True)
        path.mkdir()
        with pytest.raises(BadCheckpoint, match="Is a directory"):
            make_plan(path.parent)

    @pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "rope_scaling", "hidden_act", "qkv_bias"])
    def test_a_deeply_nested_config_value_is_refused_with_a_message(self, key: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        path, text = folder / "config.json", json.dumps({**CONFIG, **MINIMAL, key: "HERE"})
        for depth in (10, 300, *range(880, 1000, 2), 3000):
            path.write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
            with pytest.raises((BadCheckpoint, UnsupportedCheckpoint)):
                check_convertible(folder)

    @pytest.mark.parametrize("depth", [10, 200, 400, 2000, 4000])
    def test_deeply_nested_pre_tokenizers_are_refused(self, depth: int, tmp_path: Path) -> None:
        path = write_minimal(tmp_path) / "tokenizer.json"
        text = json.dumps({**json.loads(path.read_text()), "pre_tokenizer": "HERE"})
        path.write_text(text.replace('"HERE"', '{"pretokenizers": [' * depth + "]}" * depth))
        with pytest.raises((BadCheckpoint, UnsupportedCheckpoint)):
            make_plan(path.parent)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 300),
        st.sampled_from([1 << 31, 1 << 62, 1 << 64, -(1 << 63), 10**40, 10**400]),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["linear", "yarn", "Qwen2ForCausalLM", "Split", "BPE", "²", "\ud800", "<|im_end|>"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


def replace_value(document: Any, data: st.DataObject) -> Any:
    """Replace or remove one value of `document`, at any depth."""
    if isinstance(document, dict) and document and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(list(document)[:40]))
        if not data.draw(st.integers(0, 9)):
            return {other: value for other, value in document.items() if other != key}
        return {**document, key: replace_value(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.integers(0, 3)):
        at = data.draw(st.integers(0, len(document) - 1))
        return [*document[:at], replace_value(document[at], data), *document[at + 1 :]]
    return data.draw(JSON_VALUES)


@pytest.fixture(scope="module")
def complete_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has every kind of file."""
    folder = write_minimal(tmp_path_factory.mktemp("complete"), shards=2)
    (folder / "README.md").write_text(FRONT_MATTER)
    set_json(folder, "config.json", rope_scaling={"type": "yarn", "factor": 2.0}, max_window_layers=1)
    return folder


@settings(fuzz, max_examples=350)
@given(data=st.data())
def test_any_json_value_is_planned_or_refused(data: st.DataObject, complete_checkpoint: Path) -> None:
    name = data.draw(st.sampled_from(["config.json", "config.json", *DOCUMENTS, "tokenizer.json"]))
    path = complete_checkpoint / name
    original = path.read_text()
    try:
        path.write_text(json.dumps(replace_value(json.loads(original), data)))
        assert_planned_or_refused(complete_checkpoint)
    finally:
        path.write_text(original)


@settings(fuzz, max_examples=250)
@given(data=st.data())
def test_any_damaged_bytes_are_planned_or_refused(data: st.DataObject, complete_checkpoint: Path) -> None:
    name = data.draw(st.sampled_from([*DOCUMENTS, "README.md", "model-00001-of-00002.safetensors"]))
    path = complete_checkpoint / name
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    front, rest = (original[:header], original[header:]) if name.endswith(".safetensors") else (original, b"")
    try:
        path.write_bytes(data.draw(mutations(front)) + rest)
        assert_planned_or_refused(complete_checkpoint)
    finally:
        path.write_bytes(original)
