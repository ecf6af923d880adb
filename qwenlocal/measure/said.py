"""What a GGUF file says of itself, against what its checkpoint says: sizes, special tokens, template, vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qwenlocal.weights import gguf
from qwenlocal.weights.gguf import Encoded

# What a file must say; other keys may be left out, as older converters did, but not be something else.
_NEEDED = ("model", "pre", "tokens", "token_type", "merges", "scores", "eos_token_id")


# What changes the answers where only the file says it.
_TELLING = ("rope.scaling.", "attention.sliding_window")


class Contradiction(NamedTuple):
    """A key whose value is not the checkpoint's; None stands for the side that does not have it."""

    key: str
    expected: Any
    actual: Any

    def __str__(self) -> str:
        if self.actual is None:
            return f"“{self.key}” is missing; the checkpoint says {_shortly(self.expected)}"
        if self.expected is None:
            return f"“{self.key}” is {_shortly(self.actual)}; the checkpoint says nothing of the kind"
        if isinstance(self.expected, list) and isinstance(self.actual, list):
            return _list_in_words(self.key, self.expected, self.actual)
        return f"“{self.key}” is {_shortly(self.actual)}; the checkpoint says {_shortly(self.expected)}"


def contradictions(reference: Mapping[str, Encoded], file: Mapping[str, Encoded]) -> list[Contradiction]:
    """
    The keys of the architecture and the tokenizer that are not those of `reference`, which was made of the checkpoint.

    Names, licences and the like may be anything.
    """
    architecture = gguf.decode(reference["general.architecture"])
    found = []
    for key, expected in reference.items():
        matters = key.startswith((f"{architecture}.", "tokenizer.")) or key == "general.architecture"
        if not matters or file.get(key) == expected:
            continue
        needed = key.startswith(f"{architecture}.") or key.removeprefix("tokenizer.ggml.") in _NEEDED
        wanted, actual = gguf.decode(expected), gguf.decode(file[key]) if key in file else None
        if wanted != actual and (actual is not None or needed):
            found.append(Contradiction(key, wanted, actual))
    more = (key for key in file if key not in reference and key.removeprefix(f"{architecture}.").startswith(_TELLING))
    return found + [Contradiction(key, None, gguf.decode(file[key])) for key in more]


def _list_in_words(key: str, expected: list[Any], actual: list[Any]) -> str:
    if len(expected) != len(actual):
        return f"“{key}” has {len(actual):,} entries; the checkpoint has {len(expected):,}"
    where = next(n for n, (one, other) in enumerate(zip(expected, actual, strict=True)) if one != other)
    return f"“{key}” has {_shortly(actual[where])} at {where:,}; the checkpoint has {_shortly(expected[where])}"


def _shortly(value: Any) -> str:
    text = f"{value:,.10g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
