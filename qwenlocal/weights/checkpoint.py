"""
A checkpoint as the hub has it: a directory with config.json, safetensors files, and the tokenizer's files.

Nothing is guessed from names of models: what the files say is what counts, and what they contradict is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.safetensors import Front, StoredTensor, first_twice, json_fault, read_tensors, tensors_of

_PACKED = (".qweight", ".qzeros")
_INDEX = "model.safetensors.index.json"
_LONGEST_JSON = 200_000_000
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """
    `tensors` by their name in the files; `config` is config.json.

    Of one that is still on a hub `has_weights` is False: what its weights are is known, their bytes are not here.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    has_weights: bool = True

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """
        Read what a checkpoint is, its weights' headers included: a directory, or one safetensors file in it.

        Raises
        ------
        BadCheckpoint: something is missing, damaged or contradictory.
        UnsupportedCheckpoint: the weights are packed (GPTQ, AWQ, …).
        """
        folder = path.parent if path.is_file() else path
        if path.is_file() and (shard := parse_shard(path.name)) and shard.total > 1:
            raise BadCheckpoint(
                path, f"it is one of {shard.total} files of a checkpoint", hint=f"Give the folder: {folder}"
            )
        config = read_config(folder)
        files = [path] if path.is_file() else weight_files(folder)
        tensors = _together(folder, (read_tensors(file) for file in files))
        if path.is_dir() and (folder / _INDEX).exists():
            _check_index(folder, tensors)
        return cls(folder, config, tensors)

    @classmethod
    def outline(cls, folder: Path, fronts: Iterable[Front]) -> Checkpoint:
        """
        A checkpoint in `folder` of whose weights only the headers are known.

        Raises
        ------
        As `open`.
        """
        tensors = _together(folder, (tensors_of(front) for front in fronts))
        if (folder / _INDEX).exists():
            _check_index(folder, tensors)
        return cls(folder, read_config(folder), tensors, has_weights=False)


