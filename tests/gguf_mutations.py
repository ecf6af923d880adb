"""Damaged GGUF files: every key that llama.cpp reads, every tensor description and the layout, with wrong values."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import EncodedValue, decode_value, read_header, read_raw_metadata

# Keys that llama.cpp reads in files of Qwen models, without the prefix of the architecture (llama-model.cpp,
# llama-vocab.cpp); most files lack most of them.
_ARCHITECTURE_KEYS = (
    "context_length", "embedding_length", "embedding_length_out", "attention.causal", "pooling_type", "block_count",
    "nextn_predict_layers", "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count",
    "feed_forward_length", "attention.head_count", "attention.head_count_kv", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.alpha", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "attention.key_length_swa", "attention.value_length_swa",
    "rope.dimension_count_swa", "classifier.output_labels", "attention.layer_norm_rms_epsilon",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "vocab_size", "attention.sliding_window",
)  # fmt: skip
_OTHER_KEYS = (
    "general.architecture", "general.name", "general.file_type", "general.alignment", "general.license",
    "general.sampling.temp", "general.sampling.top_k", "split.count", "split.no", "split.tensors.count",
    "tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id", "tokenizer.ggml.mask_token_id", "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.prefix_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.suppress_tokens",
)  # fmt: skip
_MAX_U32 = (1 << 32) - 1
_MAX_SIZE = 1 << 24  # bytes
# Values for every key; None removes it.
_VALUES: Mapping[str, EncodedValue | None] = {
    "missing": None,
    "u32 0": gguf_writer.u32(0),
    "u32 1": gguf_writer.u32(1),
    "u32 3": gguf_writer.u32(3),
    "u32 600": gguf_writer.u32(600),
    "u32 max": gguf_writer.u32(_MAX_U32),
    "i32 -1": gguf_writer.i32(-1),
    "i32 4": gguf_writer.i32(4),
    "u8 4": struct.pack("<IB", 0, 4),
    "u16 4": struct.pack("<IH", 2, 4),
    "u64 4": struct.pack("<IQ", 10, 4),
    "f32 0": gguf_writer.f32(0),
    "f32 -1": gguf_writer.f32(-1),
    "f32 nan": gguf_writer.f32(float("nan")),
    "f32 inf": gguf_writer.f32(float("inf")),
    "f64 1": struct.pack("<Id", 12, 1.0),
    "bool": gguf_writer.boolean(True),
    "empty string": gguf_writer.string(""),
    "string x": gguf_writer.string("x"),
    "string llama": gguf_writer.string("llama"),
    "string bert": gguf_writer.string("bert"),
    "string none": gguf_writer.string("none"),
    "string yarn": gguf_writer.string("yarn"),
    "long string": gguf_writer.string("9" * 400),
    "i32s empty": gguf_writer.i32s([]),
    "i32s 1": gguf_writer.i32s([4]),
    "i32s 2": gguf_writer.i32s([4, 4]),
    "i32s 4 2": gguf_writer.i32s([4, 2]),
    "u32 2": gguf_writer.u32(2),
    "f32s 2": gguf_writer.f32s([1.0, 1.0]),
    "f32s 300": gguf_writer.f32s([1.0] * 300),
    "i32s 300": gguf_writer.i32s([1] * 300),
    "strings 2": gguf_writer.strings(["a", "b"]),
    "strings 300": gguf_writer.strings([f"t{n}" for n in range(300)]),
    "strings same": gguf_writer.strings(["a"] * 300),
    "strings empty": gguf_writer.strings([]),
}


@dataclass(frozen=True)
class TensorDescription:
    """The description of a tensor as in a file: the number of its type, and the offset from the end of the header."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufParts:
    """A GGUF file in parts, which need not fit together."""

    pairs: Mapping[str, EncodedValue]
    tensors: tuple[TensorDescription, ...]
    data: bytes
    version: int = 3
    alignment: int = 32

    def encode(self) -> bytes:
        chunks = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.pairs))]
        for key, value in self.pairs.items():
            chunks += [_text(key), value]
        for tensor in self.tensors:
            count = len(tensor.shape)
            chunks += [
                _text(tensor.name),
                struct.pack(f"<I{count}QiQ", count, *tensor.shape, tensor.type, tensor.offset),
            ]
        header = b"".join(chunks)
        return header + bytes(-len(header) % self.alignment) + self.data


