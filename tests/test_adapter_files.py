"""LoRA adapters of PEFT: read, refused, written as GGUF, and compared with a model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from adapter_files import (
    EVERYTHING,
    LINEAR,
    change_of,
    convert_adapter,
    file_changes,
    plan_merge,
    read_factors,
    values_of,
    write_adapter,
    write_merged,
    write_untied,
)
from checkpoint_files import MINIMAL, SMALL, convert_checkpoint
from commands import expect_exit
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.errors import BadCheckpoint, BadWeights, UnsupportedCheckpoint
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights.adapter import is_adapter, read_adapter
from qwenlocal.weights.adapter_file import check_adapter_fits
from qwenlocal.weights.adapter_merge import describe_base
from qwenlocal.weights.gguf_reader import read_header, read_metadata
from qwenlocal.weights.split_model import read_split_model

QUERY, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


class TestAdapterFiles:
    def test_a_usual_adapter_is_stored_as_it_is(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, targets=LINEAR)
        path = convert_adapter(folder)
        values, factors = values_of(path), read_factors(folder)
        for name, module in (("blk.0.attn_q", QUERY), ("blk.0.ffn_up", UP)):
            for letter in "AB":
                stored = values[f"{name}.weight.lora_{letter.lower()}"]
                assert (stored == factors[f"{module}.lora_{letter}.weight"]).all()
        assert len(values) == len(factors) == 14
        metadata = read_metadata(path)
        assert metadata["general.type"] == "adapter"
        assert metadata["general.architecture"] == "qwen2"
        assert metadata["adapter.type"] == "lora"
        assert metadata["adapter.lora.alpha"] == 8.0
        assert metadata["general.base_model.0.name"] == str(base)

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_what_the_file_adds_is_what_peft_adds(
        self, data: st.DataObject, base: Path, mixture: Path, tmp_path: Path
    ) -> None:
        source = data.draw(st.sampled_from([base, mixture]))
        rank, alpha = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([1, 4, 8, 16, 7.5]))
        use_rslora = data.draw(st.booleans())
        ranks = data.draw(st.sampled_from([{}, {QUERY: 3}, {QUERY: 3, "model.layers.0.self_attn.o_proj": 1}]))
        alphas = data.draw(st.sampled_from([{}, {"q_proj": 2}, {r"layers\.\d\.self_attn\.[kv]_proj": 5}]))
        folder = write_adapter(
            tmp_path / "adapter", source, targets=EVERYTHING, rank=rank, ranks=ranks, alpha_pattern=alphas,
            dtype=data.draw(st.sampled_from(["F32", "F16", "BF16"])), lora_alpha=alpha, use_rslora=use_rslora,
        )  # fmt: skip
        changes = file_changes(convert_adapter(folder))
        for module in read_adapter(folder).modules:
            module_rank = ranks.get(module.name, rank)
            own = alphas.get("q_proj", alpha) if module.name == QUERY else alpha
            own = 5 if len(alphas) and "q_proj" not in alphas and module.name[-6:] in ("k_proj", "v_proj") else own
            expected = change_of(folder, module.name, own / (math.sqrt(module_rank) if use_rslora else module_rank))
            change = changes[module.target]
            change = change[module.expert] if change.ndim == 3 else change
            assert numpy.allclose(change, expected, rtol=1e-5, atol=1e-6), module.name

    def test_experts_are_stacked(self, mixture: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", mixture, targets=LINEAR)
        path, factors = convert_adapter(folder), read_factors(folder)
        assert read_metadata(path)["general.architecture"] == "qwen2moe"
        values = values_of(path)
        for expert in range(4):
            at = f"model.layers.0.mlp.experts.{expert}.down_proj"
            assert (values["blk.0.ffn_down_exps.weight.lora_a"][expert] == factors[f"{at}.lora_A.weight"]).all()
            assert (values["blk.0.ffn_down_exps.weight.lora_b"][expert] == factors[f"{at}.lora_B.weight"]).all()

    @pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
    def test_other_types_round(self, kind: str, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, rank=4)
        types = {tensor.type.name for tensor in read_header(convert_adapter(folder, kind)).tensors}
        assert types == ({"q8_0", "f16"} if kind == "q8_0" else {kind})  # rows of 4 values have no blocks of 32
        for name, change in file_changes(convert_adapter(folder, kind)).items():
            exact = file_changes(convert_adapter(folder))[name]
            assert 0 < abs(change - exact).max() < 0.03 * abs(exact).max()

    @pytest.mark.parametrize(
        ("patterns", "ranks"),
        [
            ({"q_proj": 2}, {"q": 2, "k": 4}),
            ({r"model\.layers\.0\.self_attn\.(q|k)_proj": 2}, {"q": 2, "k": 2}),
            ({"^model.layers.0.self_attn.q_proj": 2}, {"q": 2, "k": 4}),
            ({"k_proj": 3, r".*": 2}, {"q": 2, "k": 3}),
            ({"proj": 2}, {"q": 4, "k": 4}),
        ],
    )
    def test_patterns_are_matched_as_by_peft(
        self, patterns: dict[str, int], ranks: dict[str, int], base: Path, tmp_path: Path
    ) -> None:
        modules = {f"model.layers.0.self_attn.{letter}_proj": rank for letter, rank in ranks.items()}
        folder = write_adapter(
            tmp_path / "style", base, targets=["[qk]_proj"], ranks=modules, rank_pattern=patterns, lora_alpha=12
        )
        assert {m.name: m.scale for m in read_adapter(folder).modules} == {m: 12 / r for m, r in modules.items()}

    def test_a_base_folder_tells_the_architecture(self, mixture: Path, tmp_path: Path) -> None:
        assert read_adapter(write_adapter(tmp_path / "style", mixture)).architecture == "qwen2moe"

    @pytest.mark.parametrize(
        ("base", "architecture"),
        [
            ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen2moe"),
            ("/nowhere/Qwen2-57B-A14B", "qwen2moe"),
            ("/hub/models--Qwen--Qwen1.5-MoE-A2.7B/snapshots/1a758c5", "qwen2moe"),
            ("/nowhere/moe/moeve-7b", "qwen2"),
            ("Qwen/Qwen1.5-0.5B", "qwen2"),
            ("", "qwen2"),
        ],
    )
    def test_otherwise_the_name_of_the_base_does(self, base: str, architecture: str, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base_model_name_or_path=base)
        assert read_adapter(folder).architecture == architecture

    def test_a_config_next_to_the_adapter_is_that_of_its_base(self, mixture: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", mixture, base_model_name_or_path="/nowhere/base")
        assert read_adapter(folder).architecture == "qwen2"
        shutil.copy(mixture / "config.json", folder)  # as Axolotl does
        assert read_adapter(folder).architecture == "qwen2moe"
        assert is_adapter(folder)
        shutil.copy(mixture / "model.safetensors", folder)
        assert not is_adapter(folder)

    def test_copies_of_the_embeddings_are_left_out(self, base: Path, tmp_path: Path) -> None:
        copy = {"base_model.model.model.embed_tokens.base_layer.weight": (288, 64)}
        assert len(read_adapter(write_adapter(tmp_path / "style", base, tensors=copy)).modules) == 4


# --- refusals

Q = f"base_model.model.{QUERY}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "LOHA"}, "it describes an adapter of the type 'LOHA', not LoRA"),
        ({"peft_type": ...}, "an adapter of the type None, not LoRA"),
        ({"fine_tune_type": "lora"}, "it is an adapter of MLX"),
        ({"use_dora": True}, "the adapter uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"\(modules_to_save\)"),
        ({"bias": "lora_only"}, "the adapter trained biases"),
        ({"lora_bias": True}, r"\(lora_bias\)"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 1]]}, r"\(layer_replication\)"),
        ({"trainable_token_indices": [3]}, r"\(trainable_token_indices\)"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"\(target_parameters\)"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialized with 'pissa_niter_16', which also changes the base"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    changes: dict[str, Any], sentence: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=sentence) as caught:
        read_adapter(write_adapter(tmp_path / "style", base, **changes))
    assert ("mlx_lm.fuse" if "MLX" in sentence else "peft") in caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{Q}.lora_magnitude_vector": (64,)}, "the adapter uses DoRA"),
        ({f"{Q}.lora_A.bias": (4,)}, "belongs to a variant of LoRA"),
        ({"base_model.model.lm_head.weight": (288, 64)}, "“base_model.model.lm_head.weight” replaces a part"),
        ({"base_model.model.model.norm.weight": (64,)}, "replaces a part of the model"),
        ({f"{Q}_2.lora_A.weight": (4, 64), f"{Q}_2.lora_B.weight": (64, 4)}, "q_proj_2”, which the architecture qwen2"),
        ({f"{Q}.lora_A.default_2.weight": (4, 64)}, "belongs to a variant of LoRA"),
        ({"base_model.model.model.layers.0.mlp.experts.lora_A.weight": (4, 64),
          "base_model.model.model.layers.0.mlp.experts.lora_B.weight": (64, 4)}, "does not have"),
        ({"base_model.model.model.layers.9999.mlp.up_proj.lora_A.weight": (4, 64),
          "base_model.model.model.layers.9999.mlp.up_proj.lora_B.weight": (64, 4)}, "does not have"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(
    tensors: dict[str, tuple[int, ...]], sentence: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=sentence) as caught:
        read_adapter(write_adapter(tmp_path / "style", base, tensors=tensors))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 8}, "has the rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 2}}, f"“{Q}.lora_A.weight” has the rank 4, but adapter_config.json says 2"),
        ({"r": "4"}, "“r” is '4', which is invalid"),
        ({"lora_alpha": 0}, "“lora_alpha” is 0, which is invalid"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, "“alpha_pattern” is"),
        ({"alpha_pattern": {"(": 1}}, "has an invalid regular expression"),
        ({"alpha_pattern": {"q_proj": True}}, "which is invalid: it must be a positive number"),
        ({"tensors": {f"{Q}.lora_B.weight": None}}, f"the factors of “{QUERY}” do not fit together: A"),
        ({"tensors": {f"{Q}.lora_B.weight": (64, 3)}}, "do not fit together"),
        ({"tensors": {f"{Q}.lora_A.weight": (4,)}}, "it must be a matrix"),
        ({"tensors": {f"{Q}.lora_A.weight": (0, 64)}}, "it must be a matrix"),
        ({"targets": ["nothing"]}, "its adapter has no tensors"),
        ({"dtype": "F64"}, "has the type F64; only f32, f16 and bf16"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    changes: dict[str, Any], sentence: str | None, base: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "style", base, **changes)
    if sentence is None:
        assert read_adapter(folder).modules
        return
    with pytest.raises(BadWeights, match=sentence) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.hint


def test_adapters_that_extend_prompts_are_not_merged(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        read_adapter(write_adapter(tmp_path / "style", base, peft_type="PREFIX_TUNING"))
    assert "Train a LoRA adapter" in caught.value.hint


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_downloaded_or_saved_again(file: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "style", base)
    (folder / file).write_bytes((folder / file).read_bytes()[:-50])
    with pytest.raises(BadCheckpoint) as caught:
        read_adapter(folder)
    assert caught.value.hint == "Download or save the adapter again."


def test_missing_weights_and_pickled_ones_are_refused(base: Path, tmp_path: Path, invoke: Run, base_gguf: Path) -> None:
    folder = write_adapter(tmp_path / "style", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    message = expect_exit(invoke("run", str(base_gguf), "Hi", "--adapter", str(folder)), 5)
    assert "it has no adapter_model.safetensors" in message
    assert "save_pretrained" in message


def test_changed_experts_must_be_complete_in_a_file(mixture: Path, tmp_path: Path) -> None:
    at = "base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_"
    folder = write_adapter(
        tmp_path / "style", mixture, targets=[r"experts\.\d+\.up_proj"], tensors={f"{at}{x}.weight": None for x in "AB"}
    )
    with pytest.raises(UnsupportedCheckpoint, match=r"but not expert 2; llama\.cpp needs all experts") as caught:
        convert_adapter(folder)
    assert "--merge" in caught.value.hint
    assert write_merged(mixture, folder).exists()


class TestAnotherModel:
    @pytest.fixture
    def check(self, base_gguf: Path) -> Callable[[Path], object]:
        """Check an adapter against `base_gguf`."""
        model = read_split_model(base_gguf)
        return lambda path: check_adapter_fits(path, model)

    def test_shapes_are_compared(self, check: Callable[[Path], object], base: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "Other", config=MINIMAL)
        folder = write_adapter(tmp_path / "style", other)
        with pytest.raises(
            BadWeights, match=r"it changes a “blk\.0\..*” of .* x 32, but that of base.gguf has"
        ) as caught:
            check(convert_adapter(folder))
        assert caught.value.hint == f"Use the model that it was trained for: {other}"
        with pytest.raises(
            BadCheckpoint, match=r"it changes a “model\.layers\.0.* x 32, but that of Base has"
        ) as caught2:
            plan_merge(base, folder)
        assert caught2.value.hint == f"Use the model that it was trained for: {other}"

    def test_layers_are_compared(self, check: Callable[[Path], object], base: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "Other", config={**SMALL, "num_hidden_layers": 2})
        folder = write_adapter(tmp_path / "style", other)
        with pytest.raises(BadWeights, match=r"it changes “blk\.1\..*”, which base.gguf does not have"):
            check(convert_adapter(folder))
        with pytest.raises(BadCheckpoint, match=r"it changes “model\.layers\.1\..*”, which Base does not have"):
            plan_merge(base, folder)

    def test_the_architecture_is_compared(
        self, check: Callable[[Path], object], mixture: Path, base_gguf: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(BadWeights, match="it is for models of the architecture qwen2moe, not qwen2"):
            check(convert_adapter(write_adapter(tmp_path / "style", mixture)))
        with pytest.raises(BadWeights, match="it is not a LoRA adapter"):
            check(base_gguf)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"blk.0.attn_q.weight.lora_a": (64, 3)}, "does not have two factors of the same rank"),
            ({"blk.0.attn_q.weight.lora_b": None}, "does not have two factors of the same rank"),
            ({"token_embd.weight.lora_a": (4, 288), "token_embd.weight.lora_b": (5, 64)}, "of the same rank"),
            ({"blk.0.attn_q.weight.lora_a": (64,)}, "of the same rank"),
            ({"alora": True}, "it is an aLoRA"),
        ],
    )
    def test_files_that_would_end_the_process_are_refused(
        self, change: dict[str, Any], sentence: str, check: Callable[[Path], object], tmp_path: Path
    ) -> None:
        shapes = {"blk.0.attn_q.weight.lora_a": (64, 4), "blk.0.attn_q.weight.lora_b": (4, 64), **change}
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8)
        if shapes.pop("alora", False):
            writer.add_array("adapter.alora.invocation_tokens", [1, 2])
        for name, shape in shapes.items():
            if shape:
                writer.add_tensor(name, numpy.zeros(shape[::-1], numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(BadWeights, match=sentence):
            check(tmp_path / "x.gguf")

    def test_another_name_is_mentioned(self, base: Path, base_gguf: Path, invoke: Run, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, base_model_name_or_path="Qwen/Other-7B")
        assert "The adapter was trained for Qwen/Other-7B; it is used with Base." in plan_merge(base, folder).notes
        assert plan_merge(base, write_adapter(tmp_path / "same", base)).notes == ["Merged same: 4 matrices, rank 4."]
        message = expect_exit(invoke("run", str(base_gguf), "--raw", "Hi", "-n", "1", "--adapter", str(folder)), 0)
        assert "The adapter was trained for Qwen/Other-7B; it is used with Base." in message

    @pytest.mark.parametrize(
        ("base", "name"),
        [
            ("Qwen/Qwen1.5-0.5B-Chat", "Qwen1.5-0.5B-Chat-AWQ-fp16"),
            ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5 Coder 0.5B Instruct AWQ"),
            ("Qwen/Qwen1.5-7B-Chat-GPTQ-Int4", "Qwen1.5-7B-Chat"),
            ("unsloth/Qwen1.5-7B-bnb-4bit", "qwen1_5-7b"),
            ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen1.5-0.5B/snapshots/8f445e3", "Qwen1.5-0.5B"),
            ("/home/me/.cache/modelscope/hub/models/Qwen/Qwen1___5-0___5B/", "Qwen1.5-0.5B"),
            ("", "Qwen1.5-0.5B"),
        ],
    )
    def test_other_spellings_of_a_name_are_not_mentioned(self, base: str, name: str) -> None:
        assert describe_base(base, name) == []
        if base:
            assert describe_base(base, "Qwen1.5-14B-Chat") == [
                f"The adapter was trained for {base}; it is used with Qwen1.5-14B-Chat."
            ]

    def test_one_matrix_for_embeddings_and_output_needs_a_merge(self, tied: Path, tmp_path: Path) -> None:
        path = convert_checkpoint(tied, tmp_path / "tied.gguf", "f32")
        for target in ("lm_head", "embed_tokens"):
            folder = write_adapter(
                tmp_path / target, targets=[target], base=write_untied(tied, tmp_path / f"{target}-base")
            )
            with pytest.raises(BadWeights, match="uses the same matrix for embeddings and output") as caught:
                check_adapter_fits(convert_adapter(folder), read_split_model(path))
            assert "--merge ADAPTER" in caught.value.hint
            with pytest.raises(BadWeights, match=f"{target}: it changes") as caught:
                check_adapter_fits(convert_adapter(folder), read_split_model(path), folder)
            assert f"qwenlocal convert {tmp_path / target}-base --merge {folder}" in caught.value.hint
