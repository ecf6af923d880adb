"""`qwenlocal quality`: perplexity, KL divergence and levels, compared with independent computations from logits."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
from checkpoint_files import convert_checkpoint
from commands import expect_exit, parse_json
from conftest import Run
from gguf_files import copy_with_metadata, copy_with_weights
from hub import HubServer
from hub_checkpoints import HF_NAME, publish
from packing import write_packed_checkpoint
from terminal import Terminal

from qwenlocal.cli.quality_chart import LevelPoint, draw_levels, draw_quantiles
from qwenlocal.engine.context import AbortFlag, Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.errors import DiskFull, TextTooShort
from qwenlocal.machine import Machine, Memory
from qwenlocal.measure.kl_divergence import LogProbFile
from qwenlocal.measure.logits import SAMPLE
from qwenlocal.measure.quality import ModelFile, Quality, QualityMeter, QualityTest, prepare_test
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights import gguf_writer

TEXT = SAMPLE * 3  # 2,100 bytes, which are tokens of the tiny models
BOS = 256
LEVELS = "q2_k,q4_0,q8_0"


def model_file(path: Path) -> ModelFile:
    return ModelFile(path.name, path, path.stat().st_size)


def open_test(path: Path, n_ctx: int, text: str = TEXT, chunks: int = 9) -> QualityTest:
    return prepare_test(model_file(path), text, n_ctx, chunks, 2, 8 << 30, AbortFlag())


def measure(path: Path, n_ctx: int) -> Quality:
    test, meter = open_test(path, n_ctx), QualityMeter(path.name)
    for _ in test.measure(model_file(path), meter):
        pass
    return meter.result()


def compare(test: QualityTest, path: Path, base: Path) -> tuple[QualityMeter, QualityMeter]:
    meter, base_meter = QualityMeter(path.name), QualityMeter(base.name)
    for _ in test.compare(model_file(path), model_file(base), meter, base_meter):
        pass
    return meter, base_meter


# --- the definitions, in float64 and row by row


@functools.cache
def log_probs(path: Path, windows: tuple[tuple[int, ...], ...]) -> numpy.ndarray:
    """Return the log-probabilities of the second half of each window, but its last position: (rows, vocabulary)."""
    rows, n_ctx = [], len(windows[0])
    options = ContextOptions(n_ctx, threads=1, flash_attention=False)
    with contextlib.closing(Model(path)) as model, contextlib.closing(Context(model, options)) as context:
        for ids in windows:
            context.truncate(0, 0)
            context.decode([(0, ids[: n_ctx // 2])])
            for start in range(n_ctx // 2, n_ctx - 1, 32):
                part = ids[start : min(start + 32, n_ctx - 1)]
                (first,) = context.decode([(0, part)], all_logits=(0,))
                for row in range(first, first + len(part)):
                    logits = numpy.array(context.logits(row)[: len(model.tokenizer)], numpy.float64)
                    rows.append(logits - numpy.log(numpy.exp(logits - logits.max()).sum()) - logits.max())
    return numpy.stack(rows)


def expected_nll(path: Path, windows: Sequence[Sequence[int]]) -> numpy.ndarray:
    frozen = tuple(map(tuple, windows))
    targets = [id for ids in windows for id in ids[len(ids) // 2 + 1 :]]
    return -log_probs(path, frozen)[numpy.arange(len(targets)), targets]


@pytest.fixture(scope="module")
def other_model(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with other weights in its last norm."""
    target = tmp_path_factory.mktemp("other") / "other.gguf"
    numbers = 1 + numpy.random.default_rng(0).standard_normal(288) / 4
    return copy_with_weights(random_model, target, "output_norm.weight", *map(float, numbers))


