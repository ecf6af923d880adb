"""The plan of GGUF files before they are written: the type of each tensor and why, sizes, offsets, duration."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import UsageError
from qwenlocal.formatting import format_bytes, format_percent
from qwenlocal.ggml import TensorType
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.assumptions import Assumption
from qwenlocal.weights.best_mix import MixComparison, choose_best_types
from qwenlocal.weights.file_types import FileType, QuantOverrides
from qwenlocal.weights.gguf_reader import EncodedValue
from qwenlocal.weights.gguf_writer import TensorSpec
from qwenlocal.weights.imatrix import ImportanceMatrix
from qwenlocal.weights.packed_types import DEFAULT_ENDS, describe_packing, keep_packed_types
from qwenlocal.weights.quant_mix import ModelFacts, TypeChoice, choose_types, needs_imatrix
from qwenlocal.weights.row_source import RowSource, SourceTensor
from qwenlocal.weights.write_job import OutputFile, RowRange, RowTarget, WriteJob

_QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 32, 4096  # random weights, to measure how fast this machine quantizes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor with its type in the source and in the file. `packing`: how it is packed in the source, "" if not."""

    name: str
    shape: tuple[int, ...]
    source: TensorType
    choice: TypeChoice
    packing: str = ""

    @property
    def elements(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def source_format(self) -> str:
        """The format in the source, as users know it: "bf16", "GPTQ int4, group 128"."""
        return self.packing or self.source.name

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.choice.type.row_bytes(self.elements)


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
    """
    Files to write, from one pass over the source. `notes` are sentences for display.

    `assumptions` must hold for the weights of a checkpoint that was still on a hub when the plan was made.
    """

    files: Sequence[PlannedFile]
    job: WriteJob
    notes: Sequence[str] = ()
    assumptions: Sequence[Assumption] = ()


def make_plan(
    tensors: Sequence[SourceTensor],
    targets: Sequence[tuple[Path, FileType]],
    metadata: Mapping[str, EncodedValue],
    facts: ModelFacts,
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None = None,
    vocabulary: Mapping[str, EncodedValue] = {},
    notes: Sequence[str] = (),
    lossless: Collection[TensorType] = (),
) -> ConversionPlan:
    """
    Choose the type and the offset of each tensor in each of `targets` (paths and types).

    `tensors` must be in the order of `layer_order`. `lossless` are the default types of files that keep packed weights
    as they are. A file's metadata are `metadata`, the keys that depend on its type, then the long ones of `vocabulary`.

    Raises
    ------
    UsageError: a type needs an importance matrix, and there is none.
    BadWeights: the importance matrix is of another model.
    """
    specs = [TensorSpec(t.name, t.shape, ggml.tensor_type("f32") if t.keep_f32 else t.type) for t in tensors]
    files, outputs, destinations = [], [], []
    for path, kind in targets:
        if kind.default in lossless:
            choices, more_notes = _keep_packed(tensors, specs, kind, facts, overrides)
        else:
            choices, more_notes = _choose_mix(tensors, specs, kind, facts, overrides, imatrix)
        notes = [*notes, *more_notes]
        _check_imatrix(kind, specs, choices, imatrix)
        pairs = {**metadata, **_type_keys(kind), **vocabulary, **(imatrix.metadata if imatrix else {})}
        chosen = [spec._replace(type=choice.type) for spec, choice in zip(specs, choices, strict=True)]
        layout = gguf_writer.make_layout(pairs, chosen)
        planned = [
            PlannedTensor(t.name, t.shape, t.type, choice, describe_packing(t))
            for t, choice in zip(tensors, choices, strict=True)
        ]
        files.append(PlannedFile(path, kind, planned, layout.size))
        outputs.append(OutputFile(path, layout.header, layout.size))
        destinations.append([(spec.type, layout.offsets[spec.name]) for spec in chosen])
    ranges = []
    for tensor, tensor_destinations in zip(tensors, zip(*destinations, strict=True), strict=True):
        ranges += row_ranges(tensor, tensor_destinations, imatrix)
    return ConversionPlan(files, WriteJob(outputs, _merge_ranges(ranges)), notes)


def _keep_packed(
    tensors: Sequence[SourceTensor],
    specs: Sequence[TensorSpec],
    kind: FileType,
    facts: ModelFacts,
    overrides: QuantOverrides,
) -> tuple[list[TypeChoice], list[str]]:
    ends = overrides.ends or ggml.tensor_type(DEFAULT_ENDS)
    usual = choose_types(specs, kind, facts, replace(overrides, ends=ends))
    option = "--mix best" if overrides.best else "--pure" if overrides.pure else ""
    notes = [f"{option} has no effect on {kind.name}, which keeps packed weights as they are."] if option else []
    return keep_packed_types(tensors, usual, kind, overrides), notes


def _choose_mix(
    tensors: Sequence[SourceTensor],
    specs: Sequence[TensorSpec],
    kind: FileType,
    facts: ModelFacts,
    overrides: QuantOverrides,
    imatrix: ImportanceMatrix | None,
) -> tuple[list[TypeChoice], list[str]]:
    usual = choose_types(specs, kind, facts, overrides)
    if not overrides.best or not kind.default.is_quantized:
        return usual, []
    _check_imatrix(kind, specs, usual, imatrix)  # ggml aborts without
    choices, comparison = choose_best_types(tensors, usual, overrides, imatrix, os.cpu_count() or 1)
    return choices, [_describe_mix(kind, comparison)]


def _describe_mix(kind: FileType, comparison: MixComparison) -> str:
    if comparison.loss >= comparison.usual_loss:
        return f"Mix for {kind.name}: no other types of this size have a smaller measured error than llama.cpp's."
    gain = format_percent(1 - comparison.loss / comparison.usual_loss)
    size, usual_size = format_bytes(comparison.size), format_bytes(comparison.usual_size)
    return (
        f"Mix for {kind.name}: the measured error of the layers is {gain} smaller than with llama.cpp's types, "
        f"in {f'the same {size}' if size == usual_size else f'{size} instead of {usual_size}'}."
    )


def _type_keys(kind: FileType) -> dict[str, EncodedValue]:
    return {
        "general.file_type": gguf_writer.u32(kind.number),
        "general.quantization_version": gguf_writer.u32(_QUANTIZATION_VERSION),
    }


def row_ranges(
    tensor: SourceTensor, destinations: Sequence[tuple[TensorType, int]], imatrix: ImportanceMatrix | None = None
) -> list[RowRange]:
    """Return the rows of a tensor to read and write; `destinations` are its type and its offset in each output."""
    columns, first, ranges = tensor.shape[0], 0, []
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    rows_per_expert = tensor.shape[1] if len(tensor.shape) > 1 else 1
    for rows in tensor.rows:
        expert = first // rows_per_expert
        weights = imatrix.column_weights(tensor.name, expert, experts, columns) if imatrix else None
        targets: dict[RowSource, list[RowTarget]] = {}
        for output, (kind, offset) in enumerate(destinations):
            column_weights = weights if kind.is_quantized else None
            target = RowTarget(output, offset + first * kind.row_bytes(columns), kind, column_weights)
            targets.setdefault(rows.represent(kind), []).append(target)
        name = f"{tensor.name}, expert {expert}" if experts > 1 else tensor.name
        ranges += [RowRange(name, source, group) for source, group in targets.items()]
        first += rows.row_count
    return ranges


def _merge_ranges(ranges: Sequence[RowRange]) -> list[RowRange]:
    """Merge ranges with the same source rows, which two tensors need, so that they are read once."""
    merged: dict[RowSource, RowRange] = {}
    for rows in ranges:
        if earlier := merged.get(rows.source):
            rows = replace(earlier, targets=[*earlier.targets, *rows.targets])
        merged[rows.source] = rows
    return list(merged.values())


def _check_imatrix(
    kind: FileType, specs: Sequence[TensorSpec], choices: Sequence[TypeChoice], imatrix: ImportanceMatrix | None
) -> None:
    for tensor, choice in zip(specs, choices, strict=True):
        if choice.type == tensor.type or not needs_imatrix(tensor.name, choice.type, kind):
            continue
        if imatrix is None or tensor.name not in imatrix.weights:
            raise UsageError(
                f"“{tensor.name}” is garbage as {choice.type.name} without an importance matrix.",
                hint="Create one with qwenlocal imatrix MODEL and pass it with --imatrix FILE, or use q2_k, iq3_s or "
                "q3_k_m.",
            )


def estimate_seconds(plan: ConversionPlan, threads: int) -> float:
    """
    Estimate how long quantizing takes on this machine, from a sample of random weights for each type.

    Reading and writing take longer than that only if the disk is slower.
    """
    values = Counter[TensorType]()
    for rows in plan.job.ranges:
        for target in rows.targets:
            if target.type != rows.type:
                values[target.type] += rows.row_count * rows.columns
    seconds = sum(count * _measure_quantization(kind) for kind, count in values.items())
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
