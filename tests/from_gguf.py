"""A checkpoint out of a GGUF file: dequantised weights under the names of transformers, the vocabulary as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy

from qwenlocal import ggml
from qwenlocal.chat.chat_template import CHATML
from qwenlocal.testing import as_dtype
from qwenlocal.weights.gguf_reader import Header, TensorInfo, decode_value, read_header, read_raw_metadata

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYERS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
REGULAR = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_checkpoint_of(source: Path, folder: Path, dtype: str = "BF16") -> Path:
    """Dequantise `source` into `folder`; tensor by tensor, so that memory stays small."""
    folder.mkdir(parents=True, exist_ok=True)
    header = read_header(source)
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    entries, at = {}, 0
    for tensor in header.tensors:
        size = tensor.elements * width
        entries[_name(tensor.name)] = {
            "dtype": dtype,
            "shape": [*reversed(tensor.shape)],
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in header.tensors:
            file.write(as_dtype(numbers(tensor), dtype))
    for name, document in _documents(source, header).items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


def numbers(tensor: TensorInfo) -> numpy.ndarray:
    """A tensor's numbers as float32."""
    data = numpy.fromfile(tensor.file, numpy.uint8, tensor.size, offset=tensor.offset)
    found = numpy.empty(tensor.elements, numpy.float32)
    ggml.dequantize(tensor.type, data.ctypes.data, found.ctypes.data, tensor.elements)
    return found


def _name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    layer, what, ending = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name).groups()
    return f"model.layers.{layer}.{IN_LAYERS[what]}.{ending}"


def _documents(source: Path, header: Header) -> dict[str, object]:
    pairs = {key: decode_value(value) for key, value in read_raw_metadata(source).items()}

    def said(key: str) -> object:
        return pairs[f"qwen2.{key}"]

    return {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": said("embedding_length"), "intermediate_size": said("feed_forward_length"),
            "num_hidden_layers": said("block_count"), "num_attention_heads": said("attention.head_count"),
            "num_key_value_heads": said("attention.head_count_kv"),
            "vocab_size": len(pairs["tokenizer.ggml.tokens"]),
            "max_position_embeddings": said("context_length"), "rope_theta": said("rope.freq_base"),
            "rms_norm_eps": said("attention.layer_norm_rms_epsilon"), "tie_word_embeddings": False,
        },
        **tokenizer_files(source),
    }  # fmt: skip


def tokenizer_files(source: Path, sizes: tuple[int, int] | None = None) -> dict[str, dict[str, object]]:
    """
    tokenizer.json and tokenizer_config.json of a GGUF file's vocabulary.

    `sizes` are the number of plain tokens and of all tokens, for a file whose kinds do not tell them apart.
    """
    pairs = {
        key: decode_value(value) for key, value in read_raw_metadata(source).items() if key.startswith("tokenizer.")
    }
    tokens, kinds = pairs["tokenizer.ggml.tokens"], pairs["tokenizer.ggml.token_type"]
    if sizes:
        kinds = [1] * sizes[0] + [3] * (sizes[1] - sizes[0]) + [5] * (len(tokens) - sizes[1])
    each = list(enumerate(zip(tokens, kinds, strict=True)))
    plain = {token: n for n, (token, kind) in each if kind == 1}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [
        {"id": n, "content": token, **flags, "special": kind == 3}
        for n, (token, kind) in each
        if kind in (3, 4) and not token.startswith("[PAD")
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": REGULAR}, "behavior": "Isolated", "invert": False}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": level, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                      "vocab": plain, "merges": pairs["tokenizer.ggml.merges"]},
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(entry["id"]): entry for entry in added},
            "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
            "tokenizer_class": "Qwen2Tokenizer", "chat_template": pairs.get("tokenizer.chat_template", CHATML),
        },
    }  # fmt: skip