@pytest.fixture(scope="module")
def level_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices are wide enough for all types."""
    return write_checkpoint(tmp_path_factory.mktemp("levels") / "Tiny-Qwen-0.2B")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


class TestPerplexity:
    @pytest.mark.parametrize("n_ctx", [64, 100, 512, 600], ids=["8 at once", "5 at once", "one batch", "two batches"])
    def test_it_equals_the_definition(self, n_ctx: int, random_model: Path) -> None:
        windows = open_test(random_model, n_ctx).windows
        nll = expected_nll(random_model, windows)
        quality = measure(random_model, n_ctx)
        assert quality.windows == len(windows) == min(9, len(TEXT.encode()) // n_ctx)
        assert quality.tokens == len(nll) == len(windows) * (n_ctx - n_ctx // 2 - 1)
        assert quality.nll.value == pytest.approx(nll.mean(), rel=1e-3)
        assert quality.perplexity.value == pytest.approx(numpy.exp(nll.mean()), rel=5e-3)
        assert quality.nll.error == pytest.approx(nll.std(ddof=1) / len(nll) ** 0.5, rel=1e-2)
        assert quality.perplexity.error == pytest.approx(quality.perplexity.value * quality.nll.error)

    def test_every_window_begins_with_bos_if_the_tokenizer_adds_it(self, random_model: Path, tmp_path: Path) -> None:
        keys = {
            "tokenizer.ggml.bos_token_id": gguf_writer.u32(BOS),
            "tokenizer.ggml.add_bos_token": gguf_writer.boolean(True),
        }
        path = copy_with_metadata(random_model, tmp_path / "bos.gguf", keys)
        with_bos, plain = open_test(path, 128).windows, open_test(random_model, 128).windows
        assert {window[0] for window in with_bos} == {BOS}
        assert with_bos[0][1:] == plain[0][:-1]
        assert with_bos[1][1:] == plain[1][:-1]
        assert measure(path, 128).nll.value == pytest.approx(expected_nll(path, with_bos).mean(), rel=1e-3)

    def test_a_text_needs_two_windows(self, random_model: Path) -> None:
        with pytest.raises(TextTooShort) as caught:
            open_test(random_model, 512, "a" * 1023)
        assert (caught.value.tokens, caught.value.needed) == (1023, 1024)
        assert "-c 511" in caught.value.hint
        assert len(open_test(random_model, 512, "a" * 1024).windows) == 2

    def test_chunks_limit_the_windows(self, random_model: Path) -> None:
        assert len(open_test(random_model, 128, chunks=3).windows) == 3


class TestDivergence:
    def test_it_equals_the_definition(self, random_model: Path, other_model: Path) -> None:
        test = open_test(random_model, 128)
        frozen = tuple(map(tuple, test.windows))
        p, q = log_probs(random_model, frozen), log_probs(other_model, frozen)
        kl = (numpy.exp(p) * (p - q) * (p > -16)).sum(axis=1)
        nll, base_nll = expected_nll(other_model, test.windows), expected_nll(random_model, test.windows)
        divergence = compare(test, other_model, random_model)[0].result().divergence
        assert divergence
        assert divergence.kl.value == pytest.approx(kl.mean(), rel=0.01)
        assert divergence.kl.error == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=0.02)
        assert divergence.kl_quantiles["median"] == pytest.approx(numpy.median(kl), rel=0.02)
        assert divergence.kl_quantiles["99%"] == pytest.approx(numpy.quantile(kl, 0.99), rel=0.02)
        assert divergence.kl_quantiles["maximum"] == pytest.approx(kl.max(), rel=0.02)
        assert divergence.log_ratio.value == pytest.approx((nll - base_nll).mean(), rel=0.05, abs=2e-3)
        assert divergence.base_perplexity.value == pytest.approx(numpy.exp(base_nll.mean()), rel=5e-3)
        same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
        assert 0.1 < same < 0.9
        assert divergence.same_top.value == pytest.approx(same, abs=0.02)
        changes = numpy.exp(-nll) - numpy.exp(-base_nll)
        assert divergence.rms_delta_p.value == pytest.approx((changes**2).mean() ** 0.5, rel=0.05)

    def test_a_model_does_not_diverge_from_itself(self, random_model: Path) -> None:
        divergence = compare(open_test(random_model, 128), random_model, random_model)[0].result().divergence
        assert divergence
        assert (divergence.kl, divergence.log_ratio, divergence.same_top) == ((0, 0), (0, 0), (1, 0))

    def test_a_base_that_does_not_fit_as_well_is_evaluated_first(self, random_model: Path, other_model: Path) -> None:
        test = open_test(random_model, 128)
        together, unused = compare(test, other_model, random_model)
        assert not unused.tokens
        small = replace(test, available=int(1.5 * test.plan(model_file(random_model)).memory))
        apart, base = compare(small, other_model, random_model)
        assert base.tokens == apart.tokens == together.tokens
        expected, actual = together.result().divergence, apart.result().divergence
        assert expected
        assert actual
        assert actual.kl.value == pytest.approx(expected.kl.value, rel=1e-3)
        assert actual.kl_quantiles["99%"] == pytest.approx(expected.kl_quantiles["99%"], rel=1e-3)
        assert actual.same_top.value == pytest.approx(expected.same_top.value, abs=2e-3)
        assert base.result().perplexity == pytest.approx(expected.base_perplexity, rel=1e-4)
        assert actual.base_perplexity == pytest.approx(expected.base_perplexity, rel=1e-4)

    def test_log_probabilities_that_do_not_fit_on_the_disk_are_refused_first(
        self, random_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        test = open_test(random_model, 128)
        window = LogProbFile.size(test.n_vocab, 63)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 * window + 5))
        with pytest.raises(DiskFull) as caught, test.open_store():
            pass
        assert "--chunks 3" in caught.value.hint


class TestCommand:
    def test_perplexity_is_printed(self, random_model: Path, text_file: Path, invoke: Run) -> None:
        result = invoke("quality", str(random_model), "--text", str(text_file))
        expect_exit(result, 0)
        assert result.stdout.startswith("random.gguf: 4 windows of 512 tokens, 1,020 tokens predicted")
        assert "±" in result.stdout
        assert "KL" not in result.stdout

    def test_a_base_is_compared_in_json_and_drawn(
        self, random_model: Path, other_model: Path, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        models = (str(other_model), "--base", str(random_model))
        result = invoke("quality", *models, "--text", str(text_file), "-c", "128", "--json", "--plot", "x.svg")
        expect_exit(result, 0)
        facts = parse_json(result.stdout)
        assert (facts["model"], facts["base"]) == ("other.gguf", "random.gguf")
        assert (facts["context"], facts["windows"], facts["planned_windows"]) == (128, 16, 16)
        assert facts["kl"] > 0
        assert facts["kl_error"] > 0
        assert 0 < facts["kl_quantiles"]["median"] < facts["kl_quantiles"]["maximum"]
        assert svg_texts((tmp_path / "x.svg").read_text("utf-8"))[0].startswith("KL divergence of other.gguf")

    def test_the_table_of_a_base_has_all_statistics(
        self, random_model: Path, other_model: Path, text_file: Path, invoke: Run
    ) -> None:
        result = invoke("quality", str(other_model), "--base", str(random_model), "--text", str(text_file))
        for row in ("KL divergence, mean", "KL divergence, 99%", "same most likely token", "perplexity of random.gguf"):
            assert row in result.stdout

    def test_levels_of_a_checkpoint_are_compared_with_it(
        self, level_checkpoint: Path, text_file: Path, invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(temporary := tmp_path / "temporary"))
        temporary.mkdir()
        arguments = ("quality", str(level_checkpoint), "--levels", LEVELS, "--text", str(text_file), "-c", "128")
        result = invoke(*arguments, "--json", "--plot", "x.svg")
        expect_exit(result, 0)
        source, *levels = parse_json(result.stdout)["levels"]
        assert [level["level"] for level in levels] == LEVELS.split(",")
        assert source["level"] == "f16"
        assert "kl" not in source
        assert source["size"] > levels[2]["size"] > levels[1]["size"] > levels[0]["size"]
        assert levels[0]["kl"] > levels[1]["kl"] > levels[2]["kl"] > 0
        assert all(level["prefill_tok_s"] > 0 and level["decode_tok_s"] > 0 for level in (source, *levels))
        assert all(level["memory"] > level["size"] for level in (source, *levels))
        assert not list(temporary.iterdir())
        texts = svg_texts((tmp_path / "x.svg").read_text("utf-8"))
        assert set(LEVELS.split(",")) <= set(texts)

    def test_levels_are_printed_as_a_table(self, tiny_bf16: Path, text_file: Path, invoke: Run) -> None:
        result = invoke("quality", str(tiny_bf16), "--levels", "q8_0", "--text", str(text_file), "--chunks", "2")
        expect_exit(result, 0)
        lines = result.stdout.splitlines()
        assert lines[1].split()[:5] == ["LEVEL", "SIZE", "MEMORY", "PREFILL", "DECODE"]
        assert [line.split()[0] for line in lines[2:4]] == ["bf16", "q8_0"]

    def test_levels_of_a_q8_0_file_come_with_a_note(
        self, level_checkpoint: Path, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        source = convert_checkpoint(level_checkpoint, tmp_path / "x.gguf", "q8_0")
        result = invoke("quality", str(source), "--levels", "q8_0,q4_0", "--text", str(text_file), "--chunks", "2")
        assert "is quantized to q8_0" in expect_exit(result, 0)
        same, coarser = result.stdout.splitlines()[3:5]
        assert "0.00000 ± 0.00000" in same
        assert "0.00000 ± 0.00000" not in coarser

    def test_an_importance_matrix_changes_the_levels(
        self, level_checkpoint: Path, invoke: Run, text_file: Path, tmp_path: Path
    ) -> None:
        source = convert_checkpoint(level_checkpoint, tmp_path / "x.gguf", "bf16")
        expect_exit(invoke("imatrix", str(source), "-o", "x.imatrix", "--text", str(text_file)), 0)
        arguments = ("quality", str(level_checkpoint), "--levels", "q2_k", "--text", str(text_file), "--json")
        plain, weighted = (
            parse_json(expect_json(invoke(*arguments, *more)))["levels"][1]["kl"]
            for more in ([], ["--imatrix", "x.imatrix"])
        )
        assert plain != weighted

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ([], 2, "--text FILE"),
            (["--text", "nowhere.txt"], 3, "There is no file"),
            (["--text", "text.txt", "--chunks", "0"], 2, "--chunks must be between"),
            (["--text", "text.txt", "-c", "5000"], 2, "-c must be between 8 and 4,096"),
            (["--text", "text.txt", "-t", "0"], 2, "-t must be between"),
            (["--text", "text.txt", "-c", "1100"], 2, "needed. Use a longer text"),
            (["--text", "text.txt", "--plot", "x.svg"], 2, "--plot needs a base or levels"),
            (["--text", "text.txt", "--plot", "x.png", "--levels", "q8_0"], 2, "--plot writes an SVG file"),
            (["--text", "text.txt", "--plot", "no/x.svg", "--levels", "q8_0"], 6, "Cannot write to no"),
            (["--text", "text.txt", "--levels", "q9"], 2, "--levels must be"),
            (["--text", "text.txt", "--levels", "q8_0", "--base", "x.gguf"], 2, "cannot be combined"),
            (["--text", "text.txt", "--imatrix", "x"], 2, "--imatrix needs --levels"),
        ],
    )
    def test_invalid_options_are_refused(
        self, options: list[str], code: int, message: str, random_model: Path, text_file: Path, invoke: Run
    ) -> None:
        assert text_file.name == "text.txt"
        result = invoke("quality", str(random_model), *options)
        assert message in " ".join(expect_exit(result, code).split())
        assert not result.stdout

    def test_a_quantized_file_has_no_levels(
        self, level_checkpoint: Path, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        source = convert_checkpoint(level_checkpoint, tmp_path / "x.gguf", "q4_0")
        result = invoke("quality", str(source), "--levels", "q2_k", "--text", str(text_file))
        message = expect_exit(result, 2)
        assert "quantized already (q4_0)" in message
        assert "Start from the checkpoint" in message

    def test_a_text_that_is_too_short_is_refused_before_a_checkpoint_is_converted(
        self, level_checkpoint: Path, tmp_path: Path, invoke: Run
    ) -> None:
        (tmp_path / "short.txt").write_text("Hello.")
        message = expect_exit(invoke("quality", str(level_checkpoint), "--levels", "q4_0", "--text", "short.txt"), 2)
        assert "The text has 6 tokens" in message
        assert "writing" not in message

    def test_a_level_without_its_importance_matrix_is_refused_before_the_source_is_measured(
        self, level_checkpoint: Path, text_file: Path, invoke: Run
    ) -> None:
        levels = ("--levels", "q4_0,iq2_xxs")
        message = expect_exit(invoke("quality", str(level_checkpoint), *levels, "--text", str(text_file)), 2)
        assert "--imatrix FILE" in message
        assert "writing" not in message

    def test_a_quantized_model_is_refused_before_it_is_downloaded(self, text_file: Path, invoke: Run) -> None:
        result = invoke("quality", "hf:owner/repo:q4_k_m", "--levels", "q4_0", "--text", str(text_file))
        assert "hf:owner/repo:q4_k_m is quantized already" in expect_exit(result, 2)

    def test_a_repository_of_gguf_files_needs_a_level(self, hub: HubServer, text_file: Path, invoke: Run) -> None:
        hub.repository("owner/Tiny-GGUF").files = {"tiny-f16.gguf": b"GGUF"}
        result = invoke("quality", "hf:owner/Tiny-GGUF", "--levels", "q4_0", "--text", str(text_file))
        assert "name its type, for example: hf:owner/Tiny-GGUF:f16" in " ".join(expect_exit(result, 3).split())

    @pytest.mark.parametrize("layout", ["gptq", "gemm", "gptq of experts"])
    def test_levels_of_packed_checkpoints_of_a_hub_are_measured(
        self, layout: str, hub: HubServer, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        config = {"num_hidden_layers": 1, **({**MOE_CONFIG, "num_hidden_layers": 1} if "experts" in layout else {})}
        write_packed_checkpoint(tmp_path / "x", layout.split()[0], config=config, symmetric=layout != "gemm")
        publish(hub, tmp_path / "x")
        options = ("--levels", "q4_0,q2_k", "--text", str(text_file), "-c", "128", "--chunks", "2", "--json")
        source, same, coarse = parse_json(expect_json(invoke("quality", HF_NAME, *options)))["levels"]
        assert (source["level"], same["level"], coarse["level"]) == ("f16", "q4_0", "q2_k")
        assert same["kl"] < coarse["kl"] / 2
        if layout != "gemm":
            assert same["kl"] < 1e-3, "the same weights; q4_0 rounds the inputs"

    def test_a_base_with_more_tokens_is_refused(
        self, random_model: Path, tiny_f32: Path, text_file: Path, invoke: Run
    ) -> None:
        result = invoke("quality", str(random_model), "--base", str(tiny_f32), "--text", str(text_file))
        assert "tokens, not 259" in " ".join(expect_exit(result, 2).split())

    def test_an_embedding_model_is_refused(
        self, random_model: Path, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        keys = {"qwen2.attention.causal": gguf_writer.boolean(False)}
        model = copy_with_metadata(random_model, tmp_path / "embedding.gguf", keys)
        for models in ([str(model)], [str(random_model), "--base", str(model)]):
            message = expect_exit(invoke("quality", *models, "--text", str(text_file)), 2)
            assert "embedding.gguf is an embedding model" in message

    def test_a_model_that_does_not_fit_into_memory_is_refused(
        self, random_model: Path, text_file: Path, invoke: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qwenlocal.machine.this_machine", lambda: Machine(1, lambda: Memory(1 << 30, 1 << 20)))
        message = expect_exit(invoke("quality", str(random_model), "--text", str(text_file)), 6)
        assert "of memory" in message
        assert "--force" not in message

    def test_a_damaged_model_is_named(self, random_model: Path, text_file: Path, invoke: Run, tmp_path: Path) -> None:
        model = copy_with_weights(random_model, tmp_path / "nan.gguf", "output_norm.weight", *[float("nan")] * 288)
        for models in ([str(model)], [str(random_model), "--base", str(model)]):
            message = expect_exit(invoke("quality", *models, "--text", str(text_file)), 5)
            assert "nan.gguf: the model computes NaN" in message

    def test_a_base_with_another_token_is_refused(
        self, random_model: Path, text_file: Path, invoke: Run, tmp_path: Path
    ) -> None:
        from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata

        tokens = list(decode_value(read_raw_metadata(random_model)["tokenizer.ggml.tokens"]))
        tokens[258] = "<|other|>"
        base = copy_with_metadata(
            random_model, tmp_path / "base.gguf", {"tokenizer.ggml.tokens": gguf_writer.strings(tokens)}
        )
        result = invoke("quality", str(random_model), "--base", str(base), "--text", str(text_file))
        message = " ".join(expect_exit(result, 2).split())
        assert "token 258 is '<|other|>', not '<|im_end|>'" in message


class TestInterrupts:
    def test_ctrl_c_prints_the_windows_so_far(
        self, random_model: Path, tmp_path: Path, terminal: Callable[..., Terminal]
    ) -> None:
        (tmp_path / "long.txt").write_text(TEXT * 2_000, encoding="utf-8")
        window = terminal("quality", str(random_model), "--text", "long.txt")
        window.wait_for(r"window \d+ of \d{4}, perplexity [\d.]+, .* left")
        window.type("\x03")
        text = window.wait_for("windows were evaluated")
        assert window.wait_for_exit() == 130
        assert "tokens predicted" in text
        assert "perplexity  " in text

    @pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
    def test_levels_so_far_are_printed_and_their_files_removed(
        self, end: str, level_checkpoint: Path, tmp_path: Path, terminal: Callable[..., Terminal]
    ) -> None:
        (tmp_path / "long.txt").write_text(TEXT * 20, encoding="utf-8")
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        levels = ("--levels", "q8_0,q4_0", "-c", "64", "--chunks", "300")
        window = terminal("quality", str(level_checkpoint), "--text", "long.txt", *levels, TMPDIR=str(temporary))
        window.wait_for(r"q8_0: window \d+ of 300")
        assert list(temporary.iterdir())
        {"Ctrl-C": lambda: window.type("\x03"), "SIGTERM": window.terminate, "SIGHUP": window.hang_up}[end]()
        if end != "SIGHUP":  # which closes the terminal
            assert "KL MEAN" in window.wait_for(r"q8_0: \d+ of 300 windows were evaluated. Not measured: q4_0")
            window.wait_for_exit()
        deadline = time.monotonic() + 15
        while list(temporary.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


class TestCharts:
    def test_titles_are_escaped(self) -> None:
        assert svg_texts(draw_quantiles("a<b & c", {"median": 0.1, "maximum": 1.0}))[0] == "a<b & c"

    def test_labels_of_close_points_do_not_overlap(self) -> None:
        points = [LevelPoint(f"q4_{number}_x", 400_000_000 + number, 0.1) for number in range(9)]
        svg = ElementTree.fromstring(draw_levels("x", points))
        boxes = [
            (float(node.attrib["x"]) - (width if node.attrib["text-anchor"] == "end" else 0), float(node.attrib["y"]))
            for node in svg
            if (node.text or "").startswith("q4_") and (width := 8 * len(node.text or ""))
        ]
        assert len(boxes) == 9
        for (x, y), (other_x, other_y) in itertools.combinations(boxes, 2):
            assert abs(x - other_x) >= 8 * 6 or abs(y - other_y) >= 13  # pixels of the font

    def test_levels_are_placed_by_size_and_loss(self) -> None:
        points = [LevelPoint("large", 2_000_000_000, 0.001), LevelPoint("small", 1_000_000_000, 0.1)]
        circles = [node.attrib for node in ElementTree.fromstring(draw_levels("x", points)) if "circle" in node.tag]
        small, large = ((float(circle["cx"]), float(circle["cy"])) for circle in circles)
        assert large[0] > small[0]
        assert large[1] > small[1]  # downwards

    def test_levels_without_loss_can_be_drawn(self) -> None:
        assert "q8_0" in svg_texts(draw_levels("x", [LevelPoint("q8_0", 1000, 0.0)]))
        assert "0" in svg_texts(draw_quantiles("x", {"median": 0.0}))


def svg_texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg) if node.tag.endswith("text")]


def expect_json(result: Any) -> str:
    assert result.returncode == 0, result.stderr
    return str(result.stdout)
