"""The numbers of tensors in files: read piece by piece, so that memory stays small, and compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal import ggml
from qwenlocal.errors import BadWeights
from qwenlocal.weights.header import Header, Tensor, tensor_bytes

if TYPE_CHECKING:
    import numpy

_BYTES = 1 << 20  # compared at once
_NUMBERS = 1 << 20  # read at once, in whole rows
_SMALL_ROW = 1e-4  # of the mean of the rows' squares


class Place(NamedTuple):
    """Bytes in a file."""

    file: Path
    offset: int
    size: int


def place_of(path: Path, header: Header, tensor: Tensor) -> Place:
    """Where the data of a GGUF file's tensor lies; of size 0 for a type that is not known."""
    return Place(path, header.data_offset + tensor.offset, tensor_bytes(tensor) or 0)


def same_bytes(one: Place, other: Place) -> bool:
    """
    Whether both places hold the same, in two halves by two threads: reading 311 MB twice takes 0.2 s.

    Whole buffers are compared (memcmp); memoryviews go number by number.
    """
    from concurrent.futures import ThreadPoolExecutor

    if one.size != other.size:
        return False
    half = one.size // 2
    with ThreadPoolExecutor(2) as pool:
        return all(pool.map(lambda span: _same_span(one, other, *span), ((0, half), (half, one.size))))


def _same_span(one: Place, other: Place, begin: int, end: int) -> bool:
    left, right = bytearray(_BYTES), bytearray(_BYTES)
    with one.file.open("rb", buffering=0) as here, other.file.open("rb", buffering=0) as there:
        here.seek(one.offset + begin)
        there.seek(other.offset + begin)
        while begin < end:
            count = min(_BYTES, end - begin)
            if count < _BYTES:
                left, right = bytearray(count), bytearray(count)
            if here.readinto(left) != count or there.readinto(right) != count or left != right:
                return False
            begin += count
    return True


def floats(kind: ggml.TensorType, data: bytes, count: int) -> numpy.ndarray:
    """`count` numbers of type `kind` as float32."""
    import numpy

    source = numpy.frombuffer(data, numpy.uint8)
    found: numpy.ndarray = numpy.empty(count, numpy.float32)
    ggml.dequantize(kind, source.ctypes.data, found.ctypes.data, count)
    return found


def read_rows(file: Path, offset: int, kind: ggml.TensorType, rows: int, columns: int) -> Iterator[numpy.ndarray]:
    """
    Rows that lie together, as float32 in pieces of whole rows, about a million numbers each.

    Raises
    ------
    BadWeights: the file ends before they do.
    """
    step = max(1, _NUMBERS // columns)
    with file.open("rb") as source:
        source.seek(offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = source.read(count * kind.row_bytes(columns))
            if len(data) < count * kind.row_bytes(columns):
                raise BadWeights(file, "it became shorter while it was read")
            yield floats(kind, data, count * columns)


def is_readable(tensor: Tensor) -> bool:
    """Whether its numbers can be had as float32: a type that ggml reads, and rows that divide into its blocks."""
    kind = ggml.tensor_type_by_number(tensor.type)
    return (
        kind is not None and ggml.can_dequantize(kind) and bool(tensor.shape) and tensor.shape[0] % kind.block_size == 0
    )


def numbers_of(path: Path, header: Header, tensor: Tensor) -> Iterator[numpy.ndarray]:
    """A GGUF file's tensor as float32, matrix by matrix, in pieces of whole rows; nothing for an unknown type."""
    kind = ggml.tensor_type_by_number(tensor.type)
    if kind is None or not tensor.elements:
        return
    columns, matrices = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
    rows = tensor.elements // columns // matrices
    for matrix in range(matrices):
        offset = header.data_offset + tensor.offset + matrix * rows * kind.row_bytes(columns)
        yield from read_rows(path, offset, kind, rows, columns)


class RowError(NamedTuple):
    """The relative error of a tensor (see `relative_error`), and the largest that a row of it has."""

    whole: float
    row: int
    worst: float


def errors_by_row(true: Iterable[numpy.ndarray], other: Iterable[numpy.ndarray], columns: int) -> RowError:
    """
    `relative_error` of pieces of whole rows, of all together and of the worst row.

    Rows that are a hundred times smaller than the others count for the whole only: a type may have no numbers that
    small. `errors_by_row([[3, 4, 6, 8]], [[3, 4, 6, 9]], 2)` is RowError(0.0894, 1, 0.1).
    """
    import numpy

    pairs = [_squares_by_row(left, right, columns) for left, right in zip(true, other, strict=True)]
    squares, differences = (numpy.concatenate(side) for side in zip(*pairs, strict=True))
    counts = squares > _SMALL_ROW * squares.mean()
    relative = numpy.sqrt(numpy.divide(differences, squares, out=numpy.zeros_like(squares), where=counts))
    row = int(relative.argmax())
    return RowError(_relative(float(squares.sum()), float(differences.sum())), row, float(relative[row]))


def _squares_by_row(left: numpy.ndarray, right: numpy.ndarray, columns: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Sums over each row: of the squares of `left`, and of the differences'."""
    import numpy

    left, right = left.reshape(-1, columns).astype(numpy.float64), right.reshape(-1, columns)
    with numpy.errstate(invalid="ignore"):
        difference = right - left
    return numpy.einsum("ij,ij->i", left, left), numpy.einsum("ij,ij->i", difference, difference)


def _relative(squares: float, differences: float) -> float:
    return math.sqrt(differences / squares) if squares else math.sqrt(differences)


def relative_error(true: Iterable[numpy.ndarray], other: Iterable[numpy.ndarray]) -> float:
    """
    The root of the mean squared difference over that of the true numbers; the pieces must have the same lengths.

    `relative_error([[3, 4]], [[3, 5]])` is 0.2: sqrt(1 / 25).
    """
    import numpy

    squares = differences = 0.0
    for left, right in zip(true, other, strict=True):
        left, right = left.astype(numpy.float64), right.astype(numpy.float64)  # damaged ones may be 1e38
        with numpy.errstate(invalid="ignore"):  # infinite ones give NaN, which is an answer
            difference = right - left
        squares += float(left @ left)
        differences += float(difference @ difference)
    return _relative(squares, differences)
