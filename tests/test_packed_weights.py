"""Weights packed by GPTQ and AWQ become GGUF files without rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from checkpoint_files import flip_bit, make_plan, set_json
from commands import expect_exit
from conftest import Run
from hub import HubServer
from hub_checkpoints import HF_NAME, WeightRequests, publish
from hypothesis import HealthCheck, given, settings, strategies
from interruptions import stop_before_rename
from packing import (
    PackedLayer,
    change_tensor,
    pack_gptq,
    packed_matrix,
    read_array,
    remove_tensors,
    replace_tensor,
    write_packed_checkpoint,
)

from qwenlocal import ggml
from qwenlocal.errors import BadCheckpoint, BadWeights, Interrupted, UnsupportedCheckpoint, UsageError
from qwenlocal.ggml import tensor_type
from qwenlocal.library.plan_execution import check_packed_weights
from qwenlocal.resumable import journal_path
from qwenlocal.testing import MOE_CONFIG, as_dtype, write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, default_file_type, plan_conversion
from qwenlocal.weights.conversion_plan import PlannedTensor
from qwenlocal.weights.file_types import QuantOverrides, file_type, parse_tensor_types
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.packed_proof import PackedProof, compare_packed_weights
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.quant_mix import ENDS
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.write_workers import run_job

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def convert(folder: Path, kind: str, **options: Any) -> dict[str, tuple[str, numpy.ndarray]]:
    """Convert a checkpoint, and return the type and the values of each tensor, as gguf-py dequantizes them."""
    path = folder.parent / f"{folder.name}.{kind}.gguf"
    plan = plan_conversion(Checkpoint.open(folder), [(path, file_type(kind))], ConversionOptions(**options))
    run_job(plan.job, threads=2)
    return {
        tensor.name: (tensor.tensor_type.name.lower(), gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def plan_types(folder: Path, kind: str, **options: Any) -> list[PlannedTensor]:
    """Return the tensors of the planned file."""
    plan = plan_conversion(
        Checkpoint.open(folder), [(folder / "x.gguf", file_type(kind))], ConversionOptions(**options)
    )
    return list(plan.files[0].tensors)


def assert_exact(tensors: dict[str, tuple[str, numpy.ndarray]], weights: dict[str, numpy.ndarray], kind: str) -> None:
    for module, expected in weights.items():
        _, _, layer, name = module.split(".", 3)
        actual_kind, values = tensors[f"blk.{layer}.{GGUF_NAMES[name]}.weight"]
        assert actual_kind == kind
        assert (values == expected).all(), module


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(
    ("layout", "bits", "symmetric", "kind"),
    [
        ("gptq", 4, True, "q4_0"), ("gptq_v2", 4, True, "q4_0"), ("gptq", 4, False, "q5_0"),
        ("gptq_v2", 4, False, "q5_0"), ("gptq", 8, True, "q8_0"), ("gptq_v2", 8, True, "q8_0"),
        ("gemm", 4, False, "q5_0"), ("gemv", 4, False, "q5_0"), ("gemm", 4, True, "q4_0"),
    ],
)  # fmt: skip
def test_every_weight_equals_the_mathematical_value(
    layout: str, bits: int, symmetric: bool, kind: str, group_size: int, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    weights = write_packed_checkpoint(folder, layout, bits=bits, symmetric=symmetric, group_size=group_size)
    assert_exact(convert(folder, kind), weights, kind)


MOE_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class TestExperts:
    def test_experts_equal_the_mathematical_values(self, tmp_path: Path) -> None:
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", config=MOE_CONFIG)
        tensors = convert(tmp_path / "model", "q4_0")
        for name, target in MOE_NAMES.items():
            kind, values = tensors[f"blk.1.{target}.weight"]
            experts = [weights[f"model.layers.1.mlp.experts.{number}.{name}"] for number in range(4)]
            assert kind == "q4_0"
            assert (values == numpy.stack(experts)).all()

    def test_experts_share_a_type_that_holds_all_of_them(self, tmp_path: Path) -> None:
        """One expert has other zero points than 8, which Q4_0 cannot express."""
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", config=MOE_CONFIG)
        name = "model.layers.0.mlp.experts.2.up_proj"
        change_tensor(tmp_path / "model", f"{name}.qzeros", lambda zeros: zeros ^ 0x33333333)
        tensors = convert(tmp_path / "model", "q4_0")
        kind, values = tensors["blk.0.ffn_up_exps.weight"]
        assert kind == "q5_0"
        assert (values[1] == weights["model.layers.0.mlp.experts.1.up_proj"]).all()
        assert not (values[2] == weights[name]).any()


class TestOrder:
    def test_shuffled_columns_are_dequantized_exactly(self, tmp_path: Path) -> None:
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", shuffled=True)
        assert_exact(convert(tmp_path / "model", "f32"), weights, "f32")

    def test_shuffled_columns_are_quantized_again_with_a_note(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq", shuffled=True)
        plan = make_plan(tmp_path / "model")
        assert plan.notes == [
            "Dequantized 14 packed matrices before quantizing them again, which costs quality: no type of llama.cpp "
            "holds columns in activation order (desc_act)."
        ]
        types = {tensor.choice.type.name for tensor in plan_types(tmp_path / "model", "q8_0")}
        assert types == {"q8_0", "f32"}

    def test_an_order_that_is_the_natural_one_needs_no_dequantization(self, tmp_path: Path) -> None:
        """Groups are static: AutoGPTQ sorts by activation, but assigns groups by position."""
        settings = {"desc_act": True, "static_groups": True}
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", settings=settings)
        assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q4_0")

    def test_an_order_of_zeros_means_no_order(self, tmp_path: Path) -> None:
        weights = write_packed_checkpoint(tmp_path / "model", "gptq")
        for module in weights:
            change_tensor(tmp_path / "model", f"{module}.g_idx", lambda order: order * 0)
        assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q4_0")

    def test_a_checkpoint_without_an_order_is_in_order(self, tmp_path: Path) -> None:
        weights = write_packed_checkpoint(tmp_path / "model", "gptq")
        remove_tensors(tmp_path / "model", "g_idx")
        assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q4_0")


def test_groups_may_be_larger_than_a_row(tmp_path: Path) -> None:
    weights = write_packed_checkpoint(tmp_path / "model", "gptq", group_size=1 << 40)
    assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q4_0")


class TestScales:
    @pytest.mark.parametrize("dtype", ["BF16", "F32"])
    def test_scales_of_other_types_are_exact_if_float16_holds_them(self, dtype: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        weights = write_packed_checkpoint(folder, "gptq")
        for module in weights:
            scales = read_array(folder, f"{module}.scales").astype(numpy.float32)
            rounded = (scales.view(numpy.uint32) & 0xFFFF0000).view(numpy.float32)  # to the eight bits of bfloat16
            replace_tensor(folder, f"{module}.scales", (dtype, scales.shape, as_dtype(rounded, dtype)))
            weights[module] = weights[module] / scales.T.repeat(128, 1) * rounded.T.repeat(128, 1)
        assert_exact(convert(folder, "q4_0"), weights, "q4_0")

    def test_scales_that_float16_cannot_hold_are_dequantized(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_packed_checkpoint(folder, "gptq")
        name = "model.layers.0.mlp.up_proj.scales"
        scales = numpy.full(read_array(folder, name).shape, 0.1, numpy.float32)
        replace_tensor(folder, name, ("F32", scales.shape, scales.tobytes()))
        (note,) = make_plan(folder).notes
        assert "model.layers.0.mlp.up_proj" in note
        assert "scales that float16 cannot hold" in note

    @pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
    def test_infinite_scales_are_refused_before_anything_is_written(self, value: float, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        name = "model.layers.0.mlp.up_proj.scales"
        change_tensor(tmp_path / "model", name, lambda scales: scales * value, numpy.float16)
        with pytest.raises(BadCheckpoint, match=f"“{name}” has scales that are NaN or infinite"):
            make_plan(tmp_path / "model")


class TestZeroPoints:
    def test_zero_points_decide_whatever_config_json_says(self, tmp_path: Path) -> None:
        settings = {"sym": True}
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", symmetric=False, settings=settings)
        assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q5_0")

    def test_eight_bits_with_zero_points_are_dequantized(self, tmp_path: Path) -> None:
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", bits=8, symmetric=False)
        assert_exact(convert(tmp_path / "model", "f32"), weights, "f32")
        (note,) = make_plan(tmp_path / "model").notes
        assert "no type of llama.cpp holds 8-bit codes with zero points" in note

    def test_q4_1_rounds_zero_points_only(self, tmp_path: Path) -> None:
        """The minimum −s·z has up to 15 significant bits, of which float16 keeps 11: at most 15 · 2⁻¹¹ of a step."""
        weights = write_packed_checkpoint(tmp_path / "model", "gemm", symmetric=False)
        tensors = convert(tmp_path / "model", "q4_1")
        kind, values = tensors["blk.0.ffn_up.weight"]
        expected = weights["model.layers.0.mlp.up_proj"]
        scales = read_array(tmp_path / "model", "model.layers.0.mlp.up_proj.scales").astype(numpy.float32)
        steps = abs(values - expected) / scales.T.repeat(128, 1)
        assert kind == "q4_1"
        assert 0 < steps.max() <= 15 / 2**11


class TestBiases:
    def test_biases_of_zeros_are_left_out(self, tmp_path: Path) -> None:
        """AutoGPTQ gave each layer a bias until March 2024."""
        weights = write_packed_checkpoint(tmp_path / "model", "gptq", zero_biases=True)
        assert_exact(convert(tmp_path / "model", "q4_0"), weights, "q4_0")
        (note,) = make_plan(tmp_path / "model").notes
        assert note.endswith("a bias that is all zeros.")

    def test_other_biases_are_refused(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq", zero_biases=True)
        change_tensor(tmp_path / "model", "model.layers.1.mlp.down_proj.bias", lambda bias: bias + 1, numpy.float16)
        with pytest.raises(UnsupportedCheckpoint, match=r"“model\.layers\.1\.mlp\.down_proj\.bias” is not zero"):
            make_plan(tmp_path / "model")


class TestTypes:
    def test_ends_are_q8_0_unless_chosen(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        ends = {"token_embd.weight", "output.weight"}
        types = {tensor.choice.type.name for tensor in plan_types(tmp_path / "model", "q4_0") if tensor.name in ends}
        assert types == {"q8_0"}
        overrides = QuantOverrides(ends=tensor_type("f16"))
        tensors = plan_types(tmp_path / "model", "q4_0", overrides=overrides)
        assert {tensor.choice.type.name for tensor in tensors if tensor.name in ends} == {"f16"}

    def test_layers_that_are_not_packed_keep_their_type(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        weights = write_packed_checkpoint(folder, "gptq")
        name = "model.layers.0.mlp.up_proj"
        remove_tensors(folder, f"{name}.")
        values = weights.pop(name).astype(numpy.float16)
        replace_tensor(folder, f"{name}.weight", ("F16", values.shape, values.tobytes()))
        tensors = convert(folder, "q4_0")
        assert tensors["blk.0.ffn_up.weight"][0] == "f16"
        assert_exact(tensors, weights, "q4_0")

    def test_a_packed_output_matrix_is_exact_as_well(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_packed_checkpoint(folder, "gptq")
        layer = PackedLayer(256, 288)
        remove_tensors(folder, "lm_head.")
        for part, tensor in pack_gptq(layer).items():
            replace_tensor(folder, f"lm_head.{part}", tensor)
        kind, values = convert(folder, "q4_0")["output.weight"]
        assert kind == "q4_0"
        assert (values == layer.weights).all()

    @pytest.mark.parametrize(("layout", "kind"), [("gptq", "q4_k_m"), ("gptq", "q4_1"), ("gemm", "q8_0")])
    def test_other_types_need_the_option(self, layout: str, kind: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        write_packed_checkpoint(folder, layout, symmetric=layout == "gptq")
        with pytest.raises(UsageError, match="quantized already") as caught:
            plan_types(folder, kind)
        assert "--requantize" in caught.value.hint
        assert plan_types(folder, kind, requantize=True)

    def test_a_type_for_some_tensors_needs_the_option(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        overrides = QuantOverrides(parse_tensor_types(["ffn_down=q6_k"]))
        with pytest.raises(UsageError, match="--tensor-type ffn_down=q6_k would quantize them again"):
            plan_types(tmp_path / "model", "q4_0", overrides=overrides)
        tensors = plan_types(tmp_path / "model", "q4_0", overrides=overrides, requantize=True)
        assert {tensor.choice.type.name for tensor in tensors if "ffn_down" in tensor.name} == {"q6_k"}

    def test_a_type_for_no_tensor_is_refused(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        overrides = QuantOverrides(parse_tensor_types(["ffn_dwon=q5_0"]))
        with pytest.raises(UsageError, match="“ffn_dwon” matches no tensor"):
            plan_types(tmp_path / "model", "q4_0", overrides=overrides)

    def test_ends_whose_rows_the_chosen_type_cannot_divide_get_another(self, tmp_path: Path) -> None:
        config = {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5}
        write_packed_checkpoint(tmp_path / "model", "gptq", config=config, group_size=32)
        overrides = QuantOverrides(ends=tensor_type("q6_k"))
        tensors = plan_types(tmp_path / "model", "q4_0", overrides=overrides)
        assert {tensor.choice.type.name for tensor in tensors if tensor.name in ENDS} == {"q8_0"}

    @pytest.mark.parametrize(("overrides", "option"), [({"best": True}, "--mix best"), ({"pure": True}, "--pure")])
    def test_options_without_effect_are_named(self, overrides: dict[str, bool], option: str, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        plan = plan_conversion(
            Checkpoint.open(tmp_path / "model"),
            [(tmp_path / "x.gguf", file_type("q4_0"))],
            ConversionOptions(overrides=QuantOverrides(**overrides)),  # type: ignore[arg-type]
        )
        assert plan.notes == [f"{option} has no effect on q4_0, which keeps packed weights as they are."]

    @pytest.mark.parametrize(
        ("layout", "options", "kind"),
        [
            ("gptq", {}, "q4_0"), ("gptq", {"bits": 8}, "q8_0"), ("gemm", {"symmetric": False}, "q5_0"),
            ("gptq", {"symmetric": False}, "q5_0"), ("gptq", {"shuffled": True}, "q8_0"),
            ("gptq", {"shuffled": True, "group_size": -1}, "q4_0"), ("gptq", {"group_size": 48}, "q8_0"),
        ],
    )  # fmt: skip
    def test_the_default_type_is_that_of_the_packed_weights(
        self, layout: str, options: dict[str, Any], kind: str, tmp_path: Path
    ) -> None:
        write_packed_checkpoint(tmp_path / "model", layout, **options)
        assert default_file_type(tmp_path / "model").name == kind
        layers = [tensor for tensor in plan_types(tmp_path / "model", kind) if tensor.packing]
        assert {tensor.choice.type.name for tensor in layers} == {kind}

    @pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
    def test_float_types_need_no_option(self, kind: str, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        assert kind in {tensor.choice.type.name for tensor in plan_types(tmp_path / "model", kind)}

    def test_two_types_are_written_in_one_pass(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        weights = write_packed_checkpoint(folder, "gemm", symmetric=False)
        paths = [(tmp_path / f"{kind}.gguf", file_type(kind)) for kind in ("q5_0", "q4_1", "f32")]
        plan = plan_conversion(Checkpoint.open(folder), paths)
        run_job(plan.job, threads=2)
        proofs = [compare_packed_weights(plan, number, 2) for number in range(3)]
        count = sum(values.size for values in weights.values())
        assert proofs[0] == PackedProof(count, 0.0, 0.0, is_exact=True)
        assert proofs[1] is not None
        assert 0 < proofs[1].steps < 15 / 2**11
        assert not proofs[1].is_exact
        assert proofs[2] is None


class TestInterruptions:
    def test_an_interrupted_conversion_continues_and_gives_the_same_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_packed_checkpoint(tmp_path / "model", "gemm", symmetric=False)
        path, kind = tmp_path / "x.gguf", file_type("q5_0")
        plan = plan_conversion(Checkpoint.open(tmp_path / "model"), [(path, kind)])
        with monkeypatch.context() as patch:
            stop_before_rename(patch)
            with pytest.raises(Interrupted):
                run_job(plan.job, threads=2)
        lines = journal_path(path).read_text().splitlines(keepends=True)
        journal_path(path).write_text("".join(lines[: len(lines) // 2]))
        assert run_job(plan.job, threads=2).resumed > 0
        whole = plan_conversion(Checkpoint.open(tmp_path / "model"), [(tmp_path / "y.gguf", kind)])
        run_job(whole.job, threads=1)
        assert path.read_bytes() == (tmp_path / "y.gguf").read_bytes()

    def test_changed_scales_start_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        path, kind = tmp_path / "x.gguf", file_type("q4_0")
        with monkeypatch.context() as patch:
            stop_before_rename(patch)
            with pytest.raises(Interrupted):
                run_job(plan_conversion(Checkpoint.open(tmp_path / "model"), [(path, kind)]).job, threads=2)
        name = "model.layers.1.mlp.up_proj.scales"
        change_tensor(tmp_path / "model", name, lambda scales: scales * 2, numpy.float16)
        plan = plan_conversion(Checkpoint.open(tmp_path / "model"), [(path, kind)])
        assert run_job(plan.job, threads=2).resumed == 0
        assert check_packed_weights(plan)[path].difference == 0


class TestProof:
    def test_a_changed_weight_is_found(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        path = tmp_path / "x.gguf"
        plan = plan_conversion(Checkpoint.open(tmp_path / "model"), [(path, file_type("q4_0"))])
        run_job(plan.job, threads=1)
        assert check_packed_weights(plan)[path].difference == 0
        tensor = next(tensor for tensor in read_header(path).tensors if tensor.name == "blk.1.ffn_down.weight")
        flip_bit(path, tensor.offset + 18 * 7 + 5)  # a code of the eighth block
        with pytest.raises(BadWeights, match="its weights differ from the checkpoint's by up to"):
            check_packed_weights(plan)


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"bits": 3}, "“bits” is 3; GPTQ weights must have 4 or 8"),
    ("gptq", {"bits": "4"}, "“bits” must be an integer, not '4'"),
    ("gptq", {"bits": True}, "“bits” must be an integer, not True"),
    ("gptq", {"group_size": 0}, "“group_size” must be -1 or at least 1, not 0"),
    ("gptq", {"group_size": None}, "“group_size” must be an integer, not None"),
    ("gptq", {"sym": "yes"}, "“sym” must be true or false, not 'yes'"),
    (
        "gptq",
        {"checkpoint_format": "marlin"},
        "“checkpoint_format” is 'marlin'; GPTQ weights must be “gptq” or “gptq_v2”",
    ),
    ("gptq", {"is_marlin_format": True}, "“is_marlin_format” is true"),
    ("gptq", {"dynamic": {"-:lm_head": {}}}, "“dynamic”"),
    ("gemm", {"bits": 8}, "“bits” is 8; AWQ weights must have 4"),
    ("gemm", {"version": "gemv_fast"}, "“version” is 'gemv_fast'; AWQ weights must be “gemm” or “gemv”"),
    ("gemm", {"version": None}, "“version” is None"),
    ("gemm", {"zero_point": False}, "“zero_point” is false"),
    ("gptq", {"bits": 8}, "q_proj.qweight” has the shape [32, 256]; config.json (GPTQ, “bits” 8, “group_size” 128)"),
    (
        "gptq",
        {"group_size": 64},
        "q_proj.scales” has the shape [2, 256]; config.json (GPTQ, “bits” 4, “group_size” 64)",
    ),
    ("gemm", {"version": "gemv"}, "q_proj.scales” has the shape [2, 256]; config.json (AWQ gemv, “bits” 4"),
    (
        "gptq",
        {"quant_method": "awq", "zero_point": True},
        "q_proj.qweight” has the shape [32, 256]; config.json (AWQ gemm",
    ),
    ("gptq", {"quant_method": None}, "“quant_method” is missing"),
    ("gptq", {"quant_method": None, "load_in_4bit": True}, "quantized already (bitsandbytes)"),
    *(("gptq", {"quant_method": method}, f"quantized already ({method})") for method in ("hqq", "eetq", "fp8", "5")),
    ("gptq", {"checkpoint_format": "gptq_v2"}, "q_proj.qzeros” has zero points of 7 instead of 8"),
]


class TestFaults:
    @pytest.mark.parametrize(("layout", "settings", "message"), SETTINGS)
    def test_settings_that_are_wrong_or_unknown_are_named(
        self, layout: str, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        write_packed_checkpoint(tmp_path / "model", layout, settings=settings)
        with pytest.raises(BadWeights) as caught:
            make_plan(tmp_path / "model")
        assert message in str(caught.value)
        assert caught.value.hint

    def test_zero_points_of_the_other_version_are_named_with_the_setting(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq_v2", settings={"checkpoint_format": "gptq"})
        with pytest.raises(BadCheckpoint, match="has zero points of 9 instead of 8, although “sym” is true") as caught:
            make_plan(tmp_path / "model")
        assert "set “checkpoint_format” to “gptq_v2”" in caught.value.hint

    @pytest.mark.parametrize("settings", [[1], "gptq", 4])
    def test_settings_that_are_no_object_are_named(self, settings: object, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        set_json(tmp_path / "model", "config.json", quantization_config=settings)
        with pytest.raises(BadCheckpoint, match="“quantization_config” must be an object, not "):
            make_plan(tmp_path / "model")

    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_a_missing_part_is_named(self, part: str, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        remove_tensors(tmp_path / "model", f"layers.1.mlp.up_proj.{part}")
        with pytest.raises(BadCheckpoint, match=rf"“model\.layers\.1\.mlp\.up_proj\.{part}” is missing"):
            make_plan(tmp_path / "model")

    @pytest.mark.parametrize(
        ("part", "dtype"), [("qweight", "F32"), ("qzeros", "F32"), ("scales", "I16"), ("g_idx", "F32")]
    )
    def test_a_part_of_an_odd_type_is_named(self, part: str, dtype: str, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        name = f"model.layers.0.mlp.up_proj.{part}"
        stored = Checkpoint.open(tmp_path / "model").tensors[name]
        replace_tensor(tmp_path / "model", name, (dtype, stored.shape, bytes(stored.size)))
        with pytest.raises(UnsupportedCheckpoint, match=f"“{name}” has the type {dtype}"):
            make_plan(tmp_path / "model")

    @pytest.mark.parametrize("value", [-1, 2])
    def test_a_group_that_does_not_exist_is_named(self, value: int, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        name = "model.layers.0.self_attn.q_proj.g_idx"
        change_tensor(tmp_path / "model", name, lambda order: order * 0 + value, numpy.int32)
        with pytest.raises(BadWeights, match=f"“{name}” has groups that"):
            make_plan(tmp_path / "model")

    def test_a_matrix_that_is_no_multiple_of_a_word_is_named(self, tmp_path: Path) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        set_json(tmp_path / "model", "config.json", intermediate_size=516)
        with pytest.raises(UnsupportedCheckpoint, match=r"packs 516 x 256 weights, which is not a multiple of 8"):
            make_plan(tmp_path / "model")

    def test_weights_that_are_not_packed_are_quantized_as_usual(self, tmp_path: Path) -> None:
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
        write_checkpoint(tmp_path / "model", config={"quantization_config": settings})
        plan = make_plan(tmp_path / "model")
        assert plan.notes == ["The weights are not packed, although the settings of GPTQ-Int4 are there."]
        assert {"q4_k", "q6_k"} <= {tensor.choice.type.name for tensor in plan_types(tmp_path / "model", "q4_k_m")}

    def test_settings_of_another_file_are_used(self, tmp_path: Path) -> None:
        """Older checkpoints have no "quantization_config" in config.json."""
        folder = tmp_path / "model"
        for layout, file in (("gptq", "quantize_config.json"), ("gemm", "quant_config.json")):
            weights = write_packed_checkpoint(folder, layout, symmetric=False)
            document = json.loads((folder / "config.json").read_text())
            settings = document.pop("quantization_config")
            del settings["quant_method"]
            if layout == "gemm":
                settings = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
            (folder / "config.json").write_text(json.dumps(document))
            (folder / file).write_text(json.dumps(settings))
            assert_exact(convert(folder, "q5_0"), weights, "q5_0")
            (folder / file).unlink()
            (tmp_path / "model.q5_0.gguf").unlink()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_packed_rows_of_any_shape_equal_the_definition(data: strategies.DataObject, tmp_path: Path) -> None:
    layout = data.draw(strategies.sampled_from(["gptq", "gptq_v2", "gemm", "gemv"]))
    bits = data.draw(strategies.sampled_from([4, 8] if layout.startswith("gptq") else [4]))
    columns, rows = (8 * data.draw(strategies.integers(1, 40), label=label) for label in ("columns", "rows"))
    sizes = strategies.one_of(strategies.sampled_from([-1, 32, 64, 128]), strategies.integers(1, columns))
    group_size = data.draw(strategies.just(32) if layout == "gemv" else sizes)
    layer = PackedLayer(
        columns, rows, bits, group_size,
        symmetric=data.draw(strategies.booleans()),
        shuffled=layout.startswith("gptq") and data.draw(strategies.booleans()),
        seed=data.draw(strategies.integers(0, 1000)),
    )  # fmt: skip
    matrix = packed_matrix(layer, layout, tmp_path / "x.safetensors")
    first = data.draw(strategies.integers(0, rows - 1))
    count = data.draw(strategies.integers(1, rows - first))
    for kind in matrix.exact_types:
        source = PackedRows(matrix, kind)
        with SourceFiles(source.files) as reader:
            encoded = numpy.empty(count * kind.row_bytes(columns), numpy.uint8)
            source.read(first, encoded.data, reader)
        values = gguf.dequantize(encoded.reshape(count, -1), gguf.GGMLQuantizationType(kind.number))
        assert (values == layer.weights[first : first + count]).all(), kind.name


@pytest.mark.parametrize("layout", ["gptq", "gemm", "gemv"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_both_implementations_store_the_same_bytes(
    layout: str, bits: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of libggml, and that in numpy for a libggml without our code."""
    if bits == 8 and layout != "gptq":
        bits = 4
    layer = PackedLayer(320, 72, bits, 64, symmetric)
    matrix = packed_matrix(layer, layout, tmp_path / "x.safetensors")
    kinds = [kind for kind in (*matrix.exact_types, *matrix.near_types) if kind.is_quantized]
    assert kinds
    for kind in kinds:
        results = []
        for has_code in (True, False):
            if not has_code:
                monkeypatch.setattr(ggml, "pack_rows", lambda *_arguments, **_options: False)
            source = PackedRows(matrix, kind)
            encoded = numpy.full(72 * kind.row_bytes(320), 0xAA, numpy.uint8)
            with SourceFiles(source.files) as reader:
                source.read(0, encoded.data, reader)
            results.append(encoded.tobytes())
        monkeypatch.undo()
        assert results[0] == results[1], kind.name


