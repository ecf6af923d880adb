"""
Checkpoints as hubs publish them: a folder with config.json, safetensors files, and tokenizer files.

Nothing is inferred from the name of a model: only its files count, and it is an error if they contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.json_files import read_json
from qwenlocal.weights.other_formats import ADAPTER_CONFIG, adapter_only, check_tensor_names
from qwenlocal.weights.packing import Packing, read_packing
from qwenlocal.weights.row_source import SourceReader
from qwenlocal.weights.safetensors import RawHeader, StoredTensor, parse_header, read_tensors
from qwenlocal.weights.weight_files import INDEX, WeightFiles, find_weight_files

# Parts that wrappers of PyTorch (torch.compile, DistributedDataParallel, FSDP) add to the names of a model's tensors.
_WRAPPER = re.compile(
    r"^(?:module\.)+|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?:module\.)*"
)


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint: the content of config.json, and the tensors by their name, without the parts that wrappers add.

    `packing` are the settings of GPTQ or AWQ, None if the weights are floats. `has_weights` is False if it is still on
    a hub, and only the headers of its weight files are known; `samples` may read a few of its bytes there. `notes` are
    sentences for display.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    packing: Packing | None = None
    has_weights: bool = True
    samples: SourceReader | None = None
    notes: Sequence[str] = ()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """
        Read config.json and the headers of the weights of a folder, or of a single safetensors file in it.

        Raises
        ------
        BadCheckpoint: a file is missing or damaged, or contradicts another.
        UnsupportedCheckpoint: the weights are quantized, but not by GPTQ or AWQ.
        """
        folder = path.parent if path.is_file() else path
        if path.is_file() and (shard := parse_shard(path.name)) and shard.total > 1:
            raise BadCheckpoint(
                path, f"it is one of {shard.total} files of a checkpoint", hint=f"Pass the folder: {folder}"
            )
        config = read_config(folder)
        packing = read_packing(folder, config)
        files = WeightFiles([path.name]) if path.is_file() else find_weight_files(folder, config)
        return cls._from_files(folder, config, packing, files, (read_tensors(folder / name) for name in files.names))

    @classmethod
    def from_headers(cls, folder: Path, files: WeightFiles, headers: Iterable[RawHeader]) -> Checkpoint:
        """
        Describe a checkpoint in `folder` from the headers of its weight files.

        Raises
        ------
        As `open`.
        """
        config = read_config(folder)
        packing = read_packing(folder, config)
        checkpoint = cls._from_files(folder, config, packing, files, map(parse_header, headers))
        return replace(checkpoint, has_weights=False)

    @classmethod
    def _from_files(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        packing: Packing | None,
        files: WeightFiles,
        contents: Iterable[Iterable[StoredTensor]],
    ) -> Checkpoint:
        stored = _merge_tensors(contents)
        _check_weight_map(folder, files.weight_map or {}, stored)
        tensors, notes = _remove_wrappers(stored)
        if packing and not any(name.endswith((".qweight", ".qzeros")) for name in tensors):
            notes.append(f"The weights are not packed, although the settings of {packing} are there.")
            packing = None
        check_tensor_names(folder, tensors, is_packed=packing is not None)
        return cls(folder, config, tensors, packing, notes=[note for note in (files.note, *notes) if note])


def has_vocabulary(folder: Path) -> bool:
    """Return True if there is a file with the vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """
    Read config.json of the checkpoint in `folder`.

    Raises
    ------
    BadCheckpoint: it cannot be read, or the folder has an adapter only.
    """
    if not (folder / "config.json").exists() and (folder / ADAPTER_CONFIG).exists():
        raise adapter_only(folder)
    return read_json(folder / "config.json", "the model's configuration")


def _merge_tensors(files: Iterable[Iterable[StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file:
            if tensor.name in tensors:
                raise BadCheckpoint(tensor.file, f"“{tensor.name}” is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    return tensors


def _check_weight_map(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Check that the index agrees with the files."""
    for name, file in weight_map.items():
        if name not in tensors:
            raise BadCheckpoint(folder / file, f"it does not contain “{name}”, although {INDEX} says so")
        if tensors[name].file.name != file:
            raise BadCheckpoint(folder / file, f"“{name}” is in another file, although {INDEX} names this one")


def _remove_wrappers(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Remove the parts that wrappers add to names, as PyTorch does (checkpoint/state_dict.py: _get_fqns)."""
    tensors: dict[str, StoredTensor] = {}
    for original, tensor in stored.items():
        name = _WRAPPER.sub("", original)
        if name in tensors:
            raise BadCheckpoint(tensor.file, f"“{name}” is there twice, once as “{original}”")
        tensors[name] = replace(tensor, name=name)
    parts = dict.fromkeys(f"“{part}”" for name in stored for part in _WRAPPER.findall(name))
    return tensors, [f"Left out of tensor names: {', '.join(parts)}, which PyTorch adds in training."] if parts else []
