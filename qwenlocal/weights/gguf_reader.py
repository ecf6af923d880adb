"""
Headers of GGUF files: metadata, and where the tensors are.

Format (ggml/docs/gguf.md): magic `GGUF`, version u32, tensor count u64, key count u64, then key-value pairs, then
tensor descriptions, then the data, aligned; all little-endian. A vocabulary of 151,936 tokens takes megabytes of the
metadata, so long arrays are skipped, and `read_metadata` stops before the vocabulary.

Not supported: version 1 (never used for Qwen) and big-endian files; the error says so.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwenlocal.errors import BadWeights
from qwenlocal.ggml import tensor_type_by_number

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Types of tokens (llama.h: enum llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What converters call a row of the embeddings that no token has. Typing this must not produce that id.
PADDING = re.compile(r"\[PAD\d+\]")

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_KEY_SIZE = 1 << 16, 1 << 20, 1 << 16
_MAX_ARRAY = 1024  # longer arrays are vocabularies; only their length is kept

EncodedValue = bytes
"""A value as in the file: the number of its type, then the value itself."""


@dataclass(frozen=True)
class LongArray:
    """An array that was skipped: its element type (GGUF's number) and its length."""

    element_type: int
    length: int


MetadataValue = int | float | bool | str | list["int | float | bool | str"] | LongArray


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description: dimensions in ggml's order, fastest first, and its offset after the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything before the data of a GGUF file."""

    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def architecture(self) -> str:
        """For example "qwen2"; empty if the file does not state it."""
        return str(self.metadata.get("general.architecture", ""))

    def hyperparameter(self, key: str) -> MetadataValue | None:
        """Return `metadata["<architecture>.<key>"]`; `hyperparameter("block_count")` of a 0.5B is 24."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _Reader:
    """Reads little-endian values; raises `BadWeights` if the file ends too early."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def bytes(self, count: int, part: str) -> bytes:
        if count > self.size - self.file.tell():
            raise BadWeights(self.path, f"the file ends inside {part}; it is incomplete or damaged")
        return self.file.read(count)

    def number(self, format: str, part: str) -> int | float | bool:
        (value,) = struct.unpack(format, self.bytes(struct.calcsize(format), part))
        return value  # type: ignore[no-any-return]

    def count(self, format: str, part: str, limit: int) -> int:
        value = int(self.number(format, part))
        if value > limit:
            raise BadWeights(self.path, f"{part} is {value:,}, more than any real file has; it is damaged")
        return value

    def string(self, part: str) -> str:
        return self.bytes(int(self.number("<Q", part)), part).decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> MetadataValue:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        raise BadWeights(self.path, f"“{key}” has the unknown value type {kind}; the file is damaged or too new")

    def array(self, key: str) -> MetadataValue:
        element = int(self.number("<I", key))
        length = int(self.number("<Q", key))
        if element == _STRING:
            if length > _MAX_ARRAY:
                self._skip_strings(length, key)
                return LongArray(element, length)
            return [self.string(key) for _ in range(self._check_length(length, 8, key))]
        if element not in SCALARS:
            raise BadWeights(self.path, f"“{key}” is an array of the unknown type {element}; the file is damaged")
        form = SCALARS[element]
        data = self.bytes(length * struct.calcsize(form), key)
        if length > _MAX_ARRAY:
            return LongArray(element, length)
        return list(struct.unpack(f"<{length}{form[1:]}", data))

    def _check_length(self, length: int, width: int, key: str) -> int:
        if length * width > self.size - self.file.tell():
            raise BadWeights(self.path, f"the file ends inside “{key}”; it is incomplete or damaged")
        return length

    def _skip_strings(self, length: int, key: str) -> None:
        for _ in range(self._check_length(length, 8, key)):
            size = int(self.number("<Q", key))
            if size > self.size - self.file.tell():
                raise BadWeights(self.path, f"the file ends inside “{key}”; it is incomplete or damaged")
            self.file.seek(size, 1)

    def key(self) -> str:
        length = self.count("<Q", "the length of a key", _MAX_KEY_SIZE)
        return self.bytes(length, "a key").decode("utf-8", errors="replace")


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open the file and yield it with its size; errors of the operating system become `BadWeights`."""
    try:
        with path.open("rb") as file:
            yield file, path.stat().st_size
    except OSError as reason:
        problem = reason.strerror or str(reason)
        raise BadWeights(path, f"cannot read it ({problem})", hint="Check the path and its permissions.") from reason


def _read_preamble(path: Path, file: BinaryIO, size: int) -> tuple[_Reader, int, int, int]:
    """Return a reader behind the fixed fields, the version, and the numbers of tensors and of keys."""
    if size == 0:
        raise BadWeights(path, "the file is empty")
    reader = _Reader(file, path, size)
    magic = file.read(4)
    if magic != MAGIC:
        kind = "a web page" if magic.lstrip().startswith(b"<") else "another kind of file"
        raise BadWeights(
            path,
            f"this is not a GGUF file: it begins like {kind}",
            hint="Models are .gguf files. List the names that work instead: qwenlocal list --all",
        )
    version = int(reader.number("<I", "the version"))
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "it is big-endian" if swapped in (2, 3) else f"its version is {version}; versions 2 and 3 are supported"
        raise BadWeights(path, f"this GGUF file is not supported: {why}")
    tensors = reader.count("<Q", "the number of tensors", _MAX_TENSORS)
    keys = reader.count("<Q", "the number of keys", _MAX_KEYS)
    return reader, version, tensors, keys


def _read_pairs(reader: _Reader, keys: int, *, stop_before_vocabulary: bool) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(keys):
        key = reader.key()
        kind = int(reader.number("<I", key))
        if stop_before_vocabulary and key == "tokenizer.ggml.tokens":
            break
        if key in metadata:
            raise BadWeights(reader.path, f"the key “{key}” occurs twice; the file is damaged")
        metadata[key] = reader.value(kind, key)
    return metadata


def _read_tensor_infos(reader: _Reader, count: int) -> list[TensorInfo]:
    tensors, names = [], set[str]()
    for index in range(count):
        part = f"the description of tensor {index}"
        name = reader.string(part)
        if name in names:
            raise BadWeights(reader.path, f"the tensor “{name}” occurs twice; the file is damaged")
        names.add(name)
        dimensions = reader.count("<I", f"the number of dimensions of {name}", 4)
        shape = tuple(int(reader.number("<Q", part)) for _ in range(dimensions))
        kind, offset = int(reader.number("<I", part)), int(reader.number("<Q", part))
        tensors.append(TensorInfo(name, shape, kind, offset))
    return tensors


def read_metadata(path: Path) -> Mapping[str, MetadataValue]:
    """
    Read the keys before the vocabulary: name, architecture, dimensions. Takes about a millisecond for any model.

    Raises
    ------
    BadWeights: the file cannot be read, is empty, not GGUF, of another version, or ends inside these keys.
    """
    with _open_file(path) as (file, size):
        reader, _, _, keys = _read_preamble(path, file, size)
        return _read_pairs(reader, keys, stop_before_vocabulary=True)


def read_header(path: Path) -> Header:
    """
    Read the whole header, without the vocabulary (about 0.2 s for Qwen's 151,936 tokens and their merges).

    Raises
    ------
    BadWeights: as `read_metadata`, or a tensor's data would lie beyond the end of the file.
    """
    with _open_file(path) as (file, size):
        reader, version, count, keys = _read_preamble(path, file, size)
        metadata = _read_pairs(reader, keys, stop_before_vocabulary=False)
        tensors = _read_tensor_infos(reader, count)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise BadWeights(path, f"general.alignment is {alignment!r}; the file is damaged")
        header = Header(version, metadata, tuple(tensors), -(-file.tell() // alignment) * alignment)
    _check_extent(path, header, size)
    return header


def read_raw_metadata(path: Path) -> dict[str, EncodedValue]:
    """
    Read every key, vocabulary included, with the bytes of its value (`decode_value` decodes them).

    Raises
    ------
    BadWeights: as `read_metadata`.
    """
    with _open_file(path) as (file, size):
        reader, _, _, keys = _read_preamble(path, file, size)
        pairs: dict[str, EncodedValue] = {}
        for _ in range(keys):
            key = reader.key()
            if key in pairs:
                raise BadWeights(path, f"the key “{key}” occurs twice; the file is damaged")
            begin = file.tell()
            reader.value(int(reader.number("<I", key)), key)
            end = file.tell()
            file.seek(begin)
            pairs[key] = file.read(end - begin)
        return pairs


def decode_value(encoded: EncodedValue) -> Any:
    """Decode a value: that of `gguf_writer.u32(7)` is 7, that of `gguf_writer.strings(["a"])` is ["a"]."""
    (kind,) = struct.unpack_from("<I", encoded)
    if kind == _STRING:
        return encoded[12:].decode("utf-8", errors="replace")
    if kind != _ARRAY:
        return struct.unpack_from(SCALARS[kind], encoded, 4)[0]
    element, count = struct.unpack_from("<IQ", encoded, 4)
    if element != _STRING:
        return list(struct.unpack_from(f"<{count}{SCALARS[element][1:]}", encoded, 16))
    texts, position = [], 16
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", encoded, position)
        texts.append(encoded[position + 8 : position + 8 + size].decode("utf-8", errors="replace"))
        position += 8 + size
    return texts


def tensor_bytes(tensor: TensorInfo) -> int | None:
    """Return the bytes of a tensor's data; None if its type is unknown."""
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
                f"tensor {tensor.name} would end at byte {end:,}, but the file has {size:,}; it is incomplete",
            )
