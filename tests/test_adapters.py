"""LoRA adapters: read from PEFT's directories, written as GGUF, used while running, merged into a checkpoint."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import pytest
from adapter_files import ATTENTION, EVERYTHING, LINEAR, change_of, read_factors, write_adapter
from checkpoint_files import MINIMAL, MINIMAL_MOE, SMALL, convert_checkpoint, set_json
from commands import expect_exit, parse_json
from conftest import Run
from generation import answer, answer_and_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import data_of
from packing import write_packed_checkpoint
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from server_process import serving
from terminal import Open, start_chat

import qwenlocal
from qwenlocal.chat.thread import Thread
from qwenlocal.engine.adapters import LoadedAdapters
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import EngineLoader, LoadedModel, LoadOptions
from qwenlocal.engine.prompt_cache import compute_cache_key
from qwenlocal.errors import BadCheckpoint, BadWeights, UnsupportedCheckpoint, UsageError
from qwenlocal.library.adapters import AdapterRequest, parse_adapter
from qwenlocal.machine import this_machine
from qwenlocal.terminal.completer import ChatCompleter
from qwenlocal.terminal.session import Session
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.adapter import is_adapter, read_adapter
from qwenlocal.weights.adapter_file import check_adapter_fits, plan_adapter
from qwenlocal.weights.adapter_merge import WeightedAdapter, describe_base
from qwenlocal.weights.adapter_spec import AdapterSpec
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import read_header, read_metadata
from qwenlocal.weights.split_model import read_split_model
from qwenlocal.weights.write_job import job_identity, memory_needed
from qwenlocal.weights.write_workers import run_job

PROMPT = [(7 * n) % 250 for n in range(90)]
QUERY, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
OPTIONS = ContextOptions(512, threads=1, flash_attention=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint whose output matrix is its own."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "Base", config=SMALL, dtype="F32")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one matrix for embeddings and output."""
    config = {**SMALL, "tie_word_embeddings": True}
    return write_checkpoint(tmp_path_factory.mktemp("tied") / "Tied", config=config, dtype="F32")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts."""
    return write_checkpoint(tmp_path_factory.mktemp("mixture") / "Mixture", config=MINIMAL_MOE, dtype="F32")


@pytest.fixture(scope="module")
def base_gguf(base: Path) -> Path:
    return convert_checkpoint(base, base.parent / "base.gguf", "f32")


def convert_adapter(folder: Path, kind: str = "f32", architecture: str = "") -> Path:
    target = folder.with_suffix(f".{kind}.gguf")
    run_job(plan_adapter(read_adapter(folder, architecture), [(target, file_type(kind))]).job, threads=1, replace=True)
    return target


def values_of(path: Path) -> dict[str, numpy.ndarray]:
    """Return the values of all tensors, in PyTorch's order of dimensions."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        for tensor in reader.tensors
    }


