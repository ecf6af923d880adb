"""
What a checkpoint computes, from its config.json: sizes, rope, experts, and which tensor goes where in a GGUF file.

The tables are those of llama.cpp (conversion/qwen.py, src/models/qwen2.cpp, src/models/qwen2moe.cpp). llama.cpp has one
graph for each architecture; what a config asks for beyond it is refused here, since the file would load and answer
wrongly. The world is closed: every stored tensor is placed, dropped for a stated reason, or an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, CannotExpress
from qwenlocal.weights.checkpoint import Checkpoint, read_config
from qwenlocal.weights.mix import by_layer
from qwenlocal.weights.numbers import Place, same_bytes
from qwenlocal.weights.safetensors import StoredTensor

_ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen2Model": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe"}
_MOST = 1 << 31
_LEAST, _LARGEST = 1e-37, 3e38  # of a float of four bytes, as GGUF has them
_USUAL_FIRST_WINDOW = 28  # transformers' Qwen2Config: max_window_layers
_READABLE = {"F32", "F16", "BF16"}
_RECOMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


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


@dataclass(frozen=True)
class Rows:
    """Rows of a stored matrix, one below the other: `count` of them from `first` on."""

    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class Placed:
    """
    A tensor of the GGUF file: `shape` in ggml's order (fastest first), and the rows it consists of.

    `exact` ones stay float32 whatever the file's type: norms, biases, routers (llama.cpp, conversion/base.py:
    prepare_tensors).
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Rows]
    exact: bool

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return sum(part.count for part in self.parts) * self.shape[0]


@dataclass(frozen=True)
class Dropped:
    """A stored tensor that the file does not need."""

    name: str
    reason: str
    size: int


