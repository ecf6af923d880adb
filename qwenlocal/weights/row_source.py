"""The sources of a tensor's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.ggml import TensorType

ReadInto = Callable[[Path, memoryview, int], None]
"""Fills a buffer with the bytes of a file from an offset on."""


@dataclass(frozen=True)
class FileRows:
    """Contiguous rows in a file, each of `columns` values of the type `type`."""

    file: Path
    offset: int
    row_count: int
    columns: int
    type: TensorType

    def size(self, count: int) -> int:
        """Return the bytes of `count` rows, as `read` stores them."""
        return count * self.type.row_bytes(self.columns)

    def read(self, first: int, buffer: memoryview, read_into: ReadInto) -> None:
        """Read the rows from `first` on, as many as fill `buffer`."""
        read_into(self.file, buffer, self.offset + self.size(first))

    def identify(self, fingerprints: Mapping[Path, str]) -> str:
        """Return a text that differs if other rows are read, or other data in the files."""
        return f"{self.file} {fingerprints[self.file]} {self.offset} {self.row_count} {self.columns}"
