"""Does it fit, and how: over pretended machines, and against what llama.cpp really allocates."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from conftest import Run
from hub import HubServer
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.engine.context import Context, ContextOptions, RopeScaling
from qwenlocal.engine.llama import Model, library
from qwenlocal.engine.memory import OURSELVES, memory_needed
from qwenlocal.engine.plan import Offload, choose_offload, choose_plan
from qwenlocal.engine.shape import Shape
from qwenlocal.engine.wanted import KV_TYPES, Wanted
from qwenlocal.errors import NotEnoughMemory, UsageProblem
from qwenlocal.ggml import Device
from qwenlocal.testing import write_checkpoint, write_model
from qwenlocal.weights.header import read_metadata

GIB = 2**30
MIB = 2**20
HALF = Shape(24, 16, 64, 32768, 1024, 2816, 16)  # Qwen1.5-0.5B
SEVEN = Shape(32, 32, 128, 32768, 4096, 11008, 32)  # Qwen1.5-7B
WEIGHTS = int(4.77e9)  # of the 7B as Q4_K_M


# --- how much


def test_memory_is_what_llama_cpp_allocates_for_a_qwen_of_half_a_billion() -> None:
    """Its own account (KV and compute buffer, MiB): 384 and 150.01 with 512 tokens at once, 37.50 with 128."""
    options = ContextOptions(4096, flash_attention=False)
    rows = 32 * 152_064 * 4
    need = memory_needed(HALF, 0, options)
    assert need.kv == 384 * MIB
    assert (need.compute - rows) / MIB == pytest.approx(150.01, rel=0.01)
    assert (memory_needed(HALF, 0, replace(options, n_ubatch=128)).compute - rows) / MIB == pytest.approx(
        37.5, rel=0.01
    )


@pytest.mark.parametrize(
    ("n_ctx", "together", "measured"), [(8192, 512, 286.01), (8192, 64, 35.75), (32768, 256, 551.0)]
)
def test_so_it_is_for_other_contexts(n_ctx: int, together: int, measured: float) -> None:
    need = memory_needed(HALF, 0, ContextOptions(n_ctx, n_ubatch=together, flash_attention=False))
    assert (need.compute - 32 * 152_064 * 4) / MIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("n_ctx", [256, 4096])
def test_the_cache_is_as_large_as_llama_cpp_says(n_ctx: int, flash: bool, random_model: Path) -> None:
    model = Model(random_model)
    shape = Shape.of(read_metadata(random_model))
    assert shape is not None
    for keys, values in (("f16", "f16"), ("q8_0", "f16"), *([("q8_0", "q8_0"), ("q4_0", "q4_0")] if flash else [])):
        options = ContextOptions(n_ctx, flash_attention=flash, key_type=keys, value_type=values)
        if shape.head_width % 32 and keys != "f16":
            continue
        context = Context(model, options)
        said = [re.search(r"KV buffer size = +([\d.]+) MiB", line.text) for line in library().log]
        context.close()
        (size,) = [float(match[1]) for match in said if match]
        assert memory_needed(shape, 0, options).kv / MIB == pytest.approx(size, abs=0.01)
    model.close()


# --- what is chosen


def test_a_roomy_machine_gets_the_models_own_context() -> None:
    plan = choose_plan("x", HALF, 400 * MIB, 24 * GIB)
    assert (plan.options.n_ctx, plan.options.key_type, plan.options.value_type) == (32768, "f16", "f16")


def test_the_cache_takes_no_more_than_half_of_what_the_weights_leave() -> None:
    plan = choose_plan("x", SEVEN, WEIGHTS, 16 * GIB)
    assert plan.options.n_ctx == 11264
    assert plan.need is not None
    assert plan.need.kv <= (16 * GIB - WEIGHTS) / 2
    assert plan.sentence() == "weights 4.4 + KV 5.5 (11,264 tokens, f16) + compute 0.4 of 16.0 GiB free"


def test_keys_become_smaller_before_the_context_falls_below_4096_tokens() -> None:
    plan = choose_plan("x", SEVEN, WEIGHTS, int(8.4 * GIB))
    assert (plan.options.n_ctx, plan.options.key_type, plan.options.value_type) == (5120, "q8_0", "f16")
    assert "5,120 tokens, q8_0 keys, f16 values" in plan.sentence()


def test_then_values_do_and_then_the_context_goes_down() -> None:
    plan = choose_plan("x", SEVEN, WEIGHTS, int(7.2 * GIB))
    assert (plan.options.key_type, plan.options.value_type, plan.options.flash_attention) == ("q8_0", "q8_0", True)
    small = choose_plan("x", SEVEN, WEIGHTS, int(5.8 * GIB))
    assert small.options.n_ctx < 4096


def test_what_does_not_fit_is_refused_with_numbers_and_forced_if_one_insists() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        choose_plan("qwen1.5:7b", SEVEN, WEIGHTS, 4 * GIB)
    assert caught.value.available == 4 * GIB
    assert caught.value.needed > WEIGHTS + OURSELVES
    assert "--force" in caught.value.hint
    assert choose_plan("qwen1.5:7b", SEVEN, WEIGHTS, 4 * GIB, Wanted(force=True)).options.n_ctx == 1024


def test_a_context_that_was_asked_for_is_kept_or_refused_with_what_would_fit() -> None:
    assert choose_plan("x", HALF, 400 * MIB, 8 * GIB, Wanted(32768)).options.n_ctx == 32768
    with pytest.raises(NotEnoughMemory) as caught:
        choose_plan("x", HALF, 400 * MIB, 2 * GIB, Wanted(32768))
    match = re.match(r"At most -c (\d+) fits", caught.value.hint)
    assert match
    fitting = int(match[1])
    assert choose_plan("x", HALF, 400 * MIB, 2 * GIB, Wanted(fitting)).options.n_ctx == fitting
    with pytest.raises(NotEnoughMemory):
        choose_plan("x", HALF, 400 * MIB, 2 * GIB, Wanted(fitting + 256))


@given(available=st.integers(0, 64 * GIB), weights=st.integers(1, 40 * GIB))
def test_what_is_chosen_fits(available: int, weights: int) -> None:
    try:
        plan = choose_plan("x", SEVEN, weights, available)
    except NotEnoughMemory as refused:
        assert refused.needed > available
        return
    assert plan.need is not None
    assert plan.need.total <= available
    assert 1024 <= plan.options.n_ctx <= SEVEN.n_ctx_train


def test_more_tokens_than_a_model_was_trained_for_squeeze_its_positions_and_that_is_said() -> None:
    plan = choose_plan("x", HALF, 400 * MIB, 24 * GIB, Wanted(65536))
    assert plan.options.rope == RopeScaling("yarn", 2.0, 32768)
    assert "yarn, factor 2" in plan.notes[0]
    assert choose_plan("x", HALF, 400 * MIB, 24 * GIB, Wanted(65536, rope="none")).options.rope is None
    with pytest.raises(UsageProblem, match="8 times can be tried"):
        choose_plan("x", HALF, 400 * MIB, 24 * GIB, Wanted(32768 * 9))


def test_a_small_models_context_is_never_more_than_it_was_trained_for() -> None:
    assert choose_plan("x", Shape(2, 2, 64, 512, 64, 64, 2), 1, 8 * GIB).options.n_ctx == 512


def test_a_model_of_unknown_shape_gets_a_usual_context_and_no_promise() -> None:
    plan = choose_plan("x", None, 1, 8 * GIB)
    assert plan.options.n_ctx == 4096
    assert "not known" in plan.sentence()


def test_heads_that_are_no_multiple_of_a_block_keep_their_keys_as_they_are() -> None:
    odd = replace(SEVEN, head_width=72)
    plan = choose_plan("x", odd, WEIGHTS, int(6.5 * GIB))
    assert (plan.options.key_type, plan.options.value_type) == ("f16", "f16")
    with pytest.raises(UsageProblem, match="72 wide, no multiple of 32"):
        choose_plan("x", odd, WEIGHTS, 16 * GIB, Wanted(kv_type="q8_0"))


# --- graphics cards


CARD = Device("GPU0", "a card", 4 * GIB, 4 * GIB, is_gpu=True)


def test_as_many_layers_go_to_a_card_as_it_has_room_for() -> None:
    offload = choose_offload(SEVEN, int(4.2 * GIB), ContextOptions(4096), [CARD])
    assert offload == Offload(18, 33)
    assert offload.fewer() == Offload(13, 33)
    assert choose_offload(HALF, 400 * MIB, ContextOptions(4096), [CARD]).layers == 25
    assert choose_offload(SEVEN, int(4.2 * GIB), ContextOptions(4096), []).layers == 0
    tight = replace(CARD, free=100 * MIB)
    assert choose_offload(SEVEN, int(4.2 * GIB), ContextOptions(4096), [tight]).layers == 0


@pytest.mark.parametrize(
    ("kind", "warns"), [(None, False), ("f16", False), ("q8_0", False), ("q5_1", True), ("q4_0", True)]
)
def test_keys_that_are_too_coarse_are_spoken_of(kind: str | None, warns: bool) -> None:
    notes = choose_plan("x", SEVEN, 4 * GIB, 20 * GIB, Wanted(4096, kv_type=kind)).notes
    assert any("too coarse" in note for note in notes) == warns


# --- contexts laid out otherwise


def test_a_squeezed_context_takes_more_tokens_and_answers(random_model: Path) -> None:
    model = Model(random_model)
    for kind in ("yarn", "linear"):
        context = Context(model, ContextOptions(8192, threads=1, rope=RopeScaling(kind, 2.0, 4096)))
        (row,) = context.decode([(0, list(range(50)))])
        assert not context.is_broken(row)
        context.close()
    model.close()


def test_a_context_smaller_than_a_batch_is_given_no_larger_batches(speaking_model: Path) -> None:
    model = Model(speaking_model)
    context = Context(model, ContextOptions(16, threads=1))
    assert (context.n_ctx, context.n_batch) == (256, 256)
    context.close()
    model.close()


# --- the commands


def test_run_says_how_it_was_loaded_when_asked(speaking_model: Path, invoke: Run) -> None:
    result = invoke("run", str(speaking_model), "Hi", "--stats")
    assert re.search(
        r"weights 0\.0 \+ KV 0\.0 \(4,096 tokens, f16\) \+ compute \d\.\d of \d+\.\d GiB free", result.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-ngl", "3"], "llama.cpp finds none here"),
        (["-ngl", "-1"], "-ngl is a number of layers, auto or all"),
        (["-ngl", "many"], "-ngl is a number of layers, auto or all"),
        (["--kv", "q4_k"], "There are: f16"),
        (["--kv", "q8_0", "--flash-attention", "off"], "need flash attention"),
        (["--flash-attention", "maybe"], "auto, on or off"),
        (["--rope", "ntk"], "yarn, linear, none"),
        (["-c", "0"], "-c must lie between"),
        (["-c", "-5"], "-c must lie between"),
        (["-t", "0"], "-t must lie between"),
        (["-t", "100000"], "-t must lie between"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(
    options: list[str], message: str, speaking_model: Path, invoke: Run
) -> None:
    result = invoke("run", str(speaking_model), "Hi", *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_plan_shows_every_level_and_context_of_a_model_that_is_here(invoke: Run, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", config={"hidden_size": 64, "intermediate_size": 64})
    invoke("convert", str(checkpoint), "-o", "x.gguf", "--type", "q8_0")
    result = invoke("plan", "./x.gguf")
    assert result.returncode == 0
    assert "LEVEL" in result.stdout
    for level in ("as it is", "q4_0", "q4_k_m", "q8_0", "f16"):
        assert level in result.stdout


def test_plan_reads_the_beginning_of_a_model_that_is_not(hub: HubServer, invoke: Run, tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", seed=1)
    data = file.read_bytes() + bytes(20 << 20)
    hub.repository("owner/repo").files["m-q8_0.gguf"] = data
    hub_name = "hf:owner/repo"
    result = invoke("plan", hub_name)
    assert result.returncode == 0, result.stderr
    assert "not here yet; only the beginning of its file was read" in result.stdout
    assert hub.sent < 9 << 20


@pytest.mark.parametrize("kind", [kind for kind in KV_TYPES if kind != "bf16"])
def test_every_way_to_keep_keys_and_values_answers(kind: str, tmp_path: Path, invoke: Run) -> None:
    result = invoke("run", str(wide_headed(tmp_path)), "Hi", "--kv", kind, "-n", "3", "--temp", "0")
    assert result.returncode == 0, result.stderr


def wide_headed(folder: Path) -> Path:
    """A model whose heads are 64 wide, as quantized keys need it (whole blocks of 32)."""
    from qwenlocal.weights.checkpoint import Checkpoint
    from qwenlocal.weights.convert import Options, plan_conversion
    from qwenlocal.weights.mix import file_type
    from qwenlocal.weights.writing import carry_out

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = write_checkpoint(folder / "wide", config=sizes)
    plan = plan_conversion(Checkpoint.open(source), [(folder / "wide.gguf", file_type("f32"))], Options())
    carry_out(plan.job, threads=1)
    return folder / "wide.gguf"


@pytest.mark.parametrize("options", [["--kv", "foo"], ["--flash-attention", "x"], ["-c", "-1"]])
def test_plan_refuses_what_cannot_be(options: list[str], random_model: Path, invoke: Run) -> None:
    result = invoke("plan", str(random_model), *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_digits_of_other_scripts_are_no_numbers_of_layers(random_model: Path, invoke: Run) -> None:
    assert invoke("run", str(random_model), "Hi", "-ngl", "²").returncode == 2
    assert invoke("bench", str(random_model), "--depths", "²").returncode == 2


def test_a_file_that_states_no_context_gets_a_usual_one() -> None:
    keys = {"general.architecture": "qwen2", "qwen2.block_count": 2, "qwen2.embedding_length": 64,
            "qwen2.attention.head_count": 2, "qwen2.context_length": 0}  # fmt: skip
    shape = Shape.of(keys)
    assert shape is not None
    assert shape.n_ctx_train == 8192


def test_a_model_of_unknown_shape_is_laid_out_as_asked() -> None:
    plan = choose_plan("x", None, 1, 8 * GIB, Wanted(kv_type="q8_0", threads=3))
    assert (plan.options.key_type, plan.options.flash_attention, plan.options.threads) == ("q8_0", True, 3)


def test_a_model_in_several_files_is_counted_and_verified_whole(
    invoke: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_model(tmp_path / "whole.gguf", layers=4)
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=20))
        write_model(tmp_path / "split.gguf", layers=4)
    parts = sorted(tmp_path.glob("split-*-of-*.gguf"))
    assert len(parts) > 2

    def facts(command: str, path: Path) -> Any:
        return json.loads(invoke(command, f"./{path.name}", "--json").stdout)

    assert facts("plan", parts[0])["memory"] == facts("plan", whole)["memory"]
    assert facts("show", parts[0])["parameters"] == facts("show", whole)["parameters"]
    assert facts("show", parts[1])["size"] == sum(part.stat().st_size for part in parts)
    assert invoke("run", f"./{parts[0].name}", "Hi", "-n", "2").returncode == 0
    assert invoke("verify", f"./{parts[0].name}").returncode == 0
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    assert invoke("verify", f"./{parts[0].name}").returncode == 5
    parts[1].unlink()
    for command, *more in (["verify"], ["plan"], ["run", "Hi"]):
        result = invoke(command, f"./{parts[0].name}", *more)
        assert (result.returncode, f"{parts[1].name} is not beside it" in result.stderr) == (5, True)
