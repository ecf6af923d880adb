"""Models in one GGUF file, or split into several that llama.cpp opens together, like "x-00001-of-00003.gguf"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadWeights
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.gguf_reader import EncodedValue, Header, TensorInfo, read_header, read_raw_metadata

# Keys that describe a file, not the model in it; they are not copied to another file.
ALIGNMENT_KEY = "general.alignment"
FILE_KEYS = ("split.no", "split.count", "split.tensors.count", ALIGNMENT_KEY)


class LocatedTensor(NamedTuple):
    """A tensor with its file and the header of the file."""

    path: Path
    header: Header
    tensor: TensorInfo


@dataclass(frozen=True)
class SplitModel:
    """The files of a model and their headers, in order."""

    paths: Sequence[Path]
    headers: Sequence[Header]

    @property
    def header(self) -> Header:
        """The metadata of the first file with the tensors of all; offsets are relative to each tensor's own file."""
        tensors = [tensor for header in self.headers for tensor in header.tensors]
        return replace(self.headers[0], tensors=tuple(tensors))

    @property
    def located(self) -> Sequence[LocatedTensor]:
        """Every tensor, in order."""
        files = zip(self.paths, self.headers, strict=True)
        return [LocatedTensor(path, header, tensor) for path, header in files for tensor in header.tensors]

    @property
    def by_name(self) -> Mapping[str, LocatedTensor]:
        """Every tensor by its name."""
        return {located.tensor.name: located for located in self.located}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)


def read_split_model(source: Path) -> SplitModel:
    """
    Read the headers of a model; `source` is its file, or any of its files.

    Raises
    ------
    BadWeights: a file is missing or damaged, or two have the same tensor.
    """
    paths = shard_paths(source)
    model = SplitModel(paths, [read_header(path) for path in paths])
    seen: dict[str, Path] = {}
    for path, _, tensor in model.located:
        if seen.setdefault(tensor.name, path) != path:
            raise BadWeights(path, f"the tensor “{tensor.name}” is also in {seen[tensor.name].name}")
    return model


def read_model_keys(model: SplitModel) -> dict[str, EncodedValue]:
    """Read the metadata of a model, without the keys that describe a file."""
    return {key: value for key, value in read_raw_metadata(model.paths[0]).items() if key not in FILE_KEYS}


def shard_paths(source: Path) -> list[Path]:
    """
    List the files of a model in order; `source` is its file, or any of its files.

    Raises
    ------
    BadWeights: a file is missing.
    """
    shard = parse_shard(source.name)
    if not shard:
        return [source]
    missing = [name for name in shard.siblings if not (source.parent / name).is_file()]
    if missing:
        raise BadWeights(source, f"the model is split into {shard.total} files, and {missing[0]} is missing")
    return [source.parent / name for name in shard.siblings]
