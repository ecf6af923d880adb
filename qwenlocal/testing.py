"""
Tiny models and test doubles, for this project's tests and for yours.

`write_model(path, reply="abc")` writes a GGUF model of a few hundred kilobytes that answers "abc" to every prompt;
llama.cpp loads it in milliseconds. `write_model(path)` writes one with random weights, whose answers depend on all
tokens before them. `write_checkpoint(folder)` writes a checkpoint to convert. `ScriptedGenerator` replaces llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.chat.chat_template import CHATML
from qwenlocal.engine.sampling import Sampling
from qwenlocal.errors import ContextFull
from qwenlocal.progress import PromptProgress

if TYPE_CHECKING:
    import numpy

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WIDTH = 288  # embedding dimensions: at least one for each of the 259 tokens


def byte_alphabet() -> list[str]:
    """
    Return the characters that byte-level BPE (GPT-2, encoder.py: `bytes_to_unicode`) uses for the bytes 0 to 255.

    Byte 65 is "A"; byte 32, a space, is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def write_model(
    path: Path,
    *,
    reply: str | None = None,
    ends: bool = True,
    seed: int = 0,
    layers: int = 2,
    context: int = 4096,
    template: str | None = CHATML,
    architecture: str = "qwen2",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """
    Write a tiny qwen2 model to `path`, with one token per byte and Qwen's three control tokens.

    With `reply`, the model answers with that text, byte by byte, and ends its turn; if `ends` is False, it repeats the
    text forever. No byte may occur twice in `reply`. Without `reply`, the weights are random and depend on `seed`.

    Raises
    ------
    ValueError: `reply` repeats a byte or contains a line break.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (metadata or {}).items():
        adders[type(value)](key, value)
    _add_vocabulary(writer, template)
    for name, data in _weights(reply, ends, seed, layers):
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any, template: str | None) -> None:
    import gguf

    tokens = [*byte_alphabet(), *SPECIALS]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["ÿ ÿ"])  # llama.cpp requires one; no text has the byte 0xFF, so this one never applies
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _weights(reply: str | None, ends: bool, seed: int, layers: int) -> Iterator[tuple[str, numpy.ndarray[Any, Any]]]:
    import numpy

    random = numpy.random.default_rng(seed)
    count = 256 + len(SPECIALS)

    def matrix(rows: int, columns: int) -> numpy.ndarray[Any, Any]:
        values: numpy.ndarray[Any, Any] = random.standard_normal((rows, columns)) / columns**0.5
        return values.astype(numpy.float32)

    scripted = reply is not None
    embedding = numpy.eye(count, _WIDTH, dtype=numpy.float32) if scripted else matrix(count, _WIDTH) * 8
    yield "token_embd.weight", embedding
    yield "output_norm.weight", numpy.ones(_WIDTH, numpy.float32)
    yield "output.weight", _successors(reply, ends, count) if reply is not None else matrix(count, _WIDTH)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        scale = 0.0 if scripted else 8.0  # the layers of a scripted model add nothing to the embedding
        yield prefix + "attn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        yield prefix + "ffn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        for name, rows in (("attn_q", _WIDTH), ("attn_k", _WIDTH // 2), ("attn_v", _WIDTH // 2)):
            yield f"{prefix}{name}.weight", matrix(rows, _WIDTH)
            yield f"{prefix}{name}.bias", numpy.zeros(rows, numpy.float32)
        yield prefix + "attn_output.weight", matrix(_WIDTH, _WIDTH) * numpy.float32(scale)
        yield prefix + "ffn_gate.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_up.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_down.weight", matrix(_WIDTH, 32) * numpy.float32(scale)


def _successors(reply: str, ends: bool, count: int) -> numpy.ndarray[Any, Any]:
    """Build the output matrix in which every token predicts its successor."""
    import numpy

    chain = [0x0A, *reply.encode()]
    if len(set(chain)) != len(chain):
        raise ValueError("no byte may occur twice in `reply`, nor a line break")
    end = 256 + SPECIALS.index("<|im_end|>") if ends else chain[1]
    following = dict(zip(chain, [*chain[1:], end], strict=True))
    output = numpy.zeros((count, _WIDTH), numpy.float32)
    for before in range(count):
        output[following.get(before, chain[1]), before] = 2.0
    return output


# --- checkpoints

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "bos_token_id": 258,
    "eos_token_id": 260,
    "torch_dtype": "bfloat16",
}
MOE_CONFIG: dict[str, Any] = {
    **CONFIG,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_checkpoint(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    dtype: str = "BF16",
    seed: int = 0,
    shards: int = 1,
    fused_experts: bool = False,
    store_tied_head: bool = False,
    template: str | None = CHATML,
    tensors: dict[str, tuple[int, ...] | None] | None = None,
    files: dict[str, Any] | None = None,
) -> Path:
    """
    Write a checkpoint with random weights: config.json, safetensors and tokenizer.

    `config` overrides entries of `CONFIG` (pass `MOE_CONFIG` for a mixture of experts). `tensors` adds tensors by name
    and shape, or removes them (None). `files` adds JSON files, or removes them (None).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **(config or {})}
    shapes = checkpoint_shapes(config, fused_experts=fused_experts, store_tied_head=store_tied_head)
    for name, shape in (tensors or {}).items():
        shapes.pop(name, None)
        if shape is not None:
            shapes[name] = shape
    names = list(shapes)
    parts = [names[number::shards] for number in range(shards)]
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        twin = {"lm_head.weight": "model.embed_tokens.weight"} if store_tied_head else {}
        write_safetensors(
            folder / file, {name: _random_tensor(twin.get(name, name), shapes[name], dtype, seed) for name in part}
        )
        index |= dict.fromkeys(part, file)
    documents = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [260, 258], "temperature": 0.7, "top_k": 20, "top_p": 0.8,
                                   "repetition_penalty": 1.1},
        **({"model.safetensors.index.json": {"metadata": {}, "weight_map": index}} if shards > 1 else {}),
        **_tokenizer_files(template),
        **(files or {}),
    }  # fmt: skip
    for name, document in documents.items():
        if document is not None:
            (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder


def checkpoint_shapes(
    config: dict[str, Any], *, fused_experts: bool = False, store_tied_head: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor in a Qwen1.5 checkpoint with that config, with the names of transformers."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    prefix = "" if config["architectures"][0] == "Qwen2Model" else "model."
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (vocabulary, width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"{prefix}layers.{layer}."
        for letter, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes[f"{at}self_attn.{letter}_proj.weight"] = (rows, width)
            shapes[f"{at}self_attn.{letter}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (width,)
        shapes |= _mlp_shapes(config, f"{at}mlp.", fused=fused_experts)
    shapes[f"{prefix}norm.weight"] = (width,)
    if prefix and (store_tied_head or not config["tie_word_embeddings"]):
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def _mlp_shapes(config: dict[str, Any], at: str, *, fused: bool) -> dict[str, tuple[int, ...]]:
    width = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]]

    def three(at: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{at}gate_proj.weight": (inner, width),
            f"{at}up_proj.weight": (inner, width),
            f"{at}down_proj.weight": (width, inner),
        }

    if "num_experts" not in config:
        return three(at, config["intermediate_size"])
    count, inner = config["num_experts"], config["moe_intermediate_size"]
    shapes = {f"{at}gate.weight": (count, width), f"{at}shared_expert_gate.weight": (1, width)}
    shapes |= three(f"{at}shared_expert.", config["shared_expert_intermediate_size"])
    if fused:
        return {
            **shapes,
            f"{at}experts.gate_up_proj": (count, 2 * inner, width),
            f"{at}experts.down_proj": (count, width, inner),
        }
    for expert in range(count):
        shapes |= three(f"{at}experts.{expert}.", inner)
    return shapes


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """Write a safetensors file; each tensor is (dtype, shape, bytes)."""
    entries, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, _, data in tensors.values():
            file.write(data)
    return path


def _random_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> tuple[str, tuple[int, ...], bytes]:
    import numpy

    random = numpy.random.default_rng([seed, *name.removeprefix("model.").encode()])
    scale = 1.0 if len(shape) == 1 else 2.0 / shape[-1] ** 0.5
    values = random.standard_normal(shape, numpy.float32) * numpy.float32(scale)
    if name.endswith("norm.weight"):
        values = 1 + values / 8
    return dtype, shape, as_dtype(values, dtype)


def as_dtype(values: numpy.ndarray[Any, Any], dtype: str) -> bytes:
    """Encode float32 values as a safetensors type: "F32", "F16", "F64" or "BF16" (rounded to nearest even)."""
    import numpy

    if dtype == "BF16":
        bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
        rounded: numpy.ndarray[Any, Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
        return rounded.tobytes()
    return values.astype({"F32": numpy.float32, "F16": numpy.float16, "F64": numpy.float64}[dtype]).tobytes()


def _tokenizer_files(template: str | None) -> dict[str, Any]:
    """Build a byte-level BPE with 258 tokens (the bytes, "th" and "the"), followed by Qwen's three control tokens."""
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), "th", "the"])}
    special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    added = [{"id": 258 + number, "content": token, **special} for number, token in enumerate(SPECIALS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _PRE_TOKENIZER}, "behavior": "Isolated", "invert": False}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": level,
            "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                      "merges": ["t h", "th e"]},
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(token["id"]): {**special, "content": token["content"]} for token in added},
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "tokenizer_class": "Qwen2Tokenizer",
            **({"chat_template": template} if template else {}),
        },
    }  # fmt: skip


class ScriptedGenerator:
    """
    `engine.sequence.TokenGenerator` without a model: each prompt gets the next answer of `script`, a list of token ids.

    `prompts` records the ids of every prompt.
    """

    def __init__(self, script: Sequence[Sequence[int]], *, n_ctx: int = 4096) -> None:
        self._script, self._n_ctx = list(script), n_ctx
        self.was_stopped = self.is_full = False
        self.prompts: list[list[int]] = []

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[PromptProgress | int]:
        self.prompts.append(list(ids))
        self.was_stopped = self.is_full = False
        if len(ids) >= self._n_ctx:
            raise ContextFull(len(ids), self._n_ctx, self._n_ctx)
        yield PromptProgress(len(ids), len(ids), 0)
        for produced, token in enumerate(self._script[len(self.prompts) - 1]):
            if self.was_stopped or produced >= limit:
                return
            if len(ids) + produced >= self._n_ctx:
                self.is_full = True
                return
            yield token

    def stop(self) -> None:
        self.was_stopped = True