class TestCommands:
    @pytest.mark.parametrize(
        ("layout", "options", "kind"),
        [("gptq", {}, "q4_0"), ("gptq", {"bits": 8}, "q8_0"), ("gemm", {"symmetric": False}, "q5_0")],
    )
    def test_convert_keeps_the_weights_and_proves_it(
        self,
        layout: str,
        options: dict[str, Any],
        kind: str,
        tmp_path: Path,
        invoke: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_packed_checkpoint(tmp_path / "model", layout, **options)
        message = expect_exit(invoke("convert", "model"), 0)
        assert f"Wrote model-{kind}.gguf: {kind}" in message
        assert "Compared 1,179,648 packed weights with the checkpoint: largest difference 0." in message

    def test_json_has_the_proof(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        result = invoke("convert", str(tmp_path / "model"), "-o", str(tmp_path / "x"), "--json")
        (file,) = json.loads(result.stdout)["files"]
        assert (file["compared_weights"], file["largest_difference"]) == (1179648, 0)

    def test_run_answers_from_packed_weights(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        result = invoke("run", str(tmp_path / "model"), "Hi", "-n", "4")
        message = expect_exit(result, 0)
        assert "Converting it once to q4_0" in message
        assert "largest difference 0" in message
        assert "Converting" not in expect_exit(invoke("run", str(tmp_path / "model"), "Hi", "-n", "4"), 0)

    def test_pull_converts_from_a_hub_and_records_the_type(self, hub: HubServer, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gemm", symmetric=False)
        publish(hub, tmp_path / "model")
        assert "largest difference 0" in expect_exit(invoke("pull", HF_NAME), 0)
        assert f"{HF_NAME}:q5_0" in invoke("list").stdout
        assert "largest difference" not in expect_exit(invoke("pull", HF_NAME), 0)

    def test_a_preview_from_a_hub_reads_headers_only(self, hub: HubServer, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        publish(hub, tmp_path / "model")
        requests = WeightRequests(hub)
        result = invoke("convert", HF_NAME, "--dry-run")
        expect_exit(result, 0)
        assert requests.saw_headers_only
        assert "as packed" in result.stdout

    def test_a_preview_compares_the_exact_type_with_a_near_one(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gemm", symmetric=False)
        output = invoke("convert", str(tmp_path / "model"), "--dry-run").stdout
        exact, near = (line.split() for line in output.splitlines() if line.startswith(("q5_0 ", "q4_1 ")))
        assert exact[-3:] == ["none", "as", "planned"]
        assert near[-2:] == ["--type", "q4_1"]
        types = json.loads(invoke("convert", str(tmp_path / "model"), "--dry-run", "--json").stdout)["packed_types"]
        assert [entry["type"] for entry in types] == ["q5_0", "q4_1"]
        assert types[0]["size"] > types[1]["size"]
        assert types[0]["error"] == 0 < types[1]["error"] < 0.01

    def test_a_preview_of_shuffled_columns_names_smaller_types(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq", shuffled=True)
        output = invoke("convert", str(tmp_path / "model"), "--dry-run").stdout
        assert "--type q6_k --requantize" in output

    @pytest.mark.parametrize(
        ("layout", "options", "source"),
        [
            ("gptq", {}, "GPTQ int4, group 128"),
            ("gptq", {"bits": 8, "group_size": -1}, "GPTQ int8, one group per row"),
            ("gptq", {"shuffled": True}, "GPTQ int4, group 128, desc_act"),
            ("gemv", {"group_size": 64}, "AWQ int4, group 64"),
        ],
    )
    def test_a_preview_names_how_weights_are_packed(
        self, layout: str, options: dict[str, Any], source: str, tmp_path: Path, invoke: Run
    ) -> None:
        write_packed_checkpoint(tmp_path / "model", layout, **options)
        assert f"  {source}  " in invoke("convert", str(tmp_path / "model"), "--dry-run").stdout

    def test_a_preview_has_no_table_if_the_exact_type_is_the_smallest(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        assert "PACKED WEIGHTS AS" not in invoke("convert", str(tmp_path / "model"), "--dry-run").stdout

    def test_verify_compares_the_file_with_the_packed_checkpoint(self, tmp_path: Path, invoke: Run) -> None:
        write_packed_checkpoint(tmp_path / "model", "gptq")
        target = tmp_path / "x.gguf"
        expect_exit(invoke("convert", str(tmp_path / "model"), "-o", str(target)), 0)
        result = invoke("verify", str(target), "--against", str(tmp_path / "model"))
        expect_exit(result, 0)
        assert "q4_0       14 tensors, identical" in result.stdout
