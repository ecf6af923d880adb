"""
What a model says of itself, from its checkpoint: name, licence, languages, what it was made from, sampling.

The names' parts ("Qwen1.5-0.5B-Chat": base name Qwen1.5, size 0.5B, finetune Chat) are told apart by gguf.Metadata,
llama.cpp's own library for it; the licence and the rest stand at the top of the model's README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.weights import gguf
from qwenlocal.weights.checkpoint import read_json, shortly

# generation_config.json's names and GGUF's (gguf-py, constants.py: Keys.General.SAMPLING_*).
_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temperature": "temp",
    "repetition_penalty": "penalty_repeat",
}
_STRANGE = (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError, OverflowError)
_MOST, _LONGEST = 64, 2000  # entries of a list, characters of a text
_PACKING = ("gptq-int4", "gptq-int8", "gptq", "awq", "gguf")


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has: altogether, and in its experts."""

    total: int
    in_experts: int = 0
    experts: int = 0


@dataclass(frozen=True)
class About:
    """The pairs under `general.`, and what could not be read."""

    pairs: Mapping[str, gguf.Encoded]
    notes: tuple[str, ...] = ()


def read_about(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    parameters: Parameters,
    repo: str = "",
    *,
    like_llama_cpp: bool = False,
) -> About:
    """
    `name` is what the checkpoint is called ("Qwen1.5-0.5B-Chat"), `repo` where it came from ("Qwen/Qwen1.5-0.5B-Chat").

    `like_llama_cpp` leaves out the repository, which llama.cpp's converter does not write.

    Raises
    ------
    BadCheckpoint: generation_config.json cannot be read.
    """
    from gguf import Metadata, size_label

    card, notes = _model_card(folder)
    known = {key: value for key, value in config.items() if key == "_name_or_path" and isinstance(value, str)}
    place = Path(_without_packing(name))
    try:
        found = Metadata.apply_metadata_heuristic(Metadata(), card, known, place, parameters.total)
    except _STRANGE as reason:
        notes = (*notes, _unreadable(reason))
        found = Metadata.apply_metadata_heuristic(Metadata(), {}, {}, place, parameters.total)
    shared = parameters.total - parameters.in_experts
    each = parameters.in_experts // max(1, parameters.experts)
    label = found.size_label or size_label(parameters.total, shared, each, parameters.experts)
    pairs: dict[str, gguf.Encoded] = {
        "general.type": gguf.string("model"),
        **_sampling(folder),
    }
    for key, value in (
        ("name", found.name or name),
        ("author", found.author),
        ("version", found.version),
        ("organization", found.organization),
        ("finetune", found.finetune),
        ("basename", found.basename),
        ("description", found.description),
        ("size_label", label),
        ("license", ",".join(_texts(found.license)) if isinstance(found.license, list) else found.license),
        ("license.name", found.license_name),
        ("license.link", found.license_link),
        ("source.repo_url", f"https://huggingface.co/{repo}" if repo and not like_llama_cpp else None),
    ):
        for text in _texts([value]):
            pairs[f"general.{key}"] = gguf.string(text)
    pairs |= _entries("base_model", found.base_models) | _entries("dataset", found.datasets)
    for key, values in (("tags", found.tags), ("languages", found.languages)):
        if values and (texts := _texts(values)):
            pairs[f"general.{key}"] = gguf.strings(texts)
    return About(pairs, notes)


def _without_packing(name: str) -> str:
    """`_without_packing("Qwen1.5-7B-Chat-GPTQ-Int4")` is "Qwen1.5-7B-Chat"."""
    for ending in _PACKING:
        if name.lower().endswith(f"-{ending}"):
            return name[: -len(ending) - 1]
    return name


def _model_card(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    import yaml
    from gguf import Metadata

    try:
        return Metadata.load_model_card(folder), ()
    except (OSError, yaml.YAMLError, *_STRANGE) as reason:
        return {}, (_unreadable(reason),)


def _unreadable(reason: BaseException) -> str:
    what = (str(reason).splitlines() or [type(reason).__name__])[0]
    return f"The top of README.md cannot be read ({what[:200]}): licence and languages are not known."


def _texts(values: Iterable[Any]) -> list[str]:
    """What is text, or a number or date, as text; not too much of it, since anybody may have written it."""
    plain = [str(value) for value in values if isinstance(value, (str, int, float, date)) and value != ""]
    return [text[:_LONGEST] for text in plain[:_MOST]]


def _sampling(folder: Path) -> dict[str, gguf.Encoded]:
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    said = read_json(file, "how to sample")
    found: dict[str, gguf.Encoded] = {}
    for theirs, ours in _SAMPLING.items():
        value = said.get(theirs)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e9 < value < 1e9:
            raise BadCheckpoint(file, f"“{theirs}” is {shortly(value)}, which cannot be")
        found[f"general.sampling.{ours}"] = gguf.i32(int(value)) if ours == "top_k" else gguf.f32(value)
    return found


def _entries(kind: str, found: list[dict[str, Any]] | None) -> dict[str, gguf.Encoded]:
    if not found:
        return {}
    entries = [entry for entry in found if isinstance(entry, dict)][:_MOST]
    pairs = {f"general.{kind}.count": gguf.u32(len(entries))}
    for number, entry in enumerate(entries):
        for key in ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"):
            for text in _texts([entry.get(key)]):
                pairs[f"general.{kind}.{number}.{key}"] = gguf.string(text)
    return pairs
