"""Merging of adapters into the tensors of a checkpoint, before they are quantized."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwenlocal.errors import BadCheckpoint
from qwenlocal.weights.adapter import LoraAdapter, LoraModule, base_name
from qwenlocal.weights.adapter_rows import MergedRows
from qwenlocal.weights.other_formats import base_hint
from qwenlocal.weights.quant_mix import layer_order
from qwenlocal.weights.row_source import SourceTensor

_FORMATS = re.compile(r"([-_. ](awq|gptq|gguf|int[48]|fp16|bf16|f16|bnb|[48]bit|unsloth))+$")
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter to merge, `weight` times as strong as it was trained."""

    adapter: LoraAdapter
    weight: float = 1.0


def merge_adapters(
    tensors: Sequence[SourceTensor], merges: Sequence[WeightedAdapter], name: str
) -> tuple[list[SourceTensor], list[str]]:
    """
    Return the tensors of the model `name` with the changes of adapters, and sentences for display.

    Raises
    ------
    BadCheckpoint: an adapter was trained for a model with other matrices.
    """
    merged, notes = {tensor.name: tensor for tensor in tensors}, list[str]()
    for merge in merges:
        for module in merge.adapter.modules:
            if module.target in (_EMBEDDINGS, _OUTPUT) and _OUTPUT not in merged:  # the other one stays as it is
                embeddings = next(tensor for tensor in tensors if tensor.name == _EMBEDDINGS)
                merged[_OUTPUT] = replace(embeddings, name=_OUTPUT)
                notes.append("The output matrix, which was that of the embeddings, becomes one of its own.")
            merged[module.target] = _merge(merged.get(module.target), module, merge, name)
        count, rank = len(merge.adapter.modules), max(module.rank for module in merge.adapter.modules)
        notes.append(f"Merged {merge.adapter.folder.resolve().name}: {count:,} matrices, rank {rank:,}.")
        notes += describe_base(merge.adapter.base, name)
    return sorted(merged.values(), key=lambda tensor: layer_order(tensor.name)), notes


def _merge(tensor: SourceTensor | None, module: LoraModule, merge: WeightedAdapter, name: str) -> SourceTensor:
    hint = base_hint(merge.adapter.base)
    if tensor is None or module.expert >= len(tensor.rows):
        raise BadCheckpoint(module.a.file, f"it changes “{module.name}”, which {name} does not have", hint=hint)
    rows = tensor.rows[module.expert]
    if (rows.row_count, rows.columns) != (module.rows, module.columns):
        raise BadCheckpoint(
            module.a.file,
            f"it changes a “{module.name}” of {module.rows:,} x {module.columns:,}, but that of {name} has "
            f"{rows.row_count:,} x {rows.columns:,}",
            hint=hint,
        )
    changed = [*tensor.rows]
    changed[module.expert] = MergedRows(rows, module, merge.weight)
    return replace(tensor, rows=changed)


def describe_base(base: str, name: str) -> list[str]:
    """Return a sentence if the base model of an adapter has another name than the model that it is used with."""
    if not base or _normalize(base_name(base)) == _normalize(name):
        return []
    return [f"The adapter was trained for {base}; it is used with {name}."]


def _normalize(name: str) -> str:
    """Return a name without formats, which do not make another model: "Qwen1.5-0.5B-Chat-AWQ" is "qwen1505bchat"."""
    return "".join(filter(str.isalnum, _FORMATS.sub("", name.casefold())))
