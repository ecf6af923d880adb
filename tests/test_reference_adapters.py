"""
Adapters give what llama.cpp gives with its own converter's file, and what transformers and PEFT compute.

Their programs need torch: make test-reference
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
from adapter_files import ATTENTION, EVERYTHING, LINEAR, convert_adapter, write_adapter
from checkpoint_files import convert_checkpoint
from oracle import data_of
from test_reference_convert import llama_cpp

from qwenlocal.engine.adapters import LoadedAdapters
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.testing import CONFIG, MOE_CONFIG, write_checkpoint
from qwenlocal.weights.adapter import read_adapter
from qwenlocal.weights.adapter_merge import WeightedAdapter
from qwenlocal.weights.adapter_spec import AdapterSpec
from qwenlocal.weights.gguf_reader import read_header, read_raw_metadata

pytestmark = [pytest.mark.reference, pytest.mark.slow, pytest.mark.filterwarnings("default")]

PROMPT = [(7 * n) % 250 for n in range(60)]
QUERY, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
DENSE_PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"q_proj": 3}}


@pytest.fixture(autouse=True, scope="module")
def _reference_programs() -> None:
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make test-reference installs it")


def convert_as_llama_cpp(folder: Path, base: Path, kind: str = "f32") -> Path:
    program, target = llama_cpp() / "convert_lora_to_gguf.py", folder.with_suffix(".theirs.gguf")
    command = [program, "--base", base, "--outtype", kind, "--outfile", target, folder]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def logits_of(path: Path, *adapters: AdapterSpec) -> numpy.ndarray:
    """Return the logits after each token of the prompt."""
    with closing(Model(path)) as model:
        LoadedAdapters(model, adapters)
        options = ContextOptions(
            256, threads=1, n_seq_max=len(PROMPT), key_type="f32", value_type="f32", flash_attention=False
        )
        with closing(Context(model, options)) as context:
            (row,) = context.decode([(0, PROMPT)], all_logits=(0,))
            count = len(model.tokenizer)
            return numpy.array([context.logits(row + place)[:count] for place in range(len(PROMPT))])


def logits_of_peft(base: Path, *adapters: Path) -> numpy.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, adapter in enumerate(adapters):
        if number:
            model.load_adapter(adapter, adapter_name=str(number))
        else:
            model = PeftModel.from_pretrained(model, adapter, adapter_name="0")
    if adapters:
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    with torch.no_grad():
        return numpy.asarray(model(torch.tensor([PROMPT])).logits[0].numpy())


def assert_close(ours: numpy.ndarray, theirs: numpy.ndarray) -> None:
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "mixture"])
def test_files_have_the_tensors_of_llama_cpps_converter(
    config: dict[str, Any], dtype: str, kind: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "Base", config=config, dtype="F32")
    folder = write_adapter(tmp_path / "style", base, targets=EVERYTHING, dtype=dtype, rank=8)
    ours, theirs = convert_adapter(folder, kind), convert_as_llama_cpp(folder, base, kind)
    shapes = [{tensor.name: tensor.shape for tensor in read_header(path).tensors} for path in (ours, theirs)]
    assert shapes[0] == shapes[1]
    mine, others = data_of(ours), data_of(theirs)
    assert [name for name in mine if mine[name] != others[name]] == []
    keys = [read_raw_metadata(path) for path in (ours, theirs)]
    for key in (
        "general.architecture",
        "general.type",
        "adapter.type",
        "adapter.lora.alpha",
        "general.quantization_version",
    ):
        assert keys[0][key] == keys[1][key], key


@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "mixture"])
def test_llama_cpp_computes_the_same_with_both_files(config: dict[str, Any], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "Base", config=config, dtype="F32")
    model = convert_checkpoint(base, tmp_path / "base.gguf", "f32")
    folder = write_adapter(tmp_path / "style", base, targets=EVERYTHING, size=0.5)
    ours, theirs = convert_adapter(folder), convert_as_llama_cpp(folder, base)
    assert (logits_of(model, AdapterSpec("x", ours)) == logits_of(model, AdapterSpec("x", theirs))).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"fan_in_fan_out": True},
        {"ranks": {QUERY: 2, "model.layers.1.self_attn.q_proj": 2, UP: 6}, **DENSE_PATTERNS},
        {"ranks": {QUERY: 2, "model.layers.1.self_attn.q_proj": 2, UP: 6}, **DENSE_PATTERNS, "use_rslora": True},
        {"dtype": "BF16"},
        {"targets": EVERYTHING},
        {"targets": ATTENTION, "rank": 1},
    ],
    ids=str,
)
def test_logits_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "Base", dtype="F32")
    settings = {"targets": LINEAR, "size": 0.5, "task_type": "CAUSAL_LM", **options}
    folder = write_adapter(tmp_path / "style", base, **settings)
    model = convert_checkpoint(base, tmp_path / "base.gguf", "f32")
    expected = logits_of_peft(base, folder)
    assert_close(logits_of(model, AdapterSpec("style", convert_adapter(folder))), expected)
    merged = convert_checkpoint(base, tmp_path / "m.gguf", "f32", merges=[WeightedAdapter(read_adapter(folder))])
    assert_close(logits_of(merged), expected)
    assert abs(expected - logits_of_peft(base)).max() > 0.1 * abs(expected).max()


def test_several_adapters_are_those_of_peft(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "Base", dtype="F32")
    folders = [
        write_adapter(tmp_path / f"style{seed}", base, targets=LINEAR, size=0.5, seed=seed, rank=rank)
        for seed, rank in ((1, 4), (2, 8))
    ]
    model = convert_checkpoint(base, tmp_path / "base.gguf", "f32")
    specs = [AdapterSpec(folder.name, convert_adapter(folder)) for folder in folders]
    assert_close(logits_of(model, *specs), logits_of_peft(base, *folders))


def test_an_adapter_that_peft_saved_is_read(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_checkpoint(tmp_path / "Base", dtype="F32")
    settings = LoraConfig(
        r=8, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=False, rank_pattern={"down_proj": 4},
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"],
    )  # fmt: skip
    torch.manual_seed(0)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    adapted.save_pretrained(tmp_path / "saved")
    model = convert_checkpoint(base, tmp_path / "base.gguf", "f32")
    with torch.no_grad():
        expected = numpy.asarray(adapted(torch.tensor([PROMPT])).logits[0].numpy())
    assert_close(logits_of(model, AdapterSpec("saved", convert_adapter(tmp_path / "saved"))), expected)
