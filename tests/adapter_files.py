"""LoRA adapters as PEFT writes them, with random values; converted, merged, and what they add to a matrix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from checkpoint_files import MINIMAL_MOE, SMALL, convert_checkpoint, set_json

from qwenlocal.testing import CONFIG, as_dtype, checkpoint_shapes, write_checkpoint, write_safetensors
from qwenlocal.weights.adapter import read_adapter
from qwenlocal.weights.adapter_file import plan_adapter
from qwenlocal.weights.adapter_merge import WeightedAdapter
from qwenlocal.weights.checkpoint import Checkpoint, read_config
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import read_metadata
from qwenlocal.weights.safetensors import read_tensors
from qwenlocal.weights.write_workers import run_job

ATTENTION = (r"self_attn\.[qkvo]_proj",)
LINEAR = (*ATTENTION, r"mlp\.(shared_expert\.|experts\.\d+\.)?(gate|up|down)_proj")
EVERYTHING = (*LINEAR, r"mlp\.gate", r"mlp\.shared_expert_gate", "lm_head", "embed_tokens")
DTYPES = {"F32": numpy.float32, "F16": numpy.float16}


def write_adapter(
    folder: Path,
    base: Path | None = None,
    *,
    targets: Sequence[str] = ATTENTION,
    rank: int = 4,
    ranks: Mapping[str, int] = {},
    dtype: str = "F32",
    seed: int = 0,
    size: float = 1.0,
    tensors: Mapping[str, tuple[int, ...] | None] = {},
    **config: Any,
) -> Path:
    """
    Write an adapter for the checkpoint `base` (by default one of `CONFIG`) that changes the modules matching `targets`.

    `ranks` are ranks by the name of a module; `size` multiplies the values. `tensors` adds tensors by name and shape,
    or removes them (None); `config` overrides adapter_config.json, where `...` removes a key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(seed)
    stored: dict[str, tuple[str, tuple[int, ...], bytes]] = {}

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, numpy.float32) * numpy.float32(size / shape[-1] ** 0.5)
        stored[name] = (dtype, shape, as_dtype(values, dtype))

    for name, shape in checkpoint_shapes(read_config(base) if base else CONFIG).items():
        module = name.removesuffix(".weight")
        if module == name or not any(re.fullmatch(rf"(.*\.)?({target})", module) for target in targets):
            continue
        rows, columns = shape
        r = ranks.get(module, rank)
        if module.endswith("embed_tokens"):
            add(f"base_model.model.{module}.lora_embedding_A", r, rows)
            add(f"base_model.model.{module}.lora_embedding_B", columns, r)
        else:
            add(f"base_model.model.{module}.lora_A.weight", r, columns)
            add(f"base_model.model.{module}.lora_B.weight", rows, r)
    for name, more in tensors.items():
        stored.pop(name, None)
        if more is not None:
            add(name, *more)
    write_safetensors(folder / "adapter_model.safetensors", stored)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base) if base else "Qwen/Tiny",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": rf"(.*\.)?({'|'.join(targets)})",
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": dict(ranks),
        "alpha_pattern": {},
        "init_lora_weights": True,
        "loftq_config": {},
        **config,
    }
    settings = {key: value for key, value in settings.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def read_factors(folder: Path) -> dict[str, numpy.ndarray]:
    """Return A and B by their names without the prefix, as float32."""
    factors = {}
    for tensor in read_tensors(folder / "adapter_model.safetensors"):
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.size]
        if tensor.dtype == "BF16":
            values = (numpy.frombuffer(data, numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
        else:
            values = numpy.frombuffer(data, DTYPES[tensor.dtype]).astype(numpy.float32)
        factors[tensor.name.removeprefix("base_model.model.")] = values.reshape(tensor.shape)
    return factors


def change_of(folder: Path, module: str, scale: float) -> numpy.ndarray:
    """Return scale·B·A of a module, by the definition, in float64."""
    factors = read_factors(folder)
    if f"{module}.lora_embedding_A" in factors:
        a, b = factors[f"{module}.lora_embedding_A"], factors[f"{module}.lora_embedding_B"]
        return numpy.asarray(scale * (b.astype(float) @ a.astype(float)).T)
    a, b = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
    return numpy.asarray(scale * (b.astype(float) @ a.astype(float)))


def convert_adapter(folder: Path, kind: str = "f32") -> Path:
    """Convert an adapter to a GGUF file next to its folder."""
    target = folder.with_suffix(f".{kind}.gguf")
    run_job(plan_adapter(read_adapter(folder), [(target, file_type(kind))]).job, threads=1, replace=True)
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


def plan_merge(source: Path, *adapters: Path, kind: str = "f32", weight: float = 1.0) -> ConversionPlan:
    """Plan to merge adapters into a checkpoint, in a file next to it."""
    merges = [WeightedAdapter(read_adapter(adapter), weight) for adapter in adapters]
    target = source.parent / f"merged-{len(adapters)}.gguf"
    return plan_conversion(Checkpoint.open(source), [(target, file_type(kind))], ConversionOptions(merges=merges))


def write_merged(source: Path, *adapters: Path, kind: str = "f32", weight: float = 1.0) -> Path:
    """Merge adapters into a checkpoint, and write the file."""
    plan = plan_merge(source, *adapters, kind=kind, weight=weight)
    run_job(plan.job, threads=2, replace=True)
    return plan.files[0].path


def write_untied(tied: Path, folder: Path) -> Path:
    """Return a copy whose config.json says that the output matrix is its own, so that adapters change it."""
    return set_json(Path(shutil.copytree(tied, folder)), "config.json", tie_word_embeddings=False)


# --- fixtures: base models that no test changes


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint whose output matrix is its own."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "Base", config=SMALL, dtype="F32")


@pytest.fixture(scope="session")
def base_gguf(base: Path) -> Path:
    return convert_checkpoint(base, base.parent / "base.gguf", "f32")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one matrix for embeddings and output."""
    config = {**SMALL, "tie_word_embeddings": True}
    return write_checkpoint(tmp_path_factory.mktemp("tied") / "Tied", config=config, dtype="F32")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts."""
    return write_checkpoint(tmp_path_factory.mktemp("mixture") / "Mixture", config=MINIMAL_MOE, dtype="F32")