def _together(folder: Path, files: Iterable[Iterable[StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file:
            if tensor.name in tensors:
                raise BadCheckpoint(tensor.file, f"“{tensor.name}” is in {tensors[tensor.name].file.name}, too")
            tensors[tensor.name] = tensor
    if any(name.endswith(_PACKED) for name in tensors):  # config.json does not always say so
        raise _packed(folder, "GPTQ or AWQ")
    return tensors


def is_checkpoint(folder: Path) -> bool:
    """Whether a directory looks like one; what is wrong with it shows when it is opened."""
    return (folder / "config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """
    The safetensors files of a checkpoint: those that the index names, or all there are.

    Raises
    ------
    BadCheckpoint: none, not all, or only pickled ones.
    """
    try:
        there = [file.name for file in folder.iterdir() if not file.is_dir()]
    except OSError as reason:
        raise BadCheckpoint.unreadable(folder, reason) from reason
    return [folder / name for name in weight_names(folder, there)]


def weight_names(folder: Path, there: Iterable[str]) -> list[str]:
    """
    `weight_files`, of a folder in which the files `there` are or will be; its index, if it has one, is there.

    Raises
    ------
    As `weight_files`.
    """
    found, index = set(there), folder / _INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if name not in found]
        if missing:
            raise BadCheckpoint(folder, f"{_several(missing, len(names))} missing, which {_INDEX} names")
        return names
    names = sorted(name for name in found if name.endswith(".safetensors") and not name.startswith("adapter_"))
    if not names:
        raise _no_weights(folder, found)
    _check_shards(folder, names)
    return names


def has_vocabulary(folder: Path) -> bool:
    """Whether there is a file that says what the tokens are."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def shortly(value: Any) -> str:
    """A value from somebody's file as it stands there, but not all of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _several(names: list[str], of: int) -> str:
    shown = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return f"{shown} ({len(names)} of {of} files) {'is' if len(names) == 1 else 'are'}"


def _no_weights(folder: Path, there: Iterable[str]) -> BadCheckpoint:
    files = sorted(name for name in there if name.endswith(PICKLED))
    if any(name.startswith("adapter_") for name in there):
        return BadCheckpoint(
            folder,
            "it is an adapter (LoRA), which changes another model and is none itself",
            hint="Merge the two (merge_and_unload of peft), and convert what comes of it.",
        )
    return pickled(folder, files[0]) if files else BadCheckpoint(folder, "there are no safetensors files in it")


def pickled(folder: Path, file: str) -> BadCheckpoint:
    """Weights as PyTorch pickles them are not read."""
    return BadCheckpoint(
        folder,
        f"its weights are pickled ({file}); reading such a file can run any program hidden in it",
        hint=pickled_hint(str(folder)),
    )


def pickled_hint(model: str) -> str:
    """How safetensors are made of weights that are pickled."""
    safe = f"{model.rstrip('/').rpartition('/')[2]}-safe"
    made = (
        f"{kind}.from_pretrained({model!r}).save_pretrained({safe!r})"
        for kind in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return f"Make safetensors of it where you trust it, with transformers: {'; '.join(made)}"


def _check_shards(folder: Path, names: list[str]) -> None:
    """Without an index: files numbered "-00001-of-00003" must all be there, and nothing else beside them."""
    numbered = [shard for name in names if (shard := parse_shard(name))]
    if not numbered:
        if len(names) > 1:
            raise BadCheckpoint(
                folder,
                f"it has {len(names)} safetensors files ({', '.join(names[:3])}) and no {_INDEX} "
                "to say which belong together",
                hint="Give the one file that is meant.",
            )
        return
    count = numbered[0].total
    there = {shard.number for shard in numbered}
    missing = sorted(set(range(1, count + 1)) - there)
    if missing or len(names) != count:
        what = f"part {missing[0]} of {count} is missing" if missing else "files of several models are mixed"
        raise BadCheckpoint(folder, what)


def _weight_map(index: Path) -> Mapping[str, str]:
    found = read_json(index, "which file has which tensor").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadCheckpoint(index, "it has no “weight_map”")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise BadCheckpoint(
                index,
                f"it says “{name}” is in “{file}”, which is not a file beside it",
                hint="Such an index may come from somebody who means harm. Get the checkpoint from its makers.",
            )
    return found


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in _weight_map(folder / _INDEX).items():
        if name not in tensors:
            raise BadCheckpoint(folder / file, f"it does not hold “{name}”, which {_INDEX} says it does")
        if tensors[name].file.name != file:
            raise BadCheckpoint(folder / file, f"“{name}” is not in it, as {_INDEX} says, but in another file")


def read_config(folder: Path) -> dict[str, Any]:
    """
    config.json of the checkpoint in `folder`.

    Raises
    ------
    BadCheckpoint: it cannot be read.
    UnsupportedCheckpoint: the weights are packed (GPTQ, AWQ, …).
    """
    config = read_json(folder / "config.json", "what the model is")
    _refuse_packed(folder, config)
    return config


def _refuse_packed(folder: Path, config: Mapping[str, Any]) -> None:
    packed = config.get("quantization_config")
    if not packed:
        return
    raise _packed(folder, packed.get("quant_method", "some method") if isinstance(packed, dict) else "some method")


def _packed(folder: Path, method: object) -> UnsupportedCheckpoint:
    name = f": it has no “-{method.upper()}” in its name" if method in ("gptq", "awq") else ""
    return UnsupportedCheckpoint(
        folder,
        f"its weights are packed already ({method}); plain ones (f32, f16, bf16) are converted",
        hint=f"Convert the checkpoint that it was made from{name}.",
    )


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    listed = list(pairs)
    found = dict(listed)
    if len(found) < len(listed):
        raise ValueError(f"“{first_twice(key for key, _ in listed)}” stands there twice")
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """
    A JSON object from a file of a checkpoint; `what` is what it would have said, for the error.

    Raises
    ------
    BadCheckpoint: it is missing, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise BadCheckpoint(path, f"it has {path.stat().st_size:,} bytes, which no real one has")
        found = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as reason:
        raise BadCheckpoint(path.parent, f"it has no {path.name}, which says {what}") from reason
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason
    except (ValueError, RecursionError) as reason:
        raise BadCheckpoint(path, f"it is not readable JSON ({json_fault(reason)})") from reason
    if not isinstance(found, dict):
        raise BadCheckpoint(path, "it is not a JSON object")
    return found


def optional_json(file: Path, what: str) -> dict[str, Any]:
    """`read_json` of a file that need not be there: nothing is in it then."""
    return read_json(file, what) if file.exists() else {}
