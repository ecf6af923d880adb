"""
The architecture of a checkpoint, from its config.json: dimensions, RoPE, experts.

The names are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). llama.cpp has one
graph per architecture. A config that needs another graph is refused, since the file would load and give wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr, format_quantity
from qwenlocal.weights.checkpoint import Checkpoint, read_config
from qwenlocal.weights.gguf_hyperparameters import MAX_EXPERTS, MAX_LAYERS
from qwenlocal.weights.json_files import is_integer
from qwenlocal.weights.packing import read_packing

_ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen2Model": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe"}
_MODEL_TYPES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}
_MAX_SIZE = 1 << 24  # of a width or a vocabulary: a hundred times the largest ones
_MAX_CONTEXT = 1 << 30
_EPSILON_RANGE, _ROPE_BASE_RANGE, _FACTOR_RANGE = (1e-15, 1.0), (1.0, 1e12), (1e-6, 1e6)
_DEFAULT_MAX_WINDOW_LAYERS = 28  # transformers' Qwen2Config


@dataclass(frozen=True)
class ExpertDims:
    """A mixture of experts: their number, how many a token uses, and the widths of an expert and of the shared one."""

    count: int
    used: int
    width: int
    shared_width: int


@dataclass(frozen=True)
class RopeScalingConfig:
    """
    RoPE scaling of the `kind` "linear" or "yarn" by `factor`, beyond `original_context` tokens.

    `attention` multiplies YaRN's own scaling of the attention, 0.1 ln(factor) + 1; it is usually 1.
    """

    kind: str
    factor: float
    original_context: int
    attention: float = 1.0


@dataclass(frozen=True)
class Hyperparameters:
    """
    The hyperparameters of a Qwen1.5 model.

    `is_tied`: the output matrix is the embedding matrix. `is_bare`: the checkpoint is a Qwen2Model, which may have no
    output matrix. `has_qkv_bias`: q, k and v have biases.
    """

    architecture: str
    context: int
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab_size: int
    rope_base: float
    epsilon: float
    is_tied: bool
    is_bare: bool
    has_qkv_bias: bool
    experts: ExpertDims | None = None
    scaling: RopeScalingConfig | None = None


# --- config.json


class _ConfigReader:
    """Reads values of a config; a missing or malformed one raises `BadCheckpoint` with its name."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _MAX_SIZE) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise BadCheckpoint(self.path, f"“{key}” is missing")
        if not is_integer(value) or not minimum <= value <= maximum:
            raise self._invalid(key, value, f"an integer from {minimum:,} to {maximum:,}")
        return value

    def number(self, key: str, value: Any, limits: tuple[float, float]) -> float:
        low, high = limits
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self._invalid(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def _invalid(self, key: str, value: Any, expected: str) -> BadCheckpoint:
        return BadCheckpoint(
            self.path,
            f"“{key}” is {brief_repr(value)}, which is invalid: it must be {expected}",
            hint="Download config.json again, or correct the value in it.",
        )

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise BadCheckpoint(self.path, f"“{key}” is {brief_repr(value)}; it should be true or false")
        return default if value is None else value


def read_hyperparameters(checkpoint: Checkpoint) -> Hyperparameters:
    """
    Read and check config.json.

    Raises
    ------
    BadCheckpoint: a value is missing or impossible.
    UnsupportedCheckpoint: llama.cpp would not compute what the config describes.
    """
    config = _ConfigReader(checkpoint.folder / "config.json", checkpoint.config)
    name = _architecture(config)
    heads = config.count("num_attention_heads")
    scaling, base = _rope(config)
    model = Hyperparameters(
        architecture=_ARCHITECTURES[name],
        context=config.count("max_position_embeddings", maximum=_MAX_CONTEXT),
        width=config.count("hidden_size"),
        layers=config.count("num_hidden_layers", maximum=MAX_LAYERS),
        feed_forward=config.count("intermediate_size"),
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        vocab_size=config.count("vocab_size"),
        rope_base=base,
        epsilon=config.number("rms_norm_eps", config.values.get("rms_norm_eps", 1e-6), _EPSILON_RANGE),
        is_tied=config.flag("tie_word_embeddings", False),
        is_bare=name == "Qwen2Model",
        has_qkv_bias=config.flag("qkv_bias", True),
        experts=_experts(config) if name == "Qwen2MoeForCausalLM" else None,
        scaling=scaling,
    )
    _check_graph(config, model)
    return model


def _architecture(config: _ConfigReader) -> str:
    """
    Return the name of the architecture, a key of `_ARCHITECTURES`.

    transformers chooses it by "model_type", whatever name a trainer (FSDPQwen2ForCausalLM) left in "architectures";
    llama.cpp chooses it by "architectures".
    """
    names, model_type = config.values.get("architectures"), config.values.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    by_type = _MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    is_known = isinstance(name, str) and name in _ARCHITECTURES
    if is_known and (model_type is None or (name, by_type) == ("Qwen2Model", "Qwen2ForCausalLM")):
        return str(name)
    if by_type and (names in (None, []) or (isinstance(name, str) and name.endswith("ForCausalLM"))):
        return by_type
    hint = f"Supported are {', '.join(_ARCHITECTURES)}. For others, use llama.cpp's convert_hf_to_gguf.py."
    if name is None and (by_type or model_type is None):
        raise BadCheckpoint(config.path, "“architectures” does not name the kind of model", hint=hint)
    kind = model_type if name is None or is_known else name
    shown = kind if isinstance(kind, str) and len(kind) <= 80 else brief_repr(kind)
    raise UnsupportedCheckpoint(config.path, f"{shown} is not a Qwen1.5 architecture", hint=hint)


def _experts(config: _ConfigReader) -> ExpertDims:
    experts = ExpertDims(
        config.count("num_experts", maximum=MAX_EXPERTS),
        config.count("num_experts_per_tok", maximum=MAX_EXPERTS),
        config.count("moe_intermediate_size"),
        config.count("shared_expert_intermediate_size"),
    )
    if experts.used > experts.count:
        raise BadCheckpoint(config.path, f"it uses {experts.used} experts per token, but has only {experts.count}")
    return experts


def _rope(config: _ConfigReader) -> tuple[RopeScalingConfig | None, float]:
    """Read the RoPE settings: transformers 4 has rope_theta and rope_scaling, transformers 5 has rope_parameters."""
    new, old = config.values.get("rope_parameters") or {}, config.values.get("rope_scaling") or {}
    rope = new or old
    if not isinstance(rope, Mapping) or any(isinstance(value, dict) for value in rope.values()):
        raise BadCheckpoint(config.path, f"the RoPE parameters are {brief_repr(rope)}, which is invalid")
    has_both = new and old and isinstance(old, Mapping)
    if has_both and (_rope_type(new), new.get("factor")) != (_rope_type(old), old.get("factor")):
        raise BadCheckpoint(config.path, "“rope_parameters” and “rope_scaling” contradict each other")
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))  # transformers' default
    base = config.number("rope_theta", theta, _ROPE_BASE_RANGE)
    kind = _rope_type(rope)
    if kind == "default":
        return None, base
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpoint(
            config.path, f"llama.cpp's graph of Qwen models has no RoPE scaling of the type {brief_repr(kind)}"
        )
    key = "original_max_position_embeddings"  # transformers reads it from the top level first
    original = config.values.get(key) or rope.get(key) or config.values.get("max_position_embeddings")
    factor = config.number("RoPE factor", rope.get("factor"), _FACTOR_RANGE)
    attention = _yarn_attention(config, rope, factor) if kind == "yarn" else 1.0
    if not 1e-6 < attention < 1e6:
        raise BadCheckpoint(config.path, f"its YaRN settings scale the attention by {attention:.3g}, which is invalid")
    return RopeScalingConfig(kind, factor, int(config.number(key, original, (1, _MAX_CONTEXT))), attention), base


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _yarn_attention(config: _ConfigReader, rope: Mapping[str, Any], factor: float) -> float:
    """
    Compute `RopeScalingConfig.attention`.

    transformers takes attention_factor as the whole factor (modeling_rope_utils.py: _compute_yarn_parameters);
    llama.cpp multiplies its own 0.1 ln(factor) + 1 by the value in the file (llama-context.cpp: yarn_attn_factor).
    """
    for key, default in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) is not None and key != "truncate":
            config.number(key, rope[key], _FACTOR_RANGE)
        if rope.get(key) not in (None, default):
            raise UnsupportedCheckpoint(
                config.path, f"llama.cpp does not support YaRN with {key} = {brief_repr(rope[key])}"
            )
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if rope.get("attention_factor") is not None:
        return config.number("attention_factor", rope["attention_factor"], _FACTOR_RANGE) / own
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = (config.number(key, rope[key], _FACTOR_RANGE) for key in ("mscale", "mscale_all_dim"))
        scale, scale_all_dim = (0.1 * value * math.log(factor) + 1 if factor > 1 else 1.0 for value in scales)
        return scale / scale_all_dim / own
    return 1.0


