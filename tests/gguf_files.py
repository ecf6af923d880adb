"""Builders of GGUF files, and copies of GGUF files with changes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from oracle import data_of

from qwenlocal import ggml
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import USER_DEFINED, EncodedValue, decode_value, read_header, read_raw_metadata


def write_f32_gguf(path: Path, pairs: Mapping[str, EncodedValue], tensors: Mapping[str, numpy.ndarray]) -> Path:
    kind = ggml.tensor_type("f32")
    layout = gguf_writer.make_layout(
        pairs, [gguf_writer.TensorSpec(name, tuple(reversed(data.shape)), kind) for name, data in tensors.items()]
    )
    with path.open("wb") as file:
        file.write(layout.header)
        for name, data in tensors.items():
            file.seek(layout.offsets[name])
            file.write(data.astype(numpy.float32).tobytes())
        file.truncate(max(layout.size, file.tell()))
    return path


def copy_with_metadata(source: Path, target: Path, pairs: Mapping[str, bytes | None]) -> Path:
    """Copy a GGUF file with other metadata; None removes a key."""
    header, metadata = read_header(source), read_raw_metadata(source)
    metadata = {key: value for key, value in {**metadata, **pairs}.items() if value is not None}
    specs = [gguf_writer.TensorSpec(t.name, t.shape, t.type) for t in header.tensors]
    target.write_bytes(gguf_writer.make_layout(metadata, specs).header + source.read_bytes()[header.data_offset :])
    return target


def copy_with_tensor_info(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """Copy a GGUF file with another `type` (a number) or `shape` in the description of one tensor."""
    header, infos = read_header(source), []
    for tensor in header.tensors:
        shape = changes.get("shape", tensor.shape) if tensor.name == name else tensor.shape
        number = changes.get("type", tensor.type.number) if tensor.name == name else tensor.type.number
        text = tensor.name.encode()
        infos.append(
            len(text).to_bytes(8, "little") + text
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, tensor.offset - header.data_offset)
        )  # fmt: skip
    header_start = gguf_writer.make_layout(read_raw_metadata(source), []).header
    pairs = header_start[24 : 24 + sum(8 + len(k.encode()) + len(v) for k, v in read_raw_metadata(source).items())]
    content = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(read_raw_metadata(source))) + pairs + b"".join(infos)
    content += bytes(-len(content) % 32)
    target.write_bytes(content + source.read_bytes()[header.data_offset :])
    return target


def copy_with_weights(source: Path, target: Path, name: str, *numbers: float) -> Path:
    """Copy an f32 GGUF file with other numbers at the beginning of a tensor."""
    at = next(tensor.offset for tensor in read_header(source).tensors if tensor.name == name)
    content = bytearray(source.read_bytes())
    content[at : at + 4 * len(numbers)] = numpy.array(numbers, numpy.float32).tobytes()
    target.write_bytes(content)
    return target


def copy_with_tensors(source: Path, target: Path, *, without: str = "", **more: numpy.ndarray) -> Path:
    """Copy an f32 GGUF file without one tensor, or with additional ones ("__" in names stands for ".")."""
    header, data = read_header(source), data_of(source)
    kind = ggml.tensor_type("f32")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors if tensor.name != without}
    contents = {name: data[name][1] for name in shapes}
    for name, numbers in more.items():
        shapes[name.replace("__", ".")] = tuple(reversed(numbers.shape))
        contents[name.replace("__", ".")] = numbers.astype(numpy.float32).tobytes()
    layout = gguf_writer.make_layout(
        read_raw_metadata(source), [gguf_writer.TensorSpec(name, shape, kind) for name, shape in shapes.items()]
    )
    with target.open("wb") as file:
        file.write(layout.header)
        for name, content in contents.items():
            file.seek(layout.offsets[name])
            file.write(content)
        file.truncate(layout.size)
    return target


def split_gguf(source: Path, folder: Path) -> None:
    """Split a GGUF file as llama-gguf-split does: all keys in the first part, tensors in both."""
    header, content = read_header(source), source.read_bytes()
    for number, tensors in enumerate((header.tensors[:5], header.tensors[5:])):
        pairs = read_raw_metadata(source) if number == 0 else {}
        count = struct.pack("<IH", 2, 2)
        pairs |= {"split.no": struct.pack("<IH", 2, number), "split.count": count}
        pairs["split.tensors.count"] = struct.pack("<Ii", 5, len(header.tensors))
        specs = [gguf_writer.TensorSpec(t.name, t.shape, t.type) for t in tensors]
        layout = gguf_writer.make_layout(pairs, specs)
        with (folder / f"x-0000{number + 1}-of-00002.gguf").open("wb") as file:
            file.write(layout.header)
            for tensor, spec in zip(tensors, specs, strict=True):
                file.seek(layout.offsets[tensor.name])
                file.write(content[tensor.offset : tensor.offset + spec.size])
            file.truncate(layout.size)


def old_token_types(good: Path) -> bytes:
    """Return token types with padding as user-defined tokens, as converters before mid-2024 wrote them."""
    kinds = decode_value(read_raw_metadata(good)["tokenizer.ggml.token_type"])
    return gguf_writer.i32s([USER_DEFINED if kind == 5 else kind for kind in kinds])
