"""What two GGUF files have not in common: keys, tensors, types, and how far their numbers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.weights import gguf
from qwenlocal.weights.header import Tensor, read_pairs, tensor_type_name
from qwenlocal.weights.numbers import is_readable, numbers_of, place_of, relative_error, same_bytes
from qwenlocal.weights.parts import OF_THE_FILE, Located, Parts, read_parts

Report = Callable[[int, int], object]


@dataclass(frozen=True)
class KeyDifference:
    """A key with its values; None where the file does not have it. `where` is the first place in which lists differ."""

    key: str
    left: Any
    right: Any
    where: int | None = None


@dataclass(frozen=True)
class TensorDifference:
    """
    A tensor that is only in one file ("" for the other's type), or differs.

    `rmse` is the root of the mean squared difference over that of the left one's numbers: 0.05 is five per cent.
    """

    name: str
    left: str
    right: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    rmse: float | None = None


@dataclass(frozen=True)
class Difference:
    """All differences of two files."""

    keys: Sequence[KeyDifference]
    tensors: Sequence[TensorDifference]

    @property
    def is_empty(self) -> bool:
        """Whether the files say and weigh the same."""
        return not self.keys and not self.tensors


def compare(left: Path, right: Path, report: Report = lambda done, all: None) -> Difference:
    """
    Compare two files; numbers are dequantised where the types differ. `report` gets tensors done and altogether.

    Raises
    ------
    BadWeights: one of them is not a GGUF file, or damaged.
    """
    sides = read_parts(left), read_parts(right)
    keys = _keys(*({key: value for key, value in read_pairs(side.paths[0]).items() if key not in OF_THE_FILE}
                   for side in sides))  # fmt: skip
    return Difference(keys, _tensors(*sides, report))


def _keys(left: dict[str, gguf.Encoded], right: dict[str, gguf.Encoded]) -> list[KeyDifference]:
    found = []
    for key in dict.fromkeys([*left, *right]):
        if left.get(key) == right.get(key):
            continue
        one, other = (gguf.decode(pairs[key]) if key in pairs else None for pairs in (left, right))
        where = None
        if isinstance(one, list) and isinstance(other, list):
            pairs = enumerate(zip(one, other, strict=False))
            where = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
        found.append(KeyDifference(key, one, other, where))
    return found


def _tensors(left: Parts, right: Parts, report: Report) -> list[TensorDifference]:
    here, there = left.by_name, right.by_name
    found, names = [], list(dict.fromkeys([*here, *there]))
    for number, name in enumerate(names):
        report(number, len(names))
        left_one, right_one = here.get(name), there.get(name)
        one, other = left_one and left_one.tensor, right_one and right_one.tensor
        types = _type_name(one), _type_name(other)
        shapes = (one.shape if one else None, other.shape if other else None)
        if not left_one or not right_one or one is None or other is None or one.shape != other.shape:
            found.append(TensorDifference(name, *types, shapes))
            continue
        rmse = _error(left_one, right_one)
        if rmse is None or rmse or one.type != other.type:
            found.append(TensorDifference(name, *types, shapes, rmse))
    report(len(names), len(names))
    return found


def _type_name(tensor: Tensor | None) -> str:
    return tensor_type_name(tensor.type) if tensor else ""


def _error(left: Located, right: Located) -> float | None:
    """None where the numbers of one of them cannot be read."""
    known = place_of(*left).size > 0
    if known and left.tensor.type == right.tensor.type and same_bytes(place_of(*left), place_of(*right)):
        return 0.0
    if not (is_readable(left.tensor) and is_readable(right.tensor)):
        return None
    return relative_error(numbers_of(*left), numbers_of(*right))
