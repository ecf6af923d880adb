"""Facts about models as `show`, `list`, `verify` and `inspect` print them; the keys are the JSON interface."""

from __future__ import annotations

import collections
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwenlocal.formatting import format_bytes, format_gib, format_quantity, shorten

if TYPE_CHECKING:
    from qwenlocal.library.catalog import ModelCard
    from qwenlocal.library.store import ModelRecord
    from qwenlocal.weights.gguf_reader import Header

_MAX_VALUE = 100  # characters
_LABELS = {"licence": "license", "owned": "managed by qwenlocal"}  # where they differ from the keys


def record_facts(record: ModelRecord) -> dict[str, Any]:
    """Return the facts of an installed model."""
    return {
        "name": record.name,
        "state": "checkpoint" if record.is_checkpoint else "here",
        "size": record.size,
        "path": str(record.path),
        "sha256": record.files[0].sha256 or None,
        "origin": record.origin,
        "licence": record.license or None,
        "owned": record.owned,
        "added": record.added or None,
    }


def card_facts(card: ModelCard) -> dict[str, Any]:
    """Return the facts of a model in the catalog; its name is that of the default file."""
    from qwenlocal.library.names import CatalogName

    name = CatalogName(card)
    return {
        "name": str(name),
        "state": "available" if card.gguf or card.files else "checkpoint",
        "size": name.known_file.size if name.known_file else None,
        "repository": card.gguf or card.checkpoint,
        "licence": card.license,
    }


def header_facts(header: Header) -> dict[str, Any]:
    """Return the facts in a GGUF header."""
    from qwenlocal.engine.memory import ModelDims
    from qwenlocal.weights.file_types import file_type_name

    types = collections.Counter(tensor.type.name.upper() for tensor in header.tensors)
    size = header.weights_size
    parameters = sum(tensor.elements for tensor in header.tensors)
    dims, metadata = ModelDims.from_metadata(header.metadata), header.metadata
    template, tokens, file_type = (
        metadata.get(key) for key in ("tokenizer.chat_template", "tokenizer.ggml.tokens", "general.file_type")
    )
    return {
        "title": metadata.get("general.name"),
        "licence": metadata.get("general.license.name") or metadata.get("general.license"),
        "architecture": header.architecture,
        "type": file_type_name(file_type) if isinstance(file_type, int) else None,
        "parameters": parameters,
        "bits per weight": round(size * 8 / parameters, 2) if parameters else None,
        "tensors": dict(types.most_common()),
        "layers": header.hyperparameter("block_count"),
        "embedding": header.hyperparameter("embedding_length"),
        "heads": header.hyperparameter("attention.head_count"),
        "kv heads": header.hyperparameter("attention.head_count_kv"),
        "experts": header.hyperparameter("expert_count"),
        "context": header.hyperparameter("context_length"),
        "context memory": describe_kv_memory(dims.kv_cache_bytes(1), dims.n_ctx_train) if dims else None,
        "rope base": header.hyperparameter("rope.freq_base"),
        "vocabulary": _array_length(tokens),
        "pre-tokenizer": metadata.get("tokenizer.ggml.pre"),
        "end tokens": _end_tokens(metadata),
        "chat template": template if isinstance(template, str) else None,
    }


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print facts in two columns, without those that are unknown or empty."""
    from qwenlocal.terminal.ansi import escape_controls

    labels = {key: _LABELS.get(key, key) for key in facts}
    width = max(map(len, labels.values()))
    for key, value in facts.items():
        if value not in (None, "", {}):
            text = escape_controls(_describe(key, value)).replace("\n", "\n" + " " * (width + 2))
            sys.stdout.write(f"{labels[key]:<{width}}  {text}\n")


def describe_kv_memory(bytes_per_token: int, max_tokens: int) -> str:
    """`describe_kv_memory(98304, 8192)` is "0.19 GiB at 2,048 tokens, 0.75 GiB at 8,192 tokens"."""
    counts = [count for count in (2048, 8192, 32768) if count <= max_tokens]
    return ", ".join(f"{format_gib(bytes_per_token * count)} at {count:,} tokens" for count in counts)


def _describe(key: str, value: Any) -> str:
    """Spell a value for people: `_describe("vocabulary", 151936)` is "151,936"."""
    if key == "chat template":
        return f"yes, {format_quantity(len(value), 'character')} (--json shows it)"
    if key == "state" and value == "here":
        return "installed"
    if key == "size":
        return f"{format_bytes(value)} ({value:,} bytes)"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.10g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if key == "path" else shorten(str(value), _MAX_VALUE)


def _array_length(value: object) -> int | None:
    from qwenlocal.weights.gguf_reader import LongArray

    if isinstance(value, LongArray):
        return value.length
    return len(value) if isinstance(value, list) else None


def _end_tokens(metadata: Mapping[str, Any]) -> str:
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
    return ", ".join(f"{role} {id}" for role, id in ids.items() if isinstance(id, int))
