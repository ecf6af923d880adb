"""The quantization error of each tensor, and the error that its type explains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwenlocal.formatting import format_percent
from qwenlocal.measure.reference import EMBEDDINGS, OUTPUT, ReferenceTensors, Report
from qwenlocal.weights.gguf_reader import TensorInfo
from qwenlocal.weights.split_model import read_split_model
from qwenlocal.weights.tensor_values import can_read_values, compare_rows, read_values

if TYPE_CHECKING:
    import numpy

# The relative RMSE of each type on weights like those of real models (Student's t with 5 degrees of freedom, 64 rows of
# 4096, measured with ggml). An error of more than twice that is a mistake, not quantization.
_TYPICAL_RMSE = {
    "f32": 1e-7, "f16": 0.0003, "bf16": 0.0017, "q8_0": 0.0068, "q6_k": 0.0215, "q5_k": 0.0421, "q5_1": 0.0436,
    "q5_0": 0.0539, "q4_k": 0.0832, "iq4_nl": 0.0886, "iq4_xs": 0.0895, "q4_1": 0.0901, "q4_0": 0.1078,
    "mxfp4": 0.1266, "q3_k": 0.1766, "iq3_s": 0.1891, "iq3_xxs": 0.2423, "iq2_s": 0.3151, "iq2_xs": 0.3281,
    "q2_k": 0.3322, "iq2_xxs": 0.3871, "iq1_s": 0.5575, "iq1_m": 0.5973, "q1_0": 0.6761, "q2_0": 0.7417,
    "tq1_0": 0.8517, "tq2_0": 0.8517,
}  # fmt: skip
_UNKNOWN_TYPE_RMSE = 0.85
_LIMIT = 0.98  # a tensor of zeros has a relative RMSE of 1


class TensorError(NamedTuple):
    """
    The relative RMSE of a tensor against the checkpoint, that of its worst row `row`, and the limits for both.

    A row replaced by an unrelated one has a relative RMSE of 1.4 (two orthogonal vectors of equal length), but hardly
    shows in the error of a tensor with thousands of rows.
    """

    name: str
    type: str
    rmse: float
    allowed: float
    row: int
    row_rmse: float
    row_allowed: float

    @property
    def is_explained(self) -> bool:
        """True if quantization alone can cause such an error."""
        return self.rmse <= self.allowed and self.row_rmse <= self.row_allowed

    def __str__(self) -> str:
        if not self.rmse <= self.allowed:  # also true for NaN
            error, allowed = format_percent(self.rmse), format_percent(self.allowed)
            return f"“{self.name}” ({self.type}) is off by {error}; up to {allowed} is normal for {self.type}"
        return (
            f"row {self.row:,} of “{self.name}” ({self.type}) is off by {format_percent(self.row_rmse)}; "
            f"up to {format_percent(self.row_allowed)} is normal for a row in {self.type}"
        )


def compare_tensors(
    reference: ReferenceTensors, file: Path, report: Report
) -> tuple[list[TensorError], list[str], list[str]]:
    """
    Compare every tensor of the GGUF file with the checkpoint's; one of another shape counts as missing.

    Returns the errors of the tensors that both sides have, and the names of those that are missing in the file, and of
    those that only the file has.
    """
    in_file = read_split_model(file).tensors
    errors, missing = [], []
    for number, planned in enumerate(reference.tensors):
        report("comparing weights", number, len(reference.tensors))
        tensor = in_file.get(planned.name)
        if tensor is None or tensor.shape != planned.shape or not can_read_values(tensor):
            missing.append(planned.name)
            continue
        errors.append(_tensor_error(reference.values(planned.name), tensor))
    surplus = sorted(set(in_file) - {planned.name for planned in reference.tensors})
    embeddings_shape = next((t.shape for t in reference.tensors if t.name == EMBEDDINGS), ())
    output = in_file.get(OUTPUT)
    if output and OUTPUT in surplus and output.shape == embeddings_shape and can_read_values(output):
        errors.append(_tensor_error(reference.values(EMBEDDINGS), output))  # tied, and stored twice
        surplus.remove(OUTPUT)
    return errors, missing, surplus


def _tensor_error(reference: Iterator[numpy.ndarray], tensor: TensorInfo) -> TensorError:
    type_ = tensor.type.name
    typical = _TYPICAL_RMSE.get(type_, _UNKNOWN_TYPE_RMSE)
    rmse, row, row_rmse = compare_rows(reference, read_values(tensor), tensor.shape[0])
    allowed, row_allowed = min(2 * typical, _LIMIT), min(4 * typical, _LIMIT)
    return TensorError(tensor.name, type_, rmse, allowed, row, row_rmse, row_allowed)
