"""The plan of GGUF files before they are written: the type of each tensor and why, sizes, offsets, duration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import UsageError
from qwenlocal.ggml import TensorType
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.file_types import FileType, QuantOverrides
from qwenlocal.weights.gguf_reader import EncodedValue
from qwenlocal.weights.gguf_writer import TensorSpec
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.quant_mix import Candidate, ModelFacts, TypeChoice, choose_types, needs_imatrix
from qwenlocal.weights.write_job import OutputFile, RowRange, RowTarget, WriteJob

_QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 32, 4096  # random weights, to measure how fast this machine quantizes


@dataclass(frozen=True)
class SourceRows:
    """Contiguous rows of the type `type` in a file."""

    file: Path
    offset: int
    row_count: int
    type: TensorType


@dataclass(frozen=True)
class SourceTensor:
    """
    A tensor to write: its name and shape in the GGUF file, and the rows it is read from, in order.

    `keep_f32`: it is float32 in files of every type, like norms, biases and routers (llama.cpp, conversion/base.py:
    prepare_tensors). A tensor of several experts has one `SourceRows` per expert.
    """

    name: str
    shape: tuple[int, ...]
    rows: Sequence[SourceRows]
    keep_f32: bool = False

    @property
    def type(self) -> TensorType:
        """The type in the source."""
        return self.rows[0].type

    @property
    def elements(self) -> int:
        """The number of its values."""
        return sum(rows.row_count for rows in self.rows) * self.shape[0]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor with its type in the source and in the file; `size` in bytes."""

    name: str
    shape: tuple[int, ...]
    source: TensorType
    choice: TypeChoice
    size: int
    elements: int


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: its tensors, and its size in bytes."""

    path: Path
    type: FileType
    tensors: Sequence[PlannedTensor]
    size: int

    @property
    def bits_per_weight(self) -> float:
        """The mean over all tensors."""
        return sum(t.size for t in self.tensors) * 8 / max(1, sum(t.elements for t in self.tensors))


@dataclass(frozen=True)
class ConversionPlan:
    """Files to write, from one pass over the source. `notes` are sentences for display."""

    files: Sequence[PlannedFile]
    job: WriteJob
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class OutputSpec:
    """A requested file: its path, its type, and its metadata."""

    path: Path
    type: FileType
    metadata: Mapping[str, EncodedValue]


def make_output_specs(
    targets: Sequence[tuple[Path, FileType]],
    metadata: Mapping[str, EncodedValue],
    imatrix: ImportanceMatrix | None,
    vocabulary: Mapping[str, EncodedValue] = {},
) -> list[OutputSpec]:
    """Add the keys that depend on the file type to `metadata`, and then the long ones of `vocabulary`."""
    return [
        OutputSpec(
            path,
            kind,
            {
                **metadata,
                "general.file_type": gguf_writer.u32(kind.number),
                "general.quantization_version": gguf_writer.u32(_QUANTIZATION_VERSION),
                **vocabulary,
                **(imatrix.metadata if imatrix else {}),
            },
        )
        for path, kind in targets
    ]


def make_plan(
    tensors: Sequence[SourceTensor],
    specs: Sequence[OutputSpec],
    facts: ModelFacts,
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None = None,
    notes: Sequence[str] = (),
) -> ConversionPlan:
    """
    Choose the type and the offset of each tensor in each file. `tensors` must be in the order of `layer_order`.

    Raises
    ------
    UsageError: a type needs an importance matrix, and there is none.
    BadWeights: the importance matrix is of another model.
    """
    files, outputs, types, offsets = [], [], [], []
    for spec in specs:
        candidates = [Candidate(t.name, t.shape, ggml.tensor_type("f32") if t.keep_f32 else t.type) for t in tensors]
        choices = choose_types(candidates, spec.type, facts, overrides)
        _check_imatrix(spec, candidates, choices, imatrix)
        tensor_specs = [TensorSpec(t.name, t.shape, c.type) for t, c in zip(tensors, choices, strict=True)]
        layout = gguf_writer.make_layout(spec.metadata, tensor_specs)
        planned = [
            PlannedTensor(t.name, t.shape, t.type, choice, tensor_spec.size, t.elements)
            for t, choice, tensor_spec in zip(tensors, choices, tensor_specs, strict=True)
        ]
        files.append(PlannedFile(spec.path, spec.type, planned, layout.size))
        outputs.append(OutputFile(spec.path, layout.header, layout.size))
        types.append([choice.type for choice in choices])
        offsets.append(layout.offsets)
    ranges = []
    for index, tensor in enumerate(tensors):
        kinds = [kind[index] for kind in types]
        ranges += _row_ranges(tensor, kinds, [file_offsets[tensor.name] for file_offsets in offsets], imatrix)
    return ConversionPlan(files, WriteJob(outputs, _merge_ranges(ranges)), notes)


def _row_ranges(
    tensor: SourceTensor, kinds: Sequence[TensorType], offsets: Sequence[int], imatrix: ImportanceMatrix | None
) -> list[RowRange]:
    columns, first, ranges = tensor.shape[0], 0, []
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    rows_per_expert = tensor.shape[1] if len(tensor.shape) > 1 else 1
    for rows in tensor.rows:
        expert = first // rows_per_expert
        weights = imatrix.column_weights(tensor.name, expert, experts, columns) if imatrix else None
        targets = [
            RowTarget(output, offset + first * kind.row_bytes(columns), kind, weights if kind.is_quantized else None)
            for output, (kind, offset) in enumerate(zip(kinds, offsets, strict=True))
        ]
        name = f"{tensor.name}, expert {expert}" if experts > 1 else tensor.name
        ranges.append(RowRange(name, rows.file, rows.offset, rows.type, rows.row_count, columns, targets))
        first += rows.row_count
    return ranges


def _merge_ranges(ranges: Sequence[RowRange]) -> list[RowRange]:
    """Merge ranges with the same source rows, which two tensors need, so that they are read once."""
    merged: dict[tuple[Path, int, int, int], RowRange] = {}
    for rows in ranges:
        key = (rows.file, rows.offset, rows.row_count, rows.columns)
        if key in merged:
            rows = replace(merged[key], targets=[*merged[key].targets, *rows.targets])
        merged[key] = rows
    return list(merged.values())


def _check_imatrix(
    spec: OutputSpec,
    candidates: Sequence[Candidate],
    choices: Sequence[TypeChoice],
    imatrix: ImportanceMatrix | None,
) -> None:
    for tensor, choice in zip(candidates, choices, strict=True):
        if choice.type == tensor.type or not needs_imatrix(tensor.name, choice.type, spec.type):
            continue
        if imatrix is None or tensor.name not in imatrix.weights:
            raise UsageError(
                f"“{tensor.name}” is garbage as {choice.type.name} without an importance matrix.",
                hint="Pass one with --imatrix FILE (created with llama-imatrix), or use q2_k, iq3_s or q3_k_m.",
            )


def estimate_seconds(plan: ConversionPlan, threads: int) -> float:
    """
    Estimate how long quantizing takes on this machine, from a sample of random weights for each type.

    Reading and writing take longer than that only if the disk is slower.
    """
    values: dict[str, int] = {}
    for rows in plan.job.ranges:
        for target in rows.targets:
            if target.type != rows.type:
                values[target.type.name] = values.get(target.type.name, 0) + rows.row_count * rows.columns
    seconds = sum(count * _measure_quantization(ggml.tensor_type(name)) for name, count in values.items())
    return seconds / max(1, threads)


def _measure_quantization(kind: TensorType) -> float:
    """Return the seconds per value."""
    import numpy

    rows, columns = _SAMPLE_ROWS, _SAMPLE_COLUMNS
    sample = numpy.random.default_rng(0).standard_normal((rows, columns), numpy.float32)
    result = numpy.empty(rows * kind.row_bytes(columns), numpy.uint8)
    weights = numpy.ones(columns, numpy.float32)
    address = weights.ctypes.data if ggml.requires_imatrix(kind) else 0
    ggml.quantize(kind, sample.ctypes.data, result.ctypes.data, 1, columns, address)  # builds ggml's tables, once
    begin = time.perf_counter()
    ggml.quantize(kind, sample.ctypes.data, result.ctypes.data, rows, columns, address)
    return (time.perf_counter() - begin) / (rows * columns)
