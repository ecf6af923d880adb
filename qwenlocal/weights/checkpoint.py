"""
Checkpoints as hubs publish them: a folder with config.json, safetensors files, and tokenizer files.

Nothing is inferred from the name of a model: only its files count, and it is an error if they contradict each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.safetensors import (
    RawHeader,
    StoredTensor,
    describe_json_error,
    find_duplicate,
    parse_header,
    read_tensors,
)

_QUANTIZED = (".qweight", ".qzeros")  # endings of GPTQ and AWQ tensors
_INDEX = "model.safetensors.index.json"
_MAX_JSON = 200_000_000  # bytes
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint: the content of config.json, and the tensors by their name in the files.

    `has_weights` is False if it is still on a hub, and only the headers of its weight files are known.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    has_weights: bool = True

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """
        Read config.json and the headers of the weights of a folder, or of a single safetensors file in it.

        Raises
        ------
        BadCheckpoint: a file is missing or damaged, or contradicts another.
        UnsupportedCheckpoint: the weights are quantized (GPTQ, AWQ, …).
        """
        folder = path.parent if path.is_file() else path
        if path.is_file() and (shard := parse_shard(path.name)) and shard.total > 1:
            raise BadCheckpoint(
                path, f"it is one of {shard.total} files of a checkpoint", hint=f"Pass the folder: {folder}"
            )
        config = read_config(folder)
        files = [path] if path.is_file() else weight_files(folder)
        tensors = _merge_tensors(folder, map(read_tensors, files))
        if path.is_dir():
            _check_index(folder, tensors)
        return cls(folder, config, tensors)

    @classmethod
    def from_headers(cls, folder: Path, headers: Iterable[RawHeader]) -> Checkpoint:
        """
        Describe a checkpoint in `folder` from the headers of its weight files.

        Raises
        ------
        As `open`.
        """
        tensors = _merge_tensors(folder, map(parse_header, headers))
        _check_index(folder, tensors)
        return cls(folder, read_config(folder), tensors, has_weights=False)


def _merge_tensors(folder: Path, files: Iterable[Iterable[StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file:
            if tensor.name in tensors:
                raise BadCheckpoint(tensor.file, f"“{tensor.name}” is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    if any(name.endswith(_QUANTIZED) for name in tensors):  # config.json does not always state it
        raise _quantized_weights(folder, "GPTQ or AWQ")
    return tensors


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder looks like a checkpoint; opening it checks the rest."""
    return (folder / "config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """
    List the safetensors files of a checkpoint: those that the index names, or all without an index.

    Raises
    ------
    BadCheckpoint: there are none, some are missing, or the weights are pickled.
    """
    try:
        names = [file.name for file in folder.iterdir() if not file.is_dir()]
    except OSError as reason:
        raise BadCheckpoint.unreadable(folder, reason) from reason
    return [folder / name for name in weight_names(folder, names)]


def weight_names(folder: Path, files: Iterable[str]) -> list[str]:
    """
    List the names of the safetensors files of a checkpoint, like `weight_files`.

    `files` are the names of all its files, downloaded or not; the index, if there is one, must be in `folder`.

    Raises
    ------
    As `weight_files`.
    """
    available, index = set(files), folder / _INDEX
    if index.exists():
        names = sorted(set(_read_weight_map(index).values()))
        missing = [name for name in names if name not in available]
        if missing:
            raise BadCheckpoint(folder, f"{_join_missing(missing, len(names))} missing, but listed in {_INDEX}")
        return names
    names = sorted(name for name in available if name.endswith(".safetensors") and not name.startswith("adapter_"))
    if not names:
        raise _no_weights(folder, available)
    _check_shards(folder, names)
    return names


def has_vocabulary(folder: Path) -> bool:
    """Return True if there is a file with the vocabulary."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def brief_repr(value: Any) -> str:
    """Return the repr of a value from a checkpoint, shortened to 78 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _join_missing(names: list[str], total: int) -> str:
    """`_join_missing(["a.safetensors"], 3)` is "a.safetensors (1 of 3 files) is"."""
    shown = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return f"{shown} ({len(names)} of {total} files) {'is' if len(names) == 1 else 'are'}"


def _no_weights(folder: Path, names: Iterable[str]) -> BadCheckpoint:
    files = sorted(name for name in names if name.endswith(PICKLED))
    if any(name.startswith("adapter_") for name in names):
        return BadCheckpoint(
            folder,
            "it is a LoRA adapter, not a model",
            hint="Merge it into its base model (merge_and_unload of peft), and convert the result.",
        )
    return pickled_weights(folder, files[0]) if files else BadCheckpoint(folder, "it contains no safetensors files")


def pickled_weights(folder: Path, file: str) -> BadCheckpoint:
    """Return the error for weights that PyTorch pickled, which are never read."""
    return BadCheckpoint(
        folder,
        f"its weights are pickled ({file}), and unpickling a file can execute code hidden in it",
        hint=pickled_hint(str(folder)),
    )


def pickled_hint(model: str) -> str:
    """Return how to convert pickled weights to safetensors."""
    safe = f"{model.rstrip('/').rpartition('/')[2]}-safe"
    calls = (
        f"{kind}.from_pretrained({model!r}).save_pretrained({safe!r})"
        for kind in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return f"If you trust it, convert it to safetensors with transformers: {'; '.join(calls)}"


def _check_shards(folder: Path, names: list[str]) -> None:
    """Check files without an index: one file, or all of those numbered "-00001-of-00003" and no others."""
    numbered = [shard for name in names if (shard := parse_shard(name))]
    if not numbered:
        if len(names) > 1:
            raise BadCheckpoint(
                folder,
                f"it has {len(names)} safetensors files ({', '.join(names[:3])}), and no {_INDEX} "
                "states which belong together",
                hint="Pass one of the files instead of the folder.",
            )
        return
    count = numbered[0].total
    missing = sorted(set(range(1, count + 1)) - {shard.number for shard in numbered})
    if missing or len(names) != count:
        problem = f"part {missing[0]} of {count} is missing" if missing else "it mixes files of several models"
        raise BadCheckpoint(folder, problem)


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index, "the file of each tensor").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(index, "it has no “weight_map”")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise BadCheckpoint(
                index,
                f"it says that “{name}” is in “{file}”, which is not the name of a file in the same folder",
                hint="The index may be malicious. Download the checkpoint from its publisher.",
            )
    return weight_map


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that the index, if there is one, agrees with the files."""
    index = folder / _INDEX
    for name, file in _read_weight_map(index).items() if index.exists() else ():
        if name not in tensors:
            raise BadCheckpoint(folder / file, f"it does not contain “{name}”, although {_INDEX} says so")
        if tensors[name].file.name != file:
            raise BadCheckpoint(folder / file, f"“{name}” is in another file, although {_INDEX} names this one")


def read_config(folder: Path) -> dict[str, Any]:
    """
    Read config.json of the checkpoint in `folder`.

    Raises
    ------
    BadCheckpoint: it cannot be read.
    UnsupportedCheckpoint: the weights are quantized (GPTQ, AWQ, …).
    """
    config = read_json(folder / "config.json", "the model's configuration")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise _quantized_weights(folder, method or "an unknown method")
    return config


def _quantized_weights(folder: Path, method: object) -> UnsupportedCheckpoint:
    name = f", whose name has no “-{method.upper()}”" if method in ("gptq", "awq") else ""
    return UnsupportedCheckpoint(
        folder,
        f"its weights are quantized already ({method}); only f32, f16 and bf16 can be converted",
        hint=f"Convert the original checkpoint{name}.",
    )


def _reject_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    entries = list(pairs)
    result = dict(entries)
    if len(result) < len(entries):
        raise ValueError(f"“{find_duplicate(key for key, _ in entries)}” occurs twice")
    return result


def read_json(path: Path, content: str) -> dict[str, Any]:
    """
    Read a JSON object from a file of a checkpoint; `content` is what the file contains, for the error.

    Raises
    ------
    BadCheckpoint: the file is missing, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise BadCheckpoint(path, f"it has {path.stat().st_size:,} bytes, more than any real one")
        value = json.loads(path.read_bytes(), object_pairs_hook=_reject_duplicates)
    except FileNotFoundError as reason:
        raise BadCheckpoint(path.parent, f"it has no {path.name}, which contains {content}") from reason
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason
    except (ValueError, RecursionError) as reason:
        raise BadCheckpoint(path, f"it is not valid JSON ({describe_json_error(reason)})") from reason
    if not isinstance(value, dict):
        raise BadCheckpoint(path, "it is not a JSON object")
    return value


def read_optional_json(path: Path, content: str) -> dict[str, Any]:
    """Read a file like `read_json`; a missing file counts as an empty object."""
    return read_json(path, content) if path.exists() else {}
