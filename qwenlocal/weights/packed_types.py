"""The types of the tensors of a packed checkpoint (GPTQ, AWQ): those that hold its weights without rounding."""

from __future__ import annotations

from collections.abc import Sequence

from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.file_types import FileType, QuantOverrides
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.packing import Packing
from qwenlocal.weights.quant_mix import ENDS, TypeChoice
from qwenlocal.weights.row_source import SourceTensor

DEFAULT_ENDS = "q8_0"  # practically lossless, and half of f16: the output matrix is read for each token
_DEQUANTIZED = "q8_0"  # for weights that no quantized type holds as they are packed


def choose_packed_types(tensors: Sequence[SourceTensor], kind: FileType, overrides: QuantOverrides) -> list[TypeChoice]:
    """Choose types so that packed weights need not be quantized again, for a file of one of `lossless_types`."""
    return [_choose(tensor, kind.default, overrides) for tensor in tensors]


def lossless_types(tensors: Sequence[SourceTensor], packing: Packing | None) -> set[TensorType]:
    """Return the types of files that keep the packed weights as they are; none without packed weights."""
    if packing is None:
        return set()
    return {tensor_type(packing.file_type), *(kind for tensor in tensors for kind in packed_types(tensor))}


def packed_types(tensor: SourceTensor) -> tuple[TensorType, ...]:
    """Return the types that hold the tensor as it is packed, exactly or nearly; none if it is not packed."""
    matrices = [rows.matrix for rows in tensor.rows if isinstance(rows, PackedRows)]
    if len(matrices) < len(tensor.rows):
        return ()
    types = [(*matrix.exact_types, *matrix.near_types) for matrix in matrices]
    common = [kind for kind in types[0] if all(kind in others for others in types)]
    return tuple(kind for kind in common if kind.is_quantized) or (tensor_type(_DEQUANTIZED),)


def _choose(tensor: SourceTensor, default: TensorType, overrides: QuantOverrides) -> TypeChoice:
    if tensor.keep_f32 or len(tensor.shape) == 1:
        return TypeChoice(tensor_type("f32"), "never quantized (small and sensitive)")
    for pattern, kind in overrides.tensor_types:
        if pattern.search(tensor.name):
            return TypeChoice(kind, f"--tensor-type {pattern.pattern}")
    types = packed_types(tensor)
    if tensor.name in ENDS and not types:
        return TypeChoice(overrides.ends or tensor_type(DEFAULT_ENDS), "not packed (--ends)")
    if not types:
        return TypeChoice(tensor.type, "not packed")
    if not tensor.type.is_quantized:
        return TypeChoice(types[0], "dequantized")
    kind = default if default in types else types[0]
    is_near = any(isinstance(rows, PackedRows) and kind in rows.matrix.near_types for rows in tensor.rows)
    return TypeChoice(kind, "as packed, zero points rounded" if is_near else "as packed")
