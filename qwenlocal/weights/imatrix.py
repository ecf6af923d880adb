"""
An importance matrix: how much each column of each matrix matters, as llama-imatrix measures it.

The file is a GGUF with two tensors a matrix: `<name>.in_sum2`, the sums of squares of what the columns were multiplied
with, and `<name>.counts`, of how many rows (llama.cpp, tools/imatrix/imatrix.cpp: save_imatrix). A column's weight is
the quotient, 1 for an expert that was never asked (tools/quantize/quantize.cpp: load_imatrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlocal.errors import BadWeights, ModelNotFound
from qwenlocal.weights import gguf
from qwenlocal.weights.header import Header, Tensor, read_header

if TYPE_CHECKING:
    import numpy

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """`weights[name]` is float32 of shape (experts or 1, columns); `pairs` say in a GGUF file what was used."""

    weights: Mapping[str, numpy.ndarray]
    pairs: Mapping[str, gguf.Encoded]

    def of(self, name: str, expert: int, experts: int, columns: int) -> numpy.ndarray | None:
        """
        The weights of one expert's columns (0 of 1 for ordinary matrices); None where the matrix was not measured.

        Raises
        ------
        BadWeights: the shape is another one.
        """
        found = self.weights.get(name)
        if found is None:
            return None
        if found.shape != (experts, columns):
            raise BadWeights(
                "the importance matrix",
                f"it has {found.shape[0]} x {found.shape[1]:,} weights for “{name}”, where the model has "
                f"{experts} x {columns:,}",
                hint="It was measured with another model.",
            )
        weights: numpy.ndarray = found[expert]
        return weights


def read_importance(path: Path) -> Importance:
    """
    Raises
    ------
    ModelNotFound: there is no such file.
    BadWeights: the file is no importance matrix, or is damaged.
    """
    import numpy

    if not path.exists():
        raise ModelNotFound(str(path), reason=f"There is no file {path}.", hint="llama-imatrix makes one, as GGUF.")
    hint = "llama-imatrix makes one, as GGUF (with --output-format gguf)."
    try:
        header = read_header(path)
    except BadWeights as problem:
        problem.hint = hint
        raise
    if header.metadata.get("general.type") != "imatrix":
        raise BadWeights(path, "this is no importance matrix", hint=hint)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        matrix = name.removesuffix(_SUMS)
        if matrix + _COUNTS not in tensors:
            raise BadWeights(path, f"it does not say how often “{matrix}” was measured")
        sums, counts = _numbers(path, header, tensor), _numbers(path, header, tensors[matrix + _COUNTS])
        sums = sums.reshape(-1, tensor.shape[0])
        if len(counts) != len(sums):
            raise BadWeights(path, f"its counts of “{matrix}” do not fit its sums")
        counts = counts.reshape(-1, 1)
        with numpy.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            found = numpy.divide(sums, counts, out=numpy.ones_like(sums), where=counts > 0).astype(numpy.float32)
        if not numpy.isfinite(found).all():
            raise BadWeights(path, f"its weights of “{matrix}” are NaN or infinite")
        weights[matrix] = numpy.ascontiguousarray(found)
    if not weights:
        raise BadWeights(path, "there are no weights in it")
    return Importance(weights, _pairs(path, header, len(weights)))


def _numbers(path: Path, header: Header, tensor: Tensor) -> numpy.ndarray:
    import numpy

    if tensor.type != 0 or not 1 <= len(tensor.shape) <= 3 or not tensor.elements:
        raise BadWeights(path, f"“{tensor.name}” is no matrix of float32")
    return numpy.fromfile(path, numpy.float32, tensor.elements, offset=header.data_offset + tensor.offset)


def _pairs(path: Path, header: Header, entries: int) -> dict[str, gguf.Encoded]:
    """As llama-quantize writes them (tools/quantize/quantize.cpp)."""
    pairs = {"quantize.imatrix.file": gguf.string(path.name)}
    datasets = header.metadata.get("imatrix.datasets")
    if isinstance(datasets, list) and datasets:
        pairs["quantize.imatrix.dataset"] = gguf.string(str(datasets[0]))
    pairs["quantize.imatrix.entries_count"] = gguf.u32(entries)
    chunks = header.metadata.get("imatrix.chunk_count")
    if isinstance(chunks, int) and 0 <= chunks < 1 << 32:
        pairs["quantize.imatrix.chunks_count"] = gguf.u32(chunks)
    return pairs
