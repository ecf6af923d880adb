"""
Layers packed by AutoGPTQ and AutoAWQ themselves become GGUF tensors without rounding.

Their layers are plain PyTorch: make test-reference
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from packing import PackedLayer, Tensors, packed_matrix, round_weights

from qwenlocal.testing import write_safetensors
from qwenlocal.weights.gguf_reader import read_header
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.source_files import SourceFiles
from qwenlocal.weights.tensor_values import read_values

pytestmark = [pytest.mark.reference, pytest.mark.slow, pytest.mark.filterwarnings("default")]

DTYPES = {"torch.int32": "I32", "torch.float16": "F16"}


def import_module(package: str, name: str) -> Any:
    """Import one module of an installed package, without the packages around it, which need CUDA or old libraries."""
    root = next((Path(folder) / package for folder in sys.path if (Path(folder) / package).is_dir()), None)
    if root is None:
        pytest.skip(f"{package} is not installed: make test-reference")
    parts = name.split(".")
    for depth in range(len(parts)):
        stub = types.ModuleType(".".join([package, *parts[:depth]]))
        stub.__path__ = [str(root.joinpath(*parts[:depth]))]
        sys.modules.setdefault(stub.__name__, stub)
    return importlib.import_module(f"{package}.{name}")


def random_layer(bits: int, group_size: int, *, symmetric: bool) -> PackedLayer:
    layer = PackedLayer(384, 256, bits, group_size, symmetric)
    layer.zeros = layer.zeros.clip(1)  # AutoGPTQ stores 0 − 1 as a negative number, which damages its neighbors
    return layer


@pytest.fixture(params=["random", "starter"])
def make_layer(request: pytest.FixtureRequest) -> Any:
    """Make a layer of random codes, or of a real model's weights."""
    if request.param == "random":
        return random_layer
    starter: Path = request.getfixturevalue("starter")
    tensor = next(each for each in read_header(starter).tensors if each.name == "blk.3.ffn_down.weight")
    values = numpy.concatenate(list(read_values(tensor))).reshape(-1, tensor.shape[0])[:256]

    def make(bits: int, group_size: int, *, symmetric: bool) -> PackedLayer:
        return round_weights(values, bits, group_size, symmetric=symmetric)

    return make


def linear(layer: PackedLayer) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-reference")
    module = torch.nn.Linear(layer.columns, layer.rows, bias=False).half()
    module.weight.data = torch.from_numpy(layer.weights.astype(numpy.float16))
    return module


def tensors_of(module: Any) -> Tensors:
    return {
        name: (DTYPES[str(tensor.dtype)], tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        for name, tensor in module.state_dict().items()
    }


def assert_exact(layer: PackedLayer, layout: str, tensors: Tensors, path: Path) -> None:
    write_safetensors(path, tensors)
    matrix = packed_matrix(layer, layout, path, write=False)
    for kind in matrix.exact_types:
        source = PackedRows(matrix, kind)
        encoded = numpy.empty(layer.rows * kind.row_bytes(layer.columns), numpy.uint8)
        with SourceFiles(source.files) as reader:
            source.read(0, encoded.data, reader)
        values = gguf.dequantize(encoded.reshape(layer.rows, -1), gguf.GGMLQuantizationType(kind.number))
        assert (values == layer.weights).all(), kind.name


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_autogptq(make_layer: Any, bits: int, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-reference")
    layer = make_layer(bits, group_size, symmetric=symmetric)
    quantizer = import_module("auto_gptq", "nn_modules.qlinear.qlinear_cuda_old")
    module = quantizer.QuantLinear(bits, group_size, layer.columns, layer.rows, bias=False)
    scales, zeros = (torch.from_numpy(part.T.astype(numpy.float32)) for part in (layer.scales, layer.zeros))
    module.pack(linear(layer).float(), scales, zeros, None)
    module.scales = module.scales.half()
    assert_exact(layer, "gptq", tensors_of(module), tmp_path / "x.safetensors")


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_autoawq(make_layer: Any, layout: str, group_size: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-reference")
    layer = make_layer(4, group_size, symmetric=False)
    packer = import_module("awq", f"modules.linear.{layout}")
    scales, zeros = (torch.from_numpy(part.astype(numpy.float32)) for part in (layer.scales, layer.zeros))
    if layout == "gemv":
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    kind = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV"}[layout]
    module = getattr(packer, kind).from_linear(linear(layer).float(), 4, group_size, False, scales, zeros)
    assert_exact(layer, layout, tensors_of(module), tmp_path / "x.safetensors")