@dataclass(frozen=True)
class Placement:
    """Where every tensor of a checkpoint goes."""

    tensors: Sequence[Placed]
    dropped: Sequence[Dropped]


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
            raise BadCheckpoint(self.path, f"“{key}” is {value!r}, which cannot be")
        return value

    def number(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not _LEAST < value < _LARGEST:
            raise BadCheckpoint(self.path, f"“{key}” is {value!r}, which cannot be")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise BadCheckpoint(self.path, f"“{key}” is {value!r}; it should be true or false")
        return default if value is None else value


def hyperparameters(checkpoint: Checkpoint) -> Hyperparameters:
    """
    What config.json says, checked.

    Raises
    ------
    BadCheckpoint: a value is missing or impossible.
    CannotExpress: llama.cpp would compute something else than the config asks for.
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
    raise CannotExpress(config.path, f"a {name} is not a Qwen1.5 model", hint=hint)


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
    rope = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise BadCheckpoint(config.path, f"the rope parameters are {rope!r}, which cannot be")
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))  # the default of transformers
    base = config.number("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None, base
    if kind not in ("linear", "yarn"):
        raise CannotExpress(
            config.path, f"rope scaling of the kind “{kind}” is not in llama.cpp's graph of Qwen models"
        )
    original = rope.get("original_max_position_embeddings") or config.values.get("max_position_embeddings")
    factor = config.number("rope factor", rope.get("factor"))
    attention = _yarn_attention(config, rope, factor) if kind == "yarn" else 1.0
    context = config.number("original_max_position_embeddings", original)
    if context >= _MOST:
        raise BadCheckpoint(config.path, f"“original_max_position_embeddings” is {original!r}, which cannot be")
    return RopeScaling(kind, factor, int(context), attention), base


def _yarn_attention(config: _Config, rope: Mapping[str, Any], factor: float) -> float:
    """
    transformers takes attention_factor as it stands (modeling_rope_utils.py: _compute_yarn_parameters), llama.cpp
    multiplies its own 0.1 ln(factor) + 1 with what the file says (llama-context.cpp: yarn_attn_factor).
    """
    for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if rope.get(key) is not None and key != "truncate":
            config.number(key, rope[key])
        if rope.get(key) not in (None, usual):
            raise CannotExpress(config.path, f"YaRN with {key} = {rope[key]} is not what llama.cpp computes")
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
    if found.width % found.heads or values.get("head_dim") not in (None, found.width // found.heads):
        raise CannotExpress(config.path, f"{found.heads} heads do not share a width of {found.width} evenly")
    if found.heads % found.kv_heads:
        raise BadCheckpoint(config.path, f"{found.heads} heads over {found.kv_heads} key-value heads: that cannot be")
    if values.get("hidden_act", "silu") != "silu":
        raise CannotExpress(
            config.path, f"its activation is “{values['hidden_act']}”; llama.cpp computes silu for Qwen models"
        )
    _refuse_sliding_window(config, found)
    if not found.experts:
        return
    if config.flag("norm_topk_prob", False):
        raise CannotExpress(
            config.path, "“norm_topk_prob” is true; llama.cpp does not normalise the experts' weights of this model"
        )
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise CannotExpress(
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
        raise BadCheckpoint(config.path, f"“max_window_layers” is {first!r}, which cannot be")
    slides = "sliding_attention" in kinds if isinstance(kinds, list) else first < found.layers
    if slides and window < found.context:
        raise CannotExpress(
            config.path,
            f"its layers from {first} on see only the last {window:,} tokens (sliding window); llama.cpp's graph of "
            "this architecture has full attention only",
            hint=f"Within {window:,} tokens both are the same: set “use_sliding_window” to false and "
            f"“max_position_embeddings” to {window} in a copy of config.json.",
        )


# --- tensors


def place_tensors(checkpoint: Checkpoint, model: Hyperparameters, *, keep_tied_head: bool = False) -> Placement:
    """
    Where each stored tensor goes, in llama.cpp's order: by layer, then by name.

    A head that is tied to the embeddings and stored all the same is dropped if it is equal (a fifth of a 0.5B file),
    unless `keep_tied_head`.

    Raises
    ------
    BadCheckpoint: a tensor is missing, unknown, or not of the shape that the config says.
    CannotExpress: a tensor has no place in llama.cpp's graph.
    """
    stored = _Stored(checkpoint, "" if model.bare else "model.")
    placed = [*_whole_model(stored, model, keep_tied_head=keep_tied_head)]
    for layer in range(model.layers):
        placed += _attention(stored, model, layer)
        placed += _mixture(stored, model, model.experts, layer) if model.experts else _dense(stored, model, layer)
    stored.check_nothing_left()
    return Placement(sorted(placed, key=lambda tensor: by_layer(tensor.name)), stored.dropped)


class _Stored:
    """The tensors of a checkpoint, each taken once."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.folder, self._prefix = checkpoint.folder, prefix
        self._left = dict(checkpoint.tensors)
        self.dropped: list[Dropped] = []
        for name in list(self._left):
            if name.endswith(_RECOMPUTED):
                self.drop(name, "computed anew by llama.cpp")
            elif name.endswith("_proj.bias") and not re.search(r"self_attn\.[qkv]_proj\.bias$", name):
                self._drop_zero_bias(name)

    def has(self, name: str) -> bool:
        return self._prefix + name in self._left

    def take(self, name: str, *shape: int, prefix: str | None = None) -> StoredTensor:
        full = (self._prefix if prefix is None else prefix) + name
        tensor = self._left.pop(full, None)
        if tensor is None:
            raise BadCheckpoint(self.folder, f"“{full}” is missing")
        if tensor.shape != shape:
            raise BadCheckpoint(
                tensor.file, f"“{full}” is {list(tensor.shape)}; by config.json it should be {list(shape)}"
            )
        if tensor.dtype not in _READABLE:
            raise CannotExpress(
                tensor.file, f"“{full}” is of type {tensor.dtype}; plain f32, f16 and bf16 are converted"
            )
        return tensor

    def matrix(self, target: str, source: str, rows: int, columns: int, *, exact: bool = False) -> Placed:
        tensor = self.take(f"{source}.weight", rows, columns)
        return Placed(f"{target}.weight", (columns, rows), [Rows(tensor, 0, rows)], exact)

    def vector(self, target: str, source: str, size: int) -> Placed:
        return Placed(target, (size,), [Rows(self.take(source, size), 0, 1)], exact=True)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(Dropped(name, reason, self._left.pop(name).size))

    def _drop_zero_bias(self, name: str) -> None:
        tensor = self._left[name]
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            if any(file.read(tensor.size)):
                raise CannotExpress(tensor.file, f"“{name}” is not zero; Qwen1.5 has no such bias, nor has llama.cpp")
        self.drop(name, "a bias of nothing but zeros")

    def check_nothing_left(self) -> None:
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(f"“{name}”" for name in names[:3])
            raise BadCheckpoint(
                self._left[names[0]].file,
                f"it holds what this architecture does not have: {shown}{more}",
                hint="An adapter, or layers that somebody added? Only plain checkpoints are converted.",
            )


def _whole_model(stored: _Stored, model: Hyperparameters, *, keep_tied_head: bool) -> Iterator[Placed]:
    embedding = stored.take("embed_tokens.weight", model.vocabulary, model.width)
    table = [Rows(embedding, 0, model.vocabulary)]
    shape = (model.width, model.vocabulary)
    yield Placed("token_embd.weight", shape, table, exact=False)
    yield stored.vector("output_norm.weight", "norm.weight", model.width)
    if model.bare:
        return  # llama.cpp takes the embeddings for the head
    if "lm_head.weight" in stored._left:
        head = stored.take("lm_head.weight", model.vocabulary, model.width, prefix="")
        if model.tied and not keep_tied_head and not model.experts:
            _check_equal(head, embedding)
            stored.dropped.append(Dropped(head.name, "the same as the embeddings, to which it is tied", head.size))
        else:
            yield Placed("output.weight", shape, [Rows(head, 0, model.vocabulary)], exact=False)
    elif not model.tied:
        raise BadCheckpoint(stored.folder, "“lm_head.weight” is missing, and config.json does not say that it is tied")
    elif model.experts:
        yield Placed("output.weight", shape, table, exact=False)  # llama.cpp's loader of this architecture asks for it


def _check_equal(head: StoredTensor, embedding: StoredTensor) -> None:
    places = (Place(tensor.file, tensor.offset, tensor.size) for tensor in (head, embedding))
    if head.dtype == embedding.dtype and same_bytes(*places):
        return
    raise BadCheckpoint(
        head.file,
        "config.json ties the head to the embeddings, but another “lm_head.weight” is stored",
        hint="Which is meant? For the stored one, set “tie_word_embeddings” to false in config.json.",
    )


def _attention(stored: _Stored, model: Hyperparameters, layer: int) -> Iterator[Placed]:
    source, target = f"layers.{layer}.", f"blk.{layer}."
    head = model.width // model.heads
    yield stored.vector(f"{target}attn_norm.weight", f"{source}input_layernorm.weight", model.width)
    yield stored.vector(f"{target}ffn_norm.weight", f"{source}post_attention_layernorm.weight", model.width)
    for letter, rows in (("q", model.width), ("k", model.kv_heads * head), ("v", model.kv_heads * head)):
        yield stored.matrix(f"{target}attn_{letter}", f"{source}self_attn.{letter}_proj", rows, model.width)
        if model.biased:
            yield stored.vector(f"{target}attn_{letter}.bias", f"{source}self_attn.{letter}_proj.bias", rows)
    yield stored.matrix(f"{target}attn_output", f"{source}self_attn.o_proj", model.width, model.width)


def _dense(stored: _Stored, model: Hyperparameters, layer: int) -> Iterator[Placed]:
    yield from _feed_forward(stored, f"layers.{layer}.mlp.", f"blk.{layer}.", "", model.width, model.feed_forward)


def _feed_forward(stored: _Stored, source: str, target: str, ending: str, width: int, inner: int) -> Iterator[Placed]:
    yield stored.matrix(f"{target}ffn_gate{ending}", f"{source}gate_proj", inner, width)
    yield stored.matrix(f"{target}ffn_up{ending}", f"{source}up_proj", inner, width)
    yield stored.matrix(f"{target}ffn_down{ending}", f"{source}down_proj", width, inner)


def _mixture(stored: _Stored, model: Hyperparameters, experts: Experts, layer: int) -> Iterator[Placed]:
    source, target, width = f"layers.{layer}.mlp.", f"blk.{layer}.", model.width
    yield stored.matrix(f"{target}ffn_gate_inp", f"{source}gate", experts.count, width, exact=True)
    yield stored.matrix(f"{target}ffn_gate_inp_shexp", f"{source}shared_expert_gate", 1, width, exact=True)
    yield from _feed_forward(stored, f"{source}shared_expert.", target, "_shexp", width, experts.shared_width)
    gate, up, down = (
        _fused_experts(stored, experts, source, width)
        if stored.has(f"{source}experts.gate_up_proj")
        else _separate_experts(stored, experts, source, width)
    )
    inner, count = experts.width, experts.count
    yield Placed(f"{target}ffn_gate_exps.weight", (width, inner, count), gate, exact=False)
    yield Placed(f"{target}ffn_up_exps.weight", (width, inner, count), up, exact=False)
    yield Placed(f"{target}ffn_down_exps.weight", (inner, width, count), down, exact=False)


def _separate_experts(stored: _Stored, experts: Experts, source: str, width: int) -> list[list[Rows]]:
    """transformers 4: a matrix each."""
    found = []
    for kind, rows, columns in (
        ("gate", experts.width, width),
        ("up", experts.width, width),
        ("down", width, experts.width),
    ):
        names = [f"{source}experts.{number}.{kind}_proj.weight" for number in range(experts.count)]
        found.append([Rows(stored.take(name, rows, columns), 0, rows) for name in names])
    return found


def _fused_experts(stored: _Stored, experts: Experts, source: str, width: int) -> list[list[Rows]]:
    """transformers 5: one tensor for all experts, in which each one's gate stands above its up."""
    inner = experts.width
    both = stored.take(f"{source}experts.gate_up_proj", experts.count, 2 * inner, width)
    down = stored.take(f"{source}experts.down_proj", experts.count, width, inner)
    return [
        [Rows(both, expert * 2 * inner, inner) for expert in range(experts.count)],
        [Rows(both, expert * 2 * inner + inner, inner) for expert in range(experts.count)],
        [Rows(down, expert * width, width) for expert in range(experts.count)],
    ]


def examine(folder: Path) -> None:
    """
    Whether the checkpoint in `folder` could be converted, as far as its config.json tells; its weights may be missing.

    Raises
    ------
    BadCheckpoint, CannotExpress: it could not.
    """
    config = read_config(folder)
    hyperparameters(Checkpoint(folder, config, {}))
