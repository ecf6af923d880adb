"""qwenlocal verify: --against compares a GGUF file with its checkpoint; --json reports damage."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import SMALL, UP_PROJ, convert_checkpoint, flip_bit, set_weights
from commands import TENSOR_COUNT, convert_pure, expect_exit, installed_path, parse_json
from conftest import Run
from gguf_files import copy_with_metadata, copy_with_tensors, copy_with_weights
from hub_checkpoints import CHECKPOINT
from oracle import data_of

from qwenlocal import ggml
from qwenlocal.measure.fidelity import Fidelity, compare_with_checkpoint, known_texts
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.gguf_reader import decode_value, read_header, read_raw_metadata
from qwenlocal.weights.tensor_values import compare_rows


def change_entry(file: Path, key: str, at: int, value: Any) -> bytes:
    """Return an array of the vocabulary with one entry changed."""
    values = decode_value(read_raw_metadata(file)[f"tokenizer.ggml.{key}"])
    values[at] = value
    return gguf_writer.i32s(values) if isinstance(value, int) else gguf_writer.strings(values)


def verify_problems(invoke: Run, file: Path, checkpoint: Path, code: int) -> list[str]:
    """Return the problems that verify --against reports, and check that text and JSON agree."""
    text, data = (invoke("verify", str(file), "--against", str(checkpoint), *more) for more in ((), ("--json",)))
    expect_exit(text, code)
    expect_exit(data, code)
    problems: list[str] = parse_json(data.stdout)["problems"]
    assert re.findall(r"^error    (.*)$", text.stdout, re.MULTILINE) == problems
    return problems


def measure_fidelity(checkpoint: Path, file: Path, memory: int = 0) -> Fidelity:
    pairs = read_raw_metadata(file)
    texts = known_texts(*(decode_value(pairs[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type")))
    return compare_with_checkpoint(Checkpoint.open(checkpoint), file, texts, threads=1, memory=memory)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no memory for the weights, so that logits are not computed."""

    def measure_without_memory(*arguments: Any, **options: Any) -> Fidelity:
        return compare_with_checkpoint(*arguments, **{**options, "memory": 0})

    monkeypatch.setattr("qwenlocal.measure.fidelity.compare_with_checkpoint", measure_without_memory)


ENOUGH_MEMORY = 1 << 40  # bytes of memory


