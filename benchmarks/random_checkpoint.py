"""Checkpoints in the shapes of published models, as large as the real ones, with random weights."""

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
_BLOCK = 1 << 24  # random values; longer tensors repeat them, shifted
_TIED = ("lm_head.weight", "model.embed_tokens.weight")  # written with the same values


def write_random_checkpoint(folder: Path, shape: str, tokenizer: dict[str, Any]) -> Path:
    """
    Write a bf16 checkpoint of a shape in `SHAPES`, unless `folder` has one.

    `tokenizer` is the contents of the tokenizer's JSON files by file name.
    """
    complete = folder / "whole"
    if complete.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    header, offset = {}, 0
    for name, dimensions in checkpoint_shapes(config, store_tied_head=True).items():
        size = int(numpy.prod(dimensions)) * 2
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, offset + size]}
        offset += size
    header_bytes = json.dumps(header).encode()
    random = numpy.random.default_rng(0)
    block = memoryview(as_dtype(random.standard_t(5, _BLOCK).astype(numpy.float32) * numpy.float32(0.02), "BF16"))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shift = 0 if name in _TIED else start // 7 % (_BLOCK // 2) * 2
            remaining = end - start
            while remaining:
                values = block[shift : shift + remaining]
                file.write(values)
                remaining, shift = remaining - len(values), 0
    (folder / "config.json").write_text(json.dumps(config))
    for name, document in tokenizer.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    complete.touch()
    return folder
