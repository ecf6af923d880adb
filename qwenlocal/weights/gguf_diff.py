"""Differences between two GGUF files: keys, tensors, types, and the error of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.weights.gguf_reader import EncodedValue, TensorInfo, decode_value
from qwenlocal.weights.split_model import SplitModel, read_model_keys, read_split_model
from qwenlocal.weights.tensor_values import can_read_values, compare_rows, have_same_bytes, read_values

Report = Callable[[int, int], object]


@dataclass(frozen=True)
class KeyDifference:
    """A key with its values; None stands for a missing one. `where` is the first index at which two lists differ."""

    key: str
    left: Any
    right: Any
    where: int | None = None


@dataclass(frozen=True)
class TensorDifference:
    """
    A tensor that differs, or that is in one file only (then the other's type is "").

    `rmse` is relative to the left file's values: 0.05 is five percent. None if the values cannot be compared.
    """

    name: str
    left: str
    right: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    rmse: float | None = None


@dataclass(frozen=True)
class GgufDiff:
    """All differences of two files."""

    keys: Sequence[KeyDifference]
    tensors: Sequence[TensorDifference]

    @property
    def is_empty(self) -> bool:
        """True if the metadata and the weights are equal."""
        return not self.keys and not self.tensors


def compare_files(left: Path, right: Path, report: Report = lambda done, total: None) -> GgufDiff:
    """
    Compare two files; weights of different types are dequantized. `report` gets tensors done and the total.

    Raises
    ------
    BadWeights: a file is not a GGUF file, or is damaged.
    """
    models = read_split_model(left), read_split_model(right)
    return GgufDiff(_diff_keys(*map(read_model_keys, models)), _diff_tensors(*models, report))


def _diff_keys(left: Mapping[str, EncodedValue], right: Mapping[str, EncodedValue]) -> list[KeyDifference]:
    differences = []
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) == right.get(key):
            continue
        left_value, right_value = (decode_value(pairs[key]) if key in pairs else None for pairs in (left, right))
        where = None
        if isinstance(left_value, list) and isinstance(right_value, list):
            entries = enumerate(zip(left_value, right_value, strict=False))
            where = next((n for n, (a, b) in entries if a != b), min(len(left_value), len(right_value)))
        differences.append(KeyDifference(key, left_value, right_value, where))
    return differences


def _diff_tensors(left_model: SplitModel, right_model: SplitModel, report: Report) -> list[TensorDifference]:
    left_tensors, right_tensors = left_model.tensors, right_model.tensors
    differences, names = [], list(dict.fromkeys([*left_tensors, *right_tensors]))
    for number, name in enumerate(names):
        report(number, len(names))
        left, right = left_tensors.get(name), right_tensors.get(name)
        types = _type_name(left), _type_name(right)
        shapes = (left.shape if left else None, right.shape if right else None)
        rmse = _compute_error(left, right) if left and right and shapes[0] == shapes[1] else None
        if rmse != 0 or types[0] != types[1]:
            differences.append(TensorDifference(name, *types, shapes, rmse))
    report(len(names), len(names))
    return differences


def _type_name(tensor: TensorInfo | None) -> str:
    return tensor.type.name.upper() if tensor else ""


def _compute_error(left: TensorInfo, right: TensorInfo) -> float | None:
    """Compute the relative RMSE; None if the values of a tensor cannot be read."""
    if left.type == right.type and have_same_bytes(left, right):
        return 0.0
    if not (can_read_values(left) and can_read_values(right)):
        return None
    return compare_rows(read_values(left), read_values(right), left.shape[0]).whole
