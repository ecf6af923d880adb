"""Old faults of GGUF files: found, put right in a file, and put right on loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from gguf_files import copy_with_metadata, old_token_types

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
from qwenlocal.weights import gguf
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.diagnosis import diagnose_file, missing_rope_base
from qwenlocal.weights.gguf_reader import read_header, read_raw_metadata
from qwenlocal.weights.quant_mix import file_type
from qwenlocal.weights.repair import (
    backup_path,
    encode_backup,
    fits_in_place,
    patch_header,
    plan_copy,
    repaired_layout,
    undo_interrupted_patch,
)
from qwenlocal.weights.writing import run_job


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, "tie_word_embeddings": True}
    return write_checkpoint(tmp_path_factory.mktemp("c") / "tiny", config=config, store_tied_head=True)


@pytest.fixture(scope="module")
def good(checkpoint: Path) -> Path:
    target = checkpoint.parent / "good.gguf"
    run_job(plan_conversion(Checkpoint.open(checkpoint), [(target, file_type("f32"))]).job, threads=1)
    return target


@pytest.fixture
def loaded(request: pytest.FixtureRequest) -> Iterator[Any]:
    ready: list[ChatModel] = []

    def load(path: Path) -> ChatModel:
        options = LoadOptions(LoadRequest(n_ctx=512, threads=1))
        ready.append(load_chat_model(path, options, this_machine(), name="tiny", size=path.stat().st_size))
        return ready[-1]

    yield load
    for one in ready:
        one.close()


def scores(model: Model, ids: list[int]) -> numpy.ndarray:
    context = Context(model, ContextOptions(512, threads=1))
    (row,) = context.decode([(0, ids)])
    found = numpy.ctypeslib.as_array(context.logits(row), (len(model.tokenizer),)).copy()
    context.close()
    return found


def test_an_undamaged_file_has_no_findings(good: Path, loaded: Any) -> None:
    assert diagnose_file(good).findings == []
    assert loaded(good).notes == ()


class TestMissingRopeBase:
    @pytest.fixture
    def old(self, good: Path, tmp_path: Path) -> Path:
        return copy_with_metadata(good, tmp_path / "old.gguf", {"qwen2.rope.freq_base": None})

    def test_it_is_found(self, old: Path) -> None:
        (finding,) = diagnose_file(old).findings
        assert finding.is_serious
        assert "rope base is missing" in finding.what

    def test_loading_fixes_it_with_a_note(self, old: Path, good: Path, loaded: Any) -> None:
        ready = loaded(old)
        assert ready.notes == (FileRepaired(rope_base=1e6),)
        assert "RoPE base frequency set to 1,000,000" in describe_note(ready.notes[0])
        ids = list(range(40, 140))
        assert numpy.array_equal(scores(ready.model, ids), scores(Model(good), ids))
        assert not numpy.array_equal(scores(Model(old), ids), scores(Model(good), ids)), "the fault itself does harm"

    def test_a_copy_has_the_keys_of_an_undamaged_file(self, old: Path, good: Path, tmp_path: Path) -> None:
        diagnosis = diagnose_file(old)
        target = tmp_path / "new.gguf"
        run_job(plan_copy(diagnosis, repaired_layout(diagnosis, diagnosis.fixable), target).job, threads=1)
        assert diagnose_file(target).findings == []
        assert read_raw_metadata(target) == read_raw_metadata(good)

    def test_the_default_depends_on_the_model(self) -> None:
        small, larger = ({"general.architecture": "qwen2", "qwen2.embedding_length": width} for width in (1024, 2560))
        assert missing_rope_base(small) == 1e6
        assert missing_rope_base(larger) == 5e6
        assert missing_rope_base({**small, "qwen2.rope.freq_base": 10000.0}) is None
        assert missing_rope_base({"general.architecture": "llama"}) is None


class TestPaddingAsText:
    @pytest.fixture
    def old(self, good: Path, tmp_path: Path) -> Path:
        return copy_with_metadata(good, tmp_path / "old.gguf", {"tokenizer.ggml.token_type": old_token_types(good)})

    def test_it_is_found_and_fixed_in_place(self, old: Path, good: Path) -> None:
        (finding,) = diagnose_file(old).findings
        assert "[PAD261]" in finding.what
        diagnosis = diagnose_file(old)
        layout = repaired_layout(diagnosis, diagnosis.fixable)
        assert fits_in_place(diagnosis, layout)
        patch_header(diagnosis, layout)
        assert read_raw_metadata(old) == read_raw_metadata(good)
        assert diagnose_file(old).findings == []
        assert not backup_path(old).exists()

    def test_loading_treats_it_as_text_with_a_note(self, old: Path, loaded: Any) -> None:
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


def test_a_head_that_repeats_the_embeddings_is_found_and_left_out(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "double.gguf"
    options = Options(like_llama_cpp=True)
    run_job(plan_conversion(Checkpoint.open(checkpoint), [(target, file_type("f32"))], options).job, threads=1)
    diagnosis = diagnose_file(target)
    (finding,) = [finding for finding in diagnosis.findings if finding.drops]
    assert "byte for byte" in finding.what
    smaller = tmp_path / "single.gguf"
    run_job(plan_copy(diagnosis, repaired_layout(diagnosis, [finding]), smaller).job, threads=1)
    assert "output.weight" not in [tensor.name for tensor in read_header(smaller).tensors]
    ids = list(range(10, 60))
    assert numpy.array_equal(scores(Model(smaller), ids), scores(Model(target), ids))


def test_an_interrupted_patch_is_undone(good: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    whole = good.read_bytes()
    torn.write_bytes(b"\0" * 4096 + whole[4096:])
    backup_path(torn).write_bytes(encode_backup(torn, whole[:8192]))
    assert undo_interrupted_patch(torn)
    assert torn.read_bytes() == whole
    assert not backup_path(torn).exists()
    assert not undo_interrupted_patch(torn)


def test_the_header_backup_of_another_file_is_ignored(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(good.read_bytes())
    backup_path(other).write_bytes(b"x" * 32 + b"\0" * 4096)
    assert not undo_interrupted_patch(other)
    assert other.read_bytes() == good.read_bytes()


def test_nan_and_infinity_are_found_and_counted(good: Path, tmp_path: Path) -> None:
    header = read_header(good)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_up.weight")
    data = bytearray(good.read_bytes())
    at = header.data_offset + tensor.offset
    data[at : at + 8] = numpy.array([numpy.nan, numpy.inf], numpy.float32).tobytes()
    broken = tmp_path / "nan.gguf"
    broken.write_bytes(data)
    (finding,) = diagnose_file(broken).findings
    assert finding.what == "“blk.1.ffn_up.weight” has 2 numbers that are NaN or infinite."
    assert diagnose_file(broken, weights=False).findings == []


def test_a_matrix_of_zeros_is_found(good: Path, tmp_path: Path) -> None:
    header = read_header(good)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.0.attn_q.weight")
    data = bytearray(good.read_bytes())
    at = header.data_offset + tensor.offset
    data[at : at + tensor.elements * 4] = bytes(tensor.elements * 4)
    (tmp_path / "zeros.gguf").write_bytes(data)
    (finding,) = diagnose_file(tmp_path / "zeros.gguf").findings
    assert "nothing but zeros" in finding.what


def test_a_missing_end_of_turn_token_is_found(good: Path, tmp_path: Path) -> None:
    old = copy_with_metadata(
        good,
        tmp_path / "old.gguf",
        {"tokenizer.ggml.eos_token_id": gguf.u32(258), "tokenizer.ggml.eot_token_id": None},
    )
    (finding,) = diagnose_file(old).findings
    assert "<|endoftext|> as the end only" in finding.what
    assert gguf.decode(finding.pairs["tokenizer.ggml.eot_token_id"]) == 260


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ({"tokenizer.chat_template": None}, "no chat template"),
        ({"tokenizer.chat_template": gguf.string("  ")}, "template is empty"),
        ({"tokenizer.chat_template": gguf.string("hello")}, "never looks at the messages"),
        ({"tokenizer.ggml.tokens": gguf.strings(["a", "b"])}, "2 tokens, the embeddings have 288 rows"),
        ({"qwen2.block_count": gguf.u32(3)}, "“blk.2.attn_norm.weight” is missing"),
        ({"qwen2.feed_forward_length": gguf.u32(256)}, "by the header it should be"),
        ({"qwen2.block_count": gguf.u32(1)}, "have no place in this architecture"),
    ],
)
def test_other_faults_are_named(pairs: dict[str, bytes | None], what: str, good: Path, tmp_path: Path) -> None:
    old = copy_with_metadata(good, tmp_path / "old.gguf", pairs)
    assert any(what in finding.what for finding in diagnose_file(old).findings)


# --- ends and templates that mislead


def test_an_ordinary_token_as_eos_is_found_fixed_and_ignored(good: Path, tmp_path: Path) -> None:
    tokens = gguf.decode(read_raw_metadata(good)["tokenizer.ggml.tokens"])
    wrong = copy_with_metadata(
        good, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": gguf.u32(tokens.index("b"))}
    )
    (finding,) = diagnose_file(wrong).findings
    assert finding.is_serious
    assert finding.what == "Its eos token is “b”, a token like any other: answers break off before it."
    assert gguf.decode(finding.pairs["tokenizer.ggml.eos_token_id"]) == tokens.index("<|im_end|>")
    model = Model(wrong)
    assert not model.tokenizer.is_end(tokens.index("b"))
    assert model.tokenizer.is_end(tokens.index("<|im_end|>"))
    model.close()
    loaded = load_chat_model(wrong, LoadOptions(LoadRequest(n_ctx=512, threads=1)), this_machine(), name="x", size=1)
    assert FileRepaired(false_end="b") in loaded.notes
    assert "“b” no longer ends answers" in describe_note(FileRepaired(false_end="b"))
    loaded.close()


def test_an_eos_token_outside_the_vocabulary_is_fixed(good: Path, tmp_path: Path) -> None:
    wrong = copy_with_metadata(good, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": gguf.u32(99_999)})
    (finding, *_) = diagnose_file(wrong).findings
    assert "Its eos token is 99,999" in finding.what
    assert finding.can_be_fixed


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages[0].content }}", "does not show the model the last question"),
        ("{{ messages[-1].content }}{{ add_generation_prompt }}", "what was said before the last question"),
    ],
)
def test_a_template_that_omits_messages_is_found(template: str, what: str, good: Path, tmp_path: Path) -> None:
    odd = copy_with_metadata(good, tmp_path / "odd.gguf", {"tokenizer.chat_template": gguf.string(template)})
    assert any(what in finding.what and finding.is_serious for finding in diagnose_file(odd).findings)


def test_padding_ids_are_never_generated(good: Path) -> None:
    """Not even where everything is as likely as anything else."""
    model = Model(good)
    context = Context(model, ContextOptions(512, threads=1))
    padding = set(model.tokenizer.padding)
    assert len(padding) >= 8
    sampling = Sampling(temperature=9.0, top_k=0, top_p=1.0, repeat_penalty=1.0, seed=1)
    said = [step for step in TokenSequence(context).generate([1, 2, 3], sampling, limit=400) if isinstance(step, int)]
    assert len(said) == 400
    assert not padding & set(said)
    context.close()
    model.close()
