"""A model in one GGUF file, or in several that llama.cpp opens together: "x-00001-of-00003.gguf" and its siblings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadWeights
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.header import Header, Tensor, read_header

# Keys that speak of a file and not of the model in it; one that is written anew has its own.
ALIGNMENT = "general.alignment"
OF_THE_FILE = ("split.no", "split.count", "split.tensors.count", ALIGNMENT)


class Located(NamedTuple):
    """A tensor, the file it lies in, and that file's header."""

    path: Path
    header: Header
    tensor: Tensor


@dataclass(frozen=True)
class Parts:
    """The files of a model and their headers, in order."""

    paths: Sequence[Path]
    headers: Sequence[Header]

    @property
    def header(self) -> Header:
        """What the first file says, with the tensors of all; the offsets of the others' are their own files'."""
        together = [tensor for header in self.headers for tensor in header.tensors]
        return replace(self.headers[0], tensors=tuple(together))

    @property
    def located(self) -> Sequence[Located]:
        """Every tensor, in order."""
        both = zip(self.paths, self.headers, strict=True)
        return [Located(path, header, tensor) for path, header in both for tensor in header.tensors]

    @property
    def by_name(self) -> Mapping[str, Located]:
        """Every tensor by its name."""
        return {located.tensor.name: located for located in self.located}

    @property
    def size(self) -> int:
        """Bytes altogether."""
        return sum(path.stat().st_size for path in self.paths)


def read_parts(source: Path) -> Parts:
    """
    The headers of a model, of which `source` is the file, or one of the files.

    Raises
    ------
    BadWeights: one is missing, damaged, or has a tensor that another has, too.
    """
    paths = files_of(source)
    parts = Parts(paths, [read_header(path) for path in paths])
    seen: dict[str, Path] = {}
    for path, _, tensor in parts.located:
        if seen.setdefault(tensor.name, path) != path:
            raise BadWeights(path, f"the tensor “{tensor.name}” is in {seen[tensor.name].name}, too")
    return parts


def files_of(source: Path) -> list[Path]:
    """
    The files of a model, of which `source` is the file, or one of the files; in order.

    Raises
    ------
    BadWeights: one is missing.
    """
    shard = parse_shard(source.name)
    if not shard:
        return [source]
    missing = [name for name in shard.siblings if not (source.parent / name).is_file()]
    if missing:
        raise BadWeights(source, f"it is split in {shard.total} files, and {missing[0]} is not beside it")
    return [source.parent / name for name in shard.siblings]
