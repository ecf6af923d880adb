"""
The types of a file's tensors: llama.cpp's mixes, so that "q4_k_m" means the same file everywhere.

A port of src/llama-quant.cpp (llama_tensor_get_type and what it calls) for the architectures qwen2 and qwen2moe. A mix
visits the tensors by layer, then name, and counts on the way: Q4_K_M, for example, gives Q6_K to the first and the last
eighth of the value matrices, and to every third in between.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwenlocal.errors import UsageError
from qwenlocal.ggml import TensorType, requires_imatrix, tensor_type
from qwenlocal.weights.file_types import FileType, QuantOverrides, file_type
from qwenlocal.weights.gguf_reader import Header, TensorInfo
from qwenlocal.weights.gguf_writer import TensorSpec

# The type to use if the row length is not a multiple of the block size (llama-quant.cpp: tensor_type_fallback).
_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
# The types in which attn_output gets more bits if there are eight experts, as in Mixtral.
_MORE_BITS_FOR_8_EXPERTS = ("q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s",
                            "iq3_m", "iq4_xs")  # fmt: skip
_EMBEDDING_TYPES = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "q2_k"),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
    **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "q4_k"),
}
_DEFAULT = "default"  # the reason for the type that most tensors of a file have
ENDS = ("token_embd.weight", "output.weight")
_SMALL_MIXES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m")

COMMON_TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")

# Types that llama.cpp multiplies in large pieces, by CPU feature: repacked (ggml-cpu/repack.cpp:
# ggml_repack_get_optimal_repack_type) or in tiles (ggml-cpu/tiled/tiled.cpp: ggml_tiled_supported).
_TILED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s",
          "iq1_m")  # fmt: skip
_FAST_TYPES = {
    "avx": _TILED,
    "avx2": ("q4_0", "iq4_nl", "mxfp4"),
    "avx512_vnni": ("q5_0", "q8_0"),  # tools/block_gemm.cpp
    "avx_vnni": ("q5_0", "q8_0"),
    "asimddp": ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "mxfp4"),
}


class TypeChoice(NamedTuple):
    """The type for a tensor, and the reason for display."""

    type: TensorType
    reason: str


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that the mixes depend on. `gqa`: heads per key-value head."""

    architecture: str
    layers: int
    gqa: int
    experts: int = 0

    @classmethod
    def from_header(cls, header: Header) -> ModelFacts:
        """Read the facts from a GGUF header."""
        heads = header.dimension("attention.head_count", 1)
        gqa = heads // max(1, header.dimension("attention.head_count_kv", heads))
        return cls(header.architecture, header.dimension("block_count", 0), gqa, header.dimension("expert_count", 0))


def choose_types(
    tensors: Sequence[TensorSpec], file_type: FileType, facts: ModelFacts, overrides: QuantOverrides = QuantOverrides()
) -> list[TypeChoice]:
    """
    Choose the type of each tensor from its present one; `tensors` must be in the order of `layer_order`.

    Raises
    ------
    UsageError: a regular expression of `overrides` matches no tensor.
    """
    for pattern, _ in overrides.tensor_types:
        if not any(pattern.search(tensor.name) and is_quantizable(tensor) for tensor in tensors):
            raise UsageError(
                f"“{pattern.pattern}” matches no tensor that can be quantized.",
                hint="To list the tensors, use --dry-run instead of --tensor-type.",
            )
    mix = _Mix(file_type, facts, overrides, tensors)
    return [mix.choose(tensor) for tensor in tensors]


