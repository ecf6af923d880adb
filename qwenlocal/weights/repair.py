"""
A GGUF file put right: in place where the header keeps its length, otherwise as a new file.

In place is done so that it can be undone: the old header is kept beside the file until the new one is on the disk, and
`finish_interrupted` puts it back where the program was killed in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from qwenlocal import ggml
from qwenlocal.errors import BadWeights, NotWritable
from qwenlocal.weights import gguf
from qwenlocal.weights.checkup import Checkup, Finding
from qwenlocal.weights.gguf import Described, Layout
from qwenlocal.weights.header import read_pairs
from qwenlocal.weights.mix import Choice, file_type, file_type_numbered
from qwenlocal.weights.parts import ALIGNMENT, OF_THE_FILE
from qwenlocal.weights.plan import Plan, PlannedFile, PlannedTensor
from qwenlocal.weights.quantize import source_tensor
from qwenlocal.weights.writing import Job, Output, Strip, Target

_IN_A_COPY = "Put it right in a copy: qwenlocal inspect FILE --fix -o COPY"
_MARK = 32  # bytes of the digest before a header that is kept


def backup_of(path: Path) -> Path:
    """Where the old header is while a new one is written."""
    return path.with_name(path.name + ".old-header")


def repaired_layout(checkup: Checkup, findings: Sequence[Finding]) -> Layout:
    """The header that the file should have (of a split model, one for all), and where its tensors would be then."""
    pairs, is_split = read_pairs(checkup.parts.paths[0]), len(checkup.parts.paths) > 1
    for key in OF_THE_FILE if is_split else [ALIGNMENT]:
        pairs.pop(key, None)
    for finding in findings:
        pairs |= finding.pairs
    dropped = {finding.drops for finding in findings}
    described = [
        Described(tensor.name, tensor.shape, _kind(checkup, tensor.type))
        for tensor in checkup.header.tensors
        if tensor.name not in dropped
    ]
    return gguf.lay_out(_in_order(pairs), described)


def _in_order(pairs: dict[str, gguf.Encoded]) -> dict[str, gguf.Encoded]:
    """New keys go with their kind: those of the architecture before the vocabulary, where readers look for them."""
    late = {key: value for key, value in pairs.items() if key.startswith("tokenizer.")}
    return {**{key: value for key, value in pairs.items() if key not in late}, **late}


def _kind(checkup: Checkup, number: int) -> ggml.TensorType:
    kind = ggml.tensor_type_by_number(number)
    if kind is None:
        raise BadWeights(checkup.path, f"it has tensors of a type that is not known here ({number})")
    return kind


def fits_in_place(checkup: Checkup, layout: Layout) -> bool:
    """Whether only the header changes, and not its length: every tensor would stay where it is."""
    now = {t.name: checkup.header.data_offset + t.offset for t in checkup.header.tensors}
    return dict(layout.offsets) == now and len(layout.header) == checkup.header.data_offset


def patch(checkup: Checkup, layout: Layout) -> None:
    """
    Write the new header over the old one.

    Raises
    ------
    NotWritable: the file may not be changed.
    """
    path, backup = checkup.path, backup_of(checkup.path)
    try:
        with path.open("r+b") as file:
            old = file.read(len(layout.header))
            draft = backup.with_name(backup.name + ".tmp")
            _write_through(draft, backup_bytes(path, old))
            draft.replace(backup)
            file.seek(0)
            file.write(layout.header)
            file.flush()
            os.fsync(file.fileno())
        backup.unlink()
    except OSError as reason:
        raise NotWritable(path.parent, reason.strerror or str(reason), hint=_IN_A_COPY) from reason


def finish_interrupted(path: Path) -> bool:
    """
    Undo a patch that was cut short; returns whether there was one.

    What lies behind the header must be what it was; otherwise it is another file by now, and is left alone.

    Raises
    ------
    NotWritable: the file may not be changed.
    """
    backup = backup_of(path)
    if not backup.exists():
        return False
    try:
        kept = backup.read_bytes()
        old = kept[_MARK:]
        if backup_bytes(path, old) != kept:
            return False
        _restore(path, old)
        backup.unlink()
    except OSError as reason:
        raise NotWritable(path.parent, reason.strerror or str(reason), hint=_IN_A_COPY) from reason
    return True


def backup_bytes(path: Path, header: bytes) -> bytes:
    """A header to be kept, behind a digest of the file's size and of what follows the header in it."""
    with path.open("rb") as file:
        file.seek(len(header))
        behind = file.read(1 << 16)
    return hashlib.sha256(b"%d " % path.stat().st_size + behind).digest() + header


def _restore(path: Path, header: bytes) -> None:
    with path.open("r+b") as file:
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def plan_copy(checkup: Checkup, layout: Layout, target: Path) -> Plan:
    """The plan for a new file with that header, the tensors' bytes carried over."""
    number = checkup.header.metadata.get("general.file_type")
    kind = file_type(file_type_numbered(number) or "f16") if isinstance(number, int) else file_type("f16")
    strips, planned = [], []
    for located in checkup.parts.located:
        tensor = located.tensor
        if tensor.name not in layout.offsets:
            continue
        source = source_tensor(*located)
        at = layout.offsets[tensor.name]
        for stretch in source.stretches:
            target_place = [Target(0, at, stretch.type)]
            columns = tensor.shape[0]
            strips.append(
                Strip(tensor.name, stretch.file, stretch.offset, stretch.type, stretch.rows, columns, target_place)
            )
            at += stretch.rows * stretch.type.row_bytes(columns)
        size = Described(tensor.name, tensor.shape, source.type).size
        choice = Choice(source.type, "carried over")
        planned.append(PlannedTensor(tensor.name, tensor.shape, source.type, choice, size, tensor.elements))
    return Plan(
        [PlannedFile(target, kind, planned, layout.size)], Job([Output(target, layout.header, layout.size)], strips)
    )
