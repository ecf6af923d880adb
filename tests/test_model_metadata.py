"""general.* keys of GGUF files: the parts of the name, the front matter of README.md, sampling defaults."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FRONT_MATTER, make_plan, write_minimal
from fuzzing import fuzz
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenlocal.errors import BadCheckpoint
from qwenlocal.weights.gguf_reader import decode_value
from qwenlocal.weights.model_metadata import read_model_metadata


def load_general_keys(folder: Path, name: str = "Qwen1.5-0.5B-Chat", repo: str = "") -> dict[str, Any]:
    metadata = read_model_metadata(folder, {}, name, 463_987_712, repo)
    return {key.removeprefix("general."): decode_value(value) for key, value in metadata.pairs.items()}


class TestModelMetadata:
    def test_the_name_is_split_into_basename_size_and_finetune(self, tmp_path: Path) -> None:
        metadata = load_general_keys(tmp_path, repo="Qwen/Qwen1.5-0.5B-Chat")
        assert metadata["name"] == "Qwen1.5 0.5B Chat"
        assert (metadata["basename"], metadata["size_label"], metadata["finetune"]) == ("Qwen1.5", "0.5B", "Chat")
        assert metadata["source.repo_url"] == "https://huggingface.co/Qwen/Qwen1.5-0.5B-Chat"

    @pytest.mark.parametrize("ending", ["-GPTQ-Int4", "-GPTQ-Int8", "-AWQ", "-GGUF", "-gguf"])
    def test_a_quantization_suffix_is_not_part_of_the_name(self, ending: str, tmp_path: Path) -> None:
        assert load_general_keys(tmp_path, f"Qwen1.5-7B-Chat{ending}")["name"] == "Qwen1.5 7B Chat"

    @pytest.mark.parametrize(
        "name", ["", "-", ".", "模型", "x" * 300, "7B", "a/b", "-gguf", "1" * 50, "\x1b[2J", "Ⅷ-²B", "\udcff"]
    )
    def test_any_name_is_accepted(self, name: str, tmp_path: Path) -> None:
        assert load_general_keys(tmp_path, name)["type"] == "model"

    def test_the_front_matter_of_the_readme_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(FRONT_MATTER)
        metadata = load_general_keys(tmp_path)
        assert (metadata["license"], metadata["license.name"]) == ("other", "tongyi-qianwen")
        assert metadata["languages"] == ["en", "no"], "Norwegian, not False"
        assert metadata["tags"] == ["chat", "text-generation"]
        assert metadata["base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen1.5-0.5B"
        assert metadata["dataset.count"] == 1

    @pytest.mark.parametrize(
        ("front", "reason"),
        [
            ("license: mit\nx:\n" + "- {a: b}\n" * 120_000, "longer than 524,288 bytes"),
            ("x: " + "1" + ":1" * 100_000, "a line of more than 20,000 characters"),
            (
                "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairwise("abcdefghijkl")),
                "merge",
            ),
            ("a: " + "[" * 5000 + "]" * 5000, "cannot read"),
        ],
    )
    def test_front_matter_that_takes_much_time_or_memory_is_not_read(
        self, front: str, reason: str, tmp_path: Path
    ) -> None:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
        started = time.process_time()
        (note,) = read_model_metadata(tmp_path, {}, "x", 1).notes
        assert time.process_time() - started < 2
        assert reason in note

    def test_long_lists_in_the_front_matter_are_cut(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nbase_model:\n" + "- a/b\n" * 80_000 + "---\n")
        started = time.process_time()
        assert load_general_keys(tmp_path)["base_model.count"] == 64
        assert time.process_time() - started < 3

    def test_a_long_readme_is_only_read_to_the_end_of_its_front_matter(self, tmp_path: Path) -> None:
        text = b"---\nlicense: mit\n---\n" + "é".encode() * 600_001 + b"\xff"
        (tmp_path / "README.md").write_bytes(text)
        assert load_general_keys(tmp_path)["license"] == "mit"

    def test_several_licenses_are_listed(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
        assert load_general_keys(tmp_path)["license"] == "mit,apache-2.0"

    @pytest.mark.parametrize(
        "text", ["", "# A model\n", "no front", "---", "---\n---\n", "---\n- a\n- b\n---\n", "---\n5\n---"]
    )
    def test_a_readme_without_front_matter_adds_nothing(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(text)
        assert "license" not in load_general_keys(tmp_path)
        assert not read_model_metadata(tmp_path, {}, "x", 1).notes

    @pytest.mark.parametrize(
        "front",
        [
            "a: [", "a: b: c", "\t- x\n- y", "key: *unknown", "? [a]\n: b\n{[c]: d}: e", "!!python/object:os.system x",
            "license: mit\nlicense: 'open", "date: 2024-13-45", "n: !!int x", "f: !!float x", "a: " + "[" * 5000,
        ],
    )  # fmt: skip
    def test_broken_front_matter_is_noted_and_ignored(self, front: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "README.md").write_text(f"---\n{front}\n---\n")
        plan = make_plan(folder)
        assert [note for note in plan.notes if "cannot read the front matter of README.md" in note]

    def test_a_readme_that_is_not_text_is_noted_and_ignored(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        (folder / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert [note for note in make_plan(folder).notes if "cannot read the front matter of README.md" in note]

    @pytest.mark.parametrize(
        "front",
        [
            "license: 5", "license: true", "license: {a: b}", "license: [[mit], null]", "license:", "language: no",
            "language: {en: 1}", "tags: 5", "tags: [1, null, [x], {y: z}]", "base_model: 5",
            "base_model: [5, null, [x]]", "base_model: {name: x, repo_url: [y]}", "base_model: https://huggingface.co/a/b/c/d",
            "base_model: ''",
            "datasets: {a: b}", "datasets: [2024-01-01]", "name: [a]", "name: 2024-01-01", "model_name: {a: b}",
            "author: 5", "size_label: []", "basename: {}", "finetune: [x]", "version: 1.5", "5: 6", "null: null",
            "description: |\n  line\n  line", "license: \"\\ud800\"", "license_link: 5", "pipeline_tag: [a]",
        ],
    )  # fmt: skip
    def test_unexpected_values_in_front_matter_are_accepted(self, front: str, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
        assert load_general_keys(tmp_path)["type"] == "model"

    def test_nested_yaml_aliases_do_not_inflate_the_file(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 5)]
        for key in ("license", "tags", "name"):
            (tmp_path / "README.md").write_text("\n".join(["---", *lines, f"{key}: *a4", "---", ""]))
            metadata = read_model_metadata(tmp_path, {}, "x", 1)
            assert sum(len(value) for value in metadata.pairs.values()) < 10_000

    def test_sampling_defaults_of_generation_config_are_written(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(
            '{"top_k": 20, "top_p": 0.5, "temperature": 0.75, "repetition_penalty": 1.5, "min_p": null, "x": []}'
        )
        sampling = {key: value for key, value in load_general_keys(tmp_path).items() if key.startswith("sampling.")}
        assert sampling == {
            "sampling.top_k": 20, "sampling.top_p": 0.5, "sampling.temp": 0.75, "sampling.penalty_repeat": 1.5
        }  # fmt: skip

    @pytest.mark.parametrize("key", ["top_k", "temperature", "top_p"])
    @pytest.mark.parametrize("value", ['"20"', "true", "[20]", "{}", "1e10", "-1e10", "NaN", "Infinity", "9" * 400])
    def test_impossible_sampling_values_are_refused(self, key: str, value: str, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(f'{{"{key}": {value}}}')
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which is invalid"):
            load_general_keys(tmp_path)

    @pytest.mark.parametrize("name", [5, None, [], "", "a/b/c", "/home/x/models/y", "Qwen/Qwen1.5-0.5B", "\0"])
    def test_any_name_or_path_in_the_config_is_accepted(self, name: object, tmp_path: Path) -> None:
        metadata = read_model_metadata(tmp_path, {"_name_or_path": name}, "Qwen1.5-0.5B", 1)
        assert decode_value(metadata.pairs["general.type"]) == "model"


FRONT_MATTER_LINES = st.one_of(
    st.text(max_size=12),
    st.builds(
        "{}: {}".format,
        st.sampled_from(["license", "language", "tags", "base_model", "datasets", "name", "version", "size_label"]),
        st.one_of(
            st.text(max_size=12), st.sampled_from(["[", "{}", "&a [*a]", "*a", "- x", "|", "2024-02-30", "!!int x"])
        ),
    ),
)


@settings(fuzz, max_examples=100)
@given(lines=st.lists(FRONT_MATTER_LINES, max_size=4))
@example(lines=["name: 2024-02-30"])
def test_any_front_matter_is_accepted(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8", errors="replace")
    assert read_model_metadata(tmp_path, {}, "Qwen1.5-0.5B", 1).pairs
