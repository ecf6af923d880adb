"""
The choice of the files that have a checkpoint's weights, in the order of transformers.

transformers (modeling_utils.py: _get_resolved_checkpoint_files) loads the file that config.json names
("transformers_weights", rare); without it, model.safetensors; then the shards that model.safetensors.index.json lists;
then pickled weights. Variants such as model.fp16.safetensors are loaded only on request. Unlike transformers, one file
of another name, or a complete set of shards without an index, is used if there is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal.errors import BadCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.model_files import parse_shard
from qwenlocal.weights.json_files import read_json
from qwenlocal.weights.other_formats import PICKLED_MODELS, no_weights

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightFiles(NamedTuple):
    """
    The names of a checkpoint's weight files.

    `weight_map` is the file of each tensor in the index, None if no index was used. `ignored` are other files that look
    like weights.
    """

    names: list[str]
    weight_map: Mapping[str, str] | None = None
    ignored: Sequence[str] = ()

    @property
    def note(self) -> str:
        """A sentence about the ignored files; "" if there are none."""
        if not self.ignored:
            return ""
        return f"The weights are read from {_join_some(self.names)}. Ignored: {_join_some(self.ignored)}."


def find_weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """
    Choose the weight files of the checkpoint in `folder`, whose config.json contains `config`.

    Raises
    ------
    BadCheckpoint: there are none, some are missing, or the weights are pickled.
    """
    try:
        names = [file.name for file in folder.iterdir() if not file.is_dir()]
    except OSError as reason:
        raise BadCheckpoint.unreadable(folder, reason) from reason
    return choose_weight_files(folder, config, names)


def choose_weight_files(folder: Path, config: Mapping[str, Any], files: Iterable[str]) -> WeightFiles:
    """
    Choose the weight files among `files`, the names of all files of a checkpoint, downloaded or not.

    The index, if there is one, must be in `folder`.

    Raises
    ------
    As `find_weight_files`.
    """
    available = {name for name in files if not name.startswith(".")}  # macOS writes "._model.safetensors" on USB sticks
    named = config.get("transformers_weights")
    if named not in (None, SINGLE_FILE, INDEX):
        raise BadCheckpoint(
            folder / "config.json",
            f"it says that the weights are in {brief_repr(named)} (transformers_weights)",
            hint="Pass that file instead of the folder.",
        )
    candidates = sorted(name for name in available if name.endswith(".safetensors") and not name.startswith("adapter_"))
    weight_map = None
    if SINGLE_FILE in available and named != INDEX:
        names = [SINGLE_FILE]
    elif (folder / INDEX).exists():
        weight_map = _read_weight_map(folder / INDEX)
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if name not in available]:
            count = (
                f"{len(missing)} of the {len(names)} files in {INDEX} {'is' if len(missing) == 1 else 'are'} missing"
            )
            raise BadCheckpoint(folder, f"{count}: {_join_some(missing)}")
    else:
        names = candidates
        if not names or any(name in available for name in PICKLED_MODELS):
            raise no_weights(folder, available)
        _check_shards(folder, names)
    ignored = [name for name in sorted(available) if _looks_like_weights(name) and name not in names]
    return WeightFiles(names, weight_map, ignored)


def _looks_like_weights(name: str) -> bool:
    return name.endswith(".safetensors") or re.fullmatch(r"(pytorch|adapter)_model.*\.bin", name) is not None


def _join_some(names: Collection[str]) -> str:
    """`_join_some("abcde")` is "a, b, c and 2 more"."""
    shown = ", ".join(list(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_shards(folder: Path, names: list[str]) -> None:
    """Check files without an index: one file, or all of those numbered "-00001-of-00003" and no others."""
    numbered = [shard for name in names if (shard := parse_shard(name))]
    total = numbered[0].total if numbered else 1
    if numbered and (missing := sorted(set(range(1, total + 1)) - {shard.number for shard in numbered})):
        raise BadCheckpoint(folder, f"part {missing[0]} of {total} is missing")
    if len(names) != total:
        raise BadCheckpoint(
            folder,
            f"it has {len(names)} safetensors files ({_join_some(names)}), and no {INDEX} states which belong together",
            hint="If one of the files has the whole model, pass it instead of the folder. Otherwise move the files of "
            "each model, and a copy of config.json and the tokenizer's files, to a folder of its own.",
        )


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
