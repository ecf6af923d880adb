"""Checkpoints of published shapes with random weights, as large as the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from qwenlocal.testing import CONFIG, MOE_CONFIG, as_dtype, checkpoint_shapes

QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "bos_token_id": 151643, "eos_token_id": 151645}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {**CONFIG, **QWEN, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
    "1.8b": {**CONFIG, **QWEN, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 16},
    "7b": {**CONFIG, **QWEN, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
    "moe": {**MOE_CONFIG, **QWEN, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "max_position_embeddings": 8192},
}  # fmt: skip
_BLOCK = 1 << 24  # random numbers; what is longer repeats them, shifted


def write_shape(folder: Path, shape: str, tokenizer: dict[str, Any]) -> Path:
    """A bf16 checkpoint of that shape, with these documents as its tokenizer; kept if it is there already."""
    if (folder / "whole").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    shapes = checkpoint_shapes(config, store_tied_head=True)
    entries, at = {}, 0
    for name, dimensions in shapes.items():
        size = int(numpy.prod(dimensions)) * 2
        entries[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    random = numpy.random.default_rng(0)
    block = memoryview(as_dtype(random.standard_t(5, _BLOCK).astype(numpy.float32) * numpy.float32(0.02), "BF16"))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shift = 0 if name in ("lm_head.weight", "model.embed_tokens.weight") else begin // 7 % (_BLOCK // 2) * 2
            left = end - begin
            while left:
                piece = block[shift : shift + left]
                file.write(piece)
                left, shift = left - len(piece), 0
    (folder / "config.json").write_text(json.dumps(config))
    for name, document in tokenizer.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    (folder / "whole").touch()
    return folder
