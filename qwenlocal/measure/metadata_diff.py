"""Comparison of a GGUF file's metadata with its checkpoint: dimensions, special tokens, template, vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qwenlocal.formatting import format_quantity, shorten
from qwenlocal.weights.gguf_reader import EncodedValue, decode_value

# Tokenizer keys that a file must have. Older converters left out the others, but no value may differ.
_REQUIRED = ("model", "pre", "tokens", "token_type", "merges", "scores", "eos_token_id")

# Keys that change the answers even if only the file has them.
_SIGNIFICANT = ("rope.scaling.", "attention.sliding_window")


class MetadataDifference(NamedTuple):
    """A key whose value differs from the checkpoint's; None stands for a missing value."""

    key: str
    expected: Any
    actual: Any

    def __str__(self) -> str:
        if self.actual is None:
            return f"“{self.key}” is missing; the checkpoint says {_shorten(self.expected)}"
        if self.expected is None:
            return f"“{self.key}” is {_shorten(self.actual)}; the checkpoint has no such value"
        if isinstance(self.expected, list) and isinstance(self.actual, list):
            return _describe_lists(self.key, self.expected, self.actual)
        return f"“{self.key}” is {_shorten(self.actual)}; the checkpoint says {_shorten(self.expected)}"


def diff_metadata(reference: Mapping[str, EncodedValue], file: Mapping[str, EncodedValue]) -> list[MetadataDifference]:
    """
    Return the keys of the architecture and the tokenizer in `file` that differ from `reference`.

    `reference` is the metadata that a conversion of the checkpoint gives. Names, licenses and the like are ignored.
    """
    architecture = decode_value(reference["general.architecture"])
    differences = []
    for key, encoded in reference.items():
        is_compared = key.startswith((f"{architecture}.", "tokenizer.")) or key == "general.architecture"
        if not is_compared or file.get(key) == encoded:
            continue
        is_required = key.startswith(f"{architecture}.") or key.removeprefix("tokenizer.ggml.") in _REQUIRED
        expected, actual = decode_value(encoded), decode_value(file[key]) if key in file else None
        if expected != actual and (actual is not None or is_required):
            differences.append(MetadataDifference(key, expected, actual))
    prefix = f"{architecture}."
    extra = (key for key in file if key not in reference and key.removeprefix(prefix).startswith(_SIGNIFICANT))
    return differences + [MetadataDifference(key, None, decode_value(file[key])) for key in extra]


def _describe_lists(key: str, expected: list[Any], actual: list[Any]) -> str:
    if len(expected) != len(actual):
        return f"“{key}” has {format_quantity(len(actual), 'entry', 'entries')}; the checkpoint has {len(expected):,}"
    index = next(i for i, (left, right) in enumerate(zip(expected, actual, strict=True)) if left != right)
    return f"“{key}” has {_shorten(actual[index])} at {index:,}; the checkpoint has {_shorten(expected[index])}"


def _shorten(value: Any) -> str:
    text = f"{value:,.10g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    return shorten(text, 60)
