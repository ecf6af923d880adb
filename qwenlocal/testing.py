"""
Stand-ins for tests, ours and yours: models of a few hundred kilobytes that the real llama.cpp loads in milliseconds.

`write_model(path, says="abc")` writes a model that answers "abc" to everything; `write_model(path)` one with random
weights, whose answers depend on every token before them. `write_checkpoint(folder)` writes one as the hub has them, to
be converted. `ScriptedGenerator` needs no llama.cpp at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.chat.template import CHATML
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Prefill
from qwenlocal.errors import ContextFull

if TYPE_CHECKING:
    import numpy

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WIDTH = 288  # of the embedding: room for a direction of its own for each of the 259 tokens


def byte_alphabet() -> list[str]:
    """
    The letters that byte-level BPE (GPT-2, encoder.py: `bytes_to_unicode`) uses for the bytes 0 to 255.

    Byte 65 is "A"; byte 32, a space, is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def write_model(
    path: Path,
    *,
    says: str | None = None,
    ends: bool = True,
    seed: int = 0,
    layers: int = 2,
    context: int = 4096,
    template: str | None = CHATML,
    architecture: str = "qwen2",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """
    Write a tiny qwen2 model to `path`: one token a byte, and Qwen's three control tokens.

    With `says`, the model continues a line break with that text, one byte after the other, then ends its turn, or
    begins again if not `ends`. No byte may come twice in it. Without, the weights are random, from `seed`.
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
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    _add_vocabulary(writer, template)
    for name, data in _weights(says, ends, seed, layers):
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _add_vocabulary(writer: Any, template: str | None) -> None:
    import gguf

    tokens = [*byte_alphabet(), *SPECIALS]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(SPECIALS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["ÿ ÿ"])  # llama.cpp wants one; this one never applies, no text holds the byte 0xFF
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _weights(says: str | None, ends: bool, seed: int, layers: int) -> Iterator[tuple[str, numpy.ndarray[Any, Any]]]:
    import numpy

    random = numpy.random.default_rng(seed)
    count = 256 + len(SPECIALS)

    def matrix(rows: int, columns: int) -> numpy.ndarray[Any, Any]:
        values: numpy.ndarray[Any, Any] = random.standard_normal((rows, columns)) / columns**0.5
        return values.astype(numpy.float32)

    scripted = says is not None
    embedding = numpy.eye(count, _WIDTH, dtype=numpy.float32) if scripted else matrix(count, _WIDTH) * 8
    yield "token_embd.weight", embedding
    yield "output_norm.weight", numpy.ones(_WIDTH, numpy.float32)
    yield "output.weight", _successors(says, ends, count) if says is not None else matrix(count, _WIDTH)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        quiet = 0.0 if scripted else 1.0  # a scripted model's layers add nothing to what the embedding says
        yield prefix + "attn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        yield prefix + "ffn_norm.weight", numpy.ones(_WIDTH, numpy.float32)
        for name, rows in (("attn_q", _WIDTH), ("attn_k", _WIDTH // 2), ("attn_v", _WIDTH // 2)):
            yield f"{prefix}{name}.weight", matrix(rows, _WIDTH)
            yield f"{prefix}{name}.bias", numpy.zeros(rows, numpy.float32)
        yield prefix + "attn_output.weight", matrix(_WIDTH, _WIDTH) * numpy.float32(quiet * 8)
        yield prefix + "ffn_gate.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_up.weight", matrix(32, _WIDTH)
        yield prefix + "ffn_down.weight", matrix(_WIDTH, 32) * numpy.float32(quiet * 8)


def _successors(says: str, ends: bool, count: int) -> numpy.ndarray[Any, Any]:
    """The output matrix in which every token points at its successor."""
    import numpy

    chain = [0x0A, *says.encode()]
    if len(set(chain)) != len(chain):
        raise ValueError("every byte of `says` must be another one, and none a line break")
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
_REGULAR = (
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
    Write a checkpoint with random weights: config.json, safetensors, tokenizer.

    `config` goes over `CONFIG` (or is `MOE_CONFIG` with changes); `tensors` adds tensors by name and shape, or takes
    them away (None); `files` are further JSON files, or None for one that shall be missing.
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
    """The tensors of a Qwen1.5 checkpoint with that config, by the names that transformers gives them."""
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
    """Write dtype, shape and bytes of each tensor, in this order."""
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
    """float32 numbers as the bytes of a safetensors type: "F32", "F16", or "BF16" (rounded to the nearest even)."""
    import numpy

    if dtype == "BF16":
        bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
        rounded: numpy.ndarray[Any, Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
        return rounded.tobytes()
    return values.astype({"F32": numpy.float32, "F16": numpy.float16, "F64": numpy.float64}[dtype]).tobytes()


def _tokenizer_files(template: str | None) -> dict[str, Any]:
    """Byte-level BPE of 258 tokens (the bytes, "th" and "the"), and Qwen's three control tokens after them."""
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), "th", "the"])}
    special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    added = [{"id": 258 + number, "content": token, **special} for number, token in enumerate(SPECIALS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _REGULAR}, "behavior": "Isolated", "invert": False}
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
    Fulfils `engine.sequence.Generator` without a model: yields the tokens of `script`, one answer after the other.

    `asked` keeps the ids of every prompt.
    """

    def __init__(self, script: Sequence[Sequence[int]], *, n_ctx: int = 4096) -> None:
        self._script, self._n_ctx = list(script), n_ctx
        self._stop = self._full = False
        self.asked: list[list[int]] = []

    def generate(self, ids: Sequence[int], sampling: Sampling, *, limit: int) -> Iterator[Prefill | int]:
        self.asked.append(list(ids))
        self._stop = self._full = False
        if len(ids) >= self._n_ctx:
            raise ContextFull(len(ids), self._n_ctx, self._n_ctx)
        yield Prefill(len(ids), len(ids), 0)
        for produced, token in enumerate(self._script[len(self.asked) - 1]):
            if self._stop or produced >= limit:
                return
            if len(ids) + produced >= self._n_ctx:
                self._full = True
                return
            yield token

    @property
    def is_full(self) -> bool:
        return self._full

    @property
    def was_stopped(self) -> bool:
        return self._stop

    def stop(self) -> None:
        self._stop = True
