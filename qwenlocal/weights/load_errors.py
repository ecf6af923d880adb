"""
Reasons why llama.cpp refuses a GGUF file, or ends the process over it.

`gguf_reader` checks the layout of a file, as gguf.cpp does. Here are the types and values of the metadata
(llama-model-loader.cpp: get_key), the vocabulary (llama-vocab.cpp: load), and the tensors of Qwen models.
"""

from __future__ import annotations

import collections
import shlex
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import BadWeights
from qwenlocal.formatting import format_quantity, format_shape, shorten
from qwenlocal.weights.gguf_hyperparameters import PER_LAYER, GgufHyperparameters
from qwenlocal.weights.gguf_reader import BYTE, EncodedValue, decode_value, read_raw_metadata
from qwenlocal.weights.other_formats import adapter_hint
from qwenlocal.weights.split_model import SplitModel, read_split_model

QWEN = ("qwen2", "qwen2moe")

Type = tuple[int, int | None]
"""A type of values, and for an array that of its elements (gguf.h: enum gguf_type)."""

_UINT16, _UINT32, _FLOAT32, _BOOL, _STRING = ((type_, None) for type_ in (2, 4, 6, 7, 8))
_UINT32S, _INT32S, _FLOAT32S, _BOOLS, _STRINGS = ((9, element) for element in (4, 5, 6, 7, 8))
_TYPE_NAMES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64",
               "int64", "float64")  # fmt: skip

_TYPES: Mapping[str, tuple[Type, ...]] = {
    **dict.fromkeys(("general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre"), (_STRING,)),
    **dict.fromkeys(("general.alignment", "general.file_type", "tokenizer.ggml.token_type_count"), (_UINT32,)),
    "split.count": (_UINT16,),
    **dict.fromkeys((f"tokenizer.ggml.{key}" for key in (
        "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
        "normalizer.lowercase", "normalizer.strip_accents")), (_BOOL,)),
    **dict.fromkeys((f"tokenizer.ggml.{role}_token_id" for role in (
        "bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_suf", "fim_mid",
        "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle")), (_UINT32,)),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), (_STRINGS,)),
    **dict.fromkeys(("tokenizer.ggml.token_type", "tokenizer.ggml.suppress_tokens"), (_INT32S,)),
    "tokenizer.ggml.scores": (_FLOAT32S, _INT32S),
}  # fmt: skip
_REQUIRED = ("context_length", "embedding_length", "block_count")  # of all architectures
_REQUIRED_QWEN = (*_REQUIRED, "attention.head_count", "attention.layer_norm_rms_epsilon")
# Keys of Qwen's architectures, after "qwen2." or "qwen2moe.".
_QWEN_TYPES: Mapping[str, tuple[Type, ...]] = {
    **dict.fromkeys((*_REQUIRED, "embedding_length_out", "pooling_type", "classifier.pooling_type",
                     "nextn_predict_layers", "expert_count", "expert_group_count", "expert_group_used_count",
                     "expert_shared_feed_forward_length", "rope.scaling.original_context_length",
                     "attention.key_length", "attention.value_length", "rope.dimension_count",
                     "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"), (_UINT32,)),
    **dict.fromkeys(("rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
                     "rope.scaling.alpha", "attention.layer_norm_rms_epsilon"), (_FLOAT32,)),
    **dict.fromkeys(("attention.causal", "rope.scaling.finetuned"), (_BOOL,)),
    **dict.fromkeys(PER_LAYER, (_UINT32, _UINT32S, _INT32S, _BOOLS)),
    "rope.scaling.type": (_STRING,),
}  # fmt: skip
_ONLY_MOE = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
_TOKENIZERS = ("llama", "bert", "gpt2", "hybriddna", "whitespace", "t5", "rwkv", "test", "plamo2", "gemma4")
_BYTE_BPE = ("gpt2", "hybriddna", "whitespace")
_MIN_BYTE_NAME = 3  # bytes; llama.cpp skips the "<0x" of "<0x0A>" and reads the digits after it (token_to_byte)
_MIN_ALIGNMENT = 32  # ggml-impl.h: TENSOR_ALIGNMENT

_ADAPTER_ERROR = "it is an adapter, not a model"

Pairs = Mapping[str, EncodedValue]


def find_load_errors(model: SplitModel, pairs: Pairs, *, with_tensors: bool = True) -> list[str]:
    """
    Return sentences about why llama.cpp cannot load or run the model; `pairs` is its raw metadata.

    Other architectures than Qwen's are checked only for what all files have in common. Without `with_tensors`, only the
    types of the metadata and the vocabulary are checked.
    """
    checks = [_find_wrong_types, _find_split_errors, _find_vocabulary_errors]
    if with_tensors:
        checks += [_find_hyperparameter_errors, _find_tensor_errors, _find_unusable_tensors]
    # Each check relies on those before.
    return next((errors for check in checks if (errors := list(check(model, pairs)))), [])