def layer_order(name: str) -> tuple[int, str]:
    """Sort key of llama.cpp's order of tensors: by layer, then name (llama-model-loader.h: weight_name_comparer)."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def needs_imatrix(name: str, kind: TensorType, file_type: FileType) -> bool:
    """Return True if the weights are garbage without an imatrix (llama-quant.cpp: tensor_requires_imatrix)."""
    if name in ENDS:
        return requires_imatrix(kind)
    if kind.name == "q2_k":
        return file_type.name == "q2_k_s"
    return kind.name in ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s")


def is_quantizable(tensor: TensorSpec) -> bool:
    """Return True for matrices except norms and routers (llama-quant.cpp: tensor_allows_quantization)."""
    dimensions = [size for size in tensor.shape[1:] if size > 1]
    return (
        bool(dimensions)
        and tensor.name.endswith("weight")
        and "_norm.weight" not in tensor.name
        and "ffn_gate_inp.weight" not in tensor.name
    )


class _Mix:
    """One pass over the tensors of a model, in order; methods that count tensors must be called once per tensor."""

    def __init__(
        self, file_type: FileType, facts: ModelFacts, overrides: QuantOverrides, tensors: Sequence[TensorSpec]
    ) -> None:
        self.mix, self.default = file_type.name, file_type.default
        self.facts, self.overrides = facts, overrides
        names = {tensor.name for tensor in tensors}
        self.is_tied = "output.weight" not in names
        self.attn_v_count = sum("attn_v.weight" in name for name in names)
        self.counts = Counter[str]()

    def choose(self, tensor: TensorSpec) -> TypeChoice:
        if not is_quantizable(tensor):
            return TypeChoice(tensor.type, "never quantized (small and sensitive)")
        if chosen := self.overrides.find_tensor_type(tensor.name):
            pattern, kind = chosen
            return self._with_fallback(tensor, TypeChoice(kind, f"--tensor-type {pattern.pattern}"))
        if self.overrides.ends and tensor.name in ENDS:
            return self._with_fallback(tensor, TypeChoice(self.overrides.ends, "--ends"))
        if not self.default.is_quantized:
            return TypeChoice(self.default, _DEFAULT)
        if self.overrides.pure:
            return self._with_fallback(tensor, TypeChoice(self.default, "--pure"))
        return self._with_fallback(tensor, self._choose_by_mix(tensor))

    def _with_fallback(self, tensor: TensorSpec, choice: TypeChoice) -> TypeChoice:
        """Replace the type if the rows cannot be divided into its blocks."""
        columns, kind = tensor.shape[0], choice.type
        if columns % kind.block_size == 0:
            return choice
        fallback = tensor_type(_FALLBACK.get(kind.name, kind.name))
        if columns % fallback.block_size:
            fallback = tensor_type("f16")
        return TypeChoice(fallback, f"rows of {columns:,} are not a multiple of {kind.block_size} ({kind.name})")

    def _choose_by_mix(self, tensor: TensorSpec) -> TypeChoice:
        name = tensor.name
        if name == "output.weight" or (name == "token_embd.weight" and self.is_tied):
            return TypeChoice(
                self._output_type(tensor),
                "embeddings, also used as the output matrix" if self.is_tied else "output matrix",
            )
        if self.mix == "mxfp4":
            kind = tensor_type("mxfp4" if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "q8_0")
        else:
            kind = tensor_type(self._type_for(name) or self.default.name)
        return TypeChoice(kind, _DEFAULT if kind == self.default else f"{self.mix} mix")

    def _output_type(self, tensor: TensorSpec) -> TensorType:
        if self.mix == "mxfp4" or tensor.shape[0] % self.default.block_size:
            return tensor_type("q8_0")
        if self.mix in ("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq2_s", "iq2_m", "iq1_m"):
            return tensor_type("q5_k")
        return self.default if self.default.name == "q8_0" else tensor_type("q6_k")

    def _type_for(self, name: str) -> str | None:
        """Return the name of the type that the mix has for this kind of tensor; None for the default type."""
        if name == "token_embd.weight":
            return _EMBEDDING_TYPES.get(self.mix)
        if self.mix in _SMALL_MIXES:
            return self._small_mix(name)
        if "attn_v.weight" in name:
            return self._attn_v()
        if self.facts.experts == 8 and "attn_k.weight" in name:
            return "q8_0"
        if "attn_k.weight" in name or "attn_q.weight" in name:
            return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(self.mix)
        if "ffn_down" in name:
            return self._ffn_down(name)
        if "attn_output.weight" in name:
            if self.facts.experts == 8:
                return "q5_k" if self.mix in _MORE_BITS_FOR_8_EXPERTS else None
            types = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
            return types.get(self.mix)
        if "ffn_gate" in name or "ffn_up" in name:
            return self._ffn_gate_or_up(name)
        return None

    def _small_mix(self, name: str) -> str | None:
        is_larger = self.mix in ("iq2_s", "iq2_m")
        if "attn_v.weight" in name:
            has_shared_values = self.facts.gqa >= 4 or self.facts.experts >= 4
            return "q4_k" if has_shared_values else "iq3_s" if is_larger else "q2_k"
        if self.facts.experts == 8 and "attn_k.weight" in name:
            return "q4_k"
        if "ffn_down" in name:
            is_first = self._count("ffn_down") < self.facts.layers // 8
            return ("iq3_s" if is_larger else "q2_k") if is_first else None
        if "attn_output.weight" in name:
            if self.facts.experts == 8:
                return "q5_k"
            return "iq2_xxs" if self.mix in ("iq1_s", "iq1_m") else "iq3_s" if is_larger else None
        return None

    def _attn_v(self) -> str | None:
        mix, layer, has_gqa = self.mix, self._count("attn_v"), self.facts.gqa >= 4
        kind: str | None = None
        if mix == "q2_k":
            kind = "q4_k" if has_gqa else "q3_k"
        elif mix == "iq3_xxs" and not has_gqa:
            kind = "iq3_xxs" if self.overrides.has_imatrix else "iq3_s"
        elif (mix in ("q2_k_s", "iq3_xxs", "iq3_xs", "iq3_s") and has_gqa) or mix == "iq3_m":
            kind = "q4_k"
        elif mix == "q3_k_m":
            kind = "q5_k" if layer < 2 else "q4_k"
        elif mix == "q3_k_l" or (mix in ("iq4_nl", "iq4_xs") and has_gqa):
            kind = "q5_k"
        elif mix in ("q4_k_m", "q5_k_m") and _use_more_bits(layer, self.attn_v_count):
            kind = "q6_k"
        elif mix == "q4_k_s" and layer < 4:
            kind = "q5_k"
        if self.facts.experts == 8:
            return "q8_0"
        is_70b = self.facts.architecture == "qwen2" and self.facts.layers == 80
        if is_70b and (kind or self.default.name) in ("q3_k", "q4_k"):
            return "q5_k"
        return kind

    def _ffn_down(self, name: str) -> str | None:
        mix, layers = self.mix, self.facts.layers
        layer = self._layer(self._count("ffn_down"), name)
        is_first = layer < layers // 8
        if mix == "q2_k":
            return "q3_k"
        if mix == "q2_k_s" and is_first:
            return "q4_k"
        if mix == "iq3_xxs" and not self.overrides.has_imatrix:
            return "q4_k" if is_first else "q3_k"
        if mix == "q3_k_m":
            return "q5_k" if layer < layers // 16 else "q4_k"
        if mix == "iq3_m" and (is_first or (self.facts.experts == 8 and _use_more_bits(layer, layers))):
            return "q4_k"
        if mix == "q3_k_l":
            return "q5_k"
        if mix in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _use_more_bits(layer, layers) else None
        if mix in ("iq4_nl", "iq4_xs") and is_first and not self.overrides.has_imatrix:
            return "q5_k"
        if mix == "q4_k_s" and is_first:
            return "q5_k"
        if mix in ("q4_0", "q5_0") and is_first and self.overrides.has_imatrix:
            return "q4_1" if mix == "q4_0" else "q5_1"
        return None

    def _ffn_gate_or_up(self, name: str) -> str | None:
        part, layers = "ffn_gate" if "ffn_gate" in name else "ffn_up", self.facts.layers
        layer = self._layer(self._count(part), name)
        if self.mix == "iq3_xs" and layers // 8 <= layer < 7 * layers // 8:
            return "iq3_xxs"
        return None

    def _count(self, part: str) -> int:
        """Count a tensor of this kind, and return the number of earlier ones."""
        before = self.counts[part]
        self.counts[part] += 1
        return before

    def _layer(self, count: int, name: str) -> int:
        """Return the layer: the count, or with experts, of which a layer has several matrices, the one in the name."""
        layer, _ = layer_order(name)
        return layer if self.facts.experts > 1 and layer >= 0 else count


def _use_more_bits(layer: int, layers: int) -> bool:
    """llama-quant.cpp: use_more_bits. True for layers 0–3, 6, 9, 12, 15, 18, 21, 24 and 27–31 of 32."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def estimate_sizes(header: Header, types: Sequence[str] = COMMON_TYPES) -> dict[str, int]:
    """
    Estimate the bytes of weights for each of the file types `types`, as if made from unquantized weights.

    Qwen1.5-0.5B: q4_0 286 MiB, q8_0 466 MiB, without a duplicate output matrix.
    """
    specs = [_unquantized(tensor) for tensor in sorted(header.tensors, key=lambda tensor: layer_order(tensor.name))]
    facts, sizes = ModelFacts.from_header(header), {}
    for name in types:
        choices = choose_types(specs, file_type(name), facts)
        sizes[name] = sum(spec._replace(type=choice.type).size for spec, choice in zip(specs, choices, strict=True))
    return sizes


