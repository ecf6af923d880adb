"""Known faults of old GGUF files: diagnosed, repaired in a file, and worked around on loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import convert_checkpoint
from gguf_files import copy_with_metadata, copy_with_weights, old_token_types

from qwenlocal.chat.chat_model import ChatModel, load_chat_model
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import FileRepaired, LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.machine import this_machine
from qwenlocal.terminal.load_notes import describe_note
from qwenlocal.testing import CONFIG, write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.diagnosis import diagnose_file, missing_rope_base
from qwenlocal.weights.gguf_reader import decode_value, read_header, read_raw_metadata
from qwenlocal.weights.repair import (
    backup_path,
    encode_backup,
    fits_in_place,
    patch_header,
    plan_copy,
    repaired_layout,
    undo_interrupted_patch,
)
from qwenlocal.weights.write_workers import run_job


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, "tie_word_embeddings": True}
    return write_checkpoint(tmp_path_factory.mktemp("c") / "tiny", config=config, store_tied_head=True)


@pytest.fixture(scope="module")
def good(checkpoint: Path) -> Path:
    return convert_checkpoint(checkpoint, checkpoint.parent / "good.gguf", "f32")


@pytest.fixture
def loaded() -> Iterator[Any]:
    ready: list[ChatModel] = []

    def load(path: Path) -> ChatModel:
        options = LoadOptions(LoadRequest(n_ctx=512, threads=1))
        ready.append(load_chat_model(path, options, this_machine(), name="tiny", size=path.stat().st_size))
        return ready[-1]

    yield load
    for model in ready:
        model.close()


def compute_logits(model: Model, ids: list[int]) -> numpy.ndarray:
    context = Context(model, ContextOptions(512, threads=1))
    (row,) = context.decode([(0, ids)])
    logits = numpy.ctypeslib.as_array(context.logits(row), (len(model.tokenizer),)).copy()
    context.close()
    return logits


def test_an_undamaged_file_has_no_findings(good: Path, loaded: Any) -> None:
    assert diagnose_file(good).findings == []
    assert loaded(good).notes == ()


class TestMissingRopeBase:
    @pytest.fixture
    def old(self, good: Path, tmp_path: Path) -> Path:
        return copy_with_metadata(good, tmp_path / "old.gguf", {"qwen2.rope.freq_base": None})

    def test_it_is_diagnosed(self, old: Path) -> None:
        (finding,) = diagnose_file(old).findings
        assert finding.is_serious
        assert "RoPE base is missing" in finding.problem

    def test_it_is_corrected_on_loading_with_a_note(self, old: Path, good: Path, loaded: Any) -> None:
        ready = loaded(old)
        assert ready.notes == (FileRepaired(rope_base=1e6),)
        assert "RoPE base frequency set to 1,000,000" in describe_note(ready.notes[0])
        ids = list(range(40, 140))
        assert numpy.array_equal(compute_logits(ready.model, ids), compute_logits(Model(good), ids))
        assert not numpy.array_equal(compute_logits(Model(old), ids), compute_logits(Model(good), ids)), (
            "the fault changes the logits"
        )

    def test_a_repaired_copy_has_the_metadata_of_a_good_file(self, old: Path, good: Path, tmp_path: Path) -> None:
        diagnosis = diagnose_file(old)
        target = tmp_path / "new.gguf"
        run_job(plan_copy(diagnosis, repaired_layout(diagnosis), target).job, threads=1)
        assert diagnose_file(target).findings == []
        assert read_raw_metadata(target) == read_raw_metadata(good)

    def test_the_missing_base_depends_on_the_model(self) -> None:
        small, larger = ({"general.architecture": "qwen2", "qwen2.embedding_length": width} for width in (1024, 2560))
        assert missing_rope_base(small) == 1e6
        assert missing_rope_base(larger) == 5e6
        assert missing_rope_base({**small, "qwen2.rope.freq_base": 10000.0}) is None
        assert missing_rope_base({"general.architecture": "llama"}) is None


class TestTypeablePadding:
    @pytest.fixture
    def old(self, good: Path, tmp_path: Path) -> Path:
        return copy_with_metadata(good, tmp_path / "old.gguf", {"tokenizer.ggml.token_type": old_token_types(good)})

    def test_it_is_diagnosed_and_repaired_in_place(self, old: Path, good: Path) -> None:
        (finding,) = diagnose_file(old).findings
        assert "[PAD261]" in finding.problem
        diagnosis = diagnose_file(old)
        layout = repaired_layout(diagnosis)
        assert fits_in_place(diagnosis, layout)
        patch_header(diagnosis, layout)
        assert read_raw_metadata(old) == read_raw_metadata(good)
        assert diagnose_file(old).findings == []
        assert not backup_path(old).exists()

    def test_it_is_text_after_loading_with_a_note(self, old: Path, loaded: Any) -> None:
        ready = loaded(old)
        assert ready.notes == (FileRepaired(hides_padding=True),)
        assert "padding tokens" in describe_note(ready.notes[0])
        text = "a [PAD270] b[PAD261][PAD999]"
        ids = ready.model.tokenizer.tokenize(text, special=False)
        assert max(ids) < 261
        assert b"".join(ready.model.tokenizer.piece(number) for number in ids).decode() == text
        assert ready.model.tokenizer.tokenize("plain", special=True) == [
            number for letter in "plain" for number in ready.model.tokenizer.tokenize(letter, special=True)
        ]


def test_an_output_matrix_that_duplicates_the_embeddings_is_diagnosed_and_left_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    target = convert_checkpoint(checkpoint, tmp_path / "double.gguf", "f32", like_llama_cpp=True)
    diagnosis = diagnose_file(target)
    (finding,) = [finding for finding in diagnosis.findings if finding.drops]
    assert "a copy of the embeddings" in finding.problem
    smaller = tmp_path / "single.gguf"
    run_job(plan_copy(diagnosis, repaired_layout(diagnosis), smaller).job, threads=1)
    assert "output.weight" not in [tensor.name for tensor in read_header(smaller).tensors]
    ids = list(range(10, 60))
    assert numpy.array_equal(compute_logits(Model(smaller), ids), compute_logits(Model(target), ids))


def test_an_interrupted_patch_is_undone(good: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    whole = good.read_bytes()
    torn.write_bytes(b"\0" * 4096 + whole[4096:])
    backup_path(torn).write_bytes(encode_backup(torn, whole[:8192]))
    assert undo_interrupted_patch(torn)
    assert torn.read_bytes() == whole
    assert not backup_path(torn).exists()
    assert not undo_interrupted_patch(torn)


def test_the_backup_of_another_file_is_ignored(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(good.read_bytes())
    backup_path(other).write_bytes(b"x" * 32 + b"\0" * 4096)
    assert not undo_interrupted_patch(other)
    assert other.read_bytes() == good.read_bytes()


def test_nan_and_infinity_are_counted(good: Path, tmp_path: Path) -> None:
    broken = copy_with_weights(good, tmp_path / "nan.gguf", "blk.1.ffn_up.weight", numpy.nan, numpy.inf)
    (finding,) = diagnose_file(broken).findings
    assert finding.problem == "“blk.1.ffn_up.weight” has 2 values that are NaN or infinite."
    assert diagnose_file(broken, weights=False).findings == []


def test_a_matrix_of_zeros_is_diagnosed(good: Path, tmp_path: Path) -> None:
    size = CONFIG["hidden_size"] ** 2
    zeros = copy_with_weights(good, tmp_path / "zeros.gguf", "blk.0.attn_q.weight", *[0.0] * size)
    (finding,) = diagnose_file(zeros).findings
    assert "all zeros" in finding.problem


def test_a_missing_end_of_turn_token_is_diagnosed(good: Path, tmp_path: Path) -> None:
    old = copy_with_metadata(
        good,
        tmp_path / "old.gguf",
        {"tokenizer.ggml.eos_token_id": gguf_writer.u32(258), "tokenizer.ggml.eot_token_id": None},
    )
    (finding,) = diagnose_file(old).findings
    assert "the end token is <|endoftext|>: some programs do not stop" in finding.problem
    assert decode_value(finding.fixed_keys["tokenizer.ggml.eot_token_id"]) == 260


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ({"tokenizer.chat_template": None}, "chat template is missing"),
        ({"tokenizer.chat_template": gguf_writer.string("  ")}, "template is empty"),
        ({"tokenizer.chat_template": gguf_writer.string("hello")}, "does not use the messages"),
        ({"tokenizer.ggml.tokens": gguf_writer.strings(["a", "b"])}, "2 tokens, but the embeddings have 288 rows"),
        ({"qwen2.block_count": gguf_writer.u32(3)}, "“blk.2.attn_norm.weight” is missing"),
        ({"qwen2.feed_forward_length": gguf_writer.u32(256)}, "the metadata implies"),
        ({"qwen2.block_count": gguf_writer.u32(1)}, "do not belong to this architecture"),
    ],
)
def test_other_problems_are_diagnosed(pairs: dict[str, bytes | None], problem: str, good: Path, tmp_path: Path) -> None:
    old = copy_with_metadata(good, tmp_path / "old.gguf", pairs)
    assert any(problem in finding.problem for finding in diagnose_file(old).findings)


# --- misleading end tokens and templates


def test_an_end_token_that_is_a_normal_token_is_diagnosed_repaired_and_ignored(good: Path, tmp_path: Path) -> None:
    tokens = decode_value(read_raw_metadata(good)["tokenizer.ggml.tokens"])
    wrong = copy_with_metadata(
        good, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": gguf_writer.u32(tokens.index("b"))}
    )
    (finding,) = diagnose_file(wrong).findings
    assert finding.is_serious
    assert finding.problem == "The eos token is “b”, which is a normal token: answers stop wherever it occurs."
    assert decode_value(finding.fixed_keys["tokenizer.ggml.eos_token_id"]) == tokens.index("<|im_end|>")
    model = Model(wrong)
    assert not model.tokenizer.is_end(tokens.index("b"))
    assert model.tokenizer.is_end(tokens.index("<|im_end|>"))
    model.close()
    loaded = load_chat_model(wrong, LoadOptions(LoadRequest(n_ctx=512, threads=1)), this_machine(), name="x", size=1)
    assert FileRepaired(false_end="b") in loaded.notes
    assert "“b” no longer ends answers" in describe_note(FileRepaired(false_end="b"))
    loaded.close()


def test_an_end_token_that_is_padding_is_diagnosed_and_repaired(good: Path, tmp_path: Path) -> None:
    wrong = copy_with_metadata(good, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": gguf_writer.u32(270)})
    (finding,) = diagnose_file(wrong).findings
    assert finding.is_serious
    assert finding.problem == "The eos token is “[PAD270]”, which is padding: no answer ends with it."
    assert decode_value(finding.fixed_keys["tokenizer.ggml.eos_token_id"]) == 260


def test_an_end_token_outside_of_the_vocabulary_is_repaired(good: Path, tmp_path: Path) -> None:
    wrong = copy_with_metadata(good, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": gguf_writer.u32(99_999)})
    (finding, *_) = diagnose_file(wrong).findings
    assert "The eos token has the id 99,999" in finding.problem
    assert finding.can_be_fixed


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{{ messages[0].content }}", "leaves out the last question"),
        ("{{ messages[-1].content }}{{ add_generation_prompt }}", "the messages before the last question"),
    ],
)
def test_a_template_that_leaves_out_messages_is_diagnosed(template: str, lost: str, good: Path, tmp_path: Path) -> None:
    odd = copy_with_metadata(good, tmp_path / "odd.gguf", {"tokenizer.chat_template": gguf_writer.string(template)})
    assert any(lost in finding.problem and finding.is_serious for finding in diagnose_file(odd).findings)


def test_padding_tokens_are_never_generated(good: Path) -> None:
    """Not even if all tokens are about equally likely."""
    model = Model(good)
    context = Context(model, ContextOptions(512, threads=1))
    padding = set(model.tokenizer.padding)
    assert len(padding) >= 8
    sampling = Sampling(temperature=9.0, top_k=0, top_p=1.0, repeat_penalty=1.0, seed=1)
    ids = [step for step in TokenSequence(context).generate([1, 2, 3], sampling, limit=400) if isinstance(step, int)]
    assert len(ids) == 400
    assert not padding & set(ids)
    context.close()
    model.close()
