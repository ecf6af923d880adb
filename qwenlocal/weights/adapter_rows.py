"""Rows of matrices that an adapter changes, W + s·B·A, and rows of its factors A and B. All are read as float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal import ggml
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.adapter import LoraModule
from qwenlocal.weights.row_source import CHUNK_SIZE, RowSource, SourceReader
from qwenlocal.weights.safetensors import StoredTensor

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class FactorRows:
    """The rows of a factor, multiplied by `scale`, which is 1 for A; of its transpose if `is_transposed`."""

    stored: StoredTensor
    scale: float = 1.0
    is_transposed: bool = False

    @property
    def file(self) -> Path:
        """The file with the factor."""
        return self.stored.file

    @property
    def offset(self) -> int:
        """The offset of the factor."""
        return self.stored.offset

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return self.stored.shape[1 if self.is_transposed else 0]

    @property
    def columns(self) -> int:
        """Values per row."""
        return self.stored.shape[0 if self.is_transposed else 1]

    @property
    def type(self) -> TensorType:
        """Float32."""
        return tensor_type("f32")

    @property
    def chunk_rows(self) -> int:
        """About `CHUNK_SIZE` values."""
        return min(self.row_count, max(1, CHUNK_SIZE // self.columns))

    @property
    def shared_size(self) -> int:
        """Bytes of the factor."""
        return self.stored.size

    @property
    def read_size(self) -> int:
        """Bytes of the factor."""
        return self.stored.size

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.file,)

    def represent(self, kind: TensorType) -> FactorRows:
        """Return the rows unchanged: they have one type."""
        return self

    def read(self, first: int, buffer: memoryview, reader: SourceReader) -> None:
        """Store the rows from `first` on, as many as fill `buffer`."""
        import numpy

        result = numpy.frombuffer(buffer, numpy.float32).reshape(-1, self.columns)
        rows = slice(first, first + len(result))
        result[:] = _load_part(self.stored, reader, rows, is_transposed=self.is_transposed)
        if self.scale != 1:
            result *= numpy.float32(self.scale)

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""
        return f"{_identify(self.stored, fingerprints)} {self.scale!r} {self.is_transposed}"


@dataclass(frozen=True)
class MergedRows:
    """The rows of a matrix with the change of an adapter, `weight` times as strong as it was trained."""

    rows: RowSource
    module: LoraModule
    weight: float = 1.0

    @property
    def file(self) -> Path:
        """The file with the matrix."""
        return self.rows.file

    @property
    def offset(self) -> int:
        """The offset of the matrix."""
        return self.rows.offset

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return self.rows.row_count

    @property
    def columns(self) -> int:
        """Values per row."""
        return self.rows.columns

    @property
    def type(self) -> TensorType:
        """Float32."""
        return tensor_type("f32")

    @property
    def chunk_rows(self) -> int:
        """The same number as without the change."""
        return self.rows.chunk_rows

    @property
    def shared_size(self) -> int:
        """Bytes of the factors, and those that the matrix shares."""
        return self.rows.shared_size + self.module.a.size + self.module.b.size

    @property
    def read_size(self) -> int:
        """Bytes of the matrix and the factors."""
        return self.rows.read_size + self.module.a.size + self.module.b.size

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the matrix and of the adapter."""
        return tuple(dict.fromkeys((*self.rows.files, self.module.a.file, self.module.b.file)))

    def represent(self, kind: TensorType) -> MergedRows:
        """Return the rows unchanged: they have one type."""
        return self

    def read(self, first: int, buffer: memoryview, reader: SourceReader) -> None:
        """Store the rows from `first` on, as many as fill `buffer`; computed in float32."""
        import numpy

        result = numpy.frombuffer(buffer, numpy.float32).reshape(-1, self.columns)
        count, kind = len(result), self.rows.type
        if kind.name == "f32":
            self.rows.read(first, buffer, reader)
        else:
            encoded = numpy.empty(count * kind.row_bytes(self.columns), numpy.uint8)
            self.rows.read(first, encoded.data, reader)
            ggml.dequantize(kind, encoded.ctypes.data, result.ctypes.data, result.size)
        self._add_change(result, first, reader)

    def _add_change(self, result: numpy.ndarray, first: int, reader: SourceReader) -> None:
        """Add the change to the rows from `first` on, some columns at a time, which bounds the memory."""
        import numpy

        module = self.module
        left, right = (module.a, module.b) if module.is_embedding else (module.b, module.a)
        factor = _load_part(left, reader, slice(first, first + len(result)), is_transposed=module.is_embedding)
        factor = factor * numpy.float32(module.scale * self.weight)
        step = max(1, CHUNK_SIZE // module.rank)
        for column in range(0, self.columns, step):
            columns = slice(column, column + step)
            part = _load_part(right, reader, slice(None), columns, is_transposed=module.is_embedding)
            result[:, columns] += factor @ part

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""
        factors = [_identify(stored, fingerprints) for stored in (self.module.a, self.module.b)]
        return f"{self.rows.identify(fingerprints)} + {' '.join(factors)} {self.module.scale!r} {self.weight!r}"


def _load_part(
    stored: StoredTensor,
    reader: SourceReader,
    rows: slice,
    columns: slice = slice(None),
    *,
    is_transposed: bool,
) -> numpy.ndarray:
    """Return a part of a factor, or of its transpose, as float32."""
    import numpy

    data = reader.load(stored.file, stored.offset, stored.size)
    matrix = data.view({"F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}[stored.dtype])
    matrix = matrix.reshape(stored.shape)
    part = (matrix.T if is_transposed else matrix)[rows, columns]
    values: numpy.ndarray
    if stored.dtype == "BF16":  # the upper half of a float32
        values = (part.astype(numpy.uint32) << numpy.uint32(16)).view(numpy.float32)
    else:
        values = part.astype(numpy.float32)
    return values


def _identify(stored: StoredTensor, fingerprints: Mapping[Path, str]) -> str:
    return f"{stored.file} {fingerprints[stored.file]} {stored.offset} {stored.shape} {stored.dtype}"
