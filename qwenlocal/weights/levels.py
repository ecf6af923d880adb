"""How large a model would be in another type: the mixes are known, so nothing needs to be written to find out."""

from __future__ import annotations

from collections.abc import Sequence

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
    known = [(tensor, ggml.tensor_type_numbered(tensor.type)) for tensor in tensors]
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
