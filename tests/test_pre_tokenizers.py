"""Pre-tokenizers and normalizers of tokenizer.json: Qwen1.5's are converted, all others need --pre or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    file_names,
    load_vocabulary,
    make_plan,
    plan_metadata,
    set_bpe_model,
    set_json,
    write_minimal,
)
from commands import expect_exit, list_models
from conftest import Run
from hub import HubServer
from hub_checkpoints import HF_NAME, WeightRequests, publish

from qwenlocal.errors import UnsupportedCheckpoint, UsageError
from qwenlocal.weights.gguf_reader import read_header


class TestUnknownPreTokenizers:
    @pytest.mark.parametrize(
        "pre",
        [
            None,
            {"type": "ByteLevel", "use_regex": True},
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}},
            {"type": "Split", "pattern": {"String": " "}},
            {"type": "Split", "pattern": "x"},
            {"type": "Sequence", "pretokenizers": 5},
            {"type": "Split", "pattern": {"Regex": "\ud800"}},
            [],
            "qwen2",
        ],
    )
    def test_an_unknown_pre_tokenizer_needs_a_name(self, pre: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", pre_tokenizer=pre)
        with pytest.raises(UnsupportedCheckpoint, match=r"splits text into words differently from Qwen1.5") as caught:
            load_vocabulary(folder)
        assert "--pre NAME" in caught.value.hint
        assert load_vocabulary(folder, pre="qwen2").pre == "qwen2"
        assert plan_metadata(folder, pre="qwen2")["tokenizer.ggml.pre"] == "qwen2"

    def test_a_name_unknown_to_llama_cpp_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nonsense"):
            make_plan(write_minimal(tmp_path), pre="nonsense")

    def test_a_long_expression_is_shortened_in_the_message(self, tmp_path: Path) -> None:
        pre = {"type": "Split", "pattern": {"Regex": "x" * 10_000}}
        with pytest.raises(UnsupportedCheckpoint) as caught:
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", pre_tokenizer=pre))
        assert len(str(caught.value)) < 500

    def test_convert_takes_the_name_with_pre(self, checkpoint_copy: Path, invoke: Run, tmp_path: Path) -> None:
        document = json.loads((checkpoint_copy / "tokenizer.json").read_text())
        (checkpoint_copy / "tokenizer.json").write_text(json.dumps({**document, "pre_tokenizer": None}))
        assert "--pre NAME" in expect_exit(invoke("convert", str(checkpoint_copy), "-o", "x.gguf"), 5)
        expect_exit(invoke("convert", str(checkpoint_copy), "-o", "x.gguf", "--pre", "qwen2"), 0)
        assert read_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.pre"] == "qwen2"


def load_pre_tokenizers(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two pre-tokenizers of a checkpoint: Split by an expression, and ByteLevel."""
    split, level = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    return split, level


