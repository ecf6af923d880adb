"""Models in one GGUF file, or split into several that llama.cpp opens together, like "x-00001-of-00003.gguf"."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlocal.errors import BadWeights
from qwenlocal.model_files import FilePiece, parse_piece, parse_shard
from qwenlocal.weights.gguf_reader import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    EncodedValue,
    Header,
    TensorInfo,
    read_header,
    read_raw_metadata,
)

# Keys that describe a file, not the model in it; they are not copied to another file.
ALIGNMENT_KEY = "general.alignment"
FILE_KEYS = ("split.no", "split.count", "split.tensors.count", ALIGNMENT_KEY)


@dataclass(frozen=True)
class SplitModel:
    """The files of a model and their headers, in order."""

    paths: Sequence[Path]
    headers: Sequence[Header]

    @property
    def header(self) -> Header:
        """The metadata of the first file with the tensors of all."""
        return replace(self.headers[0], tensors=tuple(tensor for header in self.headers for tensor in header.tensors))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name, in order."""
        return {tensor.name: tensor for header in self.headers for tensor in header.tensors}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)


def read_split_model(source: Path) -> SplitModel:
    """
    Read the headers of a model; `source` is its file, or any of its files.

    Raises
    ------
    BadWeights: a file is missing, damaged or misnamed, or two have the same tensor.
    """
    paths = shard_paths(source)
    model = SplitModel(paths, [read_header(path) for path in paths])
    for number, (path, header) in enumerate(zip(paths, model.headers, strict=True), 1):
        part = _read_part(header)
        if part[1] > 1 and part != (number, len(paths)):
            raise _misnamed(path, header)
    seen: dict[str, Path] = {}
    for tensor in model.header.tensors:
        if seen.setdefault(tensor.name, tensor.file) != tensor.file:
            raise BadWeights(tensor.file, f"the tensor “{tensor.name}” is also in {seen[tensor.name].name}")
    return model


def read_model_keys(model: SplitModel) -> dict[str, EncodedValue]:
    """Read the metadata of a model, without the keys that describe a file."""
    return {key: value for key, value in read_raw_metadata(model.paths[0]).items() if key not in FILE_KEYS}


def shard_paths(source: Path) -> list[Path]:
    """
    List the files of a model in order; `source` is its file, or any of its files.

    Names can be wrong, so the headers decide; but llama.cpp finds the other files of a model by their names only.

    Raises
    ------
    BadWeights: a file is missing, misnamed, or a piece of one.
    """
    shard = parse_shard(source.name)
    if not shard or shard.total < 2:
        _check_whole(source)
        return [source]
    header = read_header(source)
    part = _read_part(header)
    if part[1] < 2:
        return [source]
    if part != (shard.number, shard.total):
        raise _misnamed(source, header)
    missing = [name for name in shard.siblings if not (source.parent / name).is_file()]
    if missing:
        raise BadWeights(
            source,
            f"the model is split into {shard.total} files, and {missing[0]} is missing",
            hint="Download it into the same folder. If it is there under another name, rename it.",
        )
    return [source.parent / name for name in shard.siblings]


def _check_whole(path: Path) -> None:
    """Check that a file called like a piece of a file is none."""
    if piece := parse_piece(path.name):
        try:
            read_header(path)
        except BadWeights:
            reason = f"it is piece {piece.number} of {piece.file}"
            raise BadWeights(path, reason, hint=_join_hint(path, piece)) from None


def _join_hint(path: Path, piece: FilePiece) -> str:
    pieces = {}
    for file in path.parent.iterdir():
        other = parse_piece(file.name)
        if other and (other.file, other.total) == (piece.file, piece.total):
            pieces[other.number] = shlex.quote(str(file))
    if len(pieces) < (piece.total or 2):
        return f"Download the other pieces into the same folder; then join them: cat … > {piece.file}"
    files = " ".join(pieces[number] for number in sorted(pieces))
    return f"Join all pieces: cat {files} > {shlex.quote(str(path.with_name(piece.file)))}"


def _read_part(header: Header) -> tuple[int, int]:
    """Return the number of a file among those of its model, from 1, and their total number."""
    number, total = (header.metadata.get(key) for key in ("split.no", "split.count"))
    return (number + 1 if isinstance(number, int) else 1, total if isinstance(total, int) else 1)


def _misnamed(path: Path, header: Header) -> BadWeights:
    """Build the error for a part of a model that llama.cpp does not recognize by its name, or for several in one."""
    shard, (number, total) = parse_shard(path.name), _read_part(header)
    stem = shard.stem if shard else path.stem
    name, last = (f"{stem}-{part:05}-of-{total:05}.gguf" for part in (number, total))
    if _is_joined(path, header):
        return BadWeights(
            path,
            f"it is {total} parts of a split model, joined into one file, which llama.cpp cannot load",
            hint=f"Download the parts again and leave them as they are; the last one is called {last}",
        )
    return BadWeights(
        path,
        f"it is part {number} of {total} of a split model, but its name does not say so, and llama.cpp finds "
        "the parts by their names",
        hint=f"Rename every part, this one: mv {shlex.quote(str(path))} {shlex.quote(str(path.with_name(name)))}",
    )


def _is_joined(path: Path, header: Header) -> bool:
    """Return True if another GGUF file follows the tensors."""
    alignment = header.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)  # `read_header` has checked it
    end = max((tensor.offset + tensor.size for tensor in header.tensors), default=header.data_offset)
    with path.open("rb") as file:
        file.seek(-(-end // alignment) * alignment)
        return file.read(len(MAGIC)) == MAGIC
