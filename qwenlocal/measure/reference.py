"""A checkpoint as the reference for a comparison: its tensors in GGUF order, and a model built from them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal import ggml
from qwenlocal.engine.llama import InMemoryModel
from qwenlocal.ggml import InMemoryTensor
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.tensor_values import read_rows
from qwenlocal.weights.write_job import RowRange

if TYPE_CHECKING:
    import numpy

OUTPUT, EMBEDDINGS = "output.weight", "token_embd.weight"

Report = Callable[[str, int, int], object]
"""Gets the step of a comparison, and its progress: done and total."""


def plan_reference(checkpoint: Checkpoint, path: Path, options: ConversionOptions) -> ConversionPlan:
    """Plan a conversion of `checkpoint` to its own float type; only the header of that file is ever written."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    dtype = dtypes.pop().lower() if len(dtypes) == 1 else "f32"
    return plan_conversion(
        checkpoint, [(path, file_type(dtype if dtype in ("f32", "f16", "bf16") else "f32"))], options
    )


class ReferenceTensors:
    """The values of a checkpoint's tensors under their GGUF names, read from its files on demand."""

    def __init__(self, plan: ConversionPlan) -> None:
        self.tensors, self._ranges = plan.files[0].tensors, _ranges_by_tensor(plan)
        self._non_finite: dict[str, int] = {}

    @property
    def non_finite(self) -> int:
        """Values read so far that are NaN or infinite."""
        return sum(self._non_finite.values())

    def __contains__(self, name: str) -> bool:
        return name in self._ranges

    def values(self, name: str) -> Iterator[numpy.ndarray]:
        """Yield a tensor's values in chunks of whole rows; NaN and infinity become 0, as in `convert --allow-nan`."""
        import numpy

        non_finite = 0
        for rows in self._ranges[name]:
            for values in read_rows(rows.source):
                is_finite = numpy.isfinite(values)
                if not is_finite.all():
                    non_finite += values.size - int(is_finite.sum())
                    values = numpy.where(is_finite, values, numpy.float32(0))
                yield values
        self._non_finite[name] = non_finite


def _ranges_by_tensor(plan: ConversionPlan) -> dict[str, list[RowRange]]:
    """Group the planned row ranges by tensor, in file order."""
    by_tensor: dict[str, list[RowRange]] = {}
    by_offset = [(target.offset, rows) for rows in plan.job.ranges for target in rows.targets]
    in_order = iter(sorted(by_offset, key=lambda pair: pair[0]))
    for tensor in plan.files[0].tensors:
        missing, ranges = tensor.elements // tensor.shape[0], list[RowRange]()
        while missing:
            _, rows = next(in_order)
            ranges.append(rows)
            missing -= rows.row_count
        by_tensor[tensor.name] = ranges
    return by_tensor


def load_reference(header: Path, tensors: ReferenceTensors) -> InMemoryModel:
    """Load a model with the metadata of the GGUF file `header` and the values of `tensors`."""

    def fill(tensor: InMemoryTensor) -> None:
        if tensor.name in tensors:
            _copy_values(tensors, tensor.name, tensor)
        elif tensor.name == OUTPUT:
            _copy_values(tensors, EMBEDDINGS, tensor)  # tied to the embeddings
        else:
            _fill_default(tensor)

    return InMemoryModel(header, fill)


def _copy_values(tensors: ReferenceTensors, name: str, target: InMemoryTensor) -> None:
    offset = 0
    columns = next(planned.shape[0] for planned in tensors.tensors if planned.name == name)
    for values in tensors.values(name):
        data = _encode(values, target.type, columns)
        target.write(data.ctypes.data, offset, data.nbytes)
        offset += data.nbytes


def _fill_default(target: InMemoryTensor) -> None:
    """Fill a tensor that the checkpoint does not have: 1 for scales, 0 for biases."""
    import numpy

    values = numpy.full(target.size // 4, 1.0 if "scale" in target.name else 0.0, numpy.float32)
    target.write(values.ctypes.data, 0, values.nbytes)


def _encode(values: numpy.ndarray, type_: ggml.TensorType, columns: int) -> Any:
    """Encode float32 values as the float type that they had in the checkpoint, without loss."""
    import numpy

    if type_.name == "f32":
        return values
    rows = values.size // columns
    encoded = numpy.empty(rows * type_.row_bytes(columns), numpy.uint8)
    ggml.quantize(type_, values.ctypes.data, encoded.ctypes.data, rows, columns)
    return encoded