def _check_graph(config: _ConfigReader, model: Hyperparameters) -> None:
    """Check everything in which llama.cpp's graph is fixed."""
    values, path = config.values, config.path
    if values.get("head_dim") not in (None, model.width // model.heads):
        head_dim = brief_repr(values["head_dim"])
        raise UnsupportedCheckpoint(path, f"“head_dim” is {head_dim}; llama.cpp needs {model.width // model.heads}")
    if model.width % model.heads:
        heads = format_quantity(model.heads, "head")
        raise UnsupportedCheckpoint(path, f"a width of {model.width:,} cannot be divided evenly into {heads}")
    if model.width // model.heads % 2:
        values_per_head = format_quantity(model.width // model.heads, "value")
        raise BadCheckpoint(path, f"heads of {values_per_head} cannot be rotated (RoPE): the number is odd")
    if model.heads % model.kv_heads:
        heads = format_quantity(model.heads, "head")
        raise BadCheckpoint(path, f"{heads} cannot share {format_quantity(model.kv_heads, 'key-value head')} evenly")
    rope = values.get("rope_parameters")
    rotary_factor = (rope if isinstance(rope, dict) else values).get("partial_rotary_factor")
    if rotary_factor is None:
        rotary_factor = values.get("partial_rotary_factor")
    if rotary_factor not in (None, 1):
        raise UnsupportedCheckpoint(
            path, f"“partial_rotary_factor” is {brief_repr(rotary_factor)}; llama.cpp rotates whole heads"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedCheckpoint(
            path,
            f"its activation is {brief_repr(values['hidden_act'])}; llama.cpp computes silu for Qwen models",
        )
    if not config.flag("is_causal", True):
        raise UnsupportedCheckpoint(path, "“is_causal” is false; in llama.cpp, tokens attend only to earlier ones")
    _check_sliding_window(config, model)
    if not model.experts:
        return
    if config.flag("norm_topk_prob", False):
        raise UnsupportedCheckpoint(
            path, "“norm_topk_prob” is true; llama.cpp does not normalize the expert weights of this architecture"
        )
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise UnsupportedCheckpoint(
            path,
            "some layers have no experts (decoder_sparse_step, mlp_only_layers); llama.cpp needs them in all layers",
        )


def _check_sliding_window(config: _ConfigReader, model: Hyperparameters) -> None:
    window = config.values.get("sliding_window")
    if not config.flag("use_sliding_window", False) or window is None:
        return
    config.count("sliding_window", maximum=_MAX_CONTEXT)
    layer_types = config.values.get("layer_types")
    first = config.count("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    is_used = "sliding_attention" in layer_types if isinstance(layer_types, list) else first < model.layers
    if (is_used or model.experts) and window < model.context:
        raise UnsupportedCheckpoint(
            config.path,
            f"some layers attend only to the last {window:,} tokens (sliding window); llama.cpp's graph of this "
            "architecture has full attention only",
            hint=f"Up to {window:,} tokens both are the same: set “use_sliding_window” to false and "
            f"“max_position_embeddings” to {window} in a copy of config.json.",
        )


def check_convertible(folder: Path) -> None:
    """
    Check whether the checkpoint in `folder` can be converted, as far as config.json tells; the weights may be missing.

    Raises
    ------
    BadCheckpoint, UnsupportedCheckpoint: it cannot.
    """
    config = read_config(folder)
    read_packing(folder, config)
    read_hyperparameters(Checkpoint(folder, config, {}))