def file_changes(path: Path) -> dict[str, numpy.ndarray]:
    """Return what llama.cpp adds to each matrix for the adapter in a GGUF file, by its definition."""
    values, alpha = values_of(path), float(str(read_metadata(path)["adapter.lora.alpha"]))
    changes = {}
    for name in (name.removesuffix(".lora_a") for name in values if name.endswith(".lora_a")):
        a, b = (values[f"{name}.lora_{letter}"].astype(float) for letter in "ab")
        scale = alpha / b.shape[-1]
        changes[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return changes


def merge(source: Path, *adapters: Path, kind: str = "f32", weight: float = 1.0) -> ConversionPlan:
    merges = [WeightedAdapter(read_adapter(adapter), weight) for adapter in adapters]
    target = source.parent / f"merged-{len(adapters)}.gguf"
    return plan_conversion(Checkpoint.open(source), [(target, file_type(kind))], ConversionOptions(merges=merges))


def write_merged(source: Path, *adapters: Path, kind: str = "f32", weight: float = 1.0) -> Path:
    plan = merge(source, *adapters, kind=kind, weight=weight)
    run_job(plan.job, threads=2, replace=True)
    return plan.files[0].path


def logits_of(path: Path, *adapters: AdapterSpec) -> numpy.ndarray:
    """Return the logits after a prompt."""
    with closing(Model(path)) as model:
        LoadedAdapters(model, adapters)
        with closing(Context(model, OPTIONS)) as context:
            (row,) = context.decode([(0, PROMPT)])
            return numpy.array(context.logits(row)[: len(model.tokenizer)])


def load(path: Path, *adapters: AdapterSpec, folder: Path | None = None) -> LoadedModel:
    """Load as commands do, with prompt caches in `folder`."""
    options = LoadOptions(LoadRequest(n_ctx=512, threads=1), prompt_caches=folder, adapters=adapters)
    return EngineLoader().load(path, options, this_machine(), name="x", size=path.stat().st_size)


@pytest.fixture
def load_model() -> Iterator[Callable[..., LoadedModel]]:
    loaded: list[LoadedModel] = []

    def load_(*arguments: Any, **options: Any) -> LoadedModel:
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    yield load_
    for one in loaded:
        one.close()


# --- files


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
            merge(base, folder)
        assert caught2.value.hint == f"Use the model that it was trained for: {other}"

    def test_layers_are_compared(self, check: Callable[[Path], object], base: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "Other", config={**SMALL, "num_hidden_layers": 2})
        folder = write_adapter(tmp_path / "style", other)
        with pytest.raises(BadWeights, match=r"it changes “blk\.1\..*”, which base.gguf does not have"):
            check(convert_adapter(folder))
        with pytest.raises(BadCheckpoint, match=r"it changes “model\.layers\.1\..*”, which Base does not have"):
            merge(base, folder)

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
        assert "The adapter was trained for Qwen/Other-7B; it is used with Base." in merge(base, folder).notes
        assert merge(base, write_adapter(tmp_path / "same", base)).notes == ["Merged same: 4 matrices, rank 4."]
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
            folder = write_adapter(tmp_path / target, targets=[target], base=_untied(tied, tmp_path / f"{target}-base"))
            with pytest.raises(BadWeights, match="uses the same matrix for embeddings and output") as caught:
                check_adapter_fits(convert_adapter(folder), read_split_model(path))
            assert "--merge ADAPTER" in caught.value.hint
            with pytest.raises(BadWeights, match=f"{target}: it changes") as caught:
                check_adapter_fits(convert_adapter(folder), read_split_model(path), folder)
            assert f"qwenlocal convert {tmp_path / target}-base --merge {folder}" in caught.value.hint


def _untied(tied: Path, folder: Path) -> Path:
    """Return a copy whose config.json says that the output matrix is its own, so that adapters change it."""
    return set_json(Path(shutil.copytree(tied, folder)), "config.json", tie_word_embeddings=False)


# --- merging


class TestMerging:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_merged_weights_are_the_definition(
        self, data: st.DataObject, base: Path, mixture: Path, tmp_path: Path
    ) -> None:
        source, weight = data.draw(st.sampled_from([base, mixture])), data.draw(st.sampled_from([1.0, 0.5, -2.0]))
        rank = data.draw(st.integers(1, 40))
        folder = write_adapter(
            tmp_path / "adapter", source, targets=data.draw(st.sampled_from([ATTENTION, EVERYTHING])), rank=rank,
            dtype=data.draw(st.sampled_from(["F32", "BF16"])), use_rslora=data.draw(st.booleans()),
        )  # fmt: skip
        (tmp_path / "before.gguf").unlink(missing_ok=True)
        before = values_of(convert_checkpoint(source, tmp_path / "before.gguf", "f32"))
        after = values_of(write_merged(source, folder, weight=weight))
        for module in read_adapter(folder).modules:
            change = change_of(folder, module.name, weight * module.scale)
            old, new = (values[module.target] for values in (before, after))
            if old.ndim == 3:
                old, new = old[module.expert], new[module.expert]
            assert numpy.allclose(new, old + change, rtol=1e-5, atol=1e-5), module.name
        changed = {module.target for module in read_adapter(folder).modules}
        assert all((after[name] == values).all() for name, values in before.items() if name not in changed)

    def test_fused_experts_are_merged_like_separate_ones(self, mixture: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", mixture, targets=LINEAR)
        fused = write_checkpoint(tmp_path / "Fused", config=MINIMAL_MOE, dtype="F32", fused_experts=True)
        before, after = (
            values_of(convert_checkpoint(fused, tmp_path / "b.gguf", "f32")),
            values_of(write_merged(fused, folder)),
        )
        name = "model.layers.0.mlp.experts.3.gate_proj"
        change = change_of(folder, name, 2.0)
        old, new = (values["blk.0.ffn_gate_exps.weight"][3] for values in (before, after))
        assert numpy.allclose(new, old + change, rtol=1e-5, atol=1e-5)

    def test_the_change_is_added_before_quantizing(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, targets=LINEAR)
        exact = write_merged(base, folder)
        quantized = data_of(write_merged(base, folder, kind="q8_0"))
        for name, values in values_of(exact).items():
            if quantized[name][0] == gguf.GGMLQuantizationType.Q8_0:
                expected = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                assert quantized[name][1] == expected.tobytes(), name

    @pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m", "q4_0"])
    def test_types_are_chosen_as_without_an_adapter(self, kind: str, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "Base")
        plain = plan_conversion(Checkpoint.open(source), [(tmp_path / "x.gguf", file_type(kind))])
        merged = merge(source, write_adapter(tmp_path / "style", source, targets=LINEAR), kind=kind)
        types = [{tensor.name: tensor.choice.type for tensor in plan.files[0].tensors} for plan in (plain, merged)]
        assert types[0] == types[1]

    def test_several_adapters_are_added(self, base: Path, tmp_path: Path) -> None:
        folders = [write_adapter(tmp_path / f"style{seed}", base, seed=seed) for seed in (1, 2)]
        before = values_of(convert_checkpoint(base, tmp_path / "before.gguf", "f32"))["blk.0.attn_q.weight"]
        after = values_of(write_merged(base, *folders))["blk.0.attn_q.weight"]
        assert numpy.allclose(after, before + sum(change_of(folder, QUERY, 2.0) for folder in folders), atol=1e-5)

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_a_tied_matrix_becomes_two(self, target: str, tied: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", _untied(tied, tmp_path / "untied"), targets=[target])
        before = values_of(convert_checkpoint(tied, tmp_path / "before.gguf", "f32"))["token_embd.weight"]
        plan = merge(tied, folder)
        run_job(plan.job, threads=1, replace=True)
        after, module = values_of(plan.files[0].path), f"model.{target}" if target == "embed_tokens" else target
        changed, kept = "output.weight", "token_embd.weight"
        if target == "embed_tokens":
            changed, kept = kept, changed
        assert (after[kept] == before).all()
        assert numpy.allclose(after[changed], before + change_of(folder, module, 2.0), atol=1e-5)
        assert any("becomes one of its own" in note for note in plan.notes)

    def test_an_unfinished_merge_is_not_continued_with_another_adapter(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base)
        other = write_adapter(tmp_path / "other", base, seed=1)

        def identity(plan: ConversionPlan, **prints: str) -> dict[str, Any]:
            files = {path for rows in plan.job.ranges for path in rows.source.files}
            return job_identity(plan.job, {path: prints.get(path.parent.name, "") for path in files}, allow_nan=False)

        plain = identity(plan_conversion(Checkpoint.open(base), [(base.parent / "merged-1.gguf", file_type("f32"))]))
        merged, again = identity(merge(base, folder)), identity(merge(base, folder))
        assert merged == again
        different = [
            plain,
            merged,
            identity(merge(base, folder), style="changed"),
            identity(merge(base, other)),
            identity(merge(base, folder, weight=0.5)),
            identity(merge(base, folder, other)),
        ]
        assert len({each["identity"] for each in different}) == len(different)

    def test_memory_stays_bounded_with_a_high_rank(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "Base")
        folder = write_adapter(tmp_path / "style", source, targets=LINEAR, rank=256)
        assert memory_needed(merge(source, folder, kind="q4_0").job, threads=2) < 300 << 20

    def test_a_nan_is_found(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, size=math.nan)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            write_merged(base, folder)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            convert_adapter(folder, "f16")


# --- running


@pytest.fixture(scope="module", params=["dense", "mixture"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of a usual width, and an adapter for all its layers."""
    folder = tmp_path_factory.mktemp("adapted")
    config = {"dense": {}, "mixture": MOE_CONFIG}[request.param]
    source = write_checkpoint(folder / "Base", config=config, dtype="F32")
    return source, write_adapter(folder / "style", source, targets=EVERYTHING, use_rslora=True, size=0.3)


class TestRunning:
    def test_logits_are_those_of_the_merged_model(self, adapted: tuple[Path, Path], tmp_path: Path) -> None:
        source, folder = adapted
        plain = convert_checkpoint(source, tmp_path / "plain.gguf", "f32")
        path = convert_adapter(folder)
        for scale in (1.0, -0.5):
            expected = logits_of(write_merged(source, folder, weight=scale))
            actual = logits_of(plain, AdapterSpec("style", path, scale))
            assert abs(actual - expected).max() < 2e-3 * abs(expected).max()
            assert abs(actual - logits_of(plain)).max() > 0.1 * abs(expected).max()

    def test_several_adapters_add_up(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        folders = [write_adapter(tmp_path / f"style{seed}", base, targets=LINEAR, seed=seed) for seed in (1, 2)]
        specs = [AdapterSpec(str(n), convert_adapter(folder)) for n, folder in enumerate(folders)]
        expected = logits_of(write_merged(base, *folders))
        assert abs(logits_of(base_gguf, *specs) - expected).max() < 2e-3 * abs(expected).max()

    def test_a_scale_of_zero_is_the_model_alone(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base))
        assert (logits_of(base_gguf, AdapterSpec("style", path, 0.0)) == logits_of(base_gguf)).all()

    def test_scales_that_are_too_large_for_numbers_are_reported(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base, size=1e30))
        with pytest.raises(BadWeights, match="computes NaN with its adapters"):
            answer(load_model(base_gguf, AdapterSpec("style", path)).sequence, PROMPT, 2)

    def test_a_file_that_llama_cpp_rejects_is_reported(self, base: Path, base_gguf: Path, tmp_path: Path) -> None:
        path = convert_adapter(write_adapter(tmp_path / "style", base))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(BadWeights, match=r"llama\.cpp cannot load the adapter: .*not within the file bounds"):
            logits_of(base_gguf, AdapterSpec("style", path))

    def test_a_changed_scale_forgets_what_was_computed(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        with_adapter, without = (
            answer_and_count(load_model(base_gguf, each).sequence, PROMPT, 12)[1]
            for each in (spec, AdapterSpec("style", spec.path, 0.0))
        )
        assert with_adapter != without
        loaded = load_model(base_gguf, spec)
        for _ in range(2):
            assert answer(loaded.sequence, PROMPT, 12) == with_adapter
            assert answer_and_count(loaded.sequence, PROMPT, 12)[0] > 0
            loaded.adapters.set_scales({"style": 0.0})
            assert answer_and_count(loaded.sequence, PROMPT, 12) == (0, without)
            loaded.adapters.set_scales({"style": 1.0})
            assert answer_and_count(loaded.sequence, PROMPT, 12) == (0, with_adapter)

    def test_abandoned_branches_are_forgotten_too(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        loaded, other = load_model(base_gguf, spec), [3, *PROMPT]
        answer(loaded.sequence, PROMPT, 4)
        answer(loaded.sequence, other, 4)  # the first prompt goes to the prefix cache
        loaded.adapters.set_scales({"style": 0.25})
        assert answer_and_count(loaded.sequence, PROMPT, 4)[0] == 0


class TestCaches:
    def test_the_key_of_a_saved_state_depends_on_adapters_and_scales(
        self, base: Path, base_gguf: Path, tmp_path: Path
    ) -> None:
        first, second = (
            AdapterSpec(str(seed), convert_adapter(write_adapter(tmp_path / str(seed), base, seed=seed)))
            for seed in (1, 2)
        )

        def key(*specs: AdapterSpec) -> str:
            return compute_cache_key(base_gguf, OPTIONS, specs)

        def scaled(spec: AdapterSpec, scale: float) -> AdapterSpec:
            return AdapterSpec(spec.name, spec.path, scale)

        keys = [key(), key(first), key(second), key(first, second), key(scaled(first, 0.5)),
                key(scaled(first, 0.5), second), key(first, scaled(second, 0.5))]  # fmt: skip
        assert len(set(keys)) == len(keys)
        assert key(scaled(first, 0.0)) == key() == compute_cache_key(base_gguf, OPTIONS)
        assert key(first, second) == key(second, first)

    def test_states_on_disk_are_not_shared(
        self, base: Path, base_gguf: Path, tmp_path: Path, load_model: Callable[..., LoadedModel]
    ) -> None:
        spec = AdapterSpec("style", convert_adapter(write_adapter(tmp_path / "style", base, targets=LINEAR)))
        prompt = [*PROMPT, *PROMPT]
        for specs in ((), (spec,)):
            loaded = load_model(base_gguf, *specs, folder=tmp_path / "states")
            assert answer_and_count(loaded.sequence, prompt, 4)[0] == 0, specs
            loaded.sequence._seconds = 1e6  # such a short prompt is faster computed than read
            assert loaded.sequence.save_prompt_cache()
        loaded = load_model(base_gguf, spec, folder=tmp_path / "states")
        assert answer_and_count(loaded.sequence, prompt, 4)[0] > 64
        loaded.adapters.set_scales({"style": 0.5})
        assert answer_and_count(loaded.sequence, prompt, 4)[0] == 0
        loaded.adapters.set_scales({"style": 0.0})
        assert answer_and_count(loaded.sequence, prompt, 4)[0] > 64  # the state of the model alone


# --- commands


def _make_unread(file: Path, *, days: int) -> None:
    """Set the times of a file as if nobody had read it for some days."""
    then = time.time() - days * 24 * 3600
    os.utime(file, (then, then))


def ask(run: Run, model: Path, *arguments: str) -> str:
    """Return the answer to a question, without leaving traces."""
    result = run("run", str(model), "--raw", "Once upon", "-n", "8", "--temp", "0", *arguments)
    expect_exit(result, 0)
    return str(result.stdout)


class TestCommands:
    @pytest.fixture
    def style(self, base: Path, tmp_path: Path) -> Path:
        """An adapter that changes answers."""
        return write_adapter(tmp_path / "style", base, targets=LINEAR)

    def test_convert_writes_an_adapter(self, style: Path, invoke: Run, tmp_path: Path) -> None:
        message = expect_exit(invoke("convert", str(style)), 0)
        assert "The adapter is for models of the architecture qwen2." in message
        assert "Wrote style-f32.gguf" in message
        assert read_metadata(tmp_path / "style-f32.gguf")["general.type"] == "adapter"
        expect_exit(invoke("convert", f"{style}/adapter_model.safetensors", "-o", "x.gguf", "--type", "f16"), 0)
        assert read_header(tmp_path / "x.gguf").tensors[0].type.name == "f16"
        plan = parse_json(invoke("convert", str(style), "--dry-run", "--json").stdout)
        assert len(plan["files"][0]["tensors"]) == 14

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--type", "q4_k_m"), "The type of an adapter must be f32, f16, bf16 or q8_0, not q4_k_m."),
            (("--ends", "q8_0"), "--ends cannot be used with an adapter, and "),
            (("--merge", "{}", "--name", "x"), "--merge and --name cannot be used with an adapter, and "),
        ],
    )
    def test_convert_refuses_what_adapters_do_not_have(
        self, arguments: tuple[str, ...], sentence: str, style: Path, invoke: Run
    ) -> None:
        words = [word.replace("{}", str(style)) for word in arguments]
        assert sentence in expect_exit(invoke("convert", str(style), *words), 2)

    @pytest.mark.parametrize(
        "command",
        [("run", "{}", "Hi"), ("verify", "{}"), ("quantize", "{}", "x.gguf", "q8_0"), ("bench", "{}"), ("plan", "{}")],
        ids=lambda words: words[0],
    )
    def test_an_adapter_file_given_as_a_model_says_how_to_use_it(
        self, command: tuple[str, ...], base: Path, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "style", base, base_model_name_or_path="Qwen/Qwen1.5-0.5B")
        path = convert_adapter(folder)
        message = expect_exit(invoke(*(word.replace("{}", str(path)) for word in command)), 5)
        assert "it is an adapter, not a model" in message
        assert f"qwenlocal run hf:Qwen/Qwen1.5-0.5B --adapter {path}" in message

    def test_inspect_says_that_a_file_is_an_adapter(self, style: Path, invoke: Run) -> None:
        result = invoke("inspect", str(convert_adapter(style)))
        expect_exit(result, 5)
        assert "it is an adapter, not a model" in result.stdout
        assert "RoPE" not in result.stdout
        assert "chat template" not in result.stdout

    def test_run_uses_directories_and_files_with_scales(
        self, style: Path, base: Path, base_gguf: Path, invoke: Run, tmp_path: Path
    ) -> None:
        merged = ask(invoke, write_merged(base, style))
        assert ask(invoke, base_gguf, "--adapter", str(style)) == merged != ask(invoke, base_gguf)
        path = convert_adapter(style)
        assert ask(invoke, base_gguf, "--adapter", f"{path}:1") == merged
        assert ask(invoke, base_gguf, "--adapter", f"{path}:0.75", "--adapter", f"{style}:0.25") == merged
        assert ask(invoke, base_gguf, "--adapter", f"{path}:0") == ask(invoke, base_gguf)

    def test_a_directory_is_converted_once_and_again_when_it_changes(
        self, style: Path, base: Path, base_gguf: Path, invoke: Run, tmp_path: Path
    ) -> None:
        def run() -> str:
            return expect_exit(invoke("run", str(base_gguf), "--raw", "Hi", "-n", "1", "--adapter", str(style)), 0)

        assert "Converting the adapter style once" in run()
        assert "Converting" not in run()
        write_adapter(style, base, seed=5)
        assert "Converting the adapter style once" in run()
        (kept,) = (tmp_path / "person" / "qwenlocal" / "files" / "adapters").iterdir()
        _make_unread(kept, days=29)
        assert "Converting" not in run()
        for leftover in (kept, kept.with_suffix(".gguf.part")):
            leftover.touch()
            _make_unread(leftover, days=31)
        write_adapter(tmp_path / "tone", base, seed=6)
        expect_exit(invoke("run", str(base_gguf), "--raw", "Hi", "-n", "1", "--adapter", str(tmp_path / "tone")), 0)
        assert [file.name[:5] for file in kept.parent.iterdir()] == ["tone-"]

    @pytest.mark.parametrize(
        ("adapter", "code", "sentence"),
        [
            ("style/nothing", 3, "\n  An adapter is a directory with adapter_config.json, or a .gguf file.\n"),
            ("hf:owner/style:0.5", 3, "hf download owner/style --local-dir style; then: --adapter ./style"),
            ("owner/style", 3, "hf download owner/style --local-dir style"),
            ("./style:much", 2, "“much” is not a scale."),
            ("./style/adapter_config.json:nan", 2, "“nan” is not a scale."),
            ("./style:1000", 2, "The scale of --adapter must be between -100 and 100, not 1,000."),
            ("{base}", 2, "is a model, not an adapter."),
            ("{gguf}", 5, "base.gguf: it is not a LoRA adapter"),
            (".", 5, "Did you mean style?"),
            ("./settings.json", 5, "settings.json: it is not an adapter"),
        ],
    )
    def test_other_things_are_refused(
        self, adapter: str, code: int, sentence: str, style: Path, base: Path, base_gguf: Path, invoke: Run
    ) -> None:
        Path("settings.json").touch()  # in the working directory of the command
        adapter = adapter.format(base=base, gguf=base_gguf)
        message = expect_exit(invoke("run", str(base_gguf), "--raw", "Hi", "--adapter", adapter), code)
        assert sentence in message

    def test_an_adapter_is_checked_before_the_model_is_downloaded(
        self, base: Path, invoke: Run, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "style", base, use_dora=True)
        message = expect_exit(invoke("run", "hf:owner/repo", "Hi", "--adapter", str(folder)), 5)
        assert "the adapter uses DoRA" in message

    def test_run_with_a_remote_engine_has_no_adapters(self, style: Path, invoke: Run) -> None:
        message = expect_exit(invoke("run", "--url", "http://127.0.0.1:1/v1", "Hi", "--adapter", str(style)), 2)
        assert "--adapter" in message

    def test_a_batch_uses_adapters(self, style: Path, base: Path, invoke: Run, tmp_path: Path) -> None:
        chat, merged = (convert_checkpoint(base, tmp_path / "chat.gguf", "f32"), write_merged(base, style))
        (tmp_path / "prompts.txt").write_text("One\nTwo\n")

        def answers(model: Path, *arguments: str) -> list[str]:
            result = invoke("run", str(model), "--batch", "prompts.txt", "-n", "6", "--temp", "0", *arguments)
            expect_exit(result, 0)
            lines = [parse_json(line) for line in result.stdout.splitlines()]
            return [line["answer"] for line in sorted(lines, key=lambda line: line["id"])]

        assert answers(chat, "--adapter", str(style)) == answers(merged) != answers(chat)

    def test_convert_merges_before_quantizing(self, style: Path, base: Path, invoke: Run, tmp_path: Path) -> None:
        command = ("convert", str(base), "--type", "q8_0", "-o")
        message = expect_exit(invoke(*command, "a.gguf", "--merge", f"{style}:0.5"), 0)
        assert "Merged style: 7 matrices, rank 4." in message
        assert data_of(tmp_path / "a.gguf") == data_of(write_merged(base, style, kind="q8_0", weight=0.5))
        expect_exit(invoke(*command, "b.gguf"), 0)
        assert data_of(tmp_path / "a.gguf") != data_of(tmp_path / "b.gguf")
        message = expect_exit(invoke(*command, "c.gguf", "--merge", str(convert_adapter(style))), 2)
        assert "only directories of PEFT can be merged" in message
        assert "There is no adapter ./x on this disk." in expect_exit(invoke(*command, "c.gguf", "--merge", "./x"), 3)

    def test_quantized_checkpoints_are_not_merged(self, tmp_path: Path, style: Path, invoke: Run) -> None:
        packed = tmp_path / "Packed"
        write_packed_checkpoint(packed, "gptq")
        message = expect_exit(invoke("convert", str(packed), "--merge", str(style)), 2)
        assert "An adapter cannot be merged into quantized weights (GPTQ-Int4)." in message
        assert f"qwenlocal run {packed} --adapter {style}; or merge it into the original" in message
        repo = ConversionOptions(repo="Qwen/Qwen1.5-0.5B-GPTQ-Int4", merges=[WeightedAdapter(read_adapter(style))])
        with pytest.raises(UsageError) as caught:
            plan_conversion(Checkpoint.open(packed), [(tmp_path / "x.gguf", file_type("q4_0"))], repo)
        assert f"qwenlocal convert hf:Qwen/Qwen1.5-0.5B --merge {style}" in caught.value.hint

    def test_the_python_api_takes_adapters(
        self, style: Path, base: Path, base_gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("QWENLOCAL_HOME", str(tmp_path / "home"))

        def complete(model: Path, adapters: str | tuple[str | Path, ...] = ()) -> str:
            with qwenlocal.load(model, n_ctx=512, adapters=adapters) as loaded:
                return str(loaded.complete("Once upon", max_tokens=8, temperature=0))

        merged = complete(write_merged(base, style))
        assert complete(base_gguf, (style,)) == complete(base_gguf, str(style)) == merged != complete(base_gguf)
        assert complete(base_gguf, (f"{style}:0.5", convert_adapter(style), f"{style}:-0.5")) == merged

    @pytest.mark.slow
    def test_serve_uses_adapters_for_its_first_model(self, style: Path, base: Path, tmp_path: Path) -> None:
        chat = convert_checkpoint(base, tmp_path / "chat.gguf", "f32")

        def ask_server(model: Path, *arguments: object) -> str:
            with serving(tmp_path / "home", model, "-c", 512, *arguments) as server:
                assert not list((tmp_path / "home" / "servers").glob("*")) or not arguments
                answer_ = server.ask(temperature=0, max_tokens=8).json()
                return str(answer_["choices"][0]["message"]["content"])

        assert ask_server(chat, "--adapter", style) == ask_server(write_merged(base, style)) != ask_server(chat)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a", "a", 1.0), ("a:0.5", "a", 0.5), ("a:-2", "a", -2.0), ("a:.5", "a", 0.5), ("b:2", "b:2", 1.0)],
)
def test_a_scale_follows_a_colon(
    text: str, path: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b:2")
    assert parse_adapter(text) == AdapterRequest(Path(path), scale)


# --- the chat


def test_adapters_are_listed_scaled_and_switched_in_a_chat(terminal: Open, base: Path, tmp_path: Path) -> None:
    chat_model = convert_checkpoint(base, tmp_path / "chat.gguf", "f32")
    for name in ("style", "tone"):
        write_adapter(tmp_path / name, base, targets=LINEAR, seed=len(name))
    chat = start_chat(terminal, chat_model, "--adapter", "./style", "--adapter", "./tone:0.5", "-n", "4")
    chat.enter("/adapter", r"^  style  1\s*\n  tone  0\.5$")
    chat.enter("/adapter style 0.25", r"The next answer reads the chat again.*^  style  0\.25$")
    chat.enter("/adapter off", r"^  style  off\s*\n  tone  off$")
    chat.enter("/adapter tone", r"^  style  off\s*\n  tone  0\.5$")
    chat.enter("/adapter on", r"^  style  1\s*\n  tone  0\.5$")
    chat.enter("/adapter other", "No adapter is called “other”.*style, tone")
    chat.enter("/adapter style much", "“much” is not a scale")
    chat.enter("/adapter style 1e9", "The scale of /adapter must be between -100 and 100")
    chat.enter("Hi", "token limit")
    assert chat.exit() == 0


def test_names_of_adapters_are_completed() -> None:
    models: Any = SimpleNamespace(adapters=SimpleNamespace(scales={"style": 0.5, "tone": 0.0}))
    session = Session(Thread(), "m", models, lambda sentence: None, lambda question: "", [], Path())

    def complete(text: str) -> list[str]:
        return [each.text for each in ChatCompleter(session).get_completions(Document(text), CompleteEvent())]

    assert complete("/adap") == ["/adapter"]
    assert complete("/adapter ") == ["style", "tone", "off", "on"]
    assert complete("/adapter t") == ["tone"]
    models.adapters = None
    assert complete("/adapter ") == ["off", "on"]


def test_a_chat_without_adapters_says_how_to_use_one(terminal: Open, speaking_model: Path) -> None:
    chat = start_chat(terminal, speaking_model)
    chat.enter("/adapter", r"This model runs without adapters.*--adapter ADAPTER")
