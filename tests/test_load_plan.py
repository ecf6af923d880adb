"""Load plans for simulated machines, compared with what llama.cpp allocates."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoint_files import convert_checkpoint
from conftest import Run
from hub import HubServer
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.api.load_settings import create_gpu_request
from qwenlocal.cli.options import parse_gpu_request
from qwenlocal.devices import Device, DeviceKind, find_vulkan_drivers
from qwenlocal.engine.context import Context, ContextOptions, RopeScaling
from qwenlocal.engine.gpu_offload import DeviceShare, GpuRequest, LayerSizes, choose_gpus, plan_gpu_offload
from qwenlocal.engine.llama import Model, load_library
from qwenlocal.engine.load_plan import (
    KV_TYPES,
    CoarseKeys,
    ContextExtended,
    LoadRequest,
    plan_load,
)
from qwenlocal.engine.memory import PROCESS_OVERHEAD, ModelDims, estimate_memory
from qwenlocal.engine.tuned_settings import GpuUse
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.ggml import has_attention_kernel
from qwenlocal.terminal.load_notes import describe_note, describe_plan
from qwenlocal.testing import write_checkpoint, write_model
from qwenlocal.weights.gguf_reader import read_metadata

GIB = 2**30
MIB = 2**20
HALF = ModelDims(24, 16, 64, 32768, 1024, 2816, 16)  # Qwen1.5-0.5B
SEVEN = ModelDims(32, 32, 128, 32768, 4096, 11008, 32)  # Qwen1.5-7B
WEIGHTS = int(4.77e9)  # of the 7B as Q4_K_M


# --- estimates


def test_the_estimate_for_qwen15_05b_equals_the_memory_that_llama_cpp_allocates() -> None:
    """llama.cpp logs (KV and compute buffer, MiB): 384 and 150.01 with n_ubatch 512, 37.50 with 128."""
    options = ContextOptions(4096, flash_attention=False)
    rows = 32 * 152_064 * 4
    estimate = estimate_memory(HALF, 0, options)
    assert estimate.kv_cache == 384 * MIB
    assert (estimate.compute - rows) / MIB == pytest.approx(150.01, rel=0.01)
    assert (estimate_memory(HALF, 0, replace(options, n_ubatch=128)).compute - rows) / MIB == pytest.approx(
        37.5, rel=0.01
    )


@pytest.mark.parametrize(
    ("n_ctx", "n_ubatch", "measured"), [(8192, 512, 286.01), (8192, 64, 35.75), (32768, 256, 551.0)]
)
def test_the_estimate_holds_for_other_contexts(n_ctx: int, n_ubatch: int, measured: float) -> None:
    estimate = estimate_memory(HALF, 0, ContextOptions(n_ctx, n_ubatch=n_ubatch, flash_attention=False))
    assert (estimate.compute - 32 * 152_064 * 4) / MIB == pytest.approx(measured, rel=0.02)


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head size of 64: quantized keys and values need a multiple of 32."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", config=sizes)
    return convert_checkpoint(source, source.parent / "wide.gguf", "f32")


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("n_ctx", [256, 4096])
def test_the_kv_cache_has_the_size_that_llama_cpp_logs(n_ctx: int, flash: bool, wide_heads: Path) -> None:
    model = Model(wide_heads)
    dims = ModelDims.from_metadata(read_metadata(wide_heads))
    assert dims is not None
    for keys, values in (("f16", "f16"), ("q8_0", "f16"), *([("q8_0", "q8_0"), ("q4_0", "q4_0")] if flash else [])):
        options = ContextOptions(n_ctx, flash_attention=flash, key_type=keys, value_type=values)
        context = Context(model, options)
        matches = [re.search(r"KV buffer size = +([\d.]+) MiB", line.text) for line in load_library().log]
        context.close()
        (size,) = [float(match[1]) for match in matches if match]
        assert estimate_memory(dims, 0, options).kv_cache / MIB == pytest.approx(size, abs=0.01)
    model.close()


# --- plans


def test_enough_memory_gives_the_training_context() -> None:
    plan = plan_load("x", HALF, 400 * MIB, 24 * GIB)
    assert (plan.options.n_ctx, plan.options.key_type, plan.options.value_type) == (32768, "f16", "f16")


def test_the_kv_cache_takes_at_most_half_of_the_remaining_memory() -> None:
    plan = plan_load("x", SEVEN, WEIGHTS, 16 * GIB, LoadRequest(flash_attention=False))
    assert plan.options.n_ctx == 11264
    assert plan.memory is not None
    assert plan.memory.kv_cache <= (16 * GIB - WEIGHTS) / 2
    assert describe_plan(plan) == "weights 4.4 + KV 5.5 (11,264 tokens, f16) + compute 0.4 of 16.0 GiB free"


def test_flash_attention_is_used_where_it_is_fast() -> None:
    assert plan_load("x", SEVEN, WEIGHTS, 16 * GIB).options.flash_attention == has_attention_kernel(SEVEN.head_dim)
    odd = replace(SEVEN, head_dim=96)
    assert plan_load("x", odd, WEIGHTS, 16 * GIB).options.flash_attention is False
    q8_keys = plan_load("x", SEVEN, WEIGHTS, int(8.4 * GIB)).options
    assert (q8_keys.key_type, q8_keys.flash_attention) == ("q8_0", False)
    for choice in (True, False):
        request = LoadRequest(flash_attention=choice)
        assert plan_load("x", SEVEN, WEIGHTS, 16 * GIB, request).options.flash_attention is choice


def test_tuned_flash_attention_applies_to_f16_only() -> None:
    for tuned in (True, False):
        request = LoadRequest(tuned_flash_attention=tuned)
        assert plan_load("x", SEVEN, WEIGHTS, 16 * GIB, request).options.flash_attention is tuned
        q8_keys = plan_load("x", SEVEN, WEIGHTS, int(8.4 * GIB), request).options
        assert (q8_keys.key_type, q8_keys.flash_attention) == ("q8_0", False)
        chosen = replace(request, flash_attention=not tuned)
        assert plan_load("x", SEVEN, WEIGHTS, 16 * GIB, chosen).options.flash_attention is not tuned


def test_keys_become_q8_0_before_the_context_falls_below_4096() -> None:
    plan = plan_load("x", SEVEN, WEIGHTS, int(8.4 * GIB))
    assert (plan.options.n_ctx, plan.options.key_type, plan.options.value_type) == (5120, "q8_0", "f16")
    assert "5,120 tokens, q8_0 keys, f16 values" in describe_plan(plan)


def test_values_become_q8_0_before_the_context_falls_below_4096() -> None:
    plan = plan_load("x", SEVEN, WEIGHTS, int(7.2 * GIB))
    assert (plan.options.key_type, plan.options.value_type, plan.options.flash_attention) == ("q8_0", "q8_0", True)
    small = plan_load("x", SEVEN, WEIGHTS, int(5.8 * GIB))
    assert small.options.n_ctx < 4096


def test_a_model_that_does_not_fit_is_an_error_unless_forced() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        plan_load("qwen1.5:7b", SEVEN, WEIGHTS, 4 * GIB)
    assert caught.value.available == 4 * GIB
    assert caught.value.needed > WEIGHTS + PROCESS_OVERHEAD
    assert "--force" in caught.value.hint
    assert plan_load("qwen1.5:7b", SEVEN, WEIGHTS, 4 * GIB, LoadRequest(force=True)).options.n_ctx == 1024


def test_a_requested_context_is_kept_or_the_error_suggests_one_that_fits() -> None:
    assert plan_load("x", HALF, 400 * MIB, 8 * GIB, LoadRequest(32768)).options.n_ctx == 32768
    with pytest.raises(NotEnoughMemory) as caught:
        plan_load("x", HALF, 400 * MIB, 2 * GIB, LoadRequest(32768))
    match = re.match(r"At most -c (\d+) fits", caught.value.hint)
    assert match
    fitting = int(match[1])
    assert plan_load("x", HALF, 400 * MIB, 2 * GIB, LoadRequest(fitting)).options.n_ctx == fitting
    with pytest.raises(NotEnoughMemory):
        plan_load("x", HALF, 400 * MIB, 2 * GIB, LoadRequest(fitting + 256))


def test_a_refusal_never_states_the_same_number_twice() -> None:
    refusal = NotEnoughMemory("x", 710 * MIB, 705 * MIB, hint="")
    assert str(refusal) == "x needs about 0.7 GiB of memory; 0.6 GiB are available."


@given(available=st.integers(0, 64 * GIB), weights=st.integers(1, 40 * GIB))
def test_every_plan_fits(available: int, weights: int) -> None:
    try:
        plan = plan_load("x", SEVEN, weights, available)
    except NotEnoughMemory as refused:
        assert refused.needed > available
        return
    assert plan.memory is not None
    assert plan.memory.total <= available
    assert 1024 <= plan.options.n_ctx <= SEVEN.n_ctx_train


def test_a_context_beyond_training_uses_rope_scaling_and_adds_a_note() -> None:
    plan = plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(65536))
    assert plan.options.rope == RopeScaling("yarn", 2.0, 32768)
    assert plan.notes == (ContextExtended(65536, RopeScaling("yarn", 2.0, 32768)),)
    assert "yarn, factor 2" in describe_note(plan.notes[0])
    assert plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(65536, rope="none")).options.rope is None
    with pytest.raises(UsageError, match="at most 8 times"):
        plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(32768 * 9))


def test_the_default_context_never_exceeds_the_training_context() -> None:
    assert plan_load("x", ModelDims(2, 2, 64, 512, 64, 64, 2), 1, 8 * GIB).options.n_ctx == 512


def test_unknown_dimensions_give_a_default_context() -> None:
    plan = plan_load("x", None, 1, 8 * GIB)
    assert plan.options.n_ctx == 4096
    assert "memory use unknown" in describe_plan(plan)


def test_head_sizes_that_do_not_fill_blocks_keep_f16() -> None:
    odd = replace(SEVEN, head_dim=72)
    plan = plan_load("x", odd, WEIGHTS, int(6.5 * GIB))
    assert (plan.options.key_type, plan.options.value_type) == ("f16", "f16")
    with pytest.raises(UsageError, match="head size, 72, is not a multiple of 32"):
        plan_load("x", odd, WEIGHTS, 16 * GIB, LoadRequest(kv_type="q8_0"))


# --- GPU offload


CARD = Device("GPU0", "a card", 4 * GIB, 4 * GIB, DeviceKind.GPU)
CHIP = Device("GPU1", "a chip", 8 * GIB, 8 * GIB, DeviceKind.INTEGRATED_GPU)
SEVEN_SIZES = LayerSizes(487 * MIB, (119 * MIB,) * 32, 487 * MIB)


def test_a_gpu_gets_the_output_matrix_and_as_many_layers_as_fit() -> None:
    offload = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD])
    per_layer = 119 * MIB + 64 * MIB  # weights and KV cache
    (share,) = offload.shares
    assert (offload.layers, offload.total, offload.devices) == (18, 33, (CARD,))
    assert share == DeviceShare(CARD, 18, (487 + 17 * 119) * MIB, 17 * 64 * MIB)
    assert share.weights + share.kv_cache + per_layer > CARD.free - 600 * MIB  # another layer would take the reserve
    assert offload.reduced().layers == 13


def test_a_gpu_without_room_gets_nothing() -> None:
    tight = replace(CARD, free=100 * MIB)
    offload = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [tight])
    assert (offload.layers, offload.devices) == (0, ())
    assert plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), []).layers == 0


def test_layers_are_divided_among_gpus_as_they_fit() -> None:
    large = replace(CARD, name="GPU1", free=20 * GIB, total=24 * GIB)
    offload = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD, large])
    assert [(share.device, share.layers) for share in offload.shares] == [(large, 33)]
    small = replace(CARD, name="GPU1", free=2 * GIB, total=2 * GIB)
    both = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD, small])
    first, last = both.shares
    assert (first.device, last.device) == (small, CARD)
    assert first.layers < last.layers
    assert both.layers == first.layers + last.layers
    for share in both.shares:
        assert share.weights + share.kv_cache < share.device.free


def test_a_number_of_layers_is_not_exceeded() -> None:
    offload = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD], layers=3)
    assert (offload.layers, offload.repeating_layers) == (3, 2)
    insisting = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD], layers=99)
    assert [(share.device, share.layers) for share in insisting.shares] == [(CARD, 33)]


def test_tied_embeddings_are_copied_to_the_gpu() -> None:
    sizes = {"token_embd.weight": 100, "blk.0.a": 1, "blk.0.b": 2, "blk.10.a": 5, "blk.9.a": 4, "output_norm.weight": 7}
    assert LayerSizes.from_tensors(sizes) == LayerSizes(100, (3, 4, 5), 100)
    assert LayerSizes.from_tensors({**sizes, "output.weight": 60}).output == 60


def test_graphics_cards_are_preferred_to_integrated_gpus() -> None:
    processor = Device("CPU", "a processor", GIB, GIB)
    assert choose_gpus([processor, CHIP, CARD], GpuRequest()) == (CARD,)
    assert choose_gpus([processor, CHIP], GpuRequest()) == (CHIP,)
    assert choose_gpus([processor, CHIP, CARD], GpuRequest(devices=("gpu1", "GPU1"))) == (CHIP,)
    assert choose_gpus([CARD], GpuRequest(layers=0)) == choose_gpus([CARD], GpuRequest(devices=())) == ()


@pytest.mark.parametrize(("use", "layers", "devices"), [("layers", 18, 1), ("prompts", 0, 1), ("none", 0, 0)])
def test_a_gpu_is_used_for_what_it_is_good_for(use: str, layers: int, devices: int) -> None:
    offload = plan_gpu_offload(SEVEN, SEVEN_SIZES, ContextOptions(4096), [CARD])
    limited = offload.limited_to(GpuUse(("GPU0",), use))
    assert (limited.layers, len(limited.devices)) == (layers, devices)
    assert offload.limited_to(GpuUse(("another",), use)) == offload


def test_the_drivers_of_vulkan_are_read_from_the_log() -> None:
    log = [
        "ggml_vulkan: Found 2 Vulkan devices:\n",
        "ggml_vulkan: 1 = Iris(R) Xe (TGL GT2) (Intel open-source) | uma: 1 | x",
    ]
    assert find_vulkan_drivers(log) == {"Vulkan1": "Intel open-source"}


@pytest.mark.parametrize(
    ("text", "devices"),
    [(None, None), ("", None), (",", None), ("None", ()), ("Vulkan0, Vulkan1,", ("Vulkan0", "Vulkan1"))],
)
def test_devices_are_names_with_commas_between_them(text: str | None, devices: tuple[str, ...] | None) -> None:
    assert parse_gpu_request("auto", text).devices == devices


def test_layers_on_no_device_are_a_contradiction() -> None:
    assert parse_gpu_request("0", "none").is_off
    for layers in ("2", "all"):
        with pytest.raises(UsageError, match="--device none leaves no GPU"):
            parse_gpu_request(layers, "none")


def test_a_single_device_needs_no_list() -> None:
    assert create_gpu_request(None, "Vulkan0").devices == ("Vulkan0",)


def test_a_gpu_that_is_not_there_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(UsageError, match=r"There is no GPU named Vulkan1; there is: GPU0, GPU1\."):
        choose_gpus([CARD, CHIP], GpuRequest(devices=("Vulkan1",)))
    with pytest.raises(UsageError, match=r"llama\.cpp finds none"):
        choose_gpus([], GpuRequest(layers=3))


@pytest.mark.parametrize(
    ("kind", "warns"), [(None, False), ("f16", False), ("q8_0", False), ("q5_1", True), ("q4_0", True)]
)
def test_coarse_keys_add_a_note(kind: str | None, warns: bool) -> None:
    notes = plan_load("x", SEVEN, 4 * GIB, 20 * GIB, LoadRequest(4096, kv_type=kind)).notes
    assert notes == ((CoarseKeys(kind),) if kind and warns else ())
    assert all("too coarse" in describe_note(note) for note in notes)


# --- unusual contexts


def test_a_context_with_rope_scaling_decodes(random_model: Path) -> None:
    model = Model(random_model)
    for kind in ("yarn", "linear"):
        context = Context(model, ContextOptions(8192, threads=1, rope=RopeScaling(kind, 2.0, 4096)))
        (row,) = context.decode([(0, list(range(50)))])
        context.check_logits(row)
        context.close()
    model.close()


def test_a_small_context_limits_the_batch_size(speaking_model: Path) -> None:
    model = Model(speaking_model)
    context = Context(model, ContextOptions(16, threads=1))
    assert (context.n_ctx, context.n_batch) == (256, 256)
    context.close()
    model.close()


# --- the commands


def test_run_prints_the_plan_with_stats(speaking_model: Path, invoke: Run) -> None:
    result = invoke("run", str(speaking_model), "Hi", "--stats")
    assert re.search(
        r"weights 0\.0 \+ KV 0\.0 \(4,096 tokens, f16\) \+ compute \d\.\d of \d+\.\d GiB free", result.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-ngl", "3"], "llama.cpp finds none"),
        (["-ngl", "-1"], "-ngl must be a number of layers, auto or all"),
        (["-ngl", "many"], "-ngl must be a number of layers, auto or all"),
        (["--kv", "q4_k"], "--kv must be f16, bf16"),
        (["--kv", "q8_0", "--flash-attention", "off"], "needs flash attention"),
        (["--flash-attention", "maybe"], "auto, on or off"),
        (["--rope", "ntk"], "--rope must be yarn, linear or none, not ntk."),
        (["-c", "0"], "-c must be between"),
        (["-c", "-5"], "-c must be between"),
        (["-t", "0"], "-t must be between"),
        (["-t", "100000"], "-t must be between"),
        (["--temp", "99"], "--temp must be between 0 and 10, not 99."),
        (["--top-k", "2000000"], "--top-k must be between 0 and 1,000,000, not 2,000,000."),
        (["--seed", "4294967295"], "--seed must be between 0 and 4,294,967,294, not 4,294,967,295."),
        (["--overflow", "drop"], "--overflow must be shift, summarize or stop, not drop."),
    ],
)
def test_invalid_options_are_errors_before_loading(
    options: list[str], message: str, speaking_model: Path, invoke: Run
) -> None:
    result = invoke("run", str(speaking_model), "Hi", *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_plan_shows_all_levels_and_contexts_of_an_installed_model(invoke: Run, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", config={"hidden_size": 64, "intermediate_size": 64})
    invoke("convert", str(checkpoint), "-o", "x.gguf", "--type", "q8_0")
    result = invoke("plan", "./x.gguf")
    assert result.returncode == 0
    assert "TYPE" in result.stdout
    for level in ("as it is", "q4_0", "q4_k_m", "q8_0", "f16"):
        assert level in result.stdout


def test_plan_reads_only_the_start_of_a_remote_model(hub: HubServer, invoke: Run, tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", seed=1)
    data = file.read_bytes() + bytes(20 << 20)
    hub.repository("owner/repo").files["m-q8_0.gguf"] = data
    hub_name = "hf:owner/repo"
    result = invoke("plan", hub_name)
    assert result.returncode == 0, result.stderr
    assert "not downloaded; only its header was read" in result.stdout
    assert hub.sent < 9 << 20


@pytest.mark.parametrize("kind", [kind for kind in KV_TYPES if kind != "bf16"])
def test_run_works_with_every_kv_cache_type(kind: str, wide_heads: Path, invoke: Run) -> None:
    result = invoke("run", str(wide_heads), "Hi", "--kv", kind, "-n", "3", "--temp", "0")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [["--kv", "foo"], ["--flash-attention", "x"], ["-c", "-1"]])
def test_plan_rejects_invalid_options(options: list[str], random_model: Path, invoke: Run) -> None:
    result = invoke("plan", str(random_model), *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_numbers_must_be_ascii_digits(random_model: Path, invoke: Run) -> None:
    assert invoke("run", str(random_model), "Hi", "-ngl", "²").returncode == 2
    assert invoke("bench", str(random_model), "--depths", "²").returncode == 2


def test_a_missing_training_context_has_a_default() -> None:
    keys = {"general.architecture": "qwen2", "qwen2.block_count": 2, "qwen2.embedding_length": 64,
            "qwen2.attention.head_count": 2, "qwen2.context_length": 0}  # fmt: skip
    dims = ModelDims.from_metadata(keys)
    assert dims is not None
    assert dims.n_ctx_train == 8192


def test_unknown_dimensions_keep_the_requested_layout() -> None:
    plan = plan_load("x", None, 1, 8 * GIB, LoadRequest(kv_type="q8_0", threads=3))
    assert (plan.options.key_type, plan.options.flash_attention, plan.options.threads) == ("q8_0", True, 3)


def test_a_split_model_is_counted_and_verified_as_one(
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
        assert (result.returncode, f"{parts[1].name} is missing" in result.stderr) == (5, True)


def test_a_context_that_is_enough_is_not_exceeded() -> None:
    assert plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(max_n_ctx=8192)).options.n_ctx == 8192
    assert plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(max_n_ctx=1 << 20)).options.n_ctx == 32768
    assert plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(16384, max_n_ctx=8192)).options.n_ctx == 16384


def test_a_small_context_is_chosen_if_it_is_enough() -> None:
    assert plan_load("x", HALF, 400 * MIB, 24 * GIB, LoadRequest(max_n_ctx=2048)).options.n_ctx == 2048
    assert plan_load("x", HALF, 400 * MIB, 800 * MIB, LoadRequest(max_n_ctx=1 << 20)).options.n_ctx < 32768
