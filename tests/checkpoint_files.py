"""Builders of small checkpoints, changes to them, and plans and conversions of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest

from qwenlocal.errors import BadCheckpoint, BadWeights
from qwenlocal.testing import CONFIG, MOE_CONFIG, as_dtype, write_checkpoint, write_safetensors
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata
from qwenlocal.weights.safetensors import read_tensors
from qwenlocal.weights.vocabulary import Vocabulary
from qwenlocal.weights.vocabulary_reader import read_vocabulary
from qwenlocal.weights.write_job import WriteJob
from qwenlocal.weights.write_workers import run_job

MINIMAL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_hidden_layers": 1}  # fmt: skip


MINIMAL_MOE = {**MOE_CONFIG, **MINIMAL, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


# Rows of 36 numbers, so that there are gaps between the tensors.
UNALIGNED = {"hidden_size": 36, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}


# About a second of work for one thread, in 30 chunks: long enough to be interrupted in the middle.
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 3072}


VOCAB_SIZE = CONFIG["vocab_size"]


INDEX = "model.safetensors.index.json"


UP_PROJ = "model.layers.0.mlp.up_proj.weight"


FRONT_MATTER = """---
license: other
license_name: tongyi-qianwen
license_link: https://example.org/LICENSE
language:
- en
- no
tags: [chat]
pipeline_tag: text-generation
base_model: Qwen/Qwen1.5-0.5B
datasets: [o/d]
---
# A model
"""


def write_minimal(folder: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Write a checkpoint of one layer, 32 wide."""
    return write_checkpoint(folder / "model", config={**MINIMAL, **(config or {})}, **options)


def set_json(folder: Path, file: str, **values: Any) -> Path:
    """Set values in a JSON file of a checkpoint; `...` removes a key."""
    path = folder / file
    document = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    return folder


def set_bpe_model(folder: Path, **values: Any) -> Path:
    """Set values of "model" in tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return set_json(folder, "tokenizer.json", model={**model, **values})


def load_vocab(folder: Path) -> dict[str, int]:
    vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return vocab


def set_weights(folder: Path, name: str, row: int, *values: float, dtype: str = "BF16") -> None:
    """Overwrite the first numbers of a row of a tensor."""
    stored = Checkpoint.open(folder).tensors[name]
    columns = stored.shape[-1] if len(stored.shape) > 1 else 1
    with numpy.errstate(over="ignore"):
        data = as_dtype(numpy.array(values, numpy.float32), dtype)
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + row * columns * stored.size // math.prod(stored.shape))
        file.write(data)


def rename_tensors(folder: Path, rename: Callable[[str], str], more: Mapping[str, tuple[int, ...]] = {}) -> Path:
    """Rename the tensors of a checkpoint in one file, and add `more` of zeros, by name and shape."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    stored = {
        rename(tensor.name): (tensor.dtype, tensor.shape, data[tensor.offset : tensor.offset + tensor.size])
        for tensor in read_tensors(path)
    }
    zeros = {name: ("BF16", shape, bytes(2 * math.prod(shape))) for name, shape in more.items()}
    write_safetensors(path, {**stored, **zeros})
    return folder


def flip_bit(path: Path, at: int = -1) -> bytes:
    """Flip one bit of a file; returns the content before."""
    before = path.read_bytes()
    content = bytearray(before)
    content[at] ^= 1
    path.write_bytes(content)
    return before


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_plan(folder: Path, **options: Any) -> ConversionPlan:
    """Plan a conversion to f16, which reads everything and writes nothing."""
    return plan_conversion(
        Checkpoint.open(folder), [(folder / "out.gguf", file_type("f16"))], ConversionOptions(**options)
    )


def plan_metadata(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the keys of the planned GGUF file."""
    path = folder / "header"
    path.write_bytes(make_plan(folder, **options).job.outputs[0].header)
    return {key: decode_value(value) for key, value in read_raw_metadata(path).items()}


def plan_tensor_names(folder: Path) -> set[str]:
    """Return the tensor names of the planned GGUF file."""
    return {tensor.name for tensor in make_plan(folder).files[0].tensors}


def load_vocabulary(folder: Path, size: int = VOCAB_SIZE, **options: Any) -> Vocabulary:
    config = json.loads((folder / "config.json").read_text())
    return read_vocabulary(folder, config, size, **options)


def plan_job(source: Path, *targets: Path) -> WriteJob:
    """Plan a conversion of `source` to files named after their types, such as "x.q8_0.gguf"."""
    outputs = [(target, file_type(target.suffixes[-2][1:])) for target in targets]
    return plan_conversion(Checkpoint.open(source), outputs, ConversionOptions(name="tiny")).job


def convert_checkpoint(source: Path, target: Path, kind: str, *, threads: int = 1, **options: Any) -> Path:
    plan = plan_conversion(Checkpoint.open(source), [(target, file_type(kind))], ConversionOptions(**options))
    run_job(plan.job, threads=threads)
    return target


def read_tensor(folder: Path, name: str) -> bytes:
    stored = Checkpoint.open(folder).tensors[name]
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.size)


def expect_refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value.reason


def assert_planned_or_refused(folder: Path) -> None:
    try:
        make_plan(folder)
    except BadWeights as refused:
        assert str(folder) in str(refused)
        assert refused.hint
