"""Packed checkpoints (GPTQ, AWQ) in the shapes of published models, as large as the real ones, with random codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from random_checkpoint import SHAPES

from qwenlocal.testing import checkpoint_shapes

_GROUP = 128
_BLOCK = 1 << 24  # random bytes; longer tensors repeat them
_SYMMETRIC = {4: 0x77777777, 8: 0x7F7F7F7F}  # the zero points of GPTQ, minus 1


def write_packed_checkpoint(folder: Path, shape: str, layout: str, bits: int, tokenizer: dict[str, Any]) -> Path:
    """Write a checkpoint of a shape in `SHAPES`, unless `folder` has one. `layout` is "gptq" or "gemm" (AWQ)."""
    complete = folder / "whole"
    if complete.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPES[shape])
    tensors = sorted(_tensors(config, layout, bits), key=lambda entry: (entry[1] != "I32", entry[0]))  # as safetensors
    header, offset = {}, 0
    for name, dtype, dimensions in tensors:
        size = int(numpy.prod(dimensions)) * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": list(dimensions), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, dimensions in tensors:
            file.write(_data(name, dtype, dimensions, layout, bits))
    method = {"quant_method": "gptq", "sym": True, "desc_act": False} if layout == "gptq" else {
        "quant_method": "awq", "version": layout, "zero_point": True
    }  # fmt: skip
    config["quantization_config"] = {**method, "bits": bits, "group_size": _GROUP}
    (folder / "config.json").write_text(json.dumps(config))
    for name, document in tokenizer.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    complete.touch()
    return folder


def _tensors(config: dict[str, Any], layout: str, bits: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    per_word = 32 // bits
    for name, dimensions in checkpoint_shapes(config).items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            yield name, "F16", dimensions
            continue
        rows, columns = dimensions
        groups = -(-columns // _GROUP)
        if layout == "gptq":
            yield f"{module}.qweight", "I32", (columns // per_word, rows)
            yield f"{module}.g_idx", "I32", (columns,)
        else:
            yield f"{module}.qweight", "I32", (columns, rows // per_word)
        yield f"{module}.qzeros", "I32", (groups, rows // per_word)
        yield f"{module}.scales", "F16", (groups, rows)


def _data(name: str, dtype: str, dimensions: tuple[int, ...], layout: str, bits: int) -> bytes:
    count = int(numpy.prod(dimensions))
    random = numpy.random.default_rng(list(name.encode()))
    if name.endswith("g_idx"):
        return (numpy.arange(count) // _GROUP).astype(numpy.int32).tobytes()
    if name.endswith("qzeros") and layout == "gptq":
        return numpy.full(count, _SYMMETRIC[bits], numpy.uint32).tobytes()
    if dtype == "I32":
        block = random.bytes(min(_BLOCK, 4 * count))
        return (block * (4 * count // len(block) + 1))[: 4 * count]
    values = random.standard_normal(min(count, _BLOCK), numpy.float32) * numpy.float32(0.02)
    if name.endswith("scales"):
        values = abs(values) / numpy.float32(1 << bits) + numpy.float32(0.001)
    return numpy.resize(values.astype(numpy.float16), count).tobytes()
