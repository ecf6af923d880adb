"""
The front of a GGUF file: what it says of itself, and where its tensors lie.

Layout (ggml/docs/gguf.md): magic `GGUF`, version u32, tensor count u64, key count u64, then key–value pairs, then
tensor descriptions, then the data, aligned. All little-endian. A vocabulary of 151,936 tokens fills megabytes of the
pairs, so arrays of strings are stepped over, and `read_metadata` stops before the first one when asked to.

Not covered: versions 1 (never published for Qwen), and big-endian files, which are refused with that reason.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qwenlocal.errors import BadWeights
from qwenlocal.ggml import tensor_type_by_number

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _LONGEST_KEY = 1 << 16, 1 << 20, 1 << 16
_KEPT_ARRAY = 1024  # longer arrays are vocabularies; only their length is kept


@dataclass(frozen=True)
class LongArray:
    """An array that was stepped over: its element type (GGUF's number) and its length."""

    element_type: int
    length: int


Value = int | float | bool | str | list["int | float | bool | str"] | LongArray


@dataclass(frozen=True)
class Tensor:
    """One tensor's description: dimensions in ggml's order, fastest first, and its place after the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything before the data of a GGUF file."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int

    @property
    def architecture(self) -> str:
        """For example "qwen2"; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def hyperparameter(self, key: str) -> Value | None:
        """`metadata["<architecture>.<key>"]`, for example `hyperparameter("block_count")` of a 0.5B is 24."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _Reader:
    """Reads little-endian values and says where a file ends too early."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.file.tell():
            raise BadWeights(self.path, f"the file ends inside {what}; it is cut off or damaged")
        return self.file.read(count)

    def number(self, format: str, what: str) -> int | float | bool:
        (value,) = struct.unpack(format, self.bytes(struct.calcsize(format), what))
        return value  # type: ignore[no-any-return]

    def count(self, format: str, what: str, most: int) -> int:
        value = int(self.number(format, what))
        if value > most:
            raise BadWeights(self.path, f"{what} is {value:,}, which no real file has; it is damaged")
        return value

    def string(self, what: str) -> str:
        return self.bytes(int(self.number("<Q", what)), what).decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> Value:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        raise BadWeights(self.path, f"“{key}” has the unknown value type {kind}; the file is damaged or too new")

    def array(self, key: str) -> Value:
        element = int(self.number("<I", key))
        length = int(self.number("<Q", key))
        if element == _STRING:
            if length > _KEPT_ARRAY:
                self._step_over_strings(length, key)
                return LongArray(element, length)
            return [self.string(key) for _ in range(self._plausible(length, 8, key))]
        if element not in SCALARS:
            raise BadWeights(self.path, f"“{key}” is an array of the unknown type {element}; the file is damaged")
        form = SCALARS[element]
        data = self.bytes(length * struct.calcsize(form), key)
        if length > _KEPT_ARRAY:
            return LongArray(element, length)
        return list(struct.unpack(f"<{length}{form[1:]}", data))

    def _plausible(self, length: int, width: int, key: str) -> int:
        if length * width > self.size - self.file.tell():
            raise BadWeights(self.path, f"the file ends inside “{key}”; it is cut off or damaged")
        return length

    def _step_over_strings(self, length: int, key: str) -> None:
        for _ in range(self._plausible(length, 8, key)):
            size = int(self.number("<Q", key))
            if size > self.size - self.file.tell():
                raise BadWeights(self.path, f"the file ends inside “{key}”; it is cut off or damaged")
            self.file.seek(size, 1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size; whatever the system has against reading it becomes a sentence."""
    try:
        with path.open("rb") as file:
            yield file, path.stat().st_size
    except OSError as reason:
        what = reason.strerror or str(reason)
        raise BadWeights(path, f"cannot read it ({what})", hint="Check the path, and who may read it.") from reason


def _open(path: Path, file: BinaryIO, size: int) -> tuple[_Reader, int, int, int]:
    if size == 0:
        raise BadWeights(path, "the file is empty")
    reader = _Reader(file, path, size)
    magic = file.read(4)
    if magic != MAGIC:
        kind = "a web page" if magic.lstrip().startswith(b"<") else "some other kind of file"
        raise BadWeights(
            path,
            f"this is not a GGUF file: it begins like {kind}",
            hint="Models are .gguf files. Names that can be given instead: qwenlocal list --all",
        )
    version = int(reader.number("<I", "the version"))
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "it is big-endian" if swapped in (2, 3) else f"its version is {version}; versions 2 and 3 are supported"
        raise BadWeights(path, f"this GGUF file cannot be read: {why}")
    tensors = reader.count("<Q", "the number of tensors", _MOST_TENSORS)
    keys = reader.count("<Q", "the number of keys", _MOST_KEYS)
    return reader, version, tensors, keys


def _pairs(reader: _Reader, keys: int, *, stop_before_vocabulary: bool) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        length = reader.count("<Q", "the length of a key", _LONGEST_KEY)
        key = reader.bytes(length, "a key").decode("utf-8", errors="replace")
        kind = int(reader.number("<I", key))
        if stop_before_vocabulary and key == "tokenizer.ggml.tokens":
            break
        if key in metadata:
            raise BadWeights(reader.path, f"the key “{key}” stands there twice; the file is damaged")
        metadata[key] = reader.value(kind, key)
    return metadata


def _descriptions(reader: _Reader, tensors: int) -> list[Tensor]:
    found, names = [], set[str]()
    for index in range(tensors):
        what = f"the description of tensor {index}"
        name = reader.string(what)
        if name in names:
            raise BadWeights(reader.path, f"the tensor “{name}” stands there twice; the file is damaged")
        names.add(name)
        dimensions = reader.count("<I", f"the number of dimensions of {name}", 4)
        shape = tuple(int(reader.number("<Q", what)) for _ in range(dimensions))
        kind, offset = int(reader.number("<I", what)), int(reader.number("<Q", what))
        found.append(Tensor(name, shape, kind, offset))
    return found


def read_metadata(path: Path) -> Mapping[str, Value]:
    """
    The keys that stand before the vocabulary: name, architecture, sizes. About a millisecond for any model.

    Raises
    ------
    BadWeights: the file cannot be read, is empty, not GGUF, of another version, or cut off inside these keys.
    """
    with _opened(path) as (file, size):
        reader, _, _, keys = _open(path, file, size)
        return _pairs(reader, keys, stop_before_vocabulary=True)


def read_header(path: Path) -> Header:
    """
    The whole header, vocabulary stepped over (about 0.2 s for Qwen's 151,936 tokens and their merges).

    Raises
    ------
    BadWeights: as `read_metadata`, and where a tensor's data would lie beyond the end of the file.
    """
    with _opened(path) as (file, size):
        reader, version, tensors, keys = _open(path, file, size)
        metadata = _pairs(reader, keys, stop_before_vocabulary=False)
        found = _descriptions(reader, tensors)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise BadWeights(path, f"general.alignment is {alignment!r}; the file is damaged")
        header = Header(version, metadata, tuple(found), -(-file.tell() // alignment) * alignment)
    _check_extent(path, header, size)
    return header


def read_pairs(path: Path) -> dict[str, bytes]:
    """
    Every key with the bytes of its value as they stand in the file (`gguf.decode` makes values of them).

    Raises
    ------
    BadWeights: as `read_metadata`.
    """
    with _opened(path) as (file, size):
        reader, _, _, keys = _open(path, file, size)
        pairs: dict[str, bytes] = {}
        for _ in range(keys):
            length = reader.count("<Q", "the length of a key", _LONGEST_KEY)
            key = reader.bytes(length, "a key").decode("utf-8", errors="replace")
            if key in pairs:
                raise BadWeights(path, f"the key “{key}” stands there twice; the file is damaged")
            begin = file.tell()
            reader.value(int(reader.number("<I", key)), key)
            end = file.tell()
            file.seek(begin)
            pairs[key] = file.read(end - begin)
        return pairs


def tensor_bytes(tensor: Tensor) -> int | None:
    """How many bytes its data takes, or None for a type that this program does not know."""
    kind = tensor_type_by_number(tensor.type)
    return kind.row_bytes(tensor.elements) if kind else None


def tensor_type_name(number: int) -> str:
    """`tensor_type_name(12)` is "Q4_K"."""
    kind = tensor_type_by_number(number)
    return kind.name.upper() if kind else f"type {number}"


def _check_extent(path: Path, header: Header, size: int) -> None:
    for tensor in header.tensors:
        end = header.data_offset + tensor.offset + (tensor_bytes(tensor) or 0)
        if end > size:
            raise BadWeights(
                path,
                f"tensor {tensor.name} would end at byte {end:,}, but the file has {size:,}; it is cut off",
            )
