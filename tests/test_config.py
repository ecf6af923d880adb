"""config.json: accepted values, their GGUF keys, and invalid values, which are refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import MINIMAL_MOE, assert_planned_or_refused, make_plan, plan_metadata, set_json, write_minimal

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.testing import CONFIG
from qwenlocal.weights.architecture import check_convertible

COUNTS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
]  # fmt: skip


EXPERT_COUNTS = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]


INVALID_COUNTS = ["256", 256.0, True, False, 0, -1, 1 << 31, 10**30, [256], {}, float("nan"), float("inf"), ""]


INVALID_NUMBERS = ["1e-6", True, 0, -1e-6, [1], {}, float("nan"), float("inf"), float("-inf"), None]


class TestNumbers:
    @pytest.mark.parametrize("key", COUNTS)
    @pytest.mark.parametrize("value", INVALID_COUNTS)
    def test_an_impossible_size_is_refused_by_name(self, key: str, value: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", **{key: value})
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which is invalid") as caught:
            check_convertible(folder)
        assert str(folder / "config.json") in str(caught.value)

    @pytest.mark.parametrize("key", EXPERT_COUNTS)
    @pytest.mark.parametrize("value", ["4", 0, -1, 1.5, 1 << 31])
    def test_an_impossible_expert_size_is_refused_by_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which is invalid"):
            check_convertible(set_json(write_minimal(tmp_path, MINIMAL_MOE), "config.json", **{key: value}))

    @pytest.mark.parametrize("key", [key for key in COUNTS if key != "num_key_value_heads"])
    @pytest.mark.parametrize("value", [..., None])
    def test_a_missing_size_is_refused_by_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is missing"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", **{key: value}))

    def test_key_value_heads_default_to_the_number_of_heads(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path, {"num_key_value_heads": 2}), "config.json", num_key_value_heads=...)
        assert plan_metadata(folder)["qwen2.attention.head_count_kv"] == 2

    @pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
    @pytest.mark.parametrize("value", INVALID_NUMBERS)
    def test_an_impossible_number_is_refused_by_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which is invalid"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", **{key: value}))

    @pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
    @pytest.mark.parametrize("value", [10**400, 1e300, 1e39, 1e-60], ids=["10**400", "1e300", "1e39", "1e-60"])
    def test_a_number_outside_float32_is_refused_by_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which is invalid"):
            make_plan(set_json(write_minimal(tmp_path), "config.json", **{key: value}))

    @pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-6), ("rope_theta", 10000.0)])
    def test_a_missing_number_takes_the_default_of_transformers(self, key: str, value: float, tmp_path: Path) -> None:
        metadata = plan_metadata(set_json(write_minimal(tmp_path), "config.json", **{key: ...}))
        gguf_key = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}[key]
        assert metadata[f"qwen2.{gguf_key}"] == pytest.approx(value)

    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("rms_norm_eps", 2**63, "a number from 1e-15 to 1"),
            ("rms_norm_eps", 1.5, "a number from 1e-15 to 1"),
            ("rope_theta", 1e13, "a number from 1 to 1e+12"),
            ("rope_theta", 0.5, "a number from 1 to 1e+12"),
            ("num_hidden_layers", 513, "an integer from 1 to 512"),
            ("hidden_size", 1 << 30, "an integer from 1 to 16,777,216"),
            ("vocab_size", 1 << 30, "an integer from 1 to 16,777,216"),
            ("max_position_embeddings", (1 << 31) - 1, "an integer from 1 to 1,073,741,824"),
        ],
    )
    def test_a_number_beyond_all_models_is_refused_with_the_possible_range(
        self, key: str, value: float, expected: str, tmp_path: Path
    ) -> None:
        with pytest.raises(BadCheckpoint) as caught:
            check_convertible(set_json(write_minimal(tmp_path), "config.json", **{key: value}))
        assert caught.value.reason == f"“{key}” is {value}, which is invalid: it must be {expected}"
        assert "correct the value" in caught.value.hint

    def test_more_experts_than_llama_cpp_has_room_for_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=r"“num_experts” is 1025, .* from 1 to 1,024"):
            check_convertible(set_json(write_minimal(tmp_path, MINIMAL_MOE), "config.json", num_experts=1025))

    def test_heads_with_an_odd_number_of_values_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="heads of 1 value cannot be rotated"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", num_attention_heads=32))

    @pytest.mark.parametrize("key", ["tie_word_embeddings", "use_sliding_window", "qkv_bias"])
    @pytest.mark.parametrize("value", ["false", "true", 0, 1, [], {}])
    def test_a_flag_must_be_true_or_false(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*; it should be true or false"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", **{key: value}))


class TestArchitecture:
    @pytest.mark.parametrize("value", ["Qwen2ForCausalLM", {}, 5])
    def test_malformed_architectures_are_refused(self, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="does not name the kind of model"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", architectures=value))

    @pytest.mark.parametrize("value", [..., None, []])
    def test_a_config_without_architecture_and_model_type_is_refused(self, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="does not name the kind of model") as caught:
            check_convertible(set_json(write_minimal(tmp_path), "config.json", architectures=value, model_type=...))
        assert "Qwen2MoeForCausalLM" in caught.value.hint

    @pytest.mark.parametrize(
        "names", [..., None, [], ["FSDPQwen2ForCausalLM"], ["LigerQwen2ForCausalLM"], ["Qwen2MoeForCausalLM"]]
    )
    def test_model_type_decides_whatever_a_trainer_left_in_architectures(self, names: object, tmp_path: Path) -> None:
        """AutoModelForCausalLM loads all of them as Qwen2ForCausalLM."""
        metadata = plan_metadata(set_json(write_minimal(tmp_path), "config.json", architectures=names))
        assert metadata["general.architecture"] == "qwen2"

    def test_a_mixture_of_experts_is_recognized_by_its_model_type(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path, MINIMAL_MOE), "config.json", architectures=["FSDPQwen2MoeForCausalLM"]
        )
        assert plan_metadata(folder)["general.architecture"] == "qwen2moe"

    def test_a_missing_model_type_is_taken_from_the_architecture(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", model_type=...)
        assert plan_metadata(folder)["general.architecture"] == "qwen2"

    @pytest.mark.parametrize(
        ("name", "model_type"),
        [("Qwen3ForCausalLM", "qwen3"), ("LlamaForCausalLM", "llama"), ("Qwen2ForSequenceClassification", "qwen2"),
         ("Qwen2VLForConditionalGeneration", "qwen2_vl"), ("", "qwen2")],
    )  # fmt: skip
    def test_another_architecture_is_refused_by_name(self, name: str, model_type: str, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", architectures=[name], model_type=model_type)
        with pytest.raises(UnsupportedCheckpoint, match=f"{name} is not a Qwen1.5 architecture") as caught:
            check_convertible(folder)
        assert "convert_hf_to_gguf.py" in caught.value.hint

    def test_an_unknown_model_type_is_refused_by_name(self, tmp_path: Path) -> None:
        for names in ([], ["Qwen2ForCausalLM"]):
            folder = set_json(write_minimal(tmp_path), "config.json", architectures=names, model_type="qwen3")
            with pytest.raises(UnsupportedCheckpoint, match=r"qwen3 is not a Qwen1\.5 architecture"):
                check_convertible(folder)

    @pytest.mark.parametrize("name", [[], {}, ["Qwen2ForCausalLM"], 5, True])
    def test_an_architecture_that_is_not_text_is_refused(self, name: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, UnsupportedCheckpoint)):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", architectures=[name]))

    @pytest.mark.parametrize("act", ["gelu", "relu", "swish", None, 5, ["silu"]])
    def test_another_activation_is_refused(self, act: object, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="activation"):
            check_convertible(set_json(write_minimal(tmp_path), "config.json", hidden_act=act))

    def test_a_model_without_causal_attention_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="is_causal"):
            check_convertible(write_minimal(tmp_path, {"is_causal": False}))
        with pytest.raises(BadCheckpoint, match="“is_causal” is"):
            check_convertible(set_json(tmp_path / "model", "config.json", is_causal="no"))

    def test_heads_that_do_not_divide_the_width_are_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(UnsupportedCheckpoint, match="a width of 32 cannot be divided evenly into 3 heads"):
            check_convertible(set_json(folder, "config.json", num_attention_heads=3))
        with pytest.raises(UnsupportedCheckpoint, match=r"“head_dim” is 64; llama\.cpp needs 16"):
            check_convertible(set_json(folder, "config.json", num_attention_heads=2, head_dim=64))
        check_convertible(set_json(folder, "config.json", head_dim=16))

    def test_partial_rotary_embeddings_are_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(UnsupportedCheckpoint, match=r"“partial_rotary_factor” is 0\.5"):
            check_convertible(set_json(folder, "config.json", partial_rotary_factor=0.5))
        check_convertible(set_json(folder, "config.json", partial_rotary_factor=1.0))

    def test_key_value_heads_that_do_not_divide_the_heads_are_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        for heads, keys in ((4, 3), (2, 4)):
            with pytest.raises(BadCheckpoint, match=f"{heads} heads cannot share {keys} key-value heads"):
                check_convertible(set_json(folder, "config.json", num_attention_heads=heads, num_key_value_heads=keys))


class TestSlidingWindow:
    def test_an_unused_window_is_accepted(self, tmp_path: Path) -> None:
        assert plan_metadata(
            write_minimal(tmp_path, {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0})
        )

    @pytest.mark.parametrize(
        "config",
        [
            {"sliding_window": None},
            {"sliding_window": 2048},
            {"sliding_window": 16, "max_window_layers": 1},
            {"sliding_window": 16, "max_window_layers": 28},
            {"sliding_window": 16, "layer_types": ["full_attention"]},
        ],
    )
    def test_a_window_without_effect_is_accepted(self, config: dict[str, Any], tmp_path: Path) -> None:
        check_convertible(write_minimal(tmp_path, {"use_sliding_window": True, **config}))

    @pytest.mark.parametrize(
        "config", [{"max_window_layers": 0}, {"layer_types": ["sliding_attention"], "max_window_layers": 28}]
    )
    def test_a_window_in_use_is_refused_with_a_workaround(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"use_sliding_window": True, "sliding_window": 16, **config})
        with pytest.raises(UnsupportedCheckpoint, match="attend only to the last 16 tokens") as caught:
            check_convertible(folder)
        assert "“max_position_embeddings” to 16" in caught.value.hint
        check_convertible(set_json(folder, "config.json", use_sliding_window=False, max_position_embeddings=16))

    @pytest.mark.parametrize("window", [0, -1, "16", 1.5])
    def test_an_impossible_window_length_is_refused(self, window: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“sliding_window” is"):
            check_convertible(
                write_minimal(tmp_path, {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0})
            )

    @pytest.mark.parametrize("first", ["none", [], {}, float("nan"), float("inf")])
    def test_max_window_layers_that_is_not_a_number_is_refused(self, first: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, UnsupportedCheckpoint)):
            check_convertible(
                write_minimal(tmp_path, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": first})
            )

    def test_max_window_layers_of_null_is_planned_or_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": None})
        assert_planned_or_refused(folder)


class TestRope:
    def test_the_base_is_written_unchanged(self, tmp_path: Path) -> None:
        assert plan_metadata(write_minimal(tmp_path, {"rope_theta": 5000000}))["qwen2.rope.freq_base"] == 5_000_000.0

    @pytest.mark.parametrize("kind", ["type", "rope_type"])
    def test_linear_scaling_is_written(self, kind: str, tmp_path: Path) -> None:
        metadata = plan_metadata(write_minimal(tmp_path, {"rope_scaling": {kind: "linear", "factor": 4}}))
        assert (metadata["qwen2.rope.scaling.type"], metadata["qwen2.rope.scaling.factor"]) == ("linear", 4.0)
        assert "qwen2.rope.scaling.original_context_length" not in metadata

    def test_yarn_scaling_is_written_in_llama_cpps_terms(self, tmp_path: Path) -> None:
        """llama.cpp multiplies its own attention factor, 0.1 ln 4 + 1, by the one in the file."""
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5,
                "beta_fast": 32, "beta_slow": 1}  # fmt: skip
        metadata = plan_metadata(write_minimal(tmp_path, {"rope_scaling": yarn}))
        keys = {key.removeprefix("qwen2.rope.scaling."): value for key, value in metadata.items() if ".scaling." in key}
        assert keys == {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 512,
            "attn_factor": pytest.approx(1.5 / (0.1 * math.log(4) + 1)),
        }

    @pytest.mark.parametrize("other", [{"beta_fast": 16}, {"beta_slow": 2}, {"truncate": False}])
    def test_yarn_options_that_llama_cpp_lacks_are_refused(self, other: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="YaRN with"):
            check_convertible(write_minimal(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0, **other}}))

    def test_the_original_context_of_yarn_defaults_to_the_whole_context(self, tmp_path: Path) -> None:
        metadata = plan_metadata(write_minimal(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0}}))
        assert metadata["qwen2.rope.scaling.original_context_length"] == CONFIG["max_position_embeddings"]

    @pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama3", "mrope", "su", "", None, 5, ["yarn"], {}])
    def test_other_scaling_types_are_refused(self, kind: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, UnsupportedCheckpoint), match="RoPE"):
            check_convertible(write_minimal(tmp_path, {"rope_scaling": {"type": kind, "factor": 2.0}}))

    @pytest.mark.parametrize(
        "scaling",
        [
            {"type": "linear"},
            {"type": "linear", "factor": 0},
            {"type": "linear", "factor": "4"},
            {"type": "yarn", "factor": -1.0},
            {"type": "yarn", "factor": 4.0, "beta_fast": "32"},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": -512},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "512"},
        ],
    )
    def test_scaling_by_impossible_numbers_is_refused(self, scaling: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="which is invalid"):
            check_convertible(write_minimal(tmp_path, {"rope_scaling": scaling}))

    @pytest.mark.parametrize(
        "more", [{"original_max_position_embeddings": 1 << 40}, {"factor": 1e300}, {"beta_fast": 1e39}]
    )
    def test_scaling_by_numbers_outside_the_file_format_is_refused(self, more: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="which is invalid"):
            make_plan(write_minimal(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0, **more}}))

    @pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
    @pytest.mark.parametrize("value", ["linear", ["linear"], 4.0, True])
    def test_rope_parameters_that_are_not_an_object_are_refused(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="the RoPE parameters are"):
            check_convertible(write_minimal(tmp_path, {key: value}))

    def test_rope_parameters_of_transformers_5_are_read(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"rope_parameters": {"rope_theta": 7000.0, "rope_type": "default"}})
        metadata = plan_metadata(set_json(folder, "config.json", rope_theta=...))
        assert metadata["qwen2.rope.freq_base"] == 7000.0
        assert "qwen2.rope.scaling.type" not in metadata
        yarn = {"rope_theta": 7000.0, "rope_type": "yarn", "factor": 2.0}
        metadata = plan_metadata(set_json(folder, "config.json", rope_parameters=yarn))
        assert (metadata["qwen2.rope.freq_base"], metadata["qwen2.rope.scaling.type"]) == (7000.0, "yarn")

    def test_contradicting_rope_parameters_and_rope_scaling_are_refused(self, tmp_path: Path) -> None:
        new = {"rope_theta": 7000.0, "rope_type": "yarn", "factor": 2.0}
        with pytest.raises(BadCheckpoint, match="contradict each other"):
            check_convertible(
                write_minimal(
                    tmp_path, {"rope_parameters": new, "rope_scaling": {"type": "linear", "rope_type": "linear"}}
                )
            )
        check_convertible(
            set_json(tmp_path / "model", "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0})
        )
        for value in (True, 5, [5], "yarn", {"rope_type": {}}):
            assert_planned_or_refused(set_json(tmp_path / "model", "config.json", rope_scaling=value))


class TestExperts:
    def test_expert_sizes_are_written(self, tmp_path: Path) -> None:
        metadata = plan_metadata(write_minimal(tmp_path, {**MINIMAL_MOE, "moe_intermediate_size": 64}))
        keys = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
        assert [metadata[f"qwen2moe.{key}"] for key in keys] == [4, 2, 64, 32]

    def test_more_experts_per_token_than_experts_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="uses 5 experts per token, but has only 4"):
            check_convertible(set_json(write_minimal(tmp_path, MINIMAL_MOE), "config.json", num_experts_per_tok=5))

    def test_normalized_router_weights_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="norm_topk_prob"):
            check_convertible(write_minimal(tmp_path, {**MINIMAL_MOE, "norm_topk_prob": True}))

    @pytest.mark.parametrize(
        "config", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 0}]
    )
    def test_layers_without_experts_are_refused(self, config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="some layers have no experts"):
            check_convertible(set_json(write_minimal(tmp_path, MINIMAL_MOE), "config.json", **config))

    @pytest.mark.parametrize(
        "config", [{"mlp_only_layers": []}, {"mlp_only_layers": None}, {"decoder_sparse_step": ...}]
    )
    def test_a_config_with_experts_in_all_layers_is_accepted(self, config: dict[str, Any], tmp_path: Path) -> None:
        check_convertible(set_json(write_minimal(tmp_path, MINIMAL_MOE), "config.json", **config))

    @pytest.mark.parametrize("config", [{"decoder_sparse_step": 2}, {"norm_topk_prob": True}, {"mlp_only_layers": [0]}])
    def test_expert_settings_of_a_dense_model_are_ignored(self, config: dict[str, Any], tmp_path: Path) -> None:
        check_convertible(set_json(write_minimal(tmp_path), "config.json", **config))
