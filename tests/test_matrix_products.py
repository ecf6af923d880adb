"""Our own kernels for matrix products in libggml-cpu: the values that the definition of the types gives."""

from __future__ import annotations

import numpy
import pytest
from ggml_graph import Graph
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from qwenlocal import ggml
from qwenlocal.engine.llama import load_library


def multiply(kind: str, weights: numpy.ndarray, columns: numpy.ndarray, threads: int) -> numpy.ndarray:
    """Let ggml compute columns @ weights.T, with packed weights of one type."""
    count, width = columns.shape
    with Graph() as graph:
        packed = graph.tensor(ggml.tensor_type(kind).number, weights, (len(weights), width))
        product = graph.call("ggml_mul_mat", packed, graph.tensor(0, columns))
        return graph.compute(product, (count, len(weights)), threads)


def random_columns(count: int, width: int) -> numpy.ndarray:
    """Return integers from -127 to 127, which Q8_0 stores without loss: one of each 32 is 127."""
    columns = numpy.random.default_rng(5).integers(-127, 128, (count, width)).astype(numpy.float32)
    columns[:, ::32] = 127
    return columns


def random_weights(kind: str, rows: int, width: int) -> numpy.ndarray:
    random = numpy.random.default_rng(6)
    scales = 10.0 ** random.integers(-6, 2, (rows, width // 32)).repeat(32, axis=1)
    numbers = (random.standard_normal((rows, width)) * scales).astype(numpy.float32)
    return quantize(numbers, GGMLQuantizationType[kind.upper()])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 32, 1), (16, 64, 1), (33, 96, 2), (40, 32, 13), (100, 128, 47), (7, 4864, 25)]
)
@pytest.mark.parametrize("kind", ["q5_0", "q8_0", "q4_0"])
def test_products_are_those_of_the_unpacked_values(kind, rows, width, count, threads):
    weights, columns = random_weights(kind, rows, width), random_columns(count, width)
    values = dequantize(weights, GGMLQuantizationType[kind.upper()]).astype(numpy.float64)
    result = multiply(kind, weights, columns, threads)
    exact, size = columns @ values.T, numpy.abs(columns) @ numpy.abs(values.T)
    assert numpy.all(numpy.abs(result - exact) <= 1e-6 * size)


@pytest.mark.parametrize("kind", ["q5_0", "q8_0"])
def test_the_largest_and_smallest_values_do_not_overflow(kind):
    highest = {"q5_0": numpy.float32([-16, 15]), "q8_0": numpy.float32([-127, 127])}[kind]
    weights = quantize(numpy.tile(highest, (16, 512)).astype(numpy.float32), GGMLQuantizationType[kind.upper()])
    values = dequantize(weights, GGMLQuantizationType[kind.upper()])
    for columns in (numpy.tile(numpy.float32([-127, 127]), (3, 512)), numpy.full((3, 1024), 127, numpy.float32)):
        assert numpy.array_equal(multiply(kind, weights, columns, 2), columns @ values.T)


@pytest.mark.parametrize("kind", ["q5_0", "q8_0"])
def test_the_product_of_a_column_does_not_depend_on_the_others(kind):
    if not any(f"{feature} = 1" in load_library().system_info for feature in ("AVX512_VNNI", "AVX_VNNI")):
        pytest.skip("our kernels need a processor with AVX512-VNNI or AVX-VNNI")
    weights, columns = random_weights(kind, 100, 896), random_columns(30, 896)
    pairs = numpy.concatenate([multiply(kind, weights, columns[i : i + 2], 1) for i in range(0, 30, 2)])
    assert numpy.array_equal(multiply(kind, weights, columns, 2), pairs)
