"""Checkpoints packed by GPTQ and AWQ, written from the published layouts, and the values they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from qwenlocal.testing import write_checkpoint, write_safetensors
from qwenlocal.weights.packed_matrix import PackedMatrix
from qwenlocal.weights.safetensors import read_tensors

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, gemm.py: order_map


@dataclass
class PackedLayer:
    """
    Random codes of a layer with `columns` inputs and `rows` outputs: q (columns, rows), z and s (groups, rows).

    `order` is the group of each column.
    """

    columns: int
    rows: int
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    shuffled: bool = False
    seed: int = 0
    codes: numpy.ndarray = field(init=False)
    zeros: numpy.ndarray = field(init=False)
    scales: numpy.ndarray = field(init=False)
    order: numpy.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = numpy.random.default_rng([self.seed, self.columns, self.rows])
        size = self.columns if self.group_size == -1 else self.group_size
        groups, middle = math.ceil(self.columns / size), 1 << (self.bits - 1)
        self.codes = random.integers(0, 2 * middle, (self.columns, self.rows))
        shape = (groups, self.rows)
        self.zeros = numpy.full(shape, middle) if self.symmetric else random.integers(0, 2 * middle, shape)
        width = 0.5 / self.columns**0.5 / middle
        self.scales = (random.uniform(0.5, 1.5, shape) * width).astype(numpy.float16)
        self.order = numpy.arange(self.columns) // size
        if self.shuffled:
            random.shuffle(self.order)

    @property
    def weights(self) -> numpy.ndarray:
        """The weights (rows, columns), in float64: s·(q − z)."""
        result: numpy.ndarray = (
            self.scales.astype(numpy.float64)[self.order] * (self.codes - self.zeros[self.order])
        ).T
        return result


def round_weights(values: numpy.ndarray, bits: int, group_size: int, *, symmetric: bool) -> PackedLayer:
    """Round the weights (rows, columns) of a real layer to the nearest codes."""
    rows, columns = values.shape
    layer = PackedLayer(columns, rows, bits, group_size, symmetric)
    size, top = columns if group_size == -1 else group_size, (1 << bits) - 1
    for group in range(math.ceil(columns / size)):
        part = values[:, group * size : (group + 1) * size]
        low, high = part.min(1), part.max(1)
        if symmetric:
            high = numpy.maximum(abs(low), high)
            low = -high
        scale = (numpy.maximum(high - low, 1e-5) / top).astype(numpy.float16)
        layer.scales[group] = scale
        zero = numpy.full(rows, 1 << (bits - 1)) if symmetric else (-low / scale).round().clip(1, top).astype(int)
        layer.zeros[group] = zero
        codes = (part / scale[:, None].astype(numpy.float32)).round() + zero[:, None]
        layer.codes[group * size : (group + 1) * size] = codes.clip(0, top).T.astype(int)
    return layer


def pack_words(values: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Pack along the first axis, from the lowest bits on: (n · 32/bits, …) to (n, …)."""
    per_word = 32 // bits
    words = numpy.zeros((values.shape[0] // per_word, *values.shape[1:]), numpy.uint32)
    for number, value in enumerate(values):
        words[number // per_word] |= (value << (bits * (number % per_word))).astype(numpy.uint32)
    return words


def pack_gptq(layer: PackedLayer, *, version: int = 1) -> Tensors:
    """Pack as AutoGPTQ does (version 1 stores z − 1), or as "gptq_v2"."""
    mask = (1 << layer.bits) - 1
    stored = (layer.zeros - (1 if version == 1 else 0)) & mask
    return {
        "qweight": _tensor(pack_words(layer.codes, layer.bits), "I32"),
        "qzeros": _tensor(pack_words(stored.T, layer.bits).T, "I32"),
        "scales": _tensor(layer.scales, "F16"),
        "g_idx": _tensor(layer.order.astype(numpy.int32), "I32"),
    }


def pack_gemm(layer: PackedLayer) -> Tensors:
    """Pack as AutoAWQ's WQLinear_GEMM: along the outputs, in its order."""

    def pack(values: numpy.ndarray) -> numpy.ndarray:
        words = numpy.zeros((values.shape[0], values.shape[1] // 8), numpy.uint32)
        for word in range(words.shape[1]):
            for position, row in enumerate(_AWQ_ORDER):
                words[:, word] |= (values[:, 8 * word + row] << (4 * position)).astype(numpy.uint32)
        return words

    return {
        "qweight": _tensor(pack(layer.codes), "I32"),
        "qzeros": _tensor(pack(layer.zeros), "I32"),
        "scales": _tensor(layer.scales, "F16"),
    }


def pack_gemv(layer: PackedLayer) -> Tensors:
    """Pack as AutoAWQ's WQLinear_GEMV: along the inputs; zero points and scales are padded to whole words."""
    groups = layer.zeros.shape[0]
    multiple = {64: 2, 32: 4}.get(layer.group_size, 1)
    width = math.ceil(math.ceil(groups / 8) / multiple) * multiple
    zeros = numpy.zeros((layer.rows, width * 8), numpy.int64)
    zeros[:, :groups] = layer.zeros.T
    scales = numpy.zeros((layer.rows, width * 8), numpy.float16)
    scales[:, :groups] = layer.scales.T
    return {
        "qweight": _tensor(pack_words(layer.codes, 4).T, "I32"),
        "qzeros": _tensor(pack_words(zeros.T, 4).T, "I32"),
        "scales": _tensor(scales, "F16"),
    }


PACKERS = {
    "gptq": pack_gptq,
    "gptq_v2": lambda layer: pack_gptq(layer, version=2),
    "gemm": pack_gemm,
    "gemv": pack_gemv,
}


def write_packed_checkpoint(
    folder: Path,
    layout: str = "gptq",
    *,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    zero_biases: bool = False,
    **layer_options: Any,
) -> dict[str, numpy.ndarray]:
    """
    Write a checkpoint whose linear layers are packed; `layer_options` are those of `PackedLayer`.

    Returns the weights of the packed layers by their names. `settings` overrides "quantization_config".
    """
    write_checkpoint(folder, config=dict(config or {}), dtype="F16")
    path = folder / "model.safetensors"
    data, tensors, weights = path.read_bytes(), Tensors(), {}
    for number, stored in enumerate(read_tensors(path)):
        module, _, kind = stored.name.rpartition(".")
        if kind != "weight" or not module.endswith("_proj"):
            tensors[stored.name] = (stored.dtype, stored.shape, data[stored.offset : stored.offset + stored.size])
            continue
        rows, columns = stored.shape
        layer = PackedLayer(columns, rows, seed=number, **layer_options)
        tensors |= {f"{module}.{part}": tensor for part, tensor in PACKERS[layout](layer).items()}
        if zero_biases and f"{module}.bias" not in tensors and not module.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{module}.bias"] = ("F16", (rows,), bytes(2 * rows))
        weights[module] = layer.weights
    write_safetensors(path, tensors)
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {**quantization_settings(layout, layer_options), **(settings or {})}
    (folder / "config.json").write_text(json.dumps(document))
    return weights


def quantization_settings(layout: str, options: Mapping[str, Any]) -> dict[str, Any]:
    group_size, bits = options.get("group_size", 128), options.get("bits", 4)
    if layout in ("gemm", "gemv"):
        return {"quant_method": "awq", "bits": bits, "group_size": group_size, "version": layout, "zero_point": True}
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": options.get("symmetric", True),
        "desc_act": options.get("shuffled", False), "damp_percent": 0.01, "true_sequential": True,
        **({"checkpoint_format": layout} if layout == "gptq_v2" else {}),
    }  # fmt: skip


def _tensor(values: numpy.ndarray, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, values.shape, numpy.ascontiguousarray(values).tobytes()


# --- changes to packed checkpoints


def read_array(folder: Path, name: str) -> numpy.ndarray:
    """Return a tensor of a checkpoint in one file."""
    stored = next(tensor for tensor in read_tensors(folder / "model.safetensors") if tensor.name == name)
    dtype = {"I32": numpy.int32, "F16": numpy.float16}[stored.dtype]
    data = (folder / "model.safetensors").read_bytes()[stored.offset : stored.offset + stored.size]
    return numpy.frombuffer(data, dtype).reshape(stored.shape)


def rewrite_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    tensors = {
        stored.name: (stored.dtype, stored.shape, data[stored.offset : stored.offset + stored.size])
        for stored in read_tensors(path)
    }
    change(tensors)
    write_safetensors(path, tensors)


def replace_tensor(folder: Path, name: str, tensor: tuple[str, tuple[int, ...], bytes]) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def change_tensor(
    folder: Path, name: str, change: Callable[[numpy.ndarray], numpy.ndarray], kind: type[numpy.generic] = numpy.int32
) -> None:
    """Replace the values of a tensor, which keeps its type."""

    def replace(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        with numpy.errstate(all="ignore"):
            values = change(numpy.frombuffer(data, kind))
        tensors[name] = (dtype, shape, values.astype(kind).tobytes())

    rewrite_tensors(folder, replace)


def remove_tensors(folder: Path, part: str) -> None:
    """Remove all tensors with `part` in their names."""

    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    rewrite_tensors(folder, remove)


def packed_matrix(layer: PackedLayer, layout: str, path: Path, *, write: bool = True) -> PackedMatrix:
    """Describe a layer in a file of its own, which is written unless another packer wrote it."""
    if write:
        write_safetensors(path, PACKERS[layout](layer))
    tensors = {tensor.name: tensor for tensor in read_tensors(path)}
    return PackedMatrix(
        layout=layout.removesuffix("_v2"),
        bits=layer.bits,
        group_size=layer.columns if layer.group_size == -1 else layer.group_size,
        rows=layer.rows,
        columns=layer.columns,
        weight=tensors["qweight"],
        scales=tensors["scales"],
        zeros=tensors["qzeros"],
        groups=tensors["g_idx"] if layer.shuffled else None,
        zero_offset=1 if layout == "gptq" else 0,
        is_symmetric=layer.symmetric,
    )
