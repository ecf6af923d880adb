"""
Assumptions about weights that are still on a hub, which a plan is made with and which are checked as they arrive.

They are believed from config.json and from samples. One that turns out wrong ends the conversion: with all weights on
the disk, the plan would be another.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenlocal.errors import UnexpectedWeights, UnsupportedCheckpoint
from qwenlocal.weights.packed_matrix import PackedMatrix
from qwenlocal.weights.row_source import SourceReader
from qwenlocal.weights.safetensors import StoredTensor


@dataclass(frozen=True)
class ZeroTensor:
    """A bias is all zeros, and left out."""

    tensor: StoredTensor

    def error(self) -> UnsupportedCheckpoint:
        """Build the error for a bias that is not."""
        return nonzero_bias(self.tensor)


@dataclass(frozen=True)
class EqualTensors:
    """A tensor equals `kept`, and is left out."""

    dropped: StoredTensor
    kept: StoredTensor

    def error(self) -> UnexpectedWeights:
        """Build the error for tensors that differ."""
        return UnexpectedWeights(
            self.dropped.file,
            f"“{self.dropped.name}” differs from “{self.kept.name}”, but samples of them are equal",
        )


@dataclass(frozen=True)
class PackedFacts:
    """A packed matrix has the zero points, scales and order of columns of `assumed`; `stored` has all its tensors."""

    stored: PackedMatrix
    assumed: PackedMatrix
    has_order: bool

    def check(self, reader: SourceReader) -> None:
        """
        Compare the facts with the tensors.

        Raises
        ------
        UnexpectedWeights: they differ. BadCheckpoint: the tensors are damaged.
        """
        actual = self.stored.examine(reader, has_order=self.has_order)
        if actual == self.assumed:
            return
        if actual.groups != self.assumed.groups:
            tensor, problem = self.stored.groups, "is not in the order of columns"
        elif actual.is_symmetric != self.assumed.is_symmetric:
            tensor, problem = self.stored.zeros, "does not have the zero points"
        else:
            tensor, problem = self.stored.scales, "does not have the kind of scales"
        name = tensor.name if tensor else self.stored.weight.name
        raise UnexpectedWeights(
            self.stored.weight.file, f"“{name}” {problem} that config.json and the first matrix suggest"
        )


Assumption = ZeroTensor | EqualTensors | PackedFacts


def nonzero_bias(tensor: StoredTensor) -> UnsupportedCheckpoint:
    """Build the error for a bias that llama.cpp cannot add."""
    return UnsupportedCheckpoint(
        tensor.file, f"“{tensor.name}” is not zero, but neither Qwen1.5 nor llama.cpp has this bias"
    )
