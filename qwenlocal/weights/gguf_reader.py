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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from qwenlocal.errors import BadWeights
from qwenlocal.fileio import describe_pointer
from qwenlocal.formatting import format_quantity, shorten
from qwenlocal.ggml import TensorType, tensor_type_by_number

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Types of tokens (llama.h: enum llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What converters call a row of the embeddings that no token has. Typing this must not produce that id.
PADDING = re.compile(r"\[PAD\d+\]")

# What an added token looks like that structures prompts, even if its makers do not call it special (llama.cpp,
# conversion/base.py: does_token_look_special).
CONTROL_LOOK = re.compile(r"<\|.*\|>", re.DOTALL)

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_KEY_SIZE = 1 << 16, 1 << 20, 1 << 16
_MAX_ARRAY = 1024  # longer arrays are vocabularies; only their length is kept
_MAX_DIMENSIONS, _MAX_NAME_SIZE = 4, 63  # ggml.h: GGML_MAX_DIMS, and GGML_MAX_NAME without the final zero
_MAX_ELEMENTS = (1 << 63) - 1

EncodedValue = bytes
"""A value as in the file: the number of its type, then the value itself."""


@dataclass(frozen=True)
class LongArray:
    """An array that was skipped, and its length."""

    length: int


MetadataValue = int | float | bool | str | list["int | float | bool | str"] | LongArray


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: dimensions in ggml's order, fastest first, and the offset of its data from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    file: Path
    offset: int

    @property
    def elements(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.type.row_bytes(self.elements)


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

    @property
    def weights_size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def hyperparameter(self, key: str) -> MetadataValue | None:
        """Return `metadata["<architecture>.<key>"]`; `hyperparameter("block_count")` of a 0.5B is 24."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def dimension(self, key: str, default: Any = None) -> Any:
        """Return the hyperparameter `key` if it is an integer, else `default`."""
        value = self.hyperparameter(key)
        return value if isinstance(value, int) else default


class _Reader:
    """
    Reads little-endian values; raises `BadWeights` if the file ends too early.

    `version`, `tensor_count` and `key_count` are the fixed fields at the beginning.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size
        self._check_magic()
        self.version = self.number("<I", "the version")
        if self.version not in (2, 3):
            is_swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3)
            unsupported = f"its version is {self.version}; versions 2 and 3 are supported"
            why = "it is big-endian" if is_swapped else unsupported
            raise BadWeights(path, f"this GGUF file is not supported: {why}")
        self.tensor_count = self.count("<Q", "the number of tensors", _MAX_TENSORS)
        self.key_count = self.count("<Q", "the number of keys", _MAX_KEYS)

    def _check_magic(self) -> None:
        if self.size == 0:
            raise BadWeights(self.path, "the file is empty")
        begin = self.file.read(64)
        if pointer := describe_pointer(begin):
            raise BadWeights(self.path, pointer)
        self.file.seek(len(MAGIC))
        if not begin.startswith(MAGIC):
            cause = ": it is a web page" if begin.lstrip().startswith(b"<") else ""
            raise BadWeights(
                self.path,
                f"it is not a GGUF file{cause}",
                message=f"{self.path} is not a GGUF file{cause}.",
                hint="Models are .gguf files. List the names that work instead: qwenlocal list --all",
            )

    def require(self, count: int, part: str) -> None:
        """Check that `count` more bytes follow."""
        if count > self.size - self.file.tell():
            raise BadWeights(self.path, f"the file ends inside {part}; it is incomplete or damaged")

    def bytes(self, count: int, part: str) -> bytes:
        self.require(count, part)
        return self.file.read(count)

    def number(self, format: str, part: str) -> int:
        (value,) = struct.unpack(format, self.bytes(struct.calcsize(format), part))
        return value  # type: ignore[no-any-return]

    def count(self, format: str, part: str, limit: int) -> int:
        value = self.number(format, part)
        if value > limit:
            raise BadWeights(self.path, f"{part} is {value:,}, more than any real file has; it is damaged")
        return value

    def skip(self, count: int, part: str) -> None:
        self.require(count, part)
        self.file.seek(count, 1)

    def string(self, part: str) -> str:
        return self.bytes(self.number("<Q", part), part).decode("utf-8", errors="replace")

    def value(self, part: str) -> EncodedValue:
        """Read a value undecoded; its structure is checked."""
        begin = self.file.tell()
        kind = self.number("<I", part)
        if kind == _ARRAY:
            self._skip_array(part)
        elif kind == _STRING:
            self.skip(self.number("<Q", part), part)
        elif kind in SCALARS:
            self.skip(struct.calcsize(SCALARS[kind]), part)
        else:
            raise BadWeights(self.path, f"{part} has the unknown value type {kind}; the file is damaged or too new")
        size = self.file.tell() - begin
        self.file.seek(begin)
        return self.file.read(size)

    def _skip_array(self, part: str) -> None:
        element, length = self.number("<I", part), self.number("<Q", part)
        if element == _STRING:
            self.require(8 * length, part)
            for _ in range(length):
                self.skip(self.number("<Q", part), part)
        elif element in SCALARS:
            self.skip(length * struct.calcsize(SCALARS[element]), part)
        else:
            raise BadWeights(self.path, f"{part} is an array of the unknown type {element}; the file is damaged")

    def iterate_keys(self) -> Iterator[str]:
        """Yield each key; its value must be read before the next one."""
        seen = set[str]()
        for _ in range(self.key_count):
            length = self.count("<Q", "the length of a key", _MAX_KEY_SIZE)
            key = self.bytes(length, "a key").decode("utf-8", errors="replace")
            if not key:
                raise BadWeights(self.path, "a key is empty; the file is damaged")
            if key in seen:
                raise BadWeights(self.path, f"the key “{shorten(key)}” occurs twice; the file is damaged")
            seen.add(key)
            yield key


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[_Reader]:
    """Open the file and read its fixed fields; errors of the operating system become `BadWeights`."""
    try:
        with path.open("rb") as file:
            yield _Reader(file, path)
    except OSError as reason:
        raise BadWeights.unreadable(path, reason) from reason


def _read_pairs(reader: _Reader, *, stop_before_vocabulary: bool) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for key in reader.iterate_keys():
        if stop_before_vocabulary and key == "tokenizer.ggml.tokens":
            break
        metadata[key] = _decode_short(reader.value(f"“{shorten(key)}”"))
    return metadata


def _decode_short(encoded: EncodedValue) -> MetadataValue:
    """Decode a value unless it is a long array."""
    if encoded[0] == _ARRAY:
        (length,) = struct.unpack_from("<Q", encoded, 8)
        if length > _MAX_ARRAY:
            return LongArray(length)
    return decode_value(encoded)  # type: ignore[no-any-return]


def _read_tensor_infos(reader: _Reader) -> list[TensorInfo]:
    """Read the descriptions of the tensors; their offsets are still relative to the end of the header."""
    tensors, names = [], set[str]()
    for index in range(reader.tensor_count):
        part = f"the description of tensor {index}"
        name = reader.string(part)
        short = shorten(name)
        if len(name.encode()) > _MAX_NAME_SIZE:
            raise BadWeights(reader.path, f"the tensor name “{short}” has more than {_MAX_NAME_SIZE} bytes")
        if name in names:
            raise BadWeights(reader.path, f"the tensor “{short}” occurs twice; the file is damaged")
        names.add(name)
        dimensions = reader.count("<I", f"the number of dimensions of “{short}”", _MAX_DIMENSIONS)
        shape = tuple(reader.number("<Q", part) for _ in range(dimensions))
        number, offset = reader.number("<I", part), reader.number("<Q", part)
        kind = tensor_type_by_number(number)
        problem = _describe_bad_shape(shape, kind) if kind else f"has the unknown type {number}"
        if kind is None or problem:
            raise BadWeights(reader.path, f"the tensor “{short}” {problem}; the file is damaged or too new")
        tensors.append(TensorInfo(name, shape, kind, reader.path, offset))
    return tensors


def _describe_bad_shape(shape: tuple[int, ...], kind: TensorType) -> str:
    """Describe the fault of a tensor's shape (gguf.cpp: gguf_init_from_reader); "" if there is none."""
    if math.prod(max(1, size) for size in shape) > _MAX_ELEMENTS // kind.type_size:
        return "has more values than any file can hold"
    columns = shape[0] if shape else 1
    if columns % kind.block_size:
        count = format_quantity(columns, "value")
        return f"has rows of {count}, not a multiple of the {kind.block_size} in a block of {kind.name}"
    return ""


def _locate_tensors(tensors: list[TensorInfo], data_offset: int, alignment: int, size: int) -> Iterator[TensorInfo]:
    """Check that the tensors follow each other without gaps, as ggml requires, in a file of `size` bytes."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            raise BadWeights(
                tensor.file,
                f"the data of “{shorten(tensor.name)}” begins at byte {tensor.offset:,} of the tensors, but byte "
                f"{expected:,} follows the tensor before it; the file is damaged",
            )
        end = data_offset + expected + tensor.size
        if end > size:
            raise BadWeights(
                tensor.file,
                f"“{shorten(tensor.name)}” would end at byte {end:,}, but the file has {size:,}; it is incomplete",
            )
        yield replace(tensor, offset=data_offset + expected)
        expected += -(-tensor.size // alignment) * alignment


def read_metadata(path: Path) -> Mapping[str, MetadataValue]:
    """
    Read the keys before the vocabulary: name, architecture, dimensions. Takes about a millisecond for any model.

    Raises
    ------
    BadWeights: the file cannot be read, is empty, not GGUF, of another version, or ends inside these keys.
    """
    with _open_file(path) as reader:
        return _read_pairs(reader, stop_before_vocabulary=True)


def read_header(path: Path) -> Header:
    """
    Read the whole header, without the vocabulary (about 0.2 s for Qwen's 151,936 tokens and their merges).

    Raises
    ------
    BadWeights: as `read_metadata`, or a tensor has no valid type, shape or place.
    """
    with _open_file(path) as reader:
        metadata = _read_pairs(reader, stop_before_vocabulary=False)
        tensors = _read_tensor_infos(reader)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise BadWeights(path, f"“general.alignment” is {shorten(str(alignment))}, not a power of two")
        data_offset = -(-reader.file.tell() // alignment) * alignment
        located = tuple(_locate_tensors(tensors, data_offset, alignment, reader.size))
        return Header(reader.version, metadata, located, data_offset)


def read_raw_metadata(path: Path) -> dict[str, EncodedValue]:
    """
    Read every key, vocabulary included, with the bytes of its value (`decode_value` decodes them).

    Raises
    ------
    BadWeights: as `read_metadata`.
    """
    with _open_file(path) as reader:
        return {key: reader.value(f"“{shorten(key)}”") for key in reader.iterate_keys()}


def read_token_types(path: Path) -> list[int]:
    """
    Read the type of every token (0.3 s for Qwen's 151,936); empty if the file states none.

    Raises
    ------
    BadWeights: as `read_metadata`.
    """
    encoded = read_raw_metadata(path).get("tokenizer.ggml.token_type")
    return decode_value(encoded) if encoded else []


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
