"""Tensors of a checkpoint: their names and shapes, the output matrix, experts, and values that no type can store."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from checkpoint_files import (
    MINIMAL_MOE,
    UNALIGNED,
    UP_PROJ,
    VOCAB_SIZE,
    convert_checkpoint,
    file_names,
    make_plan,
    plan_job,
    plan_tensor_names,
    rename_tensors,
    set_json,
    set_weights,
    write_minimal,
)
from oracle import data_of

from qwenlocal.errors import BadCheckpoint, BadWeights, NonFiniteWeights, UnsupportedCheckpoint
from qwenlocal.testing import MOE_CONFIG, write_checkpoint, write_safetensors
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.safetensors import read_tensors
from qwenlocal.weights.write_workers import run_job

OUTPUT_BIAS = "model.layers.0.self_attn.o_proj.bias"


class TestTensors:
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.bias",
            "model.layers.0.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.down_proj.weight",
        ],
    )  # fmt: skip
    def test_a_missing_tensor_is_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{name}” is missing"):
            make_plan(write_minimal(tmp_path, tensors={name: None}))

    def test_a_wrong_number_of_layers_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"num_hidden_layers": 2})
        with pytest.raises(BadCheckpoint, match=r"“model.layers.2.\S+” is missing"):
            make_plan(set_json(folder, "config.json", num_hidden_layers=3))
        with pytest.raises(BadCheckpoint, match=r"“model.layers.1.*and 9 more"):
            make_plan(set_json(folder, "config.json", num_hidden_layers=1))

    @pytest.mark.parametrize("name", ["model.scores.weight", "model.layers.0.self_attn.q_norm.weight"])
    def test_an_unknown_tensor_is_refused_by_name(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"does not have: “{name}”") as caught:
            make_plan(write_minimal(tmp_path, tensors={name: (4, 4)}))
        assert "adapter" in caught.value.hint

    @pytest.mark.parametrize("shape", [(32, 33), (33, 32), (1024,), (32, 32, 1), ()])
    def test_another_shape_is_refused(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        folder = write_minimal(tmp_path, tensors={name: shape or (1,)})
        with pytest.raises(BadCheckpoint, match=r"config.json implies \[32, 32\]"):
            make_plan(folder)

    @pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "U8", "I64", "BOOL"])
    def test_another_dtype_than_f32_f16_and_bf16_is_refused(self, dtype: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
        data = path.read_bytes()
        stored = {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.size]) for t in read_tensors(path)}
        width = {"F64": 8, "I64": 8}.get(dtype, 1)
        write_safetensors(path, {**stored, name: (dtype, (32, 32), bytes(1024 * width))})
        with pytest.raises(UnsupportedCheckpoint, match=f"has the type {dtype}; only f32, f16 and bf16"):
            make_plan(folder)

    @pytest.mark.parametrize(
        "name", [OUTPUT_BIAS, "model.layers.0.mlp.down_proj.bias", "model.layers.0.mlp.gate_proj.bias"]
    )
    def test_an_unexpected_bias_is_dropped_only_if_it_is_zero(self, name: str, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, tensors={name: (32,)})
        with pytest.raises(UnsupportedCheckpoint, match=f"“{name}” is not zero"):
            make_plan(folder)
        set_weights(folder, name, 0, *[0.0] * 32)
        notes = make_plan(folder).notes
        assert [note for note in notes if name in note and "a bias that is all zeros" in note]

    def test_rotary_frequencies_are_left_out(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        (note,) = make_plan(write_minimal(tmp_path, tensors={name: (8,)})).notes
        assert note == f"Left out {name} (16 B): computed by llama.cpp itself."

    def test_several_dropped_tensors_make_one_note(self, tmp_path: Path) -> None:
        freqs = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (8,) for n in range(2)}
        (note,) = make_plan(write_minimal(tmp_path, {"num_hidden_layers": 2}, tensors=freqs)).notes
        assert note.startswith("Left out 2 tensors (32 B): computed by")

    @pytest.mark.parametrize("size", [VOCAB_SIZE - 8, VOCAB_SIZE + 12])
    def test_a_stale_vocabulary_size_is_refused_with_the_number_of_rows(self, size: int, tmp_path: Path) -> None:
        """transformers refuses it, too."""
        folder = set_json(write_minimal(tmp_path), "config.json", vocab_size=size)
        with pytest.raises(BadCheckpoint, match=f"“vocab_size” is {size}, but “model.embed_tokens.weight”") as caught:
            make_plan(folder)
        assert f"set “vocab_size” to {VOCAB_SIZE} in it" in caught.value.hint

    def test_attention_biases_may_be_missing_only_if_the_config_says_so(self, tmp_path: Path) -> None:
        biases = {f"model.layers.0.self_attn.{letter}_proj.bias": None for letter in "qkv"}
        folder = write_minimal(tmp_path, {"qkv_bias": False}, tensors=biases)
        assert not [name for name in plan_tensor_names(folder) if name.endswith(".bias")]
        with pytest.raises(BadCheckpoint, match=r"q_proj.bias” is missing"):
            make_plan(set_json(folder, "config.json", qkv_bias=...))


class TestOutputMatrix:
    def test_a_tied_output_matrix_may_be_missing(self, tmp_path: Path) -> None:
        assert "output.weight" not in plan_tensor_names(write_minimal(tmp_path, {"tie_word_embeddings": True}))

    def test_a_stored_copy_of_a_tied_output_matrix_is_left_out_with_a_note(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        assert "output.weight" not in plan_tensor_names(folder)
        (note,) = make_plan(folder).notes
        assert "lm_head.weight (18 kB): tied to the embeddings and equal to them" in note

    def test_a_stored_copy_of_a_tied_output_matrix_is_kept_like_llama_cpp(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        tensors = make_plan(folder, like_llama_cpp=True).files[0].tensors
        assert "output.weight" in {tensor.name for tensor in tensors}

    @pytest.mark.parametrize("at", [0, 1, VOCAB_SIZE * 32 // 2 * 2, VOCAB_SIZE * 32 * 2 - 1])
    def test_a_tied_output_matrix_that_differs_in_one_byte_is_used_with_a_note(self, at: int, tmp_path: Path) -> None:
        """transformers 5 warns, and does the same."""
        folder = write_minimal(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        stored = Checkpoint.open(folder).tensors["lm_head.weight"]
        with stored.file.open("r+b") as file:
            file.seek(stored.offset + at)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        (note,) = make_plan(folder).notes
        assert "“lm_head.weight” differs from them and is used" in note
        assert "output.weight" in plan_tensor_names(folder)
        assert not make_plan(set_json(folder, "config.json", tie_word_embeddings=False)).notes

    def test_tied_embeddings_may_be_stored_as_the_output_matrix(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"tie_word_embeddings": True})
        expected = data_of(convert_checkpoint(folder, tmp_path / "x.gguf", "f16"))
        rename_tensors(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
        assert data_of(convert_checkpoint(folder, tmp_path / "y.gguf", "f16")) == expected

    def test_an_untied_output_matrix_must_be_stored(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=r"“lm_head.weight” is missing, and “tie_word_embeddings”") as caught:
            make_plan(write_minimal(tmp_path, tensors={"lm_head.weight": None}))
        assert "set “tie_word_embeddings” to true" in caught.value.hint

    def test_a_base_model_has_no_output_matrix_and_no_name_prefix(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"architectures": ["Qwen2Model"]})
        assert "embed_tokens.weight" in Checkpoint.open(folder).tensors
        names = plan_tensor_names(folder)
        assert "token_embd.weight" in names
        assert "output.weight" not in names

    def test_the_output_matrix_of_a_base_model_is_used(self, tmp_path: Path) -> None:
        folder = write_minimal(
            tmp_path, {"architectures": ["Qwen2Model"]}, tensors={"lm_head.weight": (VOCAB_SIZE, 32)}
        )
        assert "output.weight" in plan_tensor_names(folder)

    def test_the_prefix_of_names_does_not_depend_on_the_architecture(self, tmp_path: Path) -> None:
        """transformers loads both forms into both classes."""
        folder = write_minimal(tmp_path)
        expected = data_of(convert_checkpoint(folder, tmp_path / "x.gguf", "f16"))
        set_json(folder, "config.json", architectures=["Qwen2Model"])
        assert data_of(convert_checkpoint(folder, tmp_path / "y.gguf", "f16")) == expected
        set_json(folder, "config.json", architectures=["Qwen2ForCausalLM"])
        rename_tensors(folder, lambda name: name.removeprefix("model."))
        assert data_of(convert_checkpoint(folder, tmp_path / "z.gguf", "f16")) == expected


class TestExperts:
    def test_a_tied_output_matrix_is_written_because_llama_cpp_needs_it(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {**MINIMAL_MOE, "tie_word_embeddings": True})
        assert "output.weight" in plan_tensor_names(folder)
        plan = make_plan(folder)
        assert [len(rows.targets) for rows in plan.job.ranges].count(2) == 1, "read once, written twice"

    def test_a_missing_expert_is_named(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.3.up_proj.weight"
        with pytest.raises(BadCheckpoint, match=f"“{name}” is missing"):
            make_plan(write_minimal(tmp_path, MINIMAL_MOE, tensors={name: None}))

    def test_an_additional_expert_is_refused(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.4.up_proj.weight"
        with pytest.raises(BadCheckpoint, match="it contains tensors that this architecture does not have"):
            make_plan(write_minimal(tmp_path, MINIMAL_MOE, tensors={name: (32, 32)}))

    def test_fused_experts_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        with pytest.raises(BadCheckpoint, match=r"has the shape \[4, 32, 32\]; config.json implies \[4, 64, 32\]"):
            make_plan(write_minimal(tmp_path, MINIMAL_MOE, fused_experts=True, tensors={name: (4, 32, 32)}))


class TestNonFiniteWeights:
    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    @pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
    @pytest.mark.parametrize("kind", ["same", "q8_0"])
    def test_nan_and_infinity_are_refused_with_tensor_and_row(
        self, dtype: str, value: float, kind: str, tmp_path: Path
    ) -> None:
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED, dtype=dtype)
        set_weights(source, UP_PROJ, 17, value, dtype=dtype)
        target = tmp_path / f"x.{dtype.lower() if kind == 'same' else kind}.gguf"
        with pytest.raises(
            NonFiniteWeights, match=r"“blk.0.ffn_up.weight” has weights.*NaN or infinite.*row 17$"
        ) as caught:
            run_job(plan_job(source, target), threads=2)
        assert "model.safetensors" in str(caught.value)
        assert (caught.value.tensor, caught.value.row) == ("blk.0.ffn_up.weight", 17)
        assert not list(tmp_path.glob("x.*"))  # no partial file either: resuming would fail, too

    def test_nan_in_a_vector_is_refused(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED)
        set_weights(source, "model.norm.weight", 0, numpy.nan)
        with pytest.raises(BadWeights, match=r"“output_norm.weight”"):
            run_job(plan_job(source, tmp_path / "x.q8_0.gguf"), threads=1)

    def test_nan_far_down_in_a_matrix_is_refused_with_its_row(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config={**UNALIGNED, "hidden_size": 32, "vocab_size": 20_000})
        set_weights(source, "lm_head.weight", 18_765, numpy.nan)
        with pytest.raises(BadWeights, match=r"“output.weight”.* row 18,765"):
            run_job(plan_job(source, tmp_path / "x.q8_0.gguf"), threads=1)

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_allowed_nan_becomes_zero_and_is_counted(self, dtype: str, tmp_path: Path) -> None:
        source, target = write_checkpoint(tmp_path / "model", config=UNALIGNED, dtype=dtype), tmp_path / "x.f32.gguf"
        good = tmp_path / "good.f32.gguf"
        run_job(plan_job(source, good), threads=1)
        set_weights(source, UP_PROJ, 3, numpy.nan, 1.0, numpy.inf, dtype=dtype)
        set_weights(source, "model.norm.weight", 0, -numpy.inf, dtype=dtype)
        assert run_job(plan_job(source, target), threads=2, allow_nan=True).non_finite == 3
        before, after = (
            {name: numpy.frombuffer(data, numpy.float32).copy() for name, (_, data) in data_of(path).items()}
            for path in (good, target)
        )
        before["blk.0.ffn_up.weight"][3 * 36 : 3 * 36 + 3] = 0, 1, 0
        before["output_norm.weight"][0] = 0
        assert all(numpy.array_equal(before[name], after[name]) for name in before)

    def test_nan_is_counted_once_for_several_outputs(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED)
        set_weights(source, UP_PROJ, 3, numpy.nan)
        targets = [tmp_path / f"x.{kind}.gguf" for kind in ("f32", "f16", "q8_0", "q4_0")]
        assert run_job(plan_job(source, *targets), threads=2, allow_nan=True).non_finite == 1

    def test_nan_in_an_expert_is_refused_with_its_tensor(self, tmp_path: Path) -> None:
        config = {**MOE_CONFIG, **UNALIGNED, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
        source = write_checkpoint(tmp_path / "model", config=config)
        set_weights(source, "model.layers.0.mlp.experts.2.up_proj.weight", 7, numpy.nan)
        with pytest.raises(BadWeights, match=r"“blk.0.ffn_up_exps.weight, expert 2”"):
            run_job(plan_job(source, tmp_path / "x.q8_0.gguf"), threads=2)

    def test_allowing_nan_after_a_refusal_writes_the_file(self, tmp_path: Path) -> None:
        """The error of the refusal suggests --allow-nan."""
        source = write_checkpoint(tmp_path / "model", config=UNALIGNED)
        set_weights(source, "lm_head.weight", 5, numpy.nan)
        job = plan_job(source, tmp_path / "x.q8_0.gguf")
        with pytest.raises(BadWeights):
            run_job(job, threads=1)
        assert run_job(job, threads=1, allow_nan=True).non_finite == 1
        assert file_names(tmp_path) == {"model", "x.q8_0.gguf"}


class TestWeightsOutOfRange:
    @pytest.mark.parametrize(
        ("value", "dtype", "kind"),
        [
            (65520.0, "F32", "f16"),
            (1e6, "BF16", "f16"),
            (-1e30, "BF16", "f16"),
            (3.4e38, "F32", "bf16"),
            (1e30, "BF16", "q8_0"),
            (1e9, "BF16", "q4_0"),
        ],
    )
    def test_weights_too_large_for_the_type_are_refused(
        self, value: float, dtype: str, kind: str, tmp_path: Path
    ) -> None:
        source, target = (
            write_checkpoint(tmp_path / "model", config=UNALIGNED, dtype=dtype),
            tmp_path / f"x.{kind}.gguf",
        )
        name = "model.layers.0.mlp.down_proj.weight"  # rows of 64: a multiple of 32
        set_weights(source, name, 17, value, dtype=dtype)
        with pytest.raises(BadWeights, match=f"“blk.0.ffn_down.weight” has weights.*too large for {kind}") as caught:
            run_job(plan_job(source, target), threads=2)
        assert "bf16 or f32" in caught.value.hint
        assert not target.exists()

    @pytest.mark.parametrize(("value", "kind"), [(1e30, "bf16"), (1e30, "f32"), (65504.0, "f16"), (65000.0, "q8_0")])
    def test_the_largest_weights_that_fit_are_written(self, value: float, kind: str, tmp_path: Path) -> None:
        source, target = (
            write_checkpoint(tmp_path / "model", config=UNALIGNED, dtype="F32"),
            tmp_path / f"x.{kind}.gguf",
        )
        set_weights(source, "model.layers.0.mlp.down_proj.weight", 17, value, dtype="F32")
        assert run_job(plan_job(source, target), threads=2).non_finite == 0
