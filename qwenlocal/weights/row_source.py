"""The rows that a tensor is written from, and where they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwenlocal.ggml import TensorType, tensor_type

if TYPE_CHECKING:
    import numpy

CHUNK_SIZE = 1 << 19  # values per chunk: 2 MiB as float32, which stay in a core's cache


class SourceReader(Protocol):
    """Reads the source files of a job, for several threads."""

    def read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on."""

    def load(self, path: Path, offset: int, size: int) -> numpy.ndarray:
        """Return bytes that several chunks need, as uint8; read once if the chunks follow each other."""


class RowSource(Protocol):
    """Rows of one matrix, each of `columns` values of the type `type`, which are read in chunks."""

    @property
    def file(self) -> Path:
        """The file with the rows."""

    @property
    def offset(self) -> int:
        """The offset of the first byte; chunks are read in this order."""

    @property
    def row_count(self) -> int:
        """The number of rows."""

    @property
    def columns(self) -> int:
        """Values per row."""

    @property
    def type(self) -> TensorType:
        """The type of the rows, as `read` stores them."""

    @property
    def chunk_rows(self) -> int:
        """The number of rows to read at once."""

    @property
    def shared_size(self) -> int:
        """Bytes that are loaded for all chunks together."""

    @property
    def read_size(self) -> int:
        """Bytes that the rows take in the files."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""

    def represent(self, kind: TensorType) -> RowSource:
        """Return the same rows in the type `kind` if they can be read in it without quantizing, otherwise unchanged."""

    def read(self, first: int, buffer: memoryview, reader: SourceReader) -> None:
        """Store the rows from `first` on, as many as fill `buffer`."""

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""


@dataclass(frozen=True)
class FileRows:
    """Contiguous rows in a file, stored as they are read."""

    file: Path
    offset: int
    row_count: int
    columns: int
    type: TensorType

    shared_size = 0

    @property
    def chunk_rows(self) -> int:
        """About `CHUNK_SIZE` values."""
        return min(self.row_count, max(1, CHUNK_SIZE // max(1, self.columns)))

    @property
    def read_size(self) -> int:
        """Bytes of all rows."""
        return self.row_count * self.type.row_bytes(self.columns)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.file,)

    def represent(self, kind: TensorType) -> FileRows:
        """Return the rows unchanged: they have one type."""
        return self

    def read(self, first: int, buffer: memoryview, reader: SourceReader) -> None:
        """Read the rows from `first` on, as many as fill `buffer`."""
        reader.read(self.file, buffer, self.offset + first * self.type.row_bytes(self.columns))

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""
        return f"{self.file} {fingerprints[self.file]} {self.offset} {self.row_count} {self.columns}"


@dataclass(frozen=True)
class SourceTensor:
    """
    A tensor to write: its name and shape in the GGUF file, and the rows it is read from, in order.

    `keep_f32`: it is float32 in files of every type, like norms, biases and routers (llama.cpp, conversion/base.py:
    prepare_tensors). A tensor of several experts has one source per expert.
    """

    name: str
    shape: tuple[int, ...]
    rows: Sequence[RowSource]
    keep_f32: bool = False

    @property
    def type(self) -> TensorType:
        """The type in the source; f32 if its rows have several."""
        types = {rows.type for rows in self.rows}
        return types.pop() if len(types) == 1 else tensor_type("f32")

    @property
    def elements(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)
