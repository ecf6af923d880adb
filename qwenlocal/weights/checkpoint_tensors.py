"""The tensors of a checkpoint, each of which goes into a GGUF file or is dropped for a reason."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from qwenlocal import ggml
from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import format_bytes, format_quantity
from qwenlocal.weights.assumptions import Assumption, PackedFacts, ZeroTensor, nonzero_bias
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.packed_matrix import PackedMatrix
from qwenlocal.weights.packed_rows import PackedRows
from qwenlocal.weights.packing import ORIGINAL_HINT, Packing
from qwenlocal.weights.row_source import FileRows, RowSource, SourceTensor
from qwenlocal.weights.safetensors import StoredTensor
from qwenlocal.weights.source_files import SourceFiles

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
_FLOAT_TYPES = ("F32", "F16", "BF16")
_CODE_TYPES = ("I32", "U32")
_UNUSED = {  # by what their names match
    re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$"): "computed by llama.cpp itself",
    re.compile(r"^v_head\."): "a value head, which only training uses",
}


class CheckpointTensors:
    """
    The tensors of a checkpoint, each of which must be taken or dropped once.

    Their names begin with "model.", or do not, if the model was saved without its output matrix; transformers loads
    both, whatever config.json says. `assumptions` are those that weights on a hub must fulfil.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.has_weights, self._packing = checkpoint.folder, checkpoint.has_weights, checkpoint.packing
        self.samples, self.assumptions = checkpoint.samples, list[Assumption]()
        self._examples: dict[bool, PackedMatrix] = {}  # examined matrices on a hub, with one group per row and several
        self._left, self._checkpoint_notes = dict(checkpoint.tensors), checkpoint.notes
        self._prefix = "" if any(name.startswith("layers.") for name in self._left) else "model."
        self.dropped: dict[str, list[StoredTensor]] = {}  # by the reason
        self.notes: list[str] = []
        self._dequantized: dict[str, list[str]] = {}  # packed matrices that no quantized type holds, by the reason
        for name in list(self._left):
            if reason := next((reason for pattern, reason in _UNUSED.items() if pattern.search(name)), None):
                self.drop(name, reason)
            elif name.endswith("_proj.bias") and not re.search(r"self_attn\.[qkv]_proj\.bias$", name):
                self._drop_zero_bias(name)

    def has(self, name: str) -> bool:
        return self._full_name(name) in self._left

    def _full_name(self, name: str) -> str:
        return name if name.startswith("lm_head.") else self._prefix + name

    def take(
        self, name: str, *shape: int, types: Sequence[str] = _FLOAT_TYPES, implied_by: str = "config.json implies"
    ) -> StoredTensor:
        full = self._full_name(name)
        tensor = self._left.pop(full, None)
        if tensor is None:
            raise BadCheckpoint(self.folder, f"“{full}” is missing", hint=" ".join(self._checkpoint_notes))
        if tensor.shape != shape:
            raise BadCheckpoint(tensor.file, f"“{full}” has the shape {list(tensor.shape)}; {implied_by} {list(shape)}")
        if tensor.dtype not in types:
            supported = "only f32, f16 and bf16 can be converted" if types is _FLOAT_TYPES else f"it must be {types[0]}"
            raise UnsupportedCheckpoint(tensor.file, f"“{full}” has the type {tensor.dtype}; {supported}")
        return tensor

    def take_vocabulary(self, name: str, rows: int, columns: int) -> StoredTensor:
        """Take a matrix with a row for each token."""
        stored = self._left.get(self._full_name(name))
        if stored and len(stored.shape) == 2 and stored.shape != (rows, columns) and stored.shape[1] == columns:
            raise BadCheckpoint(
                self.folder / "config.json",
                f"“vocab_size” is {rows:,}, but “{stored.name}” has {format_quantity(stored.shape[0], 'row')}",
                hint=f"If config.json is older than the weights, set “vocab_size” to {stored.shape[0]} in it.",
            )
        return self.take(name, rows, columns)

    def matrix(self, target: str, source: str, rows: int, columns: int, *, keep_f32: bool = False) -> SourceTensor:
        return SourceTensor(f"{target}.weight", (columns, rows), [self.matrix_rows(source, rows, columns)], keep_f32)

    def matrix_rows(self, source: str, rows: int, columns: int) -> RowSource:
        """Take a matrix, or the tensors that it is packed in."""
        if self._packing and any(self.has(f"{source}.{part}") for part in ("qweight", "qzeros", "scales")):
            return self._take_packed(source, rows, columns, self._packing)
        return file_rows(self.take(f"{source}.weight", rows, columns), 0, rows)

    def _take_packed(self, source: str, rows: int, columns: int, packing: Packing) -> PackedRows:
        per_word = 32 // packing.bits
        group_size = columns if packing.group_size == -1 else min(packing.group_size, columns)
        groups = -(-columns // group_size)
        if rows % per_word or columns % per_word:
            raise UnsupportedCheckpoint(
                self.folder,
                f"“{self._full_name(source)}.qweight” packs {rows:,} x {columns:,} weights, "
                f"which is not a multiple of {per_word}",
                hint=ORIGINAL_HINT,
            )
        take = functools.partial(self.take, implied_by=f"config.json ({packing.settings}) implies")
        if packing.layout == "gemv":
            weight = take(f"{source}.qweight", rows, columns // per_word, types=_CODE_TYPES)
            scales = take(f"{source}.scales", rows, self._padded_width(f"{source}.scales", rows, groups))
            width = self._padded_width(f"{source}.qzeros", rows, -(-groups // per_word))
            zeros = take(f"{source}.qzeros", rows, width, types=_CODE_TYPES)
        else:
            shape = (columns // per_word, rows) if packing.layout == "gptq" else (columns, rows // per_word)
            weight = take(f"{source}.qweight", *shape, types=_CODE_TYPES)
            scales = take(f"{source}.scales", groups, rows)
            zeros = take(f"{source}.qzeros", groups, rows // per_word, types=_CODE_TYPES)
        order = self.take(f"{source}.g_idx", columns, types=("I32",)) if self.has(f"{source}.g_idx") else None
        matrix = PackedMatrix(
            packing.layout, packing.bits, group_size, rows, columns, weight, scales, zeros, order,
            packing.zero_offset, packing.is_symmetric,
        )  # fmt: skip
        matrix = self._examine(matrix, packing) if self.has_weights else self._assume(matrix, packing)
        if matrix.obstacle:
            self._dequantized.setdefault(matrix.obstacle, []).append(weight.name.removesuffix(".qweight"))
        return PackedRows(matrix, matrix.exact_types[0])

    def _padded_width(self, name: str, rows: int, columns: int) -> int:
        """Return the columns of a stored matrix, at least `columns`: AWQ's gemv layout does not use the last ones."""
        stored = self._left.get(self._full_name(name))
        return max(columns, stored.shape[1]) if stored and stored.shape[:-1] == (rows,) else columns

    def _examine(self, matrix: PackedMatrix, packing: Packing) -> PackedMatrix:
        """Replace what config.json says by what the tensors contain."""
        with SourceFiles(tensor.file for tensor in matrix.tensors) as reader:
            return matrix.examine(reader, has_order=packing.has_order)

    def _assume(self, matrix: PackedMatrix, packing: Packing) -> PackedMatrix:
        """Believe config.json as long as the weights are on a hub, and that all matrices are like the first one."""
        assumed, has_one_group = matrix, matrix.group_count == 1
        if not packing.has_order or has_one_group:
            assumed = replace(assumed, groups=None)
        if self.samples:
            if has_one_group not in self._examples:
                self._examples[has_one_group] = matrix.examine(self.samples, has_order=packing.has_order)
            example = self._examples[has_one_group]
            assumed = replace(
                matrix,
                groups=matrix.groups if example.groups else None,
                is_symmetric=example.is_symmetric,
                has_half_scales=example.has_half_scales,
            )
        self.assumptions.append(PackedFacts(matrix, assumed, packing.has_order))
        return assumed

    def vector(self, target: str, source: str, size: int) -> SourceTensor:
        return SourceTensor(target, (size,), [file_rows(self.take(source, size), 0, 1)], keep_f32=True)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(self._left.pop(name))

    def describe(self) -> list[str]:
        """Return sentences for display: one per reason, not per tensor."""
        dequantized = [
            f"Dequantized {names[0] if len(names) == 1 else f'{len(names)} packed matrices'} before quantizing "
            f"{'it' if len(names) == 1 else 'them'} again, which costs quality: no type of llama.cpp holds {reason}."
            for reason, names in self._dequantized.items()
        ]
        dropped = [
            f"Left out {group[0].name if len(group) == 1 else f'{len(group)} tensors'} "
            f"({format_bytes(sum(tensor.size for tensor in group))}): {reason}."
            for reason, group in self.dropped.items()
        ]
        return [*self.notes, *dequantized, *dropped]

    def _drop_zero_bias(self, name: str) -> None:
        tensor = self._left[name]
        if self.has_weights and not _is_zero(tensor):
            raise nonzero_bias(tensor)
        if not self.has_weights:
            self.assumptions.append(ZeroTensor(tensor))
        self.drop(name, "a bias that is all zeros")

    def check_nothing_left(self) -> None:
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ", ".join(f"“{name}”" for name in names[:3])
            raise BadCheckpoint(
                self._left[names[0]].file,
                f"it contains tensors that this architecture does not have: {shown}{more}",
                hint="Convert an unmodified checkpoint, without adapters or added layers.",
            )


def _is_zero(tensor: StoredTensor) -> bool:
    import numpy

    return not (tensor.size and numpy.memmap(tensor.file, numpy.uint8, "r", tensor.offset, (tensor.size,)).any())


def file_rows(tensor: StoredTensor, first: int, count: int) -> FileRows:
    """Describe `count` rows of a stored matrix (or one of several stacked matrices) from `first` on."""
    kind, columns = ggml.tensor_type(tensor.dtype.lower()), tensor.shape[-1]
    return FileRows(tensor.file, tensor.offset + first * kind.row_bytes(columns), count, columns, kind)
