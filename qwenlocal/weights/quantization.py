"""The plan for quantizing a GGUF file: metadata is copied unchanged, tensors get other types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenlocal.errors import BadWeights, UnsupportedCheckpoint, UsageError
from qwenlocal.weights.conversion_plan import ConversionPlan, make_plan
from qwenlocal.weights.file_types import FileType, QuantOverrides, file_type_name
from qwenlocal.weights.gguf_reader import Header, TensorInfo
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.load_errors import QWEN, check_file
from qwenlocal.weights.quant_mix import ModelFacts, layer_order
from qwenlocal.weights.row_source import FileRows, SourceTensor
from qwenlocal.weights.split_model import read_model_keys


def plan_quantization(
    source: Path,
    targets: Sequence[tuple[Path, FileType]],
    overrides: QuantOverrides = QuantOverrides(),
    imatrix: ImportanceMatrix | None = None,
    *,
    requantize: bool = False,
) -> ConversionPlan:
    """
    Plan to write `targets` (paths and types) from the GGUF file `source`, or from any file of a split model.

    Raises
    ------
    BadWeights: the file is damaged, or llama.cpp cannot run it.
    UsageError: it is quantized already (not with `requantize`).
    UnsupportedCheckpoint: the mixes of its architecture are not supported (not with `pure`).
    """
    model = check_file(source)
    header = model.headers[0]
    facts = _model_facts(source, header, pure=overrides.pure)
    tensors = sorted(map(source_tensor, model.tensors.values()), key=lambda t: layer_order(t.name))
    metadata = read_model_keys(model)
    plan = make_plan(tensors, targets, metadata, facts, overrides, imatrix)
    if not requantize:
        _refuse_requantizing(source, header, plan)
    return plan


def _model_facts(source: Path, header: Header, *, pure: bool) -> ModelFacts:
    if header.architecture not in QWEN and not pure:
        raise UnsupportedCheckpoint(
            source,
            f"llama.cpp's mixes of types for the architecture “{header.architecture}” are not supported",
            hint="Use the same type for all tensors (--pure), or llama.cpp's own llama-quantize.",
        )
    return ModelFacts.from_header(header)


def source_tensor(tensor: TensorInfo) -> SourceTensor:
    """
    Describe a tensor of a GGUF file as the source of a conversion.

    Raises
    ------
    BadWeights: it has no values.
    """
    if not tensor.shape or not tensor.elements:
        raise BadWeights(tensor.file, f"“{tensor.name}” has no values")
    columns, *more = tensor.shape
    experts = more[1] if len(more) > 1 else 1
    row_count = tensor.elements // columns // experts
    size = row_count * tensor.type.row_bytes(columns)
    offsets = [tensor.offset + expert * size for expert in range(experts)]
    rows = [FileRows(tensor.file, offset, row_count, columns, tensor.type) for offset in offsets]
    return SourceTensor(tensor.name, tensor.shape, rows)


def _refuse_requantizing(source: Path, header: Header, plan: ConversionPlan) -> None:
    for file in plan.files:
        for tensor in file.tensors:
            if tensor.source.is_quantized and tensor.choice.type != tensor.source:
                type_name = file_type_name(header.metadata.get("general.file_type"))
                raise UsageError(
                    f"{source} is quantized already ({type_name or tensor.source.name}); quantizing it again loses "
                    "more quality.",
                    hint="Start from the checkpoint, or from an f16 or bf16 file. To do it anyway: --requantize",
                )
