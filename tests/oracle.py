"""llama.cpp's own quantizer, called in this process: what it makes of a GGUF file is what ours must make."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy

from qwenlocal.engine.llama import load_library
from qwenlocal.weights.file_types import FileType
from qwenlocal.weights.gguf_reader import read_header


def llama_quantize(
    source: Path,
    target: Path,
    kind: FileType,
    *,
    pure: bool = False,
    dry_run: bool = False,
    imatrix: Mapping[str, numpy.ndarray] | None = None,
) -> str:
    """Quantize as llama-quantize does; returns its log."""
    lib = load_library()
    params = lib.c.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure, params.dry_run = kind.number, 2, pure, dry_run
    kept = [(name.encode(), numpy.ascontiguousarray(values, numpy.float32)) for name, values in (imatrix or {}).items()]
    if kept:
        entry = lib.c.llama_model_imatrix_data
        entries = (entry * (len(kept) + 1))()
        for place, (name, values) in zip(entries, kept, strict=False):
            place.name = name
            place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            place.size = values.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    lib.log.clear()
    lines: list[str] = []
    before, lib.echo = lib.echo, lines.append
    try:
        failed = lib.c.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    finally:
        lib.echo = before
    log = "".join(lines)
    assert failed == 0, log[-2000:]
    return log


def dry_run_types(log: str, kind: FileType) -> dict[str, str]:
    """Tensor by tensor, the type that a dry run announced."""
    found = {}
    for name, before, rest in re.findall(r"\] (\S+)\s+- \[[^]]*\], type =\s+(\w+), (.*)", log):
        after = re.search(r"MiB \((\w+)\)", rest)
        found[name] = (after[1] if after else before).lower()
    assert found, log[-2000:]
    return found


def data_of(path: Path) -> dict[str, tuple[int, bytes]]:
    """Type and bytes of every tensor of a file."""
    found = {}
    with path.open("rb") as file:
        for tensor in read_header(path).tensors:
            file.seek(tensor.offset)
            found[tensor.name] = (tensor.type.number, file.read(tensor.size))
    return found