class TestAgainst:
    def test_a_converted_file_matches_its_checkpoint(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        convert_checkpoint(tiny_checkpoint, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint))
        assert "x.gguf matches Tiny-Qwen-0.1B" in expect_exit(result, 0)
        assert re.search(r"^weights +q8_0 ", result.stdout, re.MULTILINE)
        assert re.search(r"^tokens +(\d+) of \1 texts have the same token ids$", result.stdout, re.MULTILINE)
        assert "logits   over" in result.stdout

    def test_without_an_independent_tokenizer_that_is_said(
        self, tiny_checkpoint: Path, tiny_f32: Path, qwenlocal: Run, tmp_path: Path
    ) -> None:
        for name in ("transformers", "tokenizers"):
            (tmp_path / f"{name}.py").write_text("raise ImportError")
        command = ("verify", str(tiny_f32), "--against", str(tiny_checkpoint))
        result = qwenlocal(*command, environment={"PYTHONPATH": str(tmp_path)})
        assert "pip install transformers" in result.stdout
        result = qwenlocal(*command, "--json", environment={"PYTHONPATH": str(tmp_path)})
        assert parse_json(result.stdout)["tokenizer"] is None

    @pytest.mark.parametrize(
        ("code", "output", "exit_code"),
        [
            ("[1]", "tokens   0 of 46 texts have the same token ids as with transformers 9.9", 5),
            ("1/0", "note     transformers 9.9 cannot read the tokenizer: division by zero", 0),
        ],
    )
    def test_an_independent_tokenizer_has_the_last_word(
        self, code: str, output: str, exit_code: int, tiny_checkpoint: Path, tiny_f32: Path, qwenlocal: Run,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        """A stand-in for the library, whose tokenizer knows one token, or cannot be opened."""
        (tmp_path / "transformers.py").write_text(
            "class logging:\n    set_verbosity_error = staticmethod(lambda: None)\n"
            "class AutoTokenizer:\n    def from_pretrained(*a, **k):\n"
            f"        ids = {code}\n        tokenizer = AutoTokenizer()\n"
            "        tokenizer.encode = lambda text, add_special_tokens: ids\n        return tokenizer\n"
            "__version__ = '9.9'\n"
        )
        command = ("verify", str(tiny_f32), "--against", str(tiny_checkpoint))
        result = qwenlocal(*command, environment={"PYTHONPATH": str(tmp_path)})
        expect_exit(result, exit_code)
        assert output in result.stdout

    def test_other_weights_are_found(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", config=SMALL, seed=1)
        convert_checkpoint(other, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint))
        assert "it does not match" in expect_exit(result, 5)
        assert "error " in result.stdout

    def test_another_model_size_is_found(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", config={**SMALL, "intermediate_size": 128})
        convert_checkpoint(other, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint))
        assert "differences" in expect_exit(result, 5)
        assert "the file was made from another model" in result.stdout
        assert "“qwen2.feed_forward_length” is 128; the checkpoint says 64" in result.stdout

    def test_identical_weights_have_no_error_and_no_worst_tensor(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run
    ) -> None:
        result = invoke("verify", str(tiny_f32), "--against", str(tiny_checkpoint))
        expect_exit(result, 0)
        assert re.search(r"^weights  f32 +\d+ tensors, identical$", result.stdout, re.MULTILINE)
        assert "worst" not in result.stdout

    def test_errors_are_compared_with_the_normal_error_of_the_type(
        self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        convert_checkpoint(tiny_checkpoint, tmp_path / "x.gguf", "q8_0")
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint))
        pattern = r"^worst    \S+: error 0\.\d+%; up to 1\.36% is normal for q8_0$"
        assert re.search(pattern, result.stdout, re.MULTILINE)

    @pytest.mark.parametrize(
        "pairs",
        [
            {"tokenizer.ggml.token_type": gguf_writer.i32s([1])},
            {"tokenizer.ggml.tokens": gguf_writer.u32(7)},
            {"tokenizer.ggml.token_type": None},
            {"qwen2.expert_group_count": gguf_writer.u32(9)},
            {"general.alignment": gguf_writer.u32(1), "my.key": gguf_writer.boolean(True)},
        ],
        ids=" ".join,
    )
    def test_a_file_that_llama_cpp_cannot_run_is_refused(
        self, pairs: dict[str, bytes | None], tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        path = copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs)
        expect_exit(invoke("verify", str(path), "--against", str(tiny_checkpoint)), 5)

    def test_one_changed_weight_is_found(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", 5.0)
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint))
        expect_exit(result, 5)
        assert "“blk.0.ffn_up.weight” (f32) is off by" in result.stdout

    @pytest.mark.parametrize("kind", ["q1_0", "tq1_0"])
    def test_a_matrix_of_zeros_is_found_in_any_type(
        self, kind: str, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        path = convert_pure(invoke, tiny_checkpoint, tmp_path, kind)
        expect_exit(invoke("verify", str(path), "--against", str(tiny_checkpoint)), 0)
        tensor = next(t for t in read_header(path).tensors if t.name == "token_embd.weight")
        with path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(bytes(tensor.size))
        result = invoke("verify", str(path), "--against", str(tiny_checkpoint))
        expect_exit(result, 5)
        assert "“token_embd.weight”" in result.stdout

    @pytest.mark.parametrize("kind", ["q4_k", "q2_k"])
    def test_a_swapped_row_is_found(self, kind: str, invoke: Run, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "wide", config={**SMALL, "hidden_size": 256})
        path = convert_pure(invoke, source, tmp_path, {"q4_k": "q4_k_s"}.get(kind, kind))
        tensor = next(t for t in read_header(path).tensors if t.name == "token_embd.weight")
        width = ggml.tensor_type(kind).row_bytes(256)
        with path.open("r+b") as file:
            file.seek(tensor.offset + 7 * width)
            row = file.read(width)
            file.seek(tensor.offset + 100 * width)
            file.write(row)
        result = invoke("verify", str(path), "--against", str(source))
        expect_exit(result, 5)
        assert "row 100 of “token_embd.weight”" in result.stdout

    def test_json_reports_the_same_problems(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        result = invoke("verify", str(tiny_f32), "--against", str(tiny_checkpoint), "--json")
        assert expect_exit(result, 0) == ""
        report = parse_json(result.stdout)
        assert (len(report["tensors"]), report["problems"], report["wrong texts"]) == (TENSOR_COUNT, [], [])
        copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        result = invoke("verify", "./x.gguf", "--against", str(tiny_checkpoint), "--json")
        expect_exit(result, 5)
        assert parse_json(result.stdout)["problems"]

    @pytest.mark.parametrize(
        ("file", "checkpoint", "code"),
        [
            ("./nowhere.gguf", "./tiny", 3),
            ("qwen1.5:7b", "./tiny", 3),
            ("./good.gguf", "./nowhere", 3),
            ("./good.gguf", "./good.gguf", 2),
            ("./text.gguf", "./tiny", 5),
            ("./speaking.gguf", "./tiny", 5),
            ("./good.gguf", "./broken", 5),
        ],
    )
    def test_missing_and_damaged_files_are_reported(
        self, file: str, checkpoint: str, code: int, tiny_checkpoint: Path, tiny_f32: Path, speaking_model: Path,
        invoke: Run, tmp_path: Path,
    ) -> None:  # fmt: skip
        shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
        shutil.copytree(tiny_checkpoint, tmp_path / "broken")
        (tmp_path / "broken" / "tokenizer.json").write_text("{")
        shutil.copy(tiny_f32, tmp_path / "good.gguf")
        shutil.copy(speaking_model, tmp_path / "speaking.gguf")
        (tmp_path / "text.gguf").write_text("hello")
        expect_exit(invoke("verify", file, "--against", checkpoint), code)

    def test_no_repair_cannot_be_combined_with_against(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run
    ) -> None:
        message = expect_exit(invoke("verify", str(tiny_f32), "--against", str(tiny_checkpoint), "--no-repair"), 2)
        assert "--no-repair cannot be combined with --against" in " ".join(message.split())

    def test_a_checkpoint_on_a_hub_is_downloaded(
        self, hub_checkpoint: str, tiny_f32: Path, invoke: Run, no_memory: None
    ) -> None:
        result = invoke("verify", str(tiny_f32), "--against", hub_checkpoint)
        assert "good.gguf matches Tiny-Qwen-0.1B" in expect_exit(result, 0)


class TestMetadata:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("qwen2.rope.freq_base", gguf_writer.f32(10000), "is 10,000; the checkpoint says 1,000,000"),
            ("qwen2.rope.freq_base", None, "is missing; the checkpoint says 1,000,000"),
            ("qwen2.attention.layer_norm_rms_epsilon", gguf_writer.f32(1e-5), "; the checkpoint says 9.99999997"),
            ("qwen2.context_length", gguf_writer.u32(1024), "is 1024; the checkpoint says 2048"),
            ("qwen2.attention.head_count_kv", gguf_writer.u32(4), "is 4; the checkpoint says 2"),
            ("tokenizer.chat_template", gguf_writer.string("{{ 1 }}"), "is '{{ 1 }}'; the checkpoint says"),
            ("tokenizer.ggml.eos_token_id", gguf_writer.u32(258), "is 258; the checkpoint says 260"),
            ("tokenizer.ggml.pre", gguf_writer.string("llama-bpe"), "is 'llama-bpe'; the checkpoint says 'qwen2'"),
            ("tokenizer.ggml.merges", gguf_writer.strings(["t h"]), "has 1 entry; the checkpoint has 2"),
            ("tokenizer.ggml.add_bos_token", gguf_writer.boolean(True), "is True; the checkpoint says False"),
        ],
        ids=lambda value: value if isinstance(value, str) and " " not in value else "",
    )
    def test_a_different_key_is_named(
        self, key: str, value: bytes | None, message: str, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        problems = measure_fidelity(
            tiny_checkpoint, copy_with_metadata(tiny_f32, tmp_path / "x.gguf", {key: value})
        ).problems
        assert [problem for problem in problems if f"“{key}”" in problem and message in problem], problems

    @pytest.mark.parametrize("text", ["{{ 1 }}", "x" * 10_000, "a\x1b[2J\nb"], ids=["short", "long", "strange"])
    def test_text_and_json_report_the_same_keys(
        self, text: str, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        pairs = {"qwen2.rope.freq_base": gguf_writer.f32(10000), "tokenizer.chat_template": gguf_writer.string(text)}
        problems = verify_problems(invoke, copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs), tiny_checkpoint, 5)
        assert "“qwen2.rope.freq_base” is 10,000; the checkpoint says 1,000,000" in problems
        assert [len(problem) < 200 for problem in problems if "“tokenizer.chat_template”" in problem] == [True]

    @pytest.mark.parametrize(
        ("key", "at", "value", "message"),
        [
            ("token_type", 65, 4, "“tokenizer.ggml.token_type” has 4 at 65; the checkpoint has 1"),
            ("token_type", 270, 4, "“tokenizer.ggml.token_type” has 4 at 270; the checkpoint has 5"),
            ("tokens", 270, "[PAD]", "“tokenizer.ggml.tokens” has '[PAD]' at 270; the checkpoint has '[PAD270]'"),
            ("merges", 0, "h t", "“tokenizer.ggml.merges” has 'h t' at 0; the checkpoint has 't h'"),
        ],
    )
    def test_a_different_vocabulary_entry_is_named_with_its_index(
        self, key: str, at: int, value: Any, message: str, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        file = copy_with_metadata(
            tiny_f32, tmp_path / "x.gguf", {f"tokenizer.ggml.{key}": change_entry(tiny_f32, key, at, value)}
        )
        assert message in measure_fidelity(tiny_checkpoint, file).problems

    def test_keys_that_older_converters_omit_may_be_missing(
        self, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        unsaid = ("eot_token_id", "padding_token_id", "bos_token_id", "add_bos_token", "suppress_tokens")
        pairs = {"tokenizer.chat_template": None, **{f"tokenizer.ggml.{key}": None for key in unsaid}}
        assert set(pairs) <= set(read_raw_metadata(tiny_f32)) | {"tokenizer.ggml.bos_token_id"}
        assert (
            measure_fidelity(tiny_checkpoint, copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs)).problems == []
        )

    def test_names_licenses_and_unknown_keys_are_ignored(
        self, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        pairs = {
            "general.name": gguf_writer.string("other"),
            "general.license": gguf_writer.string("mit"),
            "my.key": gguf_writer.u32(5),
        }
        assert (
            measure_fidelity(tiny_checkpoint, copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs)).problems == []
        )

    @pytest.mark.parametrize(
        "pairs",
        [
            {"qwen2.rope.scaling.type": gguf_writer.string("linear"), "qwen2.rope.scaling.factor": gguf_writer.f32(4)},
            {"qwen2.rope.scaling.type": gguf_writer.string("yarn"), "qwen2.rope.scaling.factor": gguf_writer.f32(4),
             "qwen2.rope.scaling.original_context_length": gguf_writer.u32(2048)},
        ],
        ids=["linear", "yarn"],
    )  # fmt: skip
    @pytest.mark.parametrize("memory", [0, ENOUGH_MEMORY], ids=["header", "logits"])
    def test_an_unexpected_rope_scaling_is_found(
        self, pairs: dict[str, bytes], memory: int, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        assert measure_fidelity(
            tiny_checkpoint, copy_with_metadata(tiny_f32, tmp_path / "x.gguf", pairs), memory
        ).problems


class TestTensors:
    def test_an_additional_tensor_is_named(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        file = copy_with_tensors(tiny_f32, tmp_path / "x.gguf", blk__0__extra__weight=numpy.ones((64, 64)))
        assert verify_problems(invoke, file, tiny_checkpoint, 5) == [
            "“blk.0.extra.weight” is in the file but not in the checkpoint"
        ]

    @pytest.mark.parametrize(
        "name", ["blk.0.ffn_up.weight", "output_norm.weight", "output.weight", "blk.0.attn_q.bias"]
    )
    def test_a_missing_tensor_is_named(
        self, name: str, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        file = copy_with_tensors(tiny_f32, tmp_path / "x.gguf", without=name)
        (problem,) = verify_problems(invoke, file, tiny_checkpoint, 5)
        assert problem.startswith(f"“{name}” is missing or of another shape")

    @pytest.fixture
    def tied_checkpoint(self, tmp_path: Path) -> Path:
        config = {**SMALL, "tie_word_embeddings": True}
        return write_checkpoint(tmp_path / "tied", config=config, store_tied_head=True)

    @pytest.mark.parametrize("kind", ["f32", "q8_0"])
    def test_a_stored_copy_of_a_tied_output_matrix_is_accepted(
        self, kind: str, tied_checkpoint: Path, tmp_path: Path
    ) -> None:
        file = convert_checkpoint(tied_checkpoint, tmp_path / "x.gguf", kind, like_llama_cpp=True)
        assert "output.weight" in data_of(file)
        fidelity = measure_fidelity(tied_checkpoint, file, ENOUGH_MEMORY)
        assert fidelity.logits
        assert fidelity.problems == []

    def test_a_stored_output_matrix_that_differs_from_the_tied_one_is_found(
        self, tied_checkpoint: Path, tmp_path: Path
    ) -> None:
        file = convert_checkpoint(tied_checkpoint, tmp_path / "x.gguf", "f32", like_llama_cpp=True)
        other = copy_with_weights(file, tmp_path / "y.gguf", "output.weight", 5.0, 5.0)
        assert any(
            "“output.weight” (f32) is off by" in problem
            for problem in measure_fidelity(tied_checkpoint, other).problems
        )

    @pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "q4_0", "q2_k"])
    def test_a_file_of_any_type_matches_even_a_tiny_checkpoint(
        self, kind: str, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        assert (
            measure_fidelity(
                tiny_checkpoint, convert_checkpoint(tiny_checkpoint, tmp_path / "x.gguf", kind), ENOUGH_MEMORY
            ).problems
            == []
        )

    def test_nan_of_the_checkpoint_may_be_zero_in_the_file(
        self, checkpoint_copy: Path, invoke: Run, no_memory: None, tmp_path: Path
    ) -> None:
        set_weights(checkpoint_copy, UP_PROJ, 40, numpy.nan, numpy.inf)
        set_weights(checkpoint_copy, "model.norm.weight", 3, numpy.nan)
        expect_exit(
            invoke("convert", str(checkpoint_copy), "--type", "f32,q8_0", "-o", "{type}.gguf", "--allow-nan"), 0
        )
        for kind in ("f32", "q8_0"):
            fidelity = measure_fidelity(checkpoint_copy, tmp_path / f"{kind}.gguf", ENOUGH_MEMORY)
            assert (fidelity.problems, fidelity.non_finite) == ([], 3)
            assert fidelity.logits
        result = invoke("verify", "./q8_0.gguf", "--against", str(checkpoint_copy))
        assert "q8_0.gguf matches" in expect_exit(result, 0)
        assert "note     3 weights are NaN or infinite in the checkpoint, zero in the file" in result.stdout

    def test_nan_in_the_file_is_found(self, checkpoint_copy: Path, tiny_f32: Path, tmp_path: Path) -> None:
        set_weights(checkpoint_copy, UP_PROJ, 0, numpy.nan)
        file = copy_with_weights(tiny_f32, tmp_path / "x.gguf", "blk.0.ffn_up.weight", numpy.nan)
        assert any("“blk.0.ffn_up.weight”" in problem for problem in measure_fidelity(checkpoint_copy, file).problems)


def test_errors_are_computed_for_each_row() -> None:
    true, other = (
        numpy.array([[3, 4, 6, 8, 1e-9, 0]], numpy.float32),
        numpy.array([[3, 4, 6, 9, 0, 0]], numpy.float32),
    )
    whole, row, worst = compare_rows([true], [other], 2)
    assert (round(whole, 4), row, round(worst, 4)) == (0.0894, 1, 0.1)


class TestWithoutMemory:
    @pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
    def test_the_vocabulary_is_still_compared(self, kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
        fidelity = measure_fidelity(tiny_checkpoint, convert_checkpoint(tiny_checkpoint, tmp_path / "x.gguf", kind))
        assert fidelity.texts > 10
        assert (fidelity.logits, fidelity.problems) == (None, [])

    @pytest.mark.parametrize("at", [65, 97, 256])
    def test_another_vocabulary_is_still_found(
        self, at: int, tiny_checkpoint: Path, tiny_f32: Path, tmp_path: Path
    ) -> None:
        tokens = decode_value(read_raw_metadata(tiny_f32)["tokenizer.ggml.tokens"])
        tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
        fidelity = measure_fidelity(
            tiny_checkpoint,
            copy_with_metadata(tiny_f32, tmp_path / "x.gguf", {"tokenizer.ggml.tokens": gguf_writer.strings(tokens)}),
        )
        assert fidelity.logits is None
        assert fidelity.wrong_texts
        assert any("different token ids" in problem for problem in fidelity.problems)

    def test_the_report_says_that_logits_were_not_compared(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, no_memory: None
    ) -> None:
        result = invoke("verify", str(tiny_f32), "--against", str(tiny_checkpoint))
        expect_exit(result, 0)
        assert "logits   not compared: both models together do not fit into memory" in result.stdout


class TestJson:
    def test_an_undamaged_file_is_reported(self, tiny_f32: Path, invoke: Run) -> None:
        result = invoke("verify", str(tiny_f32), "--json")
        expect_exit(result, 0)
        report = parse_json(result.stdout)
        assert (report["path"], report["whole"], report["damage"]) == (str(tiny_f32), True, [])

    def test_damaged_blocks_are_reported_with_exit_5(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        path = Path(installed_path(invoke))
        before = flip_bit(path)
        result = invoke("verify", str(checkpoint_copy), "--json", "--no-repair")
        expect_exit(result, 5)
        report = parse_json(result.stdout)
        assert (report["whole"], report["damage"]) == (False, [{"file": str(path), "blocks": [0]}])
        assert path.read_bytes() != before

    def test_a_repair_prints_only_json(self, checkpoint_copy: Path, invoke: Run) -> None:
        expect_exit(invoke("pull", str(checkpoint_copy)), 0)
        path = Path(installed_path(invoke))
        before = flip_bit(path)
        result = invoke("verify", str(checkpoint_copy), "--json")
        expect_exit(result, 0)
        assert parse_json(result.stdout)["whole"] is True
        assert path.read_bytes() == before

    def test_a_downloaded_checkpoint_is_reported(self, hub_checkpoint: str, invoke: Run) -> None:
        expect_exit(invoke("pull", hub_checkpoint), 0)
        result = invoke("verify", hub_checkpoint + CHECKPOINT, "--json")
        expect_exit(result, 0)
        assert (parse_json(result.stdout)["state"], parse_json(result.stdout)["whole"]) == ("checkpoint", True)
