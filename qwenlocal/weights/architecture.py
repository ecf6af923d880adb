"""
What a checkpoint computes, from its config.json: sizes, rope, experts.

The names are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). llama.cpp has one
graph for each architecture; what a config asks for beyond it is refused here, since the file would load and answer
wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.checkpoint import Checkpoint, read_config, shortly

_ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen2Model": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe"}
_MOST = 1 << 31
_LEAST, _LARGEST = 1e-37, 3e38  # of a float of four bytes, as GGUF has them
_USUAL_FIRST_WINDOW = 28  # transformers' Qwen2Config: max_window_layers


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many, how many are asked for each token, and how wide they are."""

    count: int
    used: int
    width: int
    shared_width: int


@dataclass(frozen=True)
class RopeScaling:
    """
    How positions beyond those trained for are reached: "linear" or "yarn" by `factor`.

    `attention` multiplies what YaRN does to the rotations' length by itself, 0.1 ln(factor) + 1; mostly it is 1.
    """

    kind: str
    factor: float
    original_context: int
    attention: float = 1.0


@dataclass(frozen=True)
class Hyperparameters:
    """The sizes of a Qwen1.5 model, in the words of GGUF. `tied`: the head is the embedding matrix."""

    architecture: str
    context: int
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_base: float
    epsilon: float
    tied: bool
    bare: bool  # a Qwen2Model: names without "model.", no head
    biased: bool  # q, k and v have biases
    experts: Experts | None = None
    scaling: RopeScaling | None = None


# --- config.json


class _Config:
    """Reads a config value by value; what has the wrong form is an error that names it."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise BadCheckpoint(self.path, f"“{key}” is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
            raise BadCheckpoint(self.path, f"“{key}” is {shortly(value)}, which cannot be")
        return value

    def number(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not _LEAST < value < _LARGEST:
            raise BadCheckpoint(self.path, f"“{key}” is {shortly(value)}, which cannot be")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise BadCheckpoint(self.path, f"“{key}” is {shortly(value)}; it should be true or false")
        return default if value is None else value


def hyperparameters(checkpoint: Checkpoint) -> Hyperparameters:
    """
    What config.json says, checked.

    Raises
    ------
    BadCheckpoint: a value is missing or impossible.
    UnsupportedCheckpoint: llama.cpp would compute something else than the config asks for.
    """
    config = _Config(checkpoint.folder / "config.json", checkpoint.config)
    name = _architecture(config)
    heads = config.count("num_attention_heads")
    scaling, base = _rope(config)
    found = Hyperparameters(
        architecture=_ARCHITECTURES[name],
        context=config.count("max_position_embeddings"),
        width=config.count("hidden_size"),
        layers=config.count("num_hidden_layers"),
        feed_forward=config.count("intermediate_size"),
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        vocabulary=config.count("vocab_size"),
        rope_base=base,
        epsilon=config.number("rms_norm_eps", config.values.get("rms_norm_eps", 1e-6)),
        tied=config.flag("tie_word_embeddings", False),
        bare=name == "Qwen2Model",
        biased=config.flag("qkv_bias", True),
        experts=_experts(config) if name == "Qwen2MoeForCausalLM" else None,
        scaling=scaling,
    )
    _refuse_other_graphs(config, found)
    return found


def _architecture(config: _Config) -> str:
    named = config.values.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if isinstance(name, str) and name in _ARCHITECTURES:
        return name
    hint = "Converted are " + ", ".join(_ARCHITECTURES) + "; for others see llama.cpp's convert_hf_to_gguf.py."
    if name is None:
        raise BadCheckpoint(config.path, "“architectures” does not say what kind of model it is", hint=hint)
    what = name if isinstance(name, str) and len(name) <= 80 else shortly(name)
    raise UnsupportedCheckpoint(config.path, f"a {what} is not a Qwen1.5 model", hint=hint)


def _experts(config: _Config) -> Experts:
    found = Experts(
        config.count("num_experts"),
        config.count("num_experts_per_tok"),
        config.count("moe_intermediate_size"),
        config.count("shared_expert_intermediate_size"),
    )
    if found.used > found.count:
        raise BadCheckpoint(config.path, f"{found.used} experts a token, of {found.count}: that cannot be")
    return found


def _rope(config: _Config) -> tuple[RopeScaling | None, float]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 both into rope_parameters."""
    new, old = config.values.get("rope_parameters") or {}, config.values.get("rope_scaling") or {}
    rope = new or old
    if not isinstance(rope, Mapping) or any(isinstance(value, dict) for value in rope.values()):
        raise BadCheckpoint(config.path, f"the rope parameters are {shortly(rope)}, which cannot be")
    if new and isinstance(old, Mapping) and old and (_kind(new), new.get("factor")) != (_kind(old), old.get("factor")):
        raise BadCheckpoint(config.path, "“rope_parameters” and “rope_scaling” contradict each other")
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))  # the default of transformers
    base = config.number("rope_theta", theta)
    kind = _kind(rope)
    if kind == "default":
        return None, base
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpoint(
            config.path, f"rope scaling of the kind {shortly(kind)} is not in llama.cpp's graph of Qwen models"
        )
    key = "original_max_position_embeddings"  # transformers looks for it outside first
    original = config.values.get(key) or rope.get(key) or config.values.get("max_position_embeddings")
    factor = config.number("rope factor", rope.get("factor"))
    attention = _yarn_attention(config, rope, factor) if kind == "yarn" else 1.0
    if not 1e-6 < attention < 1e6:
        raise BadCheckpoint(config.path, f"its YaRN settings stretch the rotations by {attention:.3g}, which cannot be")
    context = config.number("original_max_position_embeddings", original)
    if context >= _MOST:
        raise BadCheckpoint(config.path, f"“original_max_position_embeddings” is {shortly(original)}, which cannot be")
    return RopeScaling(kind, factor, int(context), attention), base


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _yarn_attention(config: _Config, rope: Mapping[str, Any], factor: float) -> float:
    """
    transformers takes attention_factor as it stands (modeling_rope_utils.py: _compute_yarn_parameters), llama.cpp
    multiplies its own 0.1 ln(factor) + 1 with what the file says (llama-context.cpp: yarn_attn_factor).
    """
    for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) is not None and key != "truncate":
            config.number(key, rope[key])
        if rope.get(key) not in (None, usual):
            raise UnsupportedCheckpoint(
                config.path, f"YaRN with {key} = {shortly(rope[key])} is not what llama.cpp computes"
            )
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if rope.get("attention_factor") is not None:
        return config.number("attention_factor", rope["attention_factor"]) / own
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = (config.number(key, rope[key]) for key in ("mscale", "mscale_all_dim"))
        one, all_ = (0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0 for scale in scales)
        return one / all_ / own
    return 1.0


