"""
Importance matrices: how much each column of each matrix matters, as measured by llama-imatrix.

The file is a GGUF file with two tensors per matrix: `<name>.in_sum2`, the sums of squares of the inputs of each column,
and `<name>.counts`, the number of inputs (llama.cpp, tools/imatrix/imatrix.cpp: save_imatrix). A column's weight is the
quotient, or 1 for an expert that was never used (tools/quantize/quantize.cpp: load_imatrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import BadWeights, ModelNotFound
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import EncodedValue, Header, TensorInfo, read_header

if TYPE_CHECKING:
    import numpy

_SUMS, _COUNTS = ".in_sum2", ".counts"
_HINT = "Create one with llama-imatrix, in GGUF format (--output-format gguf)."


@dataclass(frozen=True)
class ImportanceMatrix:
    """
    `weights[name]` is float32 of shape (experts or 1, columns); `metadata` describes the matrix in quantized files.
    """

    weights: Mapping[str, numpy.ndarray]
    metadata: Mapping[str, EncodedValue]

    def column_weights(self, name: str, expert: int, experts: int, columns: int) -> numpy.ndarray | None:
        """
        Return the column weights of one expert (0 of 1 for ordinary matrices); None if the matrix was not measured.

        Raises
        ------
        BadWeights: the matrix has another shape.
        """
        weights = self.weights.get(name)
        if weights is None:
            return None
        if weights.shape != (experts, columns):
            raise BadWeights(
                "the importance matrix",
                f"it has {weights.shape[0]} x {weights.shape[1]:,} weights for “{name}”, but the model has "
                f"{experts} x {columns:,}",
                hint="It was measured with another model. Measure one with this model.",
            )
        expert_weights: numpy.ndarray = weights[expert]
        return expert_weights


def read_imatrix(path: Path) -> ImportanceMatrix:
    """
    Read an importance matrix.

    Raises
    ------
    ModelNotFound: there is no such file.
    BadWeights: the file is not an importance matrix, or is damaged.
    """
    import numpy

    if not path.exists():
        raise ModelNotFound.unreadable(path)
    try:
        header = read_header(path)
    except BadWeights as error:
        error.hint = _HINT
        raise
    if header.metadata.get("general.type") != "imatrix":
        raise BadWeights(
            path, "it is not an importance matrix", hint=_HINT, message=f"{path} is not an importance matrix."
        )
    tensors = {tensor.name: tensor for tensor in header.tensors}
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        matrix = name.removesuffix(_SUMS)
        if matrix + _COUNTS not in tensors:
            raise BadWeights(path, f"the counts of “{matrix}” are missing")
        sums, counts = _read_floats(tensor), _read_floats(tensors[matrix + _COUNTS])
        sums = sums.reshape(-1, tensor.shape[0])
        if len(counts) != len(sums):
            raise BadWeights(path, f"the counts of “{matrix}” do not match its sums")
        counts = counts.reshape(-1, 1)
        with numpy.errstate(over="ignore", invalid="ignore"):  # the result is checked
            quotients = numpy.divide(sums, counts, out=numpy.ones_like(sums), where=counts > 0).astype(numpy.float32)
        if not numpy.isfinite(quotients).all():
            raise BadWeights(path, f"weights of “{matrix}” are NaN or infinite")
        weights[matrix] = numpy.ascontiguousarray(quotients)
    if not weights:
        raise BadWeights(path, "it contains no weights")
    return ImportanceMatrix(weights, _metadata(path, header, len(weights)))


def _read_floats(tensor: TensorInfo) -> numpy.ndarray:
    import numpy

    if tensor.type.name != "f32" or not 1 <= len(tensor.shape) <= 3 or not tensor.elements:
        raise BadWeights(tensor.file, f"“{tensor.name}” is not a float32 matrix")
    return numpy.fromfile(tensor.file, numpy.float32, tensor.elements, offset=tensor.offset)


def _metadata(path: Path, header: Header, entries: int) -> dict[str, EncodedValue]:
    """Return the keys that llama-quantize writes (tools/quantize/quantize.cpp)."""
    pairs = {"quantize.imatrix.file": gguf_writer.string(path.name)}
    datasets = header.metadata.get("imatrix.datasets")
    if isinstance(datasets, list) and datasets:
        pairs["quantize.imatrix.dataset"] = gguf_writer.string(str(datasets[0]))
    pairs["quantize.imatrix.entries_count"] = gguf_writer.u32(entries)
    chunks = header.metadata.get("imatrix.chunk_count")
    if isinstance(chunks, int) and 0 <= chunks < 1 << 32:
        pairs["quantize.imatrix.chunks_count"] = gguf_writer.u32(chunks)
    return pairs
