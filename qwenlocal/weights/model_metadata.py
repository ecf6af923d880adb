"""
Metadata of a model from its checkpoint: name, license, languages, base models, recommended sampling.

gguf.Metadata, llama.cpp's own library, splits the name into parts ("Qwen1.5-0.5B-Chat": base name Qwen1.5, size 0.5B,
finetune Chat). The license and the rest are in the front matter of the model's README.md.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import EncodedValue
from qwenlocal.weights.json_files import read_optional_json

# Names in generation_config.json and in GGUF (gguf-py, constants.py: Keys.General.SAMPLING_*).
_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temperature": "temp",
    "repetition_penalty": "penalty_repeat",
}
_METADATA_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError, OverflowError)
_MAX_ENTRIES, _MAX_TEXT = 64, 2000  # entries of a list, characters of a text
_MAX_CARD, _MAX_LINE = 1 << 19, 20_000  # bytes of front matter (parsed in 0.5 s), characters of its lines


@dataclass(frozen=True)
class ModelMetadata:
    """The key-value pairs under `general.`, and notes about what could not be read."""

    pairs: Mapping[str, EncodedValue]
    notes: tuple[str, ...] = ()


def read_model_metadata(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    parameters: int,
    repo: str = "",
    *,
    in_experts: int = 0,
    experts: int = 0,
) -> ModelMetadata:
    """
    Read the metadata of a checkpoint, `name` ("Qwen1.5-0.5B-Chat") from repository `repo` ("Qwen/Qwen1.5-0.5B-Chat").

    Of the `parameters`, `in_experts` are in all `experts` together.

    Raises
    ------
    BadCheckpoint: generation_config.json cannot be read.
    """
    from gguf import Metadata, size_label

    card, notes = _read_model_card(folder)
    model_config = {key: value for key, value in config.items() if key == "_name_or_path" and isinstance(value, str)}
    path = Path(_strip_quantization(name))
    try:
        metadata = Metadata.apply_metadata_heuristic(Metadata(), card, model_config, path, parameters)
    except _METADATA_ERRORS as reason:
        notes = (*notes, _readme_note(reason))
        metadata = Metadata.apply_metadata_heuristic(Metadata(), {}, {}, path, parameters)
    per_expert = in_experts // max(1, experts)
    label = metadata.size_label or size_label(parameters, parameters - in_experts, per_expert, experts)
    pairs = {"general.type": gguf_writer.string("model"), **_read_sampling(folder)}
    for key, value in (
        ("name", metadata.name or name),
        ("author", metadata.author),
        ("version", metadata.version),
        ("organization", metadata.organization),
        ("finetune", metadata.finetune),
        ("basename", metadata.basename),
        ("description", metadata.description),
        ("size_label", label),
        ("license", ",".join(_texts(metadata.license)) if isinstance(metadata.license, list) else metadata.license),
        ("license.name", metadata.license_name),
        ("license.link", metadata.license_link),
        ("source.repo_url", f"https://huggingface.co/{repo}" if repo else None),
    ):
        for text in _texts([value]):
            pairs[f"general.{key}"] = gguf_writer.string(text)
    pairs |= _encode_entries("base_model", metadata.base_models) | _encode_entries("dataset", metadata.datasets)
    for key, values in (("tags", metadata.tags), ("languages", metadata.languages)):
        if values and (texts := _texts(values)):
            pairs[f"general.{key}"] = gguf_writer.strings(texts)
    return ModelMetadata(pairs, notes)


def _strip_quantization(name: str) -> str:
    """`_strip_quantization("Qwen1.5-7B-Chat-GPTQ-Int4")` is "Qwen1.5-7B-Chat"."""
    return re.sub(r"-(gptq-int4|gptq-int8|gptq|awq|gguf)\Z", "", name, flags=re.IGNORECASE)


def _read_model_card(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    import yaml

    try:
        card = _parse_front_matter(folder / "README.md")
    except (OSError, yaml.YAMLError, *_METADATA_ERRORS) as reason:
        return {}, (_readme_note(reason),)
    return {key: value[:_MAX_ENTRIES] if isinstance(value, list) else value for key, value in card.items()}, ()


def _parse_front_matter(file: Path) -> dict[str, Any]:
    """
    Parse the front matter of a model card like `gguf.Metadata.load_model_card`, but safely and eight times faster.

    Raises
    ------
    ValueError: it is too large, or not UTF-8. yaml.YAMLError: it is not YAML, or has merge keys (`<<`), with which a
    kilobyte can become gigabytes.
    """
    if not file.is_file():
        return {}
    with file.open("rb") as source:
        text = codecs.getincrementaldecoder("utf-8")().decode(source.read(_MAX_CARD))
    first, *lines = text.splitlines() or [""]
    if first != "---":
        return {}
    if "---" in lines:
        lines = lines[: lines.index("---")]
    elif file.stat().st_size > _MAX_CARD:
        raise ValueError(f"it is longer than {_MAX_CARD:,} bytes")
    if any(len(line) > _MAX_LINE for line in lines):
        raise ValueError(f"it has a line of more than {_MAX_LINE:,} characters")
    # As in gguf: the language "no" is not false, and tabs are spaces.
    data = _load_yaml(("\n".join(lines) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  "))
    return data if isinstance(data, dict) else {}


def _load_yaml(text: str) -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys are not supported")

    return yaml.load(text, Loader)


def _readme_note(error: BaseException) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"The license and the languages are unknown: cannot read the front matter of README.md ({reason[:200]})."


def _texts(values: Iterable[Any]) -> list[str]:
    """Return the texts, numbers and dates among `values` as text, shortened, since the file may be malicious."""
    texts = [str(value) for value in values if isinstance(value, (str, int, float, date)) and value != ""]
    return [text[:_MAX_TEXT] for text in texts[:_MAX_ENTRIES]]


def _read_sampling(folder: Path) -> dict[str, EncodedValue]:
    file = folder / "generation_config.json"
    config, pairs = read_optional_json(file), dict[str, EncodedValue]()
    for name, gguf_name in _SAMPLING.items():
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e9 < value < 1e9:
            raise BadCheckpoint(file, f"“{name}” is {brief_repr(value)}, which is invalid")
        encoded = gguf_writer.i32(int(value)) if gguf_name == "top_k" else gguf_writer.f32(value)
        pairs[f"general.sampling.{gguf_name}"] = encoded
    return pairs


def _encode_entries(kind: str, listed: list[dict[str, Any]] | None) -> dict[str, EncodedValue]:
    if not listed:
        return {}
    entries = [entry for entry in listed if isinstance(entry, dict)][:_MAX_ENTRIES]
    pairs = {f"general.{kind}.count": gguf_writer.u32(len(entries))}
    for number, entry in enumerate(entries):
        for key in ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"):
            for text in _texts([entry.get(key)]):
                pairs[f"general.{kind}.{number}.{key}"] = gguf_writer.string(text)
    return pairs
