"""Our own quantizers: the same bytes as ggml's, compared with them."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qwenlocal import ggml

TYPES = ("q4_k", "q5_k", "q6_k", "q8_0")
BLOCK = 256


def quantize_both(kind: str, numbers: numpy.ndarray) -> tuple[bytes, bytes]:
    """Quantize a multiple of 256 float32 values with our quantizer and with ggml's."""
    type_ = ggml.tensor_type(kind)
    ours, theirs = (numpy.full(type_.row_bytes(numbers.size), 0xAA, numpy.uint8) for _ in range(2))
    largest = ggml.quantize_fast(ggml.tensor_type("f32"), numbers.ctypes.data, type_, ours.ctypes.data, numbers.size)
    if largest is None:
        pytest.skip("this libggml was compiled without our quantizers")
    ggml.quantize_with_ggml(type_, numbers.ctypes.data, theirs.ctypes.data, numbers.size // BLOCK, BLOCK)
    return ours.tobytes(), theirs.tobytes()


def typical_weights(count: int) -> numpy.ndarray:
    random = numpy.random.default_rng(7)
    return (random.standard_t(5, count) * 0.02).astype(numpy.float32)


def mixed_magnitudes(count: int) -> numpy.ndarray:
    random = numpy.random.default_rng(8)
    sizes = 10.0 ** random.integers(-38, 5, (count // 16, 1))
    return (random.standard_normal((count // 16, 16)) * sizes).astype(numpy.float32).reshape(-1)


def sparse_weights(count: int) -> numpy.ndarray:
    random = numpy.random.default_rng(9)
    return numpy.where(random.random(count) < 0.95, 0, random.standard_normal(count)).astype(numpy.float32)


def constant_blocks(count: int) -> numpy.ndarray:
    return numpy.repeat(numpy.random.default_rng(10).standard_normal(count // 32), 32).astype(numpy.float32)


def integers(count: int) -> numpy.ndarray:
    return numpy.random.default_rng(11).integers(-4, 5, count).astype(numpy.float32)


def halves(count: int) -> numpy.ndarray:
    """Return values halfway between two levels of Q8_0, or the next float toward zero."""
    numbers = (numpy.random.default_rng(12).integers(-253, 254, (count // 32, 32)) / 2).astype(numpy.float32)
    numbers[::2] = numpy.nextafter(numbers[::2], numpy.float32(0))
    numbers[:, 0] = 127
    return numbers.reshape(-1)


def tiny_weights(count: int) -> numpy.ndarray:
    return (numpy.random.default_rng(13).standard_normal(count) * 1e-38).astype(numpy.float32)


def negative_zeros(count: int) -> numpy.ndarray:
    return -numpy.zeros(count, numpy.float32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "numbers",
    [
        typical_weights,
        mixed_magnitudes,
        sparse_weights,
        constant_blocks,
        integers,
        halves,
        tiny_weights,
        negative_zeros,
    ],
)
def test_bytes_equal_those_of_ggml(numbers, kind: str) -> None:
    ours, theirs = quantize_both(kind, numbers(BLOCK * 500))
    assert ours == theirs


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_bytes_equal_those_of_ggml_for_weights_of_one_sign(sign: int, kind: str) -> None:
    ours, theirs = quantize_both(kind, sign * numpy.abs(typical_weights(BLOCK * 200)))
    assert ours == theirs


@pytest.mark.parametrize("kind", TYPES)
@given(
    numbers=arrays.arrays(
        numpy.float32,
        BLOCK,
        elements=st.one_of(
            st.floats(-(2.0**60), 2.0**60, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-15, -1e-40])
        ),
        fill=st.sampled_from([0.0, 1.0, -2.0]),
    )
)
def test_bytes_equal_those_of_ggml_for_any_weights(kind: str, numbers: numpy.ndarray) -> None:
    ours, theirs = quantize_both(kind, numpy.ascontiguousarray(numbers))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["q5_0", "q4_0", "q3_k", "q2_k", "iq4_nl"])
def test_other_types_are_not_supported(kind: str) -> None:
    type_, numbers = ggml.tensor_type(kind), typical_weights(BLOCK)
    target = numpy.full(type_.row_bytes(BLOCK), 0xAA, numpy.uint8)
    source = ggml.tensor_type("f32")
    assert ggml.quantize_fast(source, numbers.ctypes.data, type_, target.ctypes.data, BLOCK) is None
    assert not ggml.can_quantize_fast(source, type_)
    assert (target == 0xAA).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("source", ["bf16", "f16"])
def test_16_bit_floats_are_quantized_directly(source: str, kind: str) -> None:
    type_, half = ggml.tensor_type(kind), ggml.tensor_type(source)
    stored, numbers = stored_halves(source, typical_weights(BLOCK * 100))
    target = numpy.empty(type_.row_bytes(stored.size), numpy.uint8)
    largest = ggml.quantize_fast(half, stored.ctypes.data, type_, target.ctypes.data, stored.size)
    if largest is None:
        pytest.skip("this libggml was compiled without our quantizers")
    assert target.tobytes() == quantize_both(kind, numbers)[1]
    assert largest == numpy.abs(numbers).max()


def stored_halves(source: str, numbers: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return values as stored in 16 bits, and what they are as float32."""
    if source == "f16":
        stored = numbers.astype(numpy.float16)
        return stored, stored.astype(numpy.float32)
    bits = (numbers.view(numpy.uint32) >> 16).astype(numpy.uint16)
    return bits, (bits.astype(numpy.uint32) << 16).view(numpy.float32)


@pytest.mark.parametrize("place", [0, BLOCK * 3 + 77, BLOCK * 5 - 1])
@pytest.mark.parametrize("number", [numpy.nan, -numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("kind", TYPES)
def test_nan_and_infinity_are_reported(kind: str, number: float, place: int) -> None:
    type_, numbers = ggml.tensor_type(kind), typical_weights(BLOCK * 5)
    numbers[place] = number
    target = numpy.empty(type_.row_bytes(numbers.size), numpy.uint8)
    source = ggml.tensor_type("f32")
    largest = ggml.quantize_fast(source, numbers.ctypes.data, type_, target.ctypes.data, numbers.size)
    if largest is None:
        pytest.skip("this libggml was compiled without our quantizers")
    assert largest == numpy.inf


# --- with an importance matrix

WEIGHTED_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
COLUMNS = 5 * BLOCK  # an odd number: two blocks are quantized at a time where vectors are wide enough


def spread_importance() -> numpy.ndarray:
    return numpy.exp(numpy.random.default_rng(14).standard_normal(COLUMNS) * 2).astype(numpy.float32)


def equal_importance() -> numpy.ndarray:
    return numpy.ones(COLUMNS, numpy.float32)


def partly_zero_importance() -> numpy.ndarray:
    return (numpy.random.default_rng(15).random(COLUMNS) > 0.3).astype(numpy.float32)


def tiny_importance() -> numpy.ndarray:
    return numpy.full(COLUMNS, 1e-30, numpy.float32)


def quantize_both_weighted(
    kind: str, numbers: numpy.ndarray, importance: numpy.ndarray, source: str = "f32"
) -> tuple[bytes, bytes]:
    """Quantize rows of `COLUMNS` values with our quantizer and with ggml's."""
    type_, rows = ggml.tensor_type(kind), numbers.size // COLUMNS
    stored, values = (numbers, numbers) if source == "f32" else stored_halves(source, numbers)
    ours, theirs = (numpy.full(type_.row_bytes(numbers.size), 0xAA, numpy.uint8) for _ in range(2))
    largest = ggml.quantize_fast_weighted(
        ggml.tensor_type(source), stored.ctypes.data, type_, ours.ctypes.data, rows, COLUMNS, importance.ctypes.data
    )
    if largest is None:
        pytest.skip("this libggml was compiled without our quantizers")
    assert largest == numpy.abs(values).max()
    ggml.quantize_with_ggml(type_, values.ctypes.data, theirs.ctypes.data, rows, COLUMNS, importance.ctypes.data)
    return ours.tobytes(), theirs.tobytes()


@pytest.mark.parametrize("kind", WEIGHTED_TYPES)
@pytest.mark.parametrize("importance", [spread_importance, equal_importance, partly_zero_importance, tiny_importance])
@pytest.mark.parametrize(
    "numbers", [typical_weights, mixed_magnitudes, sparse_weights, constant_blocks, integers, negative_zeros]
)
def test_bytes_with_an_importance_matrix_equal_those_of_ggml(numbers, importance, kind: str) -> None:
    ours, theirs = quantize_both_weighted(kind, numbers(COLUMNS * 25), importance())
    assert ours == theirs


@pytest.mark.parametrize("kind", WEIGHTED_TYPES)
@pytest.mark.parametrize("source", ["bf16", "f16"])
def test_16_bit_floats_are_quantized_directly_with_an_importance_matrix(source: str, kind: str) -> None:
    ours, theirs = quantize_both_weighted(kind, typical_weights(COLUMNS * 10), spread_importance(), source)
    assert ours == theirs


@pytest.mark.parametrize("kind", WEIGHTED_TYPES)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.floats(2.0**-33, 2.0**33, width=32), min_size=1, max_size=8))
def test_bytes_with_any_importance_equal_those_of_ggml(kind: str, seed: int, sizes: list[float]) -> None:
    random = numpy.random.default_rng(seed)
    importance = numpy.resize(numpy.array(sizes, numpy.float32), COLUMNS) * random.random(COLUMNS, numpy.float32)
    ours, theirs = quantize_both_weighted(kind, random.standard_normal(COLUMNS, numpy.float32), importance)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q8_0", "iq4_nl", "iq3_s"])
def test_other_types_are_not_supported_with_an_importance_matrix(kind: str) -> None:
    assert not ggml.can_quantize_fast(ggml.tensor_type("f32"), ggml.tensor_type(kind), weighted=True)