def _refuse_other_graphs(config: _Config, found: Hyperparameters) -> None:
    values = config.values
    if values.get("head_dim") not in (None, found.width // found.heads):
        what = f"its heads are {shortly(values['head_dim'])} wide (head_dim), not {found.width // found.heads}"
        raise UnsupportedCheckpoint(config.path, what)
    if found.width % found.heads:
        raise UnsupportedCheckpoint(config.path, f"{found.heads} heads do not share a width of {found.width} evenly")
    if found.heads % found.kv_heads:
        raise BadCheckpoint(config.path, f"{found.heads} heads over {found.kv_heads} key-value heads: that cannot be")
    rope = values.get("rope_parameters")
    turned = (rope if isinstance(rope, dict) else values).get("partial_rotary_factor")
    if turned is None:
        turned = values.get("partial_rotary_factor")
    if turned not in (None, 1):
        what = (
            f"only a part of each head is turned (partial_rotary_factor {shortly(turned)}); llama.cpp turns all of it"
        )
        raise UnsupportedCheckpoint(config.path, what)
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedCheckpoint(
            config.path, f"its activation is {shortly(values['hidden_act'])}; llama.cpp computes silu for Qwen models"
        )
    if not config.flag("is_causal", True):
        raise UnsupportedCheckpoint(
            config.path, "“is_causal” is false; llama.cpp lets a token see only those before it"
        )
    _refuse_sliding_window(config, found)
    if not found.experts:
        return
    if config.flag("norm_topk_prob", False):
        raise UnsupportedCheckpoint(
            config.path, "“norm_topk_prob” is true; llama.cpp does not normalise the experts' weights of this model"
        )
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise UnsupportedCheckpoint(
            config.path,
            "some of its layers have no experts (decoder_sparse_step, mlp_only_layers); llama.cpp expects them in all",
        )


def _refuse_sliding_window(config: _Config, found: Hyperparameters) -> None:
    window = config.values.get("sliding_window")
    if not config.flag("use_sliding_window", False) or window is None:
        return
    config.count("sliding_window")
    kinds, first = config.values.get("layer_types"), config.values.get("max_window_layers")
    if first is None:
        first = _USUAL_FIRST_WINDOW
    elif not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise BadCheckpoint(config.path, f"“max_window_layers” is {shortly(first)}, which cannot be")
    slides = "sliding_attention" in kinds if isinstance(kinds, list) else first < found.layers
    if (slides or found.experts) and window < found.context:
        raise UnsupportedCheckpoint(
            config.path,
            f"some of its layers see only the last {window:,} tokens (sliding window); llama.cpp's graph of this "
            "architecture has full attention only",
            hint=f"Within {window:,} tokens both are the same: set “use_sliding_window” to false and "
            f"“max_position_embeddings” to {window} in a copy of config.json.",
        )


def examine(folder: Path) -> None:
    """
    Whether the checkpoint in `folder` could be converted, as far as its config.json tells; its weights may be missing.

    Raises
    ------
    BadCheckpoint, UnsupportedCheckpoint: it could not.
    """
    config = read_config(folder)
    hyperparameters(Checkpoint(folder, config, {}))
