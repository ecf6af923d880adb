"""What will be written, tensor by tensor, before anything is: types and why, sizes, places, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import UsageError
from qwenlocal.ggml import TensorType
from qwenlocal.weights import gguf
from qwenlocal.weights.gguf import Described
from qwenlocal.weights.importance import Importance
from qwenlocal.weights.mix import Candidate, Choice, FileType, ModelFacts, Wishes, choose_types, importance_is_needed
from qwenlocal.weights.writing import Job, Output, Strip, Target

_QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 32, 4096  # of random weights, to see how fast this machine quantizes


@dataclass(frozen=True)
class Stretch:
    """Rows that lie together in a file, as type `type`."""

    file: Path
    offset: int
    rows: int
    type: TensorType


@dataclass(frozen=True)
class SourceTensor:
    """
    A tensor to be written: its name and shape in the GGUF file, and where its rows are now, in order.

    `exact` ones become float32 in every file; others may be quantized. `experts`: how many matrices lie one behind the
    other in it, each a stretch of its own.
    """

    name: str
    shape: tuple[int, ...]
    stretches: Sequence[Stretch]
    exact: bool = False

    @property
    def type(self) -> TensorType:
        """The type that its numbers have now."""
        return self.stretches[0].type

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return sum(stretch.rows for stretch in self.stretches) * self.shape[0]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor with its type in a file, and why that."""

    name: str
    shape: tuple[int, ...]
    source: TensorType
    choice: Choice
    size: int
    elements: int


@dataclass(frozen=True)
class PlannedFile:
    """A file to be: what is in it, and how large it will be."""

    path: Path
    type: FileType
    tensors: Sequence[PlannedTensor]
    size: int

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return sum(t.size for t in self.tensors) * 8 / max(1, sum(t.elements for t in self.tensors))


@dataclass(frozen=True)
class Plan:
    """Files to be written from one reading of the source. `notes` are sentences for people."""

    files: Sequence[PlannedFile]
    job: Job
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Goal:
    """One file that is wanted."""

    path: Path
    type: FileType
    metadata: Mapping[str, gguf.Encoded]


def make_goals(
    wanted: Sequence[tuple[Path, FileType]],
    pairs: Mapping[str, gguf.Encoded],
    importance: Importance | None,
    last: Mapping[str, gguf.Encoded] = {},
) -> list[Goal]:
    """A goal for each path and type: the pairs, what says which type it is, and `last` the long ones (vocabulary)."""
    return [
        Goal(
            path,
            kind,
            {
                **pairs,
                "general.file_type": gguf.u32(kind.number),
                "general.quantization_version": gguf.u32(_QUANTIZATION_VERSION),
                **last,
                **(importance.pairs if importance else {}),
            },
        )
        for path, kind in wanted
    ]


def make_plan(
    tensors: Sequence[SourceTensor],
    goals: Sequence[Goal],
    facts: ModelFacts,
    wishes: Wishes,
    importance: Importance | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """
    Decide on every tensor's type and place in every file. `tensors` come by layer, then name.

    Raises
    ------
    UsageError: a type needs an importance matrix and there is none.
    BadWeights: the importance matrix is of another model.
    """
    files, outputs, types, places = [], [], [], []
    for goal in goals:
        candidates = [Candidate(t.name, t.shape, ggml.tensor_type("f32") if t.exact else t.type) for t in tensors]
        choices = choose_types(candidates, goal.type, facts, wishes)
        _check_importance(goal, candidates, choices, importance)
        described = [Described(t.name, t.shape, c.type) for t, c in zip(tensors, choices, strict=True)]
        layout = gguf.lay_out(goal.metadata, described)
        planned = [
            PlannedTensor(t.name, t.shape, t.type, choice, d.size, t.elements)
            for t, choice, d in zip(tensors, choices, described, strict=True)
        ]
        files.append(PlannedFile(goal.path, goal.type, planned, layout.size))
        outputs.append(Output(goal.path, layout.header, layout.size))
        types.append([choice.type for choice in choices])
        places.append(layout.offsets)
    strips = []
    for index, tensor in enumerate(tensors):
        kinds = [kind[index] for kind in types]
        strips += _strips(tensor, kinds, [place[tensor.name] for place in places], importance)
    return Plan(files, Job(outputs, _together(strips)), notes)


def _strips(
    tensor: SourceTensor, kinds: Sequence[TensorType], places: Sequence[int], importance: Importance | None
) -> list[Strip]:
    columns, before, strips = tensor.shape[0], 0, []
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    per_expert = tensor.shape[1] if len(tensor.shape) > 1 else 1
    for stretch in tensor.stretches:
        weights = importance.of(tensor.name, before // per_expert, experts, columns) if importance else None
        targets = [
            Target(output, place + before * kind.row_bytes(columns), kind, weights if kind.is_quantized else None)
            for output, (kind, place) in enumerate(zip(kinds, places, strict=True))
        ]
        name = f"{tensor.name}, expert {before // per_expert}" if experts > 1 else tensor.name
        strips.append(Strip(name, stretch.file, stretch.offset, stretch.type, stretch.rows, columns, targets))
        before += stretch.rows
    return strips


def _together(strips: Sequence[Strip]) -> list[Strip]:
    """Rows that two tensors want are read once."""
    found: dict[tuple[Path, int, int, int], Strip] = {}
    for strip in strips:
        key = (strip.file, strip.offset, strip.rows, strip.columns)
        if key in found:
            first = found[key]
            targets = [*first.targets, *strip.targets]
            strip = Strip(first.name, strip.file, strip.offset, strip.type, strip.rows, strip.columns, targets)
        found[key] = strip
    return list(found.values())


def _check_importance(
    goal: Goal, candidates: Sequence[Candidate], choices: Sequence[Choice], importance: Importance | None
) -> None:
    for tensor, choice in zip(candidates, choices, strict=True):
        if choice.type == tensor.type or not importance_is_needed(tensor.name, choice.type, goal.type):
            continue
        if importance is None or tensor.name not in importance.weights:
            raise UsageError(
                f"{choice.type.name} is garbage without an importance matrix, for “{tensor.name}” for example.",
                hint="Give one with --imatrix FILE (llama-imatrix measures it), or take q2_k, iq3_s or q3_k_m.",
            )


def estimate_seconds(plan: Plan, threads: int) -> float:
    """
    How long the quantizing takes on this machine, from a sample of random weights for each type that occurs.

    Reading and writing come on top where the disk is slower than that.
    """
    work: dict[str, int] = {}
    for strip in plan.job.strips:
        for target in strip.targets:
            if target.type != strip.type:
                work[target.type.name] = work.get(target.type.name, 0) + strip.rows * strip.columns
    return sum(count * _seconds_per_number(ggml.tensor_type(name)) for name, count in work.items()) / max(1, threads)


def _seconds_per_number(kind: TensorType) -> float:
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
