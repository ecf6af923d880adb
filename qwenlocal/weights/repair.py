"""
Repair of GGUF files: in place if the header keeps its length, otherwise as a new file.

An in-place repair can be undone: the old header is saved next to the file until the new one is on the disk, and
`undo_interrupted_patch` restores it if the program was killed in between.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qwenlocal.errors import NotWritable
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.conversion_plan import ConversionPlan, PlannedFile, PlannedTensor, row_ranges
from qwenlocal.weights.diagnosis import Diagnosis
from qwenlocal.weights.file_types import file_type, file_type_name
from qwenlocal.weights.gguf_reader import EncodedValue, read_raw_metadata
from qwenlocal.weights.gguf_writer import FileLayout, TensorSpec
from qwenlocal.weights.quant_mix import TypeChoice
from qwenlocal.weights.quantization import source_tensor
from qwenlocal.weights.split_model import ALIGNMENT_KEY, FILE_KEYS
from qwenlocal.weights.write_job import OutputFile, WriteJob

_COPY_HINT = "Write a repaired copy instead: qwenlocal inspect FILE --fix -o COPY"
_DIGEST_SIZE = 32  # bytes before the header in a backup
_DIGESTED_SIZE = 1 << 16  # bytes after the header that the digest covers


def backup_path(path: Path) -> Path:
    """Return where the old header is saved while a new one is written."""
    return path.with_name(path.name + ".old-header")


def repaired_layout(diagnosis: Diagnosis) -> FileLayout:
    """Lay out the file with everything repaired that can be (a split model as one file)."""
    metadata, is_split = read_raw_metadata(diagnosis.model.paths[0]), len(diagnosis.model.paths) > 1
    for key in FILE_KEYS if is_split else [ALIGNMENT_KEY]:
        metadata.pop(key, None)
    for finding in diagnosis.findings:
        metadata |= finding.fixed_keys
    dropped = {finding.drops for finding in diagnosis.findings}
    specs = [
        TensorSpec(tensor.name, tensor.shape, tensor.type)
        for tensor in diagnosis.header.tensors
        if tensor.name not in dropped
    ]
    return gguf_writer.make_layout(_move_vocabulary_last(metadata), specs)


def _move_vocabulary_last(metadata: dict[str, EncodedValue]) -> dict[str, EncodedValue]:
    """Put new keys of the architecture before the vocabulary, where `read_metadata` finds them."""
    vocabulary = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    return {**{key: value for key, value in metadata.items() if key not in vocabulary}, **vocabulary}


def fits_in_place(diagnosis: Diagnosis, layout: FileLayout) -> bool:
    """Return True if only the header changes, and not its length, so that every tensor stays at its offset."""
    offsets = {tensor.name: tensor.offset for tensor in diagnosis.header.tensors}
    return dict(layout.offsets) == offsets and len(layout.header) == diagnosis.header.data_offset


def patch_header(diagnosis: Diagnosis, layout: FileLayout) -> None:
    """
    Overwrite the header with the new one.

    Raises
    ------
    NotWritable: the file cannot be written.
    """
    path, backup = diagnosis.path, backup_path(diagnosis.path)
    try:
        with path.open("r+b") as file:
            old_header = file.read(len(layout.header))
            temporary = backup.with_name(backup.name + ".tmp")
            _write_synced(temporary, encode_backup(path, old_header), "wb")
            temporary.replace(backup)
            _write_synced(path, layout.header, "r+b")
        backup.unlink()
    except OSError as reason:
        raise NotWritable(path.parent, reason.strerror or str(reason), hint=_COPY_HINT) from reason


def undo_interrupted_patch(path: Path) -> bool:
    """
    Restore the header if `patch_header` was interrupted; return True if it was.

    If the data after the header has changed, it is another file by now, and stays as it is.

    Raises
    ------
    NotWritable: the file cannot be written.
    """
    backup = backup_path(path)
    if not backup.exists():
        return False
    try:
        saved = backup.read_bytes()
        old_header = saved[_DIGEST_SIZE:]
        if encode_backup(path, old_header) != saved:
            return False
        _write_synced(path, old_header, "r+b")
        backup.unlink()
    except OSError as reason:
        raise NotWritable(path.parent, reason.strerror or str(reason), hint=_COPY_HINT) from reason
    return True


def encode_backup(path: Path, header: bytes) -> bytes:
    """Return a backup: a digest of the file's size and of the data after the header, then the header."""
    with path.open("rb") as file:
        file.seek(len(header))
        data = file.read(_DIGESTED_SIZE)
    return hashlib.sha256(b"%d " % path.stat().st_size + data).digest() + header


def _write_synced(path: Path, data: bytes, mode: str) -> None:
    """Write `data` at the beginning of a file, and wait until it is on the disk."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def plan_copy(diagnosis: Diagnosis, layout: FileLayout, target: Path) -> ConversionPlan:
    """Plan a new file with the header of `layout` and copies of the tensors."""
    kind = file_type(file_type_name(diagnosis.header.metadata.get("general.file_type")) or "f16")
    ranges, planned = [], []
    for name, info in diagnosis.model.tensors.items():
        if (offset := layout.offsets.get(name)) is not None:
            tensor = source_tensor(info)
            ranges += row_ranges(tensor, [(tensor.type, offset)])
            planned.append(PlannedTensor(tensor.name, tensor.shape, tensor.type, TypeChoice(tensor.type, "copied")))
    output = OutputFile(target, layout.header, layout.size)
    return ConversionPlan([PlannedFile(target, kind, planned, layout.size)], WriteJob([output], ranges))
