"""The values of tensors in files: read in chunks, so that little memory is needed, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from qwenlocal import ggml
from qwenlocal.weights.gguf_reader import TensorInfo
from qwenlocal.weights.row_source import FileRows, RowSource, SourceReader
from qwenlocal.weights.safetensors import StoredTensor
from qwenlocal.weights.source_files import SourceFiles

if TYPE_CHECKING:
    import numpy

_COMPARE_SIZE = 1 << 20  # bytes compared at once
_SAMPLES, _SAMPLE_SIZE = 3, 1 << 14  # parts of two tensors to compare, and their bytes
_CHUNK_SIZE = 1 << 20  # values read at once, in whole rows
_SMALL_ROW = 1e-4  # relative to the mean of the rows' squares
_EXPONENT = 0x7F800000  # the exponent bits of a float32; all are set if it is infinite or NaN
SCAN_SIZE = 1 << 22  # bytes


def have_same_bytes(left: TensorInfo | StoredTensor, right: TensorInfo | StoredTensor) -> bool:
    """
    Return True if both tensors consist of the same bytes. Two threads compare one half each: 311 MB take 0.2 s.

    Whole bytearrays are compared (memcmp); memoryviews would be compared value by value.
    """
    from concurrent.futures import ThreadPoolExecutor

    if left.size != right.size:
        return False
    half = left.size // 2
    with ThreadPoolExecutor(2) as pool:
        return all(pool.map(lambda span: _have_same_span(left, right, *span), ((0, half), (half, left.size))))


def _have_same_span(
    left_tensor: TensorInfo | StoredTensor, right_tensor: TensorInfo | StoredTensor, begin: int, end: int
) -> bool:
    left, right = bytearray(_COMPARE_SIZE), bytearray(_COMPARE_SIZE)
    with left_tensor.file.open("rb", buffering=0) as left_file, right_tensor.file.open("rb", buffering=0) as right_file:
        left_file.seek(left_tensor.offset + begin)
        right_file.seek(right_tensor.offset + begin)
        while begin < end:
            count = min(_COMPARE_SIZE, end - begin)
            if count < _COMPARE_SIZE:
                left, right = bytearray(count), bytearray(count)
            if left_file.readinto(left) != count or right_file.readinto(right) != count or left != right:
                return False
            begin += count
    return True


def have_same_samples(left: StoredTensor, right: StoredTensor, reader: SourceReader) -> bool:
    """Return True if parts at the beginning, in the middle and at the end of both tensors consist of the same bytes."""
    if left.size != right.size:
        return False
    size = min(left.size, _SAMPLE_SIZE)
    begins = [(left.size - size) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
    return all(_read_part(left, begin, size, reader) == _read_part(right, begin, size, reader) for begin in begins)


def _read_part(tensor: StoredTensor, begin: int, size: int, reader: SourceReader) -> bytearray:
    data = bytearray(size)
    reader.read(tensor.file, memoryview(data), tensor.offset + begin)
    return data


def read_rows(rows: RowSource) -> Iterator[numpy.ndarray]:
    """
    Yield rows as float32, in chunks of whole rows with about a million values each.

    Raises
    ------
    BadWeights: a file cannot be read, or ends too early.
    """
    import numpy

    step = max(1, _CHUNK_SIZE // rows.columns)
    with SourceFiles(rows.files) as reader:
        for first in range(0, rows.row_count, step):
            count = min(step, rows.row_count - first)
            encoded = numpy.empty(count * rows.type.row_bytes(rows.columns), numpy.uint8)
            rows.read(first, encoded.data, reader)
            values = numpy.empty(count * rows.columns, numpy.float32)
            ggml.dequantize(rows.type, encoded.ctypes.data, values.ctypes.data, values.size)
            yield values


def can_read_values(tensor: TensorInfo) -> bool:
    """Return True if the tensor has values, and ggml can dequantize its type."""
    return bool(tensor.shape) and tensor.elements > 0 and ggml.can_dequantize(tensor.type)


def read_values(tensor: TensorInfo) -> Iterator[numpy.ndarray]:
    """Yield a tensor of a GGUF file as float32, in chunks of whole rows of a matrix."""
    columns, matrices = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
    rows = tensor.elements // columns // matrices
    for matrix in range(matrices):
        offset = tensor.offset + matrix * rows * tensor.type.row_bytes(columns)
        yield from read_rows(FileRows(tensor.file, offset, rows, columns, tensor.type))


def scan_values(tensor: TensorInfo, buffer: Any, report: Callable[[int], object]) -> tuple[int, bool]:
    """
    Read the values of a tensor, using `buffer` of `SCAN_SIZE` bytes; none if ggml cannot dequantize them.

    Returns the number of NaN and infinite values, and True if all bytes are zero. `report` gets the bytes read since
    its last call.
    """
    import numpy

    kind = tensor.type
    if not ggml.can_dequantize(kind):
        return 0, False
    step = SCAN_SIZE // kind.type_size * kind.type_size
    floats = numpy.empty(step // kind.type_size * kind.block_size, numpy.float32)
    non_finite, all_zero = 0, True
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.size, step):
            data = buffer[: min(step, tensor.size - start)]
            if file.readinto(data) != data.size:
                break
            all_zero = all_zero and not data.any()
            values = floats[: data.size // kind.type_size * kind.block_size]
            ggml.dequantize(kind, data.ctypes.data, values.ctypes.data, values.size)
            non_finite += _count_non_finite(values)
            report(data.size)
    return non_finite, all_zero


def _count_non_finite(values: Any) -> int:
    import numpy

    exponents = values.view(numpy.uint32) & _EXPONENT
    return int((exponents == _EXPONENT).sum()) if exponents.size and int(exponents.max()) == _EXPONENT else 0


class RowError(NamedTuple):
    """The relative RMSE of a tensor, its worst row, and the relative RMSE of that row."""

    whole: float
    row: int
    worst: float


def compare_rows(true: Iterable[numpy.ndarray], other: Iterable[numpy.ndarray], columns: int) -> RowError:
    """
    Compute the root mean square of the differences relative to that of the true values, for all rows and for the worst.

    The chunks must have equal lengths and consist of whole rows.
    Rows that are a hundred times smaller than the others only count for the whole: a type may not have values that
    small. `compare_rows([[3, 4, 6, 8]], [[3, 4, 6, 9]], 2)` is RowError(0.0894, 1, 0.1).
    """
    import numpy

    pairs = [_squares_by_row(left, right, columns) for left, right in zip(true, other, strict=True)]
    squares, differences = (numpy.concatenate(side) for side in zip(*pairs, strict=True))
    counts = squares > _SMALL_ROW * squares.mean()
    relative = numpy.sqrt(numpy.divide(differences, squares, out=numpy.zeros_like(squares), where=counts))
    row = int(relative.argmax())
    whole = math.sqrt(float(differences.sum()) / float(squares.sum() or 1))
    return RowError(whole, row, float(relative[row]))


def _squares_by_row(left: numpy.ndarray, right: numpy.ndarray, columns: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Sum, for each row, the squares of `left` and the squared differences."""
    import numpy

    left, right = left.reshape(-1, columns).astype(numpy.float64), right.reshape(-1, columns)  # 1e38 if damaged
    with numpy.errstate(invalid="ignore"):  # infinite values give NaN, a valid result
        difference = right - left
    return numpy.einsum("ij,ij->i", left, left), numpy.einsum("ij,ij->i", difference, difference)