def read_parts(path: Path) -> GgufParts:
    header = read_header(path)
    begin = header.data_offset
    tensors = tuple(TensorDescription(t.name, t.shape, t.type.number, t.offset - begin) for t in header.tensors)
    return GgufParts(read_raw_metadata(path), tensors, path.read_bytes()[begin:])


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def damaged_files(good: GgufParts) -> Iterator[tuple[str, GgufParts]]:
    """Yield descriptions of damages and files that have them."""
    yield "good", good
    yield from _damaged_metadata(good)
    yield from _damaged_layouts(good)
    yield from _damaged_tensors(good)


def _damaged_metadata(good: GgufParts) -> Iterator[tuple[str, GgufParts]]:
    architecture = good.pairs["general.architecture"][12:].decode()
    keys = dict.fromkeys([*good.pairs, *_OTHER_KEYS, *(f"{architecture}.{key}" for key in _ARCHITECTURE_KEYS)])
    for key in keys:
        for description, value in _VALUES.items():
            if good.pairs.get(key) == value or (value is None and key not in good.pairs):
                continue
            pairs = {**good.pairs, key: value}
            pairs = {name: data for name, data in pairs.items() if data is not None}
            yield f"{key}: {description}", replace(good, pairs=pairs)
        value = good.pairs.get(key, b"")
        if value[:4] == struct.pack("<I", 9):
            yield from _damaged_list(good, key, value)


def _damaged_list(good: GgufParts, key: str, value: EncodedValue) -> Iterator[tuple[str, GgufParts]]:
    """Change the length of a list, with and without the entries, and entries of lists of integers."""
    element, count = struct.unpack_from("<IQ", value, 4)
    if element != 8:
        size = (len(value) - 16) // count
        for entries in (count - 1, count + 1):
            data = (value[16:] + bytes(size))[: entries * size]
            changed = struct.pack("<IIQ", 9, element, entries) + data
            yield f"{key}: {entries} entries", replace(good, pairs={**good.pairs, key: changed})
        for number in (-1, *range(8)) if element == 5 else ():
            for place in (0, count - 1):
                changed = gguf_writer.i32s([*(values := decode_value(value))[:place], number, *values[place + 1 :]])
                yield f"{key}: {number} at {place}", replace(good, pairs={**good.pairs, key: changed})
    elif count > 1:
        texts = decode_value(value)
        for description, entries in (
            ("one entry less", texts[:-1]),
            ("one entry more", [*texts, "more"]),
            ("one entry twice", [*texts[:-1], texts[0]]),
            ("one entry empty", ["", *texts[1:]]),
        ):
            yield f"{key}: {description}", replace(good, pairs={**good.pairs, key: gguf_writer.strings(entries)})
    for lie in (count - 1, count + 1, 1 << 40):
        changed = struct.pack("<IIQ", 9, element, lie) + value[16:]
        yield f"{key}: states {lie} entries", replace(good, pairs={**good.pairs, key: changed})
    unknown = struct.pack("<IIQ", 9, 13, count) + value[16:]
    yield f"{key}: unknown element type", replace(good, pairs={**good.pairs, key: unknown})
    nested = struct.pack("<IIQ", 9, 9, count) + value[16:]
    yield f"{key}: list of lists", replace(good, pairs={**good.pairs, key: nested})


def _damaged_layouts(good: GgufParts) -> Iterator[tuple[str, GgufParts]]:
    for version in (0, 1, 2, 4, 3 << 24):
        yield f"version {version}", replace(good, version=version)
    for alignment in (1, 2, 4, 8, 16, 48, 64, 96, 128, 4096):
        pairs = {**good.pairs, "general.alignment": gguf_writer.u32(alignment)}
        yield f"alignment {alignment}, as written", replace(good, pairs=pairs, alignment=alignment)
        yield f"alignment {alignment}, laid out", _lay_out(replace(good, pairs=pairs, alignment=alignment))
        longer = {**pairs, "my.key": gguf_writer.boolean(True)}
        yield f"alignment {alignment}, longer header", replace(good, pairs=longer, alignment=alignment)
    yield "an empty key", replace(good, pairs={**good.pairs, "": gguf_writer.u32(1)})
    yield "an unknown value type", replace(good, pairs={**good.pairs, "my.key": struct.pack("<II", 13, 1)})
    yield "data cut", replace(good, data=good.data[:-100])
    yield "data missing", replace(good, data=b"")
    yield "data longer", replace(good, data=good.data + bytes(1000))
    yield "no tensors", replace(good, tensors=(), data=b"")
    yield "no keys", replace(good, pairs={})


def _size(tensor: TensorDescription) -> int | None:
    """Return the bytes of a tensor; None if its type is unknown or no file could hold it."""
    kind = ggml.tensor_type_by_number(tensor.type)
    size = kind.row_bytes(math.prod(tensor.shape)) if kind else _MAX_SIZE
    return size if size < _MAX_SIZE else None


