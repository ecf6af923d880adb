"""
The hyperparameters of Qwen models in GGUF files: their ranges, and the tensors that they imply.

Sources: llama-model.cpp (load_hparams, load_tensors, create_tensor_qkv), models/qwen2.cpp, models/qwen2moe.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qwenlocal.formatting import format_quantity, shorten
from qwenlocal.weights.gguf_reader import EncodedValue, decode_value

Shape = tuple[int, ...]

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama.cpp ends the process beyond (llama-hparams.h)
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_SCALES = ("scale", "input_scale")  # of quantization types such as NVFP4
# One number, or one for each layer.
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv", "expert_used_count",
             "expert_feed_forward_length")  # fmt: skip


class GgufHyperparameters:
    """
    The keys of a file's architecture, whose types have been checked.

    `layers`, `tensors` and so on are valid only if `find_errors` yields nothing.
    """

    def __init__(self, architecture: str, pairs: Mapping[str, EncodedValue]) -> None:
        self._prefix = f"{architecture}."
        self._values = {
            key.removeprefix(self._prefix): decode_value(value)
            for key, value in pairs.items()
            if key.startswith(self._prefix)
        }
        self.is_moe = architecture == "qwen2moe"
        self.width, self.heads = self.number("embedding_length"), self.number("attention.head_count")
        self.kv_heads = self.number("attention.head_count_kv", self.heads)
        # Those after them predict further tokens, and are not loaded.
        self.layers = self.number("block_count") - self.number("nextn_predict_layers")

    def number(self, key: str, default: Any = 0) -> Any:
        """Return a number; of several, that of the first layer."""
        value = self._values.get(key, default)
        return next(iter(value), default) if isinstance(value, list) else value

    def find_errors(self) -> Iterator[str]:
        """Yield a sentence for each value that llama.cpp refuses, or with which it computes nothing useful."""
        yield from self._find_layer_errors()
        yield from self._find_expert_errors()
        yield from self._find_head_errors()
        scaling = self.number("rope.scaling.type", "linear")
        if scaling not in _ROPE_SCALINGS:
            yield f"“{self._prefix}rope.scaling.type” is “{shorten(scaling)}”, which is unknown"
        if not self.number("rope.freq_base", 1.0) > 0:  # also true for NaN, as in the next line
            yield f"{self._state('rope.freq_base')}; it must be greater than 0"
        if not self.number("attention.layer_norm_rms_epsilon") >= 0:
            yield f"{self._state('attention.layer_norm_rms_epsilon')}; it must be 0 or greater"

    def _state(self, key: str) -> str:
        """`_state("block_count")` is "“qwen2.block_count” is 24"."""
        value = self.number(key)
        return f"“{self._prefix}{key}” is {f'{value:,}' if isinstance(value, int) else f'{value:g}'}"

    def _find_layer_errors(self) -> Iterator[str]:
        total = self.number("block_count")
        if not 0 < total <= MAX_LAYERS:
            yield f"{self._state('block_count')}; it must be between 1 and {MAX_LAYERS}"
            return
        if self.layers < 1:
            yield f"{self._state('nextn_predict_layers')}; it must be less than the number of layers ({total:,})"
        for key in PER_LAYER if self.is_moe else PER_LAYER[:-1]:
            value = self._values.get(key)
            if isinstance(value, list) and len(value) != total:
                count = format_quantity(len(value), "number")
                yield f"“{self._prefix}{key}” has {count} for {format_quantity(total, 'layer')}"

    def _find_expert_errors(self) -> Iterator[str]:
        experts, groups = self.number("expert_count"), self.number("expert_group_count")
        listed = self._values.get("expert_used_count", 0)
        used = max(listed, default=0) if isinstance(listed, list) else listed
        if experts > MAX_EXPERTS:
            yield f"{self._state('expert_count')}; it must be at most {MAX_EXPERTS:,}"
        elif self.is_moe and not experts:
            yield f"“{self._prefix}expert_count” is missing or 0"
        elif (experts or used) and not 0 < used <= experts:
            yield (
                f"“{self._prefix}expert_used_count” is {used:,}; it must be between 1 and the number of experts "
                f"({experts:,})"
            )
        elif groups and (groups >= experts or experts % groups):
            rule = f"it must be less than the number of experts ({experts:,}), and divide it"
            yield f"{self._state('expert_group_count')}; {rule}"
        elif groups > 1 and not 0 < self.number("expert_group_used_count") < groups:
            rule = f"it must be at least 1, and less than the number of groups ({groups:,})"
            yield f"{self._state('expert_group_used_count')}; {rule}"

    def _find_head_errors(self) -> Iterator[str]:
        if not self.width or not self.heads or self.width % self.heads:
            heads = f"the number of heads ({self.heads:,})"
            yield f"{self._state('embedding_length')}; it must be a multiple of {heads}, and neither may be 0"
            return
        if not self.kv_heads or self.heads % self.kv_heads:
            count = format_quantity(self.kv_heads, "key-value head")
            yield f"{self._state('attention.head_count')}, not a multiple of {count}"
        size = self.width // self.heads
        if size % 2:
            yield f"the heads have an odd number of dimensions ({size:,})"
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if self.number(key, size) != size:
                yield f"{self._state(key)}, but the heads have {format_quantity(size, 'dimension')}"

    def tensors(self, vocabulary: int, names: Collection[str]) -> Iterator[tuple[str, Shape, bool]]:
        """
        Yield the tensors that llama.cpp creates for a file with the tensors `names` and that many tokens.

        Each has a name, a shape, and True if it must be in the file.
        """
        yield "token_embd.weight", (self.width, vocabulary), True
        yield "output_norm.weight", (self.width,), True
        yield "output.weight", (self.width, vocabulary), self.is_moe
        if not self.is_moe:
            yield "output.bias", (vocabulary,), False
        for prefix in (f"blk.{layer}." for layer in range(self.layers)):
            for name, width in self._attention_widths(f"{prefix}attn_qkv.bias" in names):
                yield f"{prefix}{name}.bias", (width,), False
            for name, shape in self._layer_tensors(prefix, names):
                yield name, shape, True
                if len(shape) > 1 and "ffn_gate_inp" not in name:
                    stem, matrices = name.removesuffix("weight"), shape[2] if len(shape) > 2 else 1
                    yield from ((stem + suffix, (matrices,), False) for suffix in _SCALES)

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
        kv_width = self.width // self.heads * self.kv_heads
        if is_fused:
            yield "attn_qkv", self.width + 2 * kv_width
        else:
            yield from (("attn_q", self.width), ("attn_k", kv_width), ("attn_v", kv_width))


def _feed_forward(name: str, width: int, inner: int, *experts: int) -> Iterator[tuple[str, Shape]]:
    yield name % "gate", (width, inner, *experts)
    yield name % "up", (width, inner, *experts)
    yield name % "down", (inner, width, *experts)
