"""
Importance matrices: how much each column of each matrix matters, as llama-imatrix and `qwenlocal imatrix` measure it.

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
from qwenlocal.fileio import replace_file
from qwenlocal.ggml import tensor_type
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import EncodedValue, Header, TensorInfo, read_header
from qwenlocal.weights.gguf_writer import TensorSpec

if TYPE_CHECKING:
    import numpy

_SUMS, _COUNTS = ".in_sum2", ".counts"
_HINT = "Create one: qwenlocal imatrix MODEL"


@dataclass
class InputStatistics:
    """
    The squares of a matrix's inputs, summed per column: `sums` is float64 of shape (matrices, columns).

    `counts` are the inputs per matrix: one for an ordinary matrix, one per expert otherwise.
    """

    sums: numpy.ndarray
    counts: numpy.ndarray


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


def write_imatrix(
    path: Path, statistics: Mapping[str, InputStatistics], chunks: int, chunk_size: int, text: str
) -> None:
    """
    Write statistics of `chunks` chunks of `chunk_size` tokens of the file `text`, in llama.cpp's format.

    Raises
    ------
    NotWritable, DiskFull: the file cannot be written.
    """
    import numpy

    metadata = {
        "general.type": gguf_writer.string("imatrix"),
        "imatrix.datasets": gguf_writer.strings([text]),
        "imatrix.chunk_count": gguf_writer.u32(chunks),
        "imatrix.chunk_size": gguf_writer.u32(chunk_size),
    }
    data: dict[TensorSpec, bytes] = {}
    for name, entry in sorted(statistics.items()):
        matrices, columns = entry.sums.shape
        for ending, shape, values in (
            (_SUMS, (columns, matrices), entry.sums),
            (_COUNTS, (1, matrices), entry.counts),
        ):
            stored = shape if matrices > 1 else shape[:1]  # ggml leaves out dimensions of 1 at the end
            data[TensorSpec(name + ending, stored, tensor_type("f32"))] = values.astype(numpy.float32).tobytes()
    layout = gguf_writer.make_layout(metadata, list(data))
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for spec, encoded in data.items():
        offset = layout.offsets[spec.name]
        content[offset : offset + spec.size] = encoded
    replace_file(path, bytes(content))


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
