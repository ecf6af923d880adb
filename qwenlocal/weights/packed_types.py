"""The types of the tensors of a packed checkpoint (GPTQ, AWQ): those that hold its weights without rounding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwenlocal.errors import UsageError
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.weights.file_types import FileType, QuantOverrides
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.packing import Packing
from qwenlocal.weights.quant_mix import ENDS, TypeChoice
from qwenlocal.weights.row_source import SourceTensor

DEFAULT_ENDS = "q8_0"  # practically lossless, and half of f16: the output matrix is read for each token
_DEQUANTIZED = "q8_0"  # for weights that no quantized type holds as they are packed


def keep_packed_types(
    tensors: Sequence[SourceTensor], usual: Sequence[TypeChoice], kind: FileType, overrides: QuantOverrides
) -> list[TypeChoice]:
    """
    Replace `usual` choices so that packed weights need not be quantized again, for a file of one of `lossless_types`.

    Embeddings, output matrix and types that the user chose stay as they are.
    """
    return [
        choice
        if tensor.keep_f32 or len(tensor.shape) == 1 or overrides.find_tensor_type(tensor.name)
        else _choose(tensor, choice, kind.default)
        for tensor, choice in zip(tensors, usual, strict=True)
    ]


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


def describe_packing(tensor: SourceTensor) -> str:
    """Return how a packed tensor is stored: "GPTQ int4, group 128"; "" if it is not packed."""
    rows = tensor.rows[0]
    return str(rows.matrix) if isinstance(rows, PackedRows) else ""


def refuse_requantizing(
    tensors: Sequence[SourceTensor],
    packing: Packing,
    lossless: Collection[TensorType],
    kinds: Sequence[FileType],
    overrides: QuantOverrides,
) -> None:
    """
    Check that no packed weights would be quantized again.

    Raises
    ------
    UsageError: they would.
    """
    for kind in kinds:
        if kind.default.is_quantized and kind.default not in lossless:
            raise _requantizing(packing, kind.name, f"Leave out --type to write {packing.file_type}.")
    for tensor in tensors:
        chosen, types = overrides.find_tensor_type(tensor.name), packed_types(tensor)
        if chosen and types and chosen[1].is_quantized and chosen[1] not in types:
            choice = f"--tensor-type {chosen[0].pattern}={chosen[1].name}"
            raise _requantizing(packing, choice, f"“{tensor.name}” can be {' or '.join(kind.name for kind in types)}.")


def _requantizing(packing: Packing, cause: str, hint: str) -> UsageError:
    return UsageError(
        f"The weights are quantized already ({packing}); {cause} would quantize them again, which loses quality.",
        hint=f"{hint} To do it anyway: --requantize",
    )


def _choose(tensor: SourceTensor, usual: TypeChoice, default: TensorType) -> TypeChoice:
    types = packed_types(tensor)
    if not types:
        return usual if tensor.name in ENDS else TypeChoice(tensor.type, "not packed")
    if not tensor.type.is_quantized:
        return TypeChoice(types[0], "dequantized")
    kind = default if default in types else types[0]
    is_near = any(isinstance(rows, PackedRows) and kind in rows.matrix.near_types for rows in tensor.rows)
    return TypeChoice(kind, "as packed, zero points rounded" if is_near else "as packed")