def set_pre_tokenizers(folder: Path, *steps: dict[str, Any]) -> Path:
    return set_json(folder, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


class TestByteLevelTokenizers:
    @pytest.mark.parametrize(
        "normalizer",
        [
            {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "Strip", "strip_left": True},
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFKC"}]}]},
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, "NFKC"]}, {"type": "Sequence", "normalizers": 5},
            "NFKC", [{"type": "NFKC"}], [], {}, 5, False,
        ],
        ids=str,
    )  # fmt: skip
    def test_other_normalizers_are_refused(self, normalizer: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="it changes text before tokenizing") as caught:
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", normalizer=normalizer))
        assert "tokenizer.json" in str(caught.value)

    @pytest.mark.parametrize(
        "normalizer",
        [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
         {"type": "Sequence", "normalizers": []}, ...],
        ids=str,
    )  # fmt: skip
    def test_nfc_and_no_normalizer_are_accepted(self, normalizer: Any, tmp_path: Path) -> None:
        assert (
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", normalizer=normalizer)).pre == "qwen2"
        )

    @pytest.mark.parametrize(
        ("step", "key", "value"),
        [
            (0, "behavior", "Removed"), (0, "behavior", "MergedWithNext"), (0, "invert", True),
            (1, "add_prefix_space", True), (1, "use_regex", True),
        ],
    )  # fmt: skip
    def test_other_pre_tokenizer_settings_are_refused(self, step: int, key: str, value: Any, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        steps = load_pre_tokenizers(folder)
        steps[step][key] = value
        with pytest.raises(UnsupportedCheckpoint, match=rf"differently from Qwen1\.5 .{key} is {value!r}") as caught:
            load_vocabulary(set_pre_tokenizers(folder, *steps))
        assert "--pre NAME" in caught.value.hint

    @pytest.mark.parametrize(
        "more",
        [{"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": "Punctuation"}],
        ids=str,
    )
    def test_an_additional_pre_tokenizer_is_refused(self, more: dict[str, Any], tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(UnsupportedCheckpoint, match=r"differently from Qwen1\.5"):
            load_vocabulary(set_pre_tokenizers(folder, *load_pre_tokenizers(folder), more))

    def test_a_missing_use_regex_counts_as_true_and_is_refused(self, tmp_path: Path) -> None:
        """Hugging Face's tokenizers, byte_level.rs: `use_regex` is true by default."""
        folder = write_minimal(tmp_path)
        split, level = load_pre_tokenizers(folder)
        del level["use_regex"]
        with pytest.raises(UnsupportedCheckpoint, match="use_regex"):
            load_vocabulary(set_pre_tokenizers(folder, split, level))

    @pytest.mark.parametrize("order", [(0,), (1, 0), (0, 1, 1)], ids=str)
    def test_another_order_of_pre_tokenizers_is_refused(self, order: tuple[int, ...], tmp_path: Path) -> None:
        """Without ByteLevel, bytes are not mapped to letters; after ByteLevel, Split finds no spaces."""
        folder = write_minimal(tmp_path)
        steps = load_pre_tokenizers(folder)
        with pytest.raises(UnsupportedCheckpoint):
            load_vocabulary(set_pre_tokenizers(folder, *(steps[number] for number in order)))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("ignore_merges", True),
            ("dropout", 0.1),
            ("continuing_subword_prefix", "##"),
            ("end_of_word_suffix", "</w>"),
        ],
    )
    def test_other_bpe_settings_are_refused(self, key: str, value: Any, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match=f"its tokenizer has {key} = "):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), **{key: value}))

    @pytest.mark.parametrize(
        "model", [{"ignore_merges": False}, {"dropout": 0.0}, {"dropout": None}, {"continuing_subword_prefix": None}],
        ids=str,
    )  # fmt: skip
    def test_bpe_settings_without_effect_are_accepted(self, model: dict[str, Any], tmp_path: Path) -> None:
        assert load_vocabulary(set_bpe_model(write_minimal(tmp_path), **model)).pre == "qwen2"

    @pytest.mark.parametrize("command", ["convert", "pull"])
    def test_convert_and_pull_exit_5_for_an_unknown_normalizer(
        self, command: str, checkpoint_copy: Path, invoke: Run, tmp_path: Path
    ) -> None:
        set_json(checkpoint_copy, "tokenizer.json", normalizer={"type": "NFKC"})
        assert "NFKC" in expect_exit(invoke(command, str(checkpoint_copy)), 5)
        assert list_models(invoke) == {}
        assert file_names(tmp_path) - {"person"} == {checkpoint_copy.name}

    def test_an_unsupported_tokenizer_on_a_hub_is_refused_before_the_weights_are_downloaded(
        self, checkpoint_copy: Path, hub: HubServer, weight_requests: WeightRequests, invoke: Run
    ) -> None:
        publish(hub, set_bpe_model(checkpoint_copy, ignore_merges=True))
        assert "ignore_merges" in expect_exit(invoke("pull", HF_NAME), 5)
        assert weight_requests.saw_headers_only
