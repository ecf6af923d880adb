"""
Makes logits.json with torch and transformers: what small checkpoints answer, computed by the library they are made for.

    make setup && .venv/bin/python tools/reference.py
    build/reference/bin/python tests/goldens/make_logits.py

The checkpoints are those of `qwenlocal.testing.write_checkpoint`; each golden says which, with a digest of the weights,
so that `tests/test_logits.py` computes the very same without torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qwenlocal.testing import CONFIG, MOE_CONFIG, write_checkpoint

if TYPE_CHECKING:
    import numpy

GOLDEN = Path(__file__).with_name("logits.json")
IDS = [258, 40, 69, 256, 81, 220, 117, 257, 3, 199, 259, 12, 256, 88, 142, 201, 17, 260, 68, 68, 230, 101, 0, 74]
POSITIONS = 4  # the last ones; each depends on all before
COLUMNS = slice(0, None, 3)
DIGITS = 7

_MOE = {key: value for key, value in MOE_CONFIG.items() if CONFIG.get(key) != value}
_UNSCALED = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
_SHORT = {"rope_theta": 10000.0}
_UNBIASED = {
    f"model.layers.{layer}.self_attn.{letter}_proj.bias": None
    for layer in range(CONFIG["num_hidden_layers"])
    for letter in "qkv"
}

# By name, what `write_checkpoint` is to be given. Every vocabulary has 288 rows for 261 tokens.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, bf16, two shards": {"dtype": "BF16", "shards": 2, "seed": 1},
    "dense, f16, a key-value head for each head": {
        "config": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, "dtype": "F16", "seed": 2,
    },
    "dense, tied": {"config": {"tie_word_embeddings": True}, "seed": 3},
    "dense, tied, names of a bare Qwen2Model": {
        "config": {"architectures": ["Qwen2Model"], "tie_word_embeddings": True}, "seed": 4,
    },
    "dense, linear scaling": {
        "config": {**_SHORT, "rope_scaling": {"type": "linear", "factor": 4.0}}, "seed": 5,
    },
    "dense, yarn": {"config": {**_SHORT, "rope_scaling": _YARN}, "seed": 6},
    "dense, yarn with the usual betas": {
        "config": {**_SHORT, "rope_scaling": {**_YARN, "beta_fast": 32, "beta_slow": 1.0}}, "seed": 7,
    },
    "dense, yarn as transformers 5 writes it": {
        "files": {
            "config.json": {
                **_UNSCALED,
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 50000.0, "factor": 8.0, "original_max_position_embeddings": 256,
                },
            },
        },
        "seed": 8,
    },
    "dense, yarn with an attention factor": {
        "config": {**_SHORT, "rope_scaling": {**_YARN, "attention_factor": 1.5}}, "seed": 9,
    },
    "dense, yarn with mscale": {
        "config": {**_SHORT, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "seed": 14,
    },
    "dense, yarn, the original context beside it": {
        "config": {
            **_SHORT, "original_max_position_embeddings": 256, "rope_scaling": {"type": "yarn", "factor": 8.0},
        },
        "seed": 15,
    },
    "mixture": {"config": _MOE, "seed": 10},
    "mixture, fused experts": {"config": _MOE, "fused_experts": True, "seed": 11},
    "mixture, tied": {"config": {**_MOE, "tie_word_embeddings": True}, "seed": 12},
    "mixture, no biases": {"config": {**_MOE, "qkv_bias": False}, "tensors": _UNBIASED, "seed": 13},
}  # fmt: skip


def build(folder: Path, checkpoint: dict[str, Any]) -> Path:
    """The checkpoint that a golden speaks of."""
    return write_checkpoint(folder, **{"dtype": "F32", **checkpoint})


def digest(folder: Path) -> str:
    """Of its weights, to tell other random numbers from other answers."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def excerpt(logits: numpy.ndarray) -> numpy.ndarray:
    """The part of (tokens, vocabulary) that a golden has."""
    return logits[-POSITIONS:, COLUMNS]


def logits_of_transformers(folder: Path, ids: list[int]) -> numpy.ndarray:
    """What transformers computes, in float32 and with its plainest attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(loading.values()):
        raise ValueError(f"transformers and the checkpoint disagree about its tensors: {loading}")
    with torch.no_grad():
        found: numpy.ndarray = model.eval()(torch.tensor([ids])).logits[0].numpy()
    return found


def main() -> None:
    import numpy
    import torch
    import transformers

    cases = []
    for name, checkpoint in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = build(Path(folder), checkpoint)
            logits = excerpt(logits_of_transformers(source, IDS))
            rows = [[float(f"{value:.{DIGITS}g}") for value in row] for row in logits.tolist()]
            cases.append({"name": name, "checkpoint": checkpoint, "weights": digest(source), "logits": rows})
    versions = {module.__name__: module.__version__ for module in (torch, transformers, numpy)}
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    head = json.dumps({"made with": versions, "ids": IDS}, indent=1)[:-2]
    GOLDEN.write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(len(cases), "goldens,", GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
