"""
The hyperparameters of Qwen models in GGUF files: their ranges, and the tensors that they imply.

Sources: llama-model.cpp (load_hparams, load_tensors, create_tensor_qkv), models/qwen2.cpp, models/qwen2moe.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qwenlocal.formatting import format_quantity, shorten
from qwenlocal.weights.gguf_reader import EncodedValue, decode_value

Shape = tuple[int, ...]

_MAX_LAYERS, _MAX_EXPERTS = 512, 1024  # llama-hparams.h
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_SCALES = ("scale", "input_scale")  # of quantization types such as NVFP4
# One number, or one for each layer.
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_used_count",
             "expert_feed_forward_length")  # fmt: skip


class GgufHyperparameters:
    """The keys of a file's architecture; their types must be right, and `find_errors` empty for all else to work."""

    def __init__(self, architecture: str, pairs: Mapping[str, EncodedValue]) -> None:
        self._prefix = f"{architecture}."
        self._values = {
            key.removeprefix(self._prefix): decode_value(value)
            for key, value in pairs.items()
            if key.startswith(self._prefix)
        }
        self.is_moe = architecture == "qwen2moe"

    def number(self, key: str, default: Any = 0) -> Any:
        """Return a number; of several, that of the first layer."""
        value = self._values.get(key, default)
        return next(iter(value), default) if isinstance(value, list) else value

    @property
    def width(self) -> int:
        """The size of an embedding."""
        return int(self.number("embedding_length"))

    @property
    def layers(self) -> int:
        """The number of layers, without those that predict several tokens."""
        return int(self.number("block_count") - self.number("nextn_predict_layers"))

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return int(self.number("attention.head_count"))

    @property
    def kv_width(self) -> int:
        """The size of all keys of a token in a layer, and of all values."""
        return self.width // self.heads * int(self.number("attention.head_count_kv", self.heads))

    def find_errors(self) -> Iterator[str]:
        """Yield a sentence for each value that llama.cpp refuses, or with which it computes nothing useful."""
        yield from self._find_layer_errors()
        yield from self._find_expert_errors()
        yield from self._find_head_errors()
        yield from self._find_rope_errors()
        epsilon = self.number("attention.layer_norm_rms_epsilon")
        if not epsilon >= 0:  # also true for NaN
            yield f"“{self._prefix}attention.layer_norm_rms_epsilon” is {epsilon:g}; it must be 0 or greater"

    def _find_layer_errors(self) -> Iterator[str]:
        layers, nextn = self.number("block_count"), self.number("nextn_predict_layers")
        if not 0 < layers <= _MAX_LAYERS:
            yield f"“{self._prefix}block_count” is {layers:,}; it must be between 1 and {_MAX_LAYERS}"
            return
        if nextn >= layers:
            total = format_quantity(layers, "layer")
            yield f"“{self._prefix}nextn_predict_layers” is {nextn:,}, but the model has {total}"
        for key in PER_LAYER if self.is_moe else PER_LAYER[:-1]:
            value = self._values.get(key)
            if isinstance(value, list) and len(value) != layers:
                count = format_quantity(len(value), "number")
                yield f"“{self._prefix}{key}” has {count} for {format_quantity(layers, 'layer')}"

    def _find_expert_errors(self) -> Iterator[str]:
        experts, groups = self.number("expert_count"), self.number("expert_group_count")
        used = self._values.get("expert_used_count", 0)
        used = max(used, default=0) if isinstance(used, list) else used
        if experts > _MAX_EXPERTS:
            yield f"“{self._prefix}expert_count” is {experts:,}; it must be at most {_MAX_EXPERTS:,}"
        elif self.is_moe and not experts:
            yield f"“{self._prefix}expert_count” is missing or 0"
        elif (experts or used) and not 0 < used <= experts:
            yield f"“{self._prefix}expert_used_count” is {used:,}, and “{self._prefix}expert_count” is {experts:,}"
        elif groups and (groups >= experts or experts % groups):
            yield f"“{self._prefix}expert_group_count” is {groups:,}, and “{self._prefix}expert_count” is {experts:,}"
        elif groups > 1 and not 0 < (used_groups := self.number("expert_group_used_count")) < groups:
            yield f"“{self._prefix}expert_group_used_count” is {used_groups:,}, but there are {groups:,} groups"

    def _find_head_errors(self) -> Iterator[str]:
        heads, kv_heads = self.heads, self.number("attention.head_count_kv", self.heads)
        if not heads or self.width % heads or not self.width:
            count = format_quantity(heads, "head")
            yield f"“{self._prefix}embedding_length” is {self.width:,}, not a multiple of {count}"
            return
        if not kv_heads or heads % kv_heads:
            count = format_quantity(kv_heads, "key-value head")
            yield f"“{self._prefix}attention.head_count” is {heads:,}, not a multiple of {count}"
        size = self.width // heads
        if size % 2:
            yield f"the heads have an odd number of dimensions ({size:,})"
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if self.number(key, size) != size:
                dimensions = format_quantity(size, "dimension")
                yield f"“{self._prefix}{key}” is {self.number(key):,}, but the heads have {dimensions}"

    def _find_rope_errors(self) -> Iterator[str]:
        scaling = self.number("rope.scaling.type", "linear")
        if scaling not in _ROPE_SCALINGS:
            yield f"“{self._prefix}rope.scaling.type” is “{shorten(scaling)}”, which is unknown"
        base = self.number("rope.freq_base", 1.0)
        if not base > 0:  # also true for NaN
            yield f"“{self._prefix}rope.freq_base” is {base:g}; it must be greater than 0"
        factor = "rope.scaling.factor" if "rope.scaling.factor" in self._values else "rope.scale_linear"
        if math.isnan(self.number(factor, 0.0)):
            yield f"“{self._prefix}{factor}” is NaN"
        if not math.isfinite(self.number("rope.scaling.attn_factor", 1.0)):
            yield f"“{self._prefix}rope.scaling.attn_factor” is {self.number('rope.scaling.attn_factor'):g}"

    def required_tensors(self, vocabulary: int, names: Collection[str]) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes of the tensors that a file with the tensors `names` and that many tokens must have."""
        yield "token_embd.weight", (self.width, vocabulary)
        yield "output_norm.weight", (self.width,)
        if self.is_moe:
            yield "output.weight", (self.width, vocabulary)
        for layer in range(self.layers):
            yield from self._layer_tensors(f"blk.{layer}.", names)

    def optional_tensors(self, vocabulary: int, names: Collection[str]) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes of the tensors that such a file may have besides."""
        if not self.is_moe:
            yield "output.weight", (self.width, vocabulary)
            yield "output.bias", (vocabulary,)
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            for name, width in self._attention_widths(f"{prefix}attn_qkv.bias" in names):
                yield f"{prefix}{name}.bias", (width,)
            for name, shape in self._layer_tensors(prefix, names):
                stem = name.removesuffix("weight")
                if len(shape) > 1 and "ffn_gate_inp" not in name:
                    yield from ((stem + suffix, (shape[2] if len(shape) > 2 else 1,)) for suffix in _SCALES)

    def _layer_tensors(self, prefix: str, names: Collection[str]) -> Iterator[tuple[str, Shape]]:
        width = self.width
        yield f"{prefix}attn_norm.weight", (width,)
        for name, rows in self._attention_widths(f"{prefix}attn_qkv.weight" in names):
            yield f"{prefix}{name}.weight", (width, rows)
        yield f"{prefix}attn_output.weight", (width, width)
        yield f"{prefix}ffn_norm.weight", (width,)
        if not self.is_moe:
            yield from _feed_forward(f"{prefix}ffn_%s.weight", width, self.number("feed_forward_length"))
            return
        inner, experts = self.number("feed_forward_length"), self.number("expert_count")
        expert_inner = self.number("expert_feed_forward_length") or inner // self.number("expert_used_count", 1)
        yield f"{prefix}ffn_gate_inp.weight", (width, experts)
        yield from _feed_forward(f"{prefix}ffn_%s_exps.weight", width, expert_inner, experts)
        yield f"{prefix}ffn_gate_inp_shexp.weight", (width,)
        shared_inner = self.number("expert_shared_feed_forward_length") or inner
        yield from _feed_forward(f"{prefix}ffn_%s_shexp.weight", width, shared_inner)

    def _attention_widths(self, is_fused: bool) -> Iterator[tuple[str, int]]:
        """Yield the sizes of queries, keys and values, which may be the rows of one matrix."""
        if is_fused:
            yield "attn_qkv", self.width + 2 * self.kv_width
        else:
            yield from (("attn_q", self.width), ("attn_k", self.kv_width), ("attn_v", self.kv_width))


def _feed_forward(name: str, width: int, inner: int, *experts: int) -> Iterator[tuple[str, Shape]]:
    yield name % "gate", (width, inner, *experts)
    yield name % "up", (width, inner, *experts)
    yield name % "down", (inner, width, *experts)