def _lay_out(parts: GgufParts, sizes: Mapping[str, int] = {}) -> GgufParts:
    """Move the tensors to offsets that fit the alignment; those with `sizes` get as many bytes of their own data."""
    tensors, chunks, end = [], list[bytes](), 0
    ends = [tensor.offset for tensor in parts.tensors[1:]] + [len(parts.data)]
    for tensor, next_offset in zip(parts.tensors, ends, strict=True):
        content = parts.data[tensor.offset : next_offset]
        if (size := sizes.get(tensor.name)) is not None:
            content = (content + bytes(max(0, size - len(content))))[:size]
        tensors.append(replace(tensor, offset=end))
        chunks.append(content + bytes(-len(content) % parts.alignment))
        end += len(chunks[-1])
    return replace(parts, tensors=tuple(tensors), data=b"".join(chunks))


def _damaged_tensors(good: GgufParts) -> Iterator[tuple[str, GgufParts]]:
    tensors = good.tensors
    for index, tensor in enumerate(tensors):
        for description, changed in _damaged_descriptions(tensor, tensors[index - 1]):
            others = replace(good, tensors=(*tensors[:index], changed, *tensors[index + 1 :]))
            yield f"{tensor.name}: {description}", others
            if (size := _size(changed)) is not None and changed.offset == tensor.offset:
                yield f"{tensor.name}: {description}, laid out", _lay_out(others, {changed.name: size})
        yield f"{tensor.name}: removed", replace(good, tensors=(*tensors[:index], *tensors[index + 1 :]))
        begin, end = tensor.offset, tensors[index + 1].offset if index + 1 < len(tensors) else len(good.data)
        rest = tuple(replace(t, offset=t.offset - (end - begin)) for t in tensors[index + 1 :])
        without = replace(good, tensors=(*tensors[:index], *rest), data=good.data[:begin] + good.data[end:])
        yield f"{tensor.name}: removed with its data", without
    size, vocabulary = len(good.data), next(t.shape[-1] for t in tensors if t.name == "token_embd.weight")
    for name, shape in (("my.weight", (8, 4)), ("output.bias", (vocabulary,)), ("rope_freqs.weight", (8,)),
                        ("blk.0.attn_q.scale", (1,)), ("blk.0.attn_qkv.weight", (8, 8)), ("blk.9.attn_q.bias", (8,)),
                        ("blk.0.attn_output.bias", (8,)), ("output.scale", (1,)), ("output.weight", (8, 4)),
                        ("blk.0.attn_q.input_scale", (1,)), ("blk.0.ffn_gate_inp.bias", (4,)),
                        ("blk.0.ffn_up.scale", (1,)), ("blk.0.ffn_up.scale", (2,)), ("blk.0.attn_v.scale", (1, 2)),
                        ("blk.0.ffn_up_exps.scale", (4,))):  # fmt: skip
        extra = TensorDescription(name, shape, 0, size)
        yield f"extra {name} {shape}", replace(good, tensors=(*tensors, extra), data=good.data + bytes(2048))


def _damaged_descriptions(
    tensor: TensorDescription, other: TensorDescription
) -> Iterator[tuple[str, TensorDescription]]:
    shape = tensor.shape
    for number in (*range(44), 99, -1):
        if number != tensor.type:
            yield f"type {number}", replace(tensor, type=number)
    yield "transposed", replace(tensor, shape=tuple(reversed(shape)) if len(shape) > 1 else (1, *shape))
    first, *rest, last = (1, *shape)[-2:] if len(shape) < 2 else shape
    shapes = ((), (0,), (*shape, 1), (*shape, 0), (*shape, 2), (1, *shape), (1, 1, 1, 1, 1), (1 << 32, 1 << 32),
              (shape[0], 1 << 62), (first, *rest, last + 1), (first, *rest, last - 1), (first // 2, *rest, last),
              *((size, *shape[1:]) for size in (shape[0] - 1, shape[0] // 2, 1 << 40, 1 << 63)))  # fmt: skip
    for changed in dict.fromkeys(shapes):
        yield f"shape {changed}", replace(tensor, shape=changed)
    begin = tensor.offset
    for offset in dict.fromkeys((0, begin + 32, begin + 1, other.offset, begin - 32, 1 << 40, (1 << 64) - 32)):
        if offset != tensor.offset and offset >= 0:
            yield f"offset {offset}", replace(tensor, offset=offset)
    for name in ("", "x", "x" * 63, "x" * 64, other.name, tensor.name + " ", tensor.name.replace("weight", "wright")):
        if name != tensor.name:
            yield f"name {name!r}", replace(tensor, name=name)
