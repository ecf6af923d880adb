"""How large a model would be in another type: the mixes are known, so nothing needs to be written to find out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwenlocal import ggml
from qwenlocal.weights.header import Header, tensor_bytes
from qwenlocal.weights.mix import Candidate, ModelFacts, by_layer, choose_types, file_type

USUAL = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")


def sizes_of_levels(header: Header, facts: ModelFacts, levels: Sequence[str] = USUAL) -> dict[str, int]:
    """
    Bytes of weights for each of `levels`, as if made from unquantized ones.

    Qwen1.5-0.5B: q4_0 286 MiB, q8_0 466 MiB without a repeated head.
    """
    f32 = ggml.tensor_type("f32")
    tensors = sorted(header.tensors, key=lambda tensor: by_layer(tensor.name))
    known = [(tensor, ggml.tensor_type_by_number(tensor.type)) for tensor in tensors]
    candidates = [
        Candidate(tensor.name, tensor.shape, f32 if kind == f32 or kind is None else ggml.tensor_type("bf16"))
        for tensor, kind in known
    ]
    found = {}
    for level in levels:
        choices = choose_types(candidates, file_type(level), facts)
        found[level] = sum(
            choice.type.row_bytes(tensor.shape[0]) * (tensor.elements // tensor.shape[0])
            for (tensor, _), choice in zip(known, choices, strict=True)
        )
    return found


def weights_of(header: Header) -> int:
    """Bytes of weights as they are."""
    return sum(tensor_bytes(tensor) or 0 for tensor in header.tensors)


# What llama.cpp repacks for vector units, by what the processor can do (ggml-cpu/repack.cpp:
# ggml_repack_get_optimal_repack_type).
_REPACKED = {
    "avx2": ("q4_0", "q4_k", "iq4_nl", "mxfp4"),
    "avx512f": ("q2_k",),
    "asimddp": ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl", "mxfp4"),
}


def slow_types(header: Header, features: Collection[str]) -> tuple[float, list[str]]:
    """
    The share of the matrices' bytes that are in types without a fast way on such a processor, and these types.

    The official Q4_K_M of a 0.5B with 896 columns, which are no multiple of 256, on AVX2: (0.85, ["q5_0", "q8_0"]).
    """
    fast = {name for feature in features for name in _REPACKED.get(feature, ())}
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        kind = ggml.tensor_type_by_number(tensor.type)
        if kind is not None and kind.is_quantized and len(tensor.shape) > 1 and tensor.name != "token_embd.weight":
            sizes[kind.name] = sizes.get(kind.name, 0) + (tensor_bytes(tensor) or 0)
    slow = {name: size for name, size in sizes.items() if name not in fast}
    total = sum(sizes.values())
    return (sum(slow.values()) / total if total else 0.0), sorted(slow, key=lambda name: -slow[name])