def _unquantized(tensor: TensorInfo) -> TensorSpec:
    f32 = tensor_type("f32")
    return TensorSpec(tensor.name, tensor.shape, f32 if tensor.type == f32 else tensor_type("bf16"))


def has_fast_kernel(kind: TensorType, features: Collection[str]) -> bool:
    """Return True if llama.cpp multiplies matrices of this type in large pieces on a CPU with these features."""
    return any(kind.name in _FAST_TYPES.get(feature, ()) for feature in features)


def find_slow_types(header: Header, features: Collection[str]) -> tuple[float, list[str]]:
    """
    Return the share of the matrices' bytes in types without a fast kernel for these CPU features, and these types.

    The official Q4_K_M of a 0.5B with 896 columns, not a multiple of 256, on AVX2: (0.85, ["q5_0", "q8_0"]);
    with AVX-VNNI, our own kernels are fast for these: (0.0, []).
    """
    sizes = Counter[TensorType]()
    for tensor in header.tensors:
        if tensor.type.is_quantized and len(tensor.shape) > 1 and tensor.name != "token_embd.weight":
            sizes[tensor.type] += tensor.size
    slow = [kind for kind, _ in sizes.most_common() if not has_fast_kernel(kind, features)]
    return sum(sizes[kind] for kind in slow) / max(1, sizes.total()), [kind.name for kind in slow]