def check_file(source: Path, *, with_tensors: bool = True) -> SplitModel:
    """
    Check that llama.cpp can load and run a model, as `find_load_errors` does; `source` is one of its files.

    Raises
    ------
    BadWeights: it cannot; the error states the first reason.
    """
    model = read_split_model(source)
    path = model.paths[0]
    if is_adapter_file(model):
        base = str(model.headers[0].metadata.get("general.base_model.0.name", ""))
        raise BadWeights(path, _ADAPTER_ERROR, hint=adapter_hint(str(path), base))
    if errors := find_load_errors(model, read_raw_metadata(path), with_tensors=with_tensors):
        hint = f"To list all problems: qwenlocal inspect {shlex.quote(str(path))}"
        raise BadWeights(path, f"llama.cpp cannot run it: {errors[0]}", hint=hint)
    return model


# --- the metadata


def is_adapter_file(model: SplitModel) -> bool:
    """Return True if the file has an adapter, not a model."""
    return model.headers[0].metadata.get("general.type") == "adapter"


def _find_wrong_types(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    """Find keys that are missing, or whose types are not exactly those that llama.cpp asks for."""
    architecture = model.headers[0].architecture
    if is_adapter_file(model):
        yield _ADAPTER_ERROR
        return
    if not architecture:
        yield "“general.architecture” is missing"
        return
    of_architecture = _REQUIRED_QWEN if architecture in QWEN else _REQUIRED
    required = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", *(f"{architecture}.{key}" for key in of_architecture))
    yield from (f"“{shorten(key, 80)}” is missing" for key in required if key not in pairs)
    for key, allowed in _allowed_types(architecture, pairs).items():
        if key in pairs and _type_of(pairs[key]) not in allowed:
            yield f"“{shorten(key, 80)}” is of type {_type_name(_type_of(pairs[key]))}, not {_type_name(allowed[0])}"


def _allowed_types(architecture: str, pairs: Pairs) -> Mapping[str, tuple[Type, ...]]:
    """Return the types that llama.cpp accepts for the keys that it reads."""
    if architecture not in QWEN:
        return {**_TYPES, **{f"{architecture}.{key}": (_UINT32,) for key in _REQUIRED}}
    ignored = {"rope.scale_linear"} if f"{architecture}.rope.scaling.factor" in pairs else set[str]()
    ignored |= {*_ONLY_MOE} if architecture == "qwen2" else set()
    types = {f"{architecture}.{key}": allowed for key, allowed in _QWEN_TYPES.items() if key not in ignored}
    labels = f"{architecture}.classifier.output_labels"
    if _type_of(pairs.get(labels, b""))[1] is not None:  # other values than arrays are ignored
        types[labels] = (_STRINGS,)
    return {**_TYPES, **types}


def _type_of(value: EncodedValue) -> Type:
    type_ = int.from_bytes(value[:4], "little")
    return (type_, int.from_bytes(value[4:8], "little")) if type_ == _STRINGS[0] else (type_, None)


def _type_name(type_: Type) -> str:
    """`_type_name((9, 8))` is "array of string"."""
    number, element = type_
    return _TYPE_NAMES[number] if element is None else f"array of {_TYPE_NAMES[element]}"


def _find_split_errors(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    """Compare the numbers of the files of a split model, and their tensors, with what they state."""
    if len(model.paths) < 2:
        return
    for number, path in enumerate(model.paths):
        stated = pairs if number == 0 else read_raw_metadata(path)
        if stated.get("split.no") != struct.pack("<IH", _UINT16[0], number):
            yield f"“split.no” of {path.name} is not {number} (uint16)"
    total = sum(len(header.tensors) for header in model.headers)
    if pairs.get("split.tensors.count") != struct.pack("<Ii", _INT32S[1], total):
        yield f"“split.tensors.count” is not {total:,} (int32)"


def _find_hyperparameter_errors(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    architecture = model.headers[0].architecture
    if architecture in QWEN:
        yield from GgufHyperparameters(architecture, pairs).find_errors()
        return
    from gguf.constants import MODEL_ARCH_NAMES

    if architecture not in MODEL_ARCH_NAMES.values():
        yield f"its architecture “{shorten(architecture)}” is unknown"


# --- the vocabulary


def _find_vocabulary_errors(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    from qwenlocal.weights.byte_bpe import PRE_TOKENIZER_NAMES  # 10 ms that starting a chat does not need

    names = ("model", "pre", "tokens", "token_type", "scores")
    values = {key: decode_value(pairs[f"tokenizer.ggml.{key}"]) for key in names if f"tokenizer.ggml.{key}" in pairs}
    tokenizer, tokens, types = values["model"], values["tokens"], values.get("token_type", ())
    if tokenizer not in _TOKENIZERS:
        yield f"its tokenizer “{shorten(tokenizer)}” is unknown"
    if not tokens:
        yield "the vocabulary is empty"
    twice = next((token for token, count in collections.Counter(tokens).items() if count > 1 and token), None)
    if twice is not None:
        yield f"the vocabulary has the token “{shorten(twice)}” twice"
    for name in ("scores", "token_type"):
        if (count := len(values.get(name, tokens))) < len(tokens):
            size, entries = format_quantity(len(tokens), "token"), format_quantity(count, "entry", "entries")
            yield f"the vocabulary has {size}, but “tokenizer.ggml.{name}” has {entries}"
    if BYTE in types and tokenizer in ("llama", *_BYTE_BPE):
        in_pairs = zip(tokens, types, strict=False)
        if short := [token for token, kind in in_pairs if kind == BYTE and len(token.encode()) < _MIN_BYTE_NAME]:
            yield f"the token “{short[0]}” is a byte by its type, but not by its name"
    if tokenizer == "llama" and (byte := _find_missing_byte(tokens)):
        yield f"the vocabulary has no token for the byte {byte}"
    if tokenizer in _BYTE_BPE:
        if "tokenizer.ggml.merges" not in pairs:
            yield "“tokenizer.ggml.merges” is missing"
        if values.get("pre", "default") not in ("", *PRE_TOKENIZER_NAMES):
            yield f"its pre-tokenizer “{shorten(values['pre'])}” is unknown"


def _find_missing_byte(tokens: Sequence[str]) -> str:
    """Return a byte without a token in a SentencePiece vocabulary, such as "<0x0A>"; "" if all have one."""
    known = set(tokens)
    names = ((f"<0x{byte:02X}>", byte) for byte in range(256))
    return next((name for name, byte in names if name not in known and not (byte < 128 and chr(byte) in known)), "")


# --- the tensors


def _find_tensor_errors(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    """Compare the tensors with those that llama.cpp creates: it refuses a file with others, or without one of them."""
    architecture = model.headers[0].architecture
    if architecture not in QWEN:
        return
    vocabulary = len(decode_value(pairs["tokenizer.ggml.tokens"]))
    hyperparameters = GgufHyperparameters(architecture, pairs)
    tensors, known = model.tensors, set[str]()
    embeddings = tensors.get("token_embd.weight")
    if embeddings and len(embeddings.shape) == 2 and embeddings.shape[1] != vocabulary:
        size = format_quantity(vocabulary, "token")
        yield f"the vocabulary has {size}, but the embeddings have {format_quantity(embeddings.shape[1], 'row')}"
        return
    for name, shape, is_required in hyperparameters.tensors(vocabulary, tensors):
        known.add(name)
        if name not in tensors:
            if is_required:
                yield f"the tensor “{name}” is missing"
                return
        elif _trim(tensors[name].shape) != _trim(shape):
            stored = format_shape(tensors[name].shape)
            yield f"the tensor “{name}” has the shape {stored}; the metadata implies {format_shape(shape)}"
            return
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    if output.type.name == "nvfp4":
        known |= {"output.scale", "output.input_scale"}
    if unknown := [name for name in tensors if name not in known]:
        more = f" and {len(unknown) - 1:,} more do" if len(unknown) > 1 else " does"
        yield f"the tensor “{shorten(unknown[0])}”{more} not belong to this architecture"


def _trim(shape: Sequence[int]) -> list[int]:
    """Remove ones at the end of a shape, which ggml ignores."""
    trimmed = list(shape)
    while trimmed and trimmed[-1] == 1:
        trimmed.pop()
    return trimmed


def _find_unusable_tensors(model: SplitModel, pairs: Pairs) -> Iterator[str]:
    """Find a tensor of a type with which llama.cpp cannot compute, or at an address that ggml's buffers cannot have."""
    for tensor in model.tensors.values():
        is_vector, name = tensor.name.endswith(("_norm.weight", ".bias", "scale")), shorten(tensor.name)
        if not ggml.can_dequantize(tensor.type) or (is_vector and tensor.type.name != "f32"):
            problem = "but must be F32" if is_vector else "which it cannot compute with"
            yield f"the tensor “{name}” has the type {tensor.type.name.upper()}, {problem}"
            return
        if tensor.offset % _MIN_ALIGNMENT:
            yield f"the data of “{name}” begins at byte {tensor.offset:,}, not at a multiple of {_MIN_ALIGNMENT}"
            return
