"""`qwenlocal imatrix`: the inputs of a model's matrices, measured while it reads a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy
import pytest
from checkpoint_files import convert_checkpoint
from commands import expect_exit
from conftest import Run
from gguf_files import copy_with_weights
from terminal import Terminal

from qwenlocal.engine.context import AbortFlag
from qwenlocal.engine.evaluation import InputCollector
from qwenlocal.engine.llama import Model
from qwenlocal.errors import UsageError
from qwenlocal.machine import Machine, Memory
from qwenlocal.measure.importance import CALIBRATION_TEXT, CHUNK_SIZE, measure_importance, split_text
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.imatrix import InputStatistics, read_imatrix

WIDTH, INNER, EXPERTS, USED = 64, 96, 6, 2
SMALL = {"hidden_size": WIDTH, "intermediate_size": INNER}
MIXTURE = {
    **MOE_CONFIG, **SMALL, "num_experts": EXPERTS, "num_experts_per_tok": USED, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": INNER,
}  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog, and then over the fence. " * 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return convert_checkpoint(write_checkpoint(folder / "x", config=SMALL), folder / "x.gguf", "f32")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    return convert_checkpoint(write_checkpoint(folder / "x", config=MIXTURE), folder / "x.gguf", "f32")


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[Model]:
    with contextlib.closing(Model(path)) as model:
        yield model


def measure(path: Path, chunks: int = 2) -> tuple[list[list[int]], dict[str, InputStatistics]]:
    with loaded(path) as model:
        parts = split_text(model.tokenizer, TEXT, "text", special=False)[:chunks]
        return parts, read_chunks(model, parts)


def read_chunks(model: Model, parts: Sequence[Sequence[int]]) -> dict[str, InputStatistics]:
    collector = InputCollector()
    assert [*measure_importance(model, parts, 1, collector, AbortFlag())] == list(range(1, len(parts) + 1))
    return collector.statistics


def read_tensor(path: Path, name: str) -> numpy.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    values: numpy.ndarray = tensor.data
    return values


class TestStatistics:
    def test_the_first_layer_reads_normalized_embeddings(self, dense: Path) -> None:
        parts, statistics = measure(dense)
        embeddings = read_tensor(dense, "token_embd.weight")[numpy.concatenate(parts)].astype(numpy.float64)
        norm = read_tensor(dense, "blk.0.attn_norm.weight")
        inputs = embeddings / numpy.sqrt((embeddings**2).mean(1, keepdims=True) + 1e-6) * norm
        for letter in "qkv":
            entry = statistics[f"blk.0.attn_{letter}.weight"]
            assert entry.sums[0] == pytest.approx((inputs**2).sum(0), rel=1e-5)
            assert entry.counts.tolist() == [2 * CHUNK_SIZE]

    def test_every_matrix_of_every_layer_is_measured(self, dense: Path) -> None:
        _, statistics = measure(dense, chunks=3)
        kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        assert set(statistics) == {f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
        assert {entry.counts[0] for entry in statistics.values()} == {3 * CHUNK_SIZE}

    def test_experts_are_measured_on_the_tokens_they_get(self, mixture: Path) -> None:
        """Each token goes to two experts: their sums are twice those of the shared expert, which gets all tokens."""
        _, statistics = measure(mixture)
        shared = statistics["blk.1.ffn_gate_shexp.weight"]
        for kind in ("gate", "up"):
            experts = statistics[f"blk.1.ffn_{kind}_exps.weight"]
            assert experts.sums.shape == (EXPERTS, WIDTH)
            assert experts.counts.sum() == USED * 2 * CHUNK_SIZE
            assert experts.sums.sum(0) == pytest.approx(USED * shared.sums[0], rel=1e-4)
        down = statistics["blk.1.ffn_down_exps.weight"]
        assert down.counts.tolist() == statistics["blk.1.ffn_up_exps.weight"].counts.tolist()
        assert (down.sums[down.counts > 0] > 0).any(axis=1).all()

    def test_chunks_are_independent(self, dense: Path) -> None:
        parts, both = measure(dense)
        with loaded(dense) as model:
            first, second = (read_chunks(model, [part]) for part in parts)
        name = "blk.1.ffn_down.weight"
        assert both[name].sums == pytest.approx(first[name].sums + second[name].sums, rel=1e-5)


class TestText:
    def test_a_rest_shorter_than_a_chunk_is_left_out(self, dense: Path) -> None:
        with loaded(dense) as model:
            tokens = len(model.tokenizer.tokenize(TEXT, special=False))
            parts = split_text(model.tokenizer, TEXT, "text", special=False)
        assert [len(part) for part in parts] == [CHUNK_SIZE] * (tokens // CHUNK_SIZE)

    def test_a_text_that_is_too_short_is_refused_with_its_length(self, dense: Path) -> None:
        with (
            loaded(dense) as model,
            pytest.raises(UsageError, match=r"notes\.txt has 500 tokens; at least 1,024 are needed"),
        ):
            split_text(model.tokenizer, "x " * 250, "notes.txt", special=False)

    def test_the_bundled_text_has_many_languages_and_chat_markup(self) -> None:
        text = CALIBRATION_TEXT.read_text("utf-8")
        for piece in ("<|im_start|>assistant", "<|im_end|>", "def ", "的", "は", "ё", "ñ", "SELECT"):
            assert piece in text, piece
        assert len(text.encode()) > 50_000


class TestCommand:
    def test_the_file_improves_a_quantization(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        target = tmp_path / "x.imatrix.gguf"
        message = expect_exit(
            invoke("imatrix", str(dense), "--text", str(tmp_path / "text.txt"), "-o", str(target), "--chunks", "2"), 0
        )
        assert f"Wrote {target}: 14 matrices, 1,024 tokens of text.txt" in message
        matrix = read_imatrix(target)
        assert matrix.weights["blk.0.attn_q.weight"].shape == (1, WIDTH)
        quantized = tmp_path / "q.gguf"
        result = invoke("quantize", str(dense), str(quantized), "q4_0", "--imatrix", str(target))
        expect_exit(result, 0)
        assert gguf.GGUFReader(quantized).fields["quantize.imatrix.chunks_count"].contents() == 2

    def test_an_existing_file_is_kept_without_force(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        target = tmp_path / "x.imatrix.gguf"
        target.write_text("mine")
        expect_exit(invoke("imatrix", str(dense), "-o", str(target)), 2)
        assert target.read_text() == "mine"

    def test_a_short_text_ends_with_its_length(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        (tmp_path / "short.txt").write_text("Hello.")
        message = expect_exit(invoke("imatrix", str(dense), "--text", str(tmp_path / "short.txt")), 2)
        assert "short.txt has 6 tokens; at least 1,024 are needed" in message

    def test_a_missing_text_and_a_missing_model_are_named(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        assert "nothing.txt" in expect_exit(invoke("imatrix", str(dense), "--text", str(tmp_path / "nothing.txt")), 3)
        assert "no-model" in expect_exit(invoke("imatrix", str(tmp_path / "no-model.gguf")), 3)

    def test_the_model_and_the_text_are_never_overwritten(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        text = tmp_path / "text.txt"
        text.write_text(TEXT)
        for path in (dense, text):
            before = path.read_bytes()
            result = invoke("imatrix", str(dense), "--text", str(text), "-o", str(path), "--force")
            assert "which it is measured with" in expect_exit(result, 2)
            assert path.read_bytes() == before

    def test_a_folder_gets_a_file_with_the_name_of_the_model(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        expect_exit(invoke("imatrix", str(dense), "-o", str(tmp_path), "--chunks", "1"), 0)
        assert read_imatrix(tmp_path / "x.imatrix.gguf").weights

    def test_a_missing_folder_is_refused(self, dense: Path, tmp_path: Path, invoke: Run) -> None:
        message = expect_exit(invoke("imatrix", str(dense), "-o", str(tmp_path / "no" / "x.gguf")), 6)
        assert "does not exist" in message
        assert "-o OUT" in message

    def test_experts_without_tokens_are_counted(self, tmp_path: Path, invoke: Run) -> None:
        config = {**MIXTURE, "num_experts": 60, "num_experts_per_tok": 1}
        model = convert_checkpoint(write_checkpoint(tmp_path / "x", config=config), tmp_path / "x.gguf", "f32")
        target = tmp_path / "x.imatrix"
        message = expect_exit(invoke("imatrix", str(model), "-o", str(target), "--chunks", "1"), 0)
        weights = [entry for entry in read_imatrix(target).weights.values() if len(entry) > 1]
        unused = sum(int((entry == 1).all(axis=1).sum()) for entry in weights)
        assert f"{unused} of 360 matrices of experts got no tokens" in " ".join(message.split())

    def test_a_damaged_model_is_named(self, random_model: Path, tmp_path: Path, invoke: Run) -> None:
        name = "blk.0.attn_norm.weight"
        model = copy_with_weights(random_model, tmp_path / "nan.gguf", name, *[float("nan")] * 288)
        message = expect_exit(invoke("imatrix", str(model), "-o", str(tmp_path / "x")), 5)
        assert "nan.gguf: the inputs of “blk.0.attn_q.weight” are NaN" in message

    def test_a_model_that_does_not_fit_into_memory_is_refused(
        self, dense: Path, tmp_path: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qwenlocal.machine.this_machine", lambda: Machine(1, lambda: Memory(1 << 30, 1 << 20)))
        result = invoke("imatrix", str(dense), "-o", str(tmp_path / "x"))
        message = expect_exit(result, 6)
        assert "of memory" in message
        assert "--force" not in message

    def test_ctrl_c_keeps_the_chunks_so_far(
        self, dense: Path, tmp_path: Path, terminal: Callable[..., Terminal]
    ) -> None:
        (tmp_path / "long.txt").write_text(TEXT * 300)
        window = terminal("imatrix", str(dense), "--text", "long.txt", "-o", "x.imatrix")
        window.wait_for(r"chunk [1-9]\d* of \d{3}")
        window.type("\x03")
        window.wait_for("chunks were measured")
        assert window.wait_for_exit() == 130
        assert read_imatrix(tmp_path / "x.imatrix").weights["blk.1.ffn_down.weight"].shape == (1, INNER)

    @pytest.mark.parametrize("threads", ["0", "100000"])
    def test_an_invalid_number_of_threads_is_refused(self, threads: str, dense: Path, invoke: Run) -> None:
        assert "-t must be between" in expect_exit(invoke("imatrix", str(dense), "-t", threads), 2)

    @pytest.mark.parametrize("chunks", ["0", "-1", "x"])
    def test_an_invalid_number_of_chunks_is_refused(self, chunks: str, dense: Path, invoke: Run) -> None:
        assert "--chunks" in expect_exit(invoke("imatrix", str(dense), "--chunks", chunks), 2)
