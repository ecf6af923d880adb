"""
Which tensor gets which type: llama.cpp's mixes, so that "q4_k_m" means the same file everywhere.

A port of src/llama-quant.cpp (llama_tensor_get_type and what it calls) for the architectures qwen2 and qwen2moe. A mix
visits the tensors by layer, then name, and counts as it goes: Q4_K_M gives Q6_K to every third of the value matrices
and the first and last eighth of them, for example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwenlocal.errors import UsageError
from qwenlocal.ggml import TensorType, requires_imatrix, tensor_type, tensor_types
from qwenlocal.model_files import FILE_TYPE_ALIASES, FILE_TYPES

# What is taken where a row's length is no multiple of a type's block (llama-quant.cpp: tensor_type_fallback).
_FALLBACK = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
# Mixtures of eight experts, Mixtral's number, get more for what all experts share.
_MORE_FOR_EIGHT = ("q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m",
                   "iq4_xs")  # fmt: skip
_TINY_MIXES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m")


@dataclass(frozen=True)
class FileType:
    """A mix: its name, the number that says so in the file, and the type of most tensors."""

    name: str
    number: int
    default: TensorType


class Candidate(NamedTuple):
    """A tensor to be given a type: its shape in ggml's order, and the type it has now."""

    name: str
    shape: tuple[int, ...]
    type: TensorType


class Choice(NamedTuple):
    """The type a tensor gets, and why, for people."""

    type: TensorType
    why: str


@dataclass(frozen=True)
class ModelFacts:
    """What the mixes look at beside the tensors. `gqa`: heads for each key-value head."""

    architecture: str
    layers: int
    gqa: int
    experts: int = 0


@dataclass(frozen=True)
class Wishes:
    """
    What a person wants otherwise: types for tensors whose name a regular expression is found in, the first that fits.

    With `pure` all tensors get the default type. `has_importance`: there is an importance matrix.
    """

    overrides: Sequence[tuple[re.Pattern[str], TensorType]] = ()
    pure: bool = False
    has_importance: bool = False


def file_type(name: str) -> FileType:
    """
    The mix of that name, in any of its spellings: `file_type("Q4_K_M").number` is 15.

    Raises
    ------
    UsageError: there is none; close ones are named.
    """
    import difflib

    wanted = name.strip().lower().replace("-", "_")
    wanted = FILE_TYPE_ALIASES.get(wanted, wanted)
    if wanted not in FILE_TYPES:
        close = difflib.get_close_matches(wanted, FILE_TYPES, n=3)
        raise UsageError(
            f"“{name}” is not a type.",
            hint=f"Did you mean {' or '.join(close)}?" if close else "There are: " + ", ".join(FILE_TYPES),
        )
    number, default = FILE_TYPES[wanted]
    return FileType(wanted, number, tensor_type(default))


def file_types() -> list[str]:
    """The names of all mixes."""
    return list(FILE_TYPES)


def file_type_numbered(number: int) -> str:
    """`file_type_numbered(15)` is "q4_k_m"; "" for a number that is not known."""
    return next((name for name, (known, _) in FILE_TYPES.items() if known == number), "")


def parse_overrides(texts: Sequence[str]) -> list[tuple[re.Pattern[str], TensorType]]:
    """
    `parse_overrides(["ffn_down=q6_k"])`: tensors with "ffn_down" in their names become Q6_K.

    Raises
    ------
    UsageError: it is not EXPRESSION=TYPE, the expression is none, or the type is not one a tensor can have.
    """
    found = []
    for text in texts:
        expression, equals, kind = text.rpartition("=")
        if not equals or not expression:
            raise UsageError(f"“{text}” is not of the form EXPRESSION=TYPE.", hint="For example: ffn_down=q6_k")
        try:
            pattern = re.compile(expression)
        except re.error as reason:
            raise UsageError(
                f"“{expression}” is not a regular expression: {reason}.", hint="For example: 'blk.0.*ffn_down=q6_k'"
            ) from reason
        known = tensor_types().get(kind.strip().lower())
        if known is None or known.name not in _tensor_type_names():
            raise UsageError(f"“{kind}” is not a tensor's type.", hint="There are: " + ", ".join(_tensor_type_names()))
        found.append((pattern, known))
    return found


def _tensor_type_names() -> list[str]:
    return sorted({default for _, default in FILE_TYPES.values()})


def choose_types(
    tensors: Sequence[Candidate], goal: FileType, facts: ModelFacts, wishes: Wishes = Wishes()
) -> list[Choice]:
    """
    The type of each tensor; `tensors` come by layer, then name.

    Raises
    ------
    UsageError: a wish is for tensors that are not there.
    """
    for pattern, _ in wishes.overrides:
        if not any(pattern.search(tensor.name) and is_quantizable(tensor) for tensor in tensors):
            raise UsageError(
                f"No tensor that is quantized has “{pattern.pattern}” in its name.",
                hint="Their names: the same command with --dry-run instead of --tensor-type.",
            )
    mix = _Mix(goal, facts, wishes, tensors)
    return [mix.choose(tensor) for tensor in tensors]


def by_layer(name: str) -> tuple[int, str]:
    """The order in which llama.cpp visits tensors: by layer, then name (llama-model-loader.h: weight_name_comparer)."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def importance_is_needed(name: str, chosen: TensorType, goal: FileType) -> bool:
    """Whether the result is garbage without an importance matrix (llama-quant.cpp: tensor_requires_imatrix)."""
    if name in ("token_embd.weight", "output.weight"):
        return requires_imatrix(chosen)
    needy = {"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s", *(["q2_k"] if goal.name == "q2_k_s" else [])}
    return chosen.name in needy


def is_quantizable(tensor: Candidate) -> bool:
    """Matrices named weight, but norms and routers (llama-quant.cpp: tensor_allows_quantization)."""
    dimensions = [size for size in tensor.shape[1:] if size > 1]
    return (
        bool(dimensions)
        and tensor.name.endswith("weight")
        and "_norm.weight" not in tensor.name
        and "ffn_gate_inp.weight" not in tensor.name
    )


class _Mix:
    """One walk over the tensors of a model."""

    def __init__(self, goal: FileType, facts: ModelFacts, wishes: Wishes, tensors: Sequence[Candidate]) -> None:
        self.goal, self.facts, self.wishes = goal, facts, wishes
        names = {tensor.name for tensor in tensors}
        self.tied = "output.weight" not in names
        self.values = sum("attn_v.weight" in name for name in names)
        self.seen: dict[str, int] = {"attn_v": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}

    def choose(self, tensor: Candidate) -> Choice:
        if not is_quantizable(tensor):
            return Choice(tensor.type, "never quantized: small, and it matters")
        for pattern, wanted in self.wishes.overrides:
            if pattern.search(tensor.name):
                return self._fitting(tensor, Choice(wanted, f"asked for: {pattern.pattern}"))
        if not self.goal.default.is_quantized:
            return Choice(self.goal.default, f"{self.goal.name} file")
        if self.wishes.pure:
            return self._fitting(tensor, Choice(self.goal.default, "asked for: the same for all"))
        return self._fitting(tensor, self._by_mix(tensor))

    def _fitting(self, tensor: Candidate, choice: Choice) -> Choice:
        """Another type where the rows do not divide into blocks."""
        columns, chosen = tensor.shape[0], choice.type
        if columns % chosen.block_size == 0:
            return choice
        instead = tensor_type(_FALLBACK.get(chosen.name, chosen.name))
        if columns % instead.block_size:
            instead = tensor_type("f16")
        return Choice(instead, f"{chosen.name} wants multiples of {chosen.block_size}; rows here have {columns:,}")

    def _by_mix(self, tensor: Candidate) -> Choice:
        default, name = self.goal.default, tensor.name
        chosen, why = default, f"{self.goal.name}"
        if name == "output.weight" or (name == "token_embd.weight" and self.tied):
            chosen, why = self._head(tensor), "the head"
            if self.tied:
                why = "embeddings that are the head, too"
        elif self.goal.name == "mxfp4":
            chosen = tensor_type("mxfp4" if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "q8_0")
        else:
            chosen = tensor_type(self._named(name) or default.name)
        if chosen != default and why == self.goal.name:
            why = f"{self.goal.name} has another type here"
        return Choice(chosen, why)

    def _head(self, tensor: Candidate) -> TensorType:
        default = self.goal.default
        if self.goal.name == "mxfp4" or tensor.shape[0] % default.block_size:
            return tensor_type("q8_0")
        if self.goal.name in ("iq2_xxs", "iq2_xs", "iq3_xxs", "iq1_s", "iq2_s", "iq2_m", "iq1_m"):
            return tensor_type("q5_k")
        return default if default.name == "q8_0" else tensor_type("q6_k")

    def _named(self, name: str) -> str | None:
        """The type's name where the mix has one for this kind of tensor."""
        if name == "token_embd.weight":
            return self._embedding()
        if self.goal.name in _TINY_MIXES:
            return self._tiny(name)
        if "attn_v.weight" in name:
            return self._value()
        if self.facts.experts == 8 and "attn_k.weight" in name:
            return "q8_0"
        if "attn_k.weight" in name or "attn_q.weight" in name:
            return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(self.goal.name)
        if "ffn_down" in name:
            return self._down(name)
        if "attn_output.weight" in name:
            if self.facts.experts == 8:
                return "q5_k" if self.goal.name in _MORE_FOR_EIGHT else None
            others = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
            return others.get(self.goal.name)
        if "ffn_gate" in name or "ffn_up" in name:
            return self._gate_or_up(name)
        return None

    def _embedding(self) -> str | None:
        types: Mapping[str, str] = {
            **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), "q2_k"),
            **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
            **dict.fromkeys(("tq1_0", "tq2_0", "q2_0"), "q4_k"),
        }
        return types.get(self.goal.name)

    def _tiny(self, name: str) -> str | None:
        larger = self.goal.name in ("iq2_s", "iq2_m")
        if "attn_v.weight" in name:
            many = self.facts.gqa >= 4 or self.facts.experts >= 4
            return "q4_k" if many else "iq3_s" if larger else "q2_k"
        if self.facts.experts == 8 and "attn_k.weight" in name:
            return "q4_k"
        if "ffn_down" in name:
            first = self._count("ffn_down") < self.facts.layers // 8
            return ("iq3_s" if larger else "q2_k") if first else None
        if "attn_output.weight" in name:
            if self.facts.experts == 8:
                return "q5_k"
            return "iq2_xxs" if self.goal.name in ("iq1_s", "iq1_m") else "iq3_s" if larger else None
        return None

    def _value(self) -> str | None:
        goal, layer, many = self.goal.name, self._count("attn_v"), self.facts.gqa >= 4
        chosen: str | None = None
        if goal == "q2_k":
            chosen = "q4_k" if many else "q3_k"
        elif goal == "iq3_xxs" and not many:
            chosen = "iq3_xxs" if self.wishes.has_importance else "iq3_s"
        elif (goal in ("q2_k_s", "iq3_xxs", "iq3_xs", "iq3_s") and many) or goal == "iq3_m":
            chosen = "q4_k"
        elif goal == "q3_k_m":
            chosen = "q5_k" if layer < 2 else "q4_k"
        elif goal == "q3_k_l" or (goal in ("iq4_nl", "iq4_xs") and many):
            chosen = "q5_k"
        elif goal in ("q4_k_m", "q5_k_m") and _gets_more(layer, self.values):
            chosen = "q6_k"
        elif goal == "q4_k_s" and layer < 4:
            chosen = "q5_k"
        if self.facts.experts == 8:
            return "q8_0"
        is_70b = self.facts.architecture == "qwen2" and self.facts.layers == 80
        if is_70b and (chosen or self.goal.default.name) in ("q3_k", "q4_k"):
            return "q5_k"
        return chosen

    def _down(self, name: str) -> str | None:
        goal, layers = self.goal.name, self.facts.layers
        layer = self._layer(self._count("ffn_down"), name)
        first = layer < layers // 8
        if goal == "q2_k":
            return "q3_k"
        if goal == "q2_k_s" and first:
            return "q4_k"
        if goal == "iq3_xxs" and not self.wishes.has_importance:
            return "q4_k" if first else "q3_k"
        if goal == "q3_k_m":
            return "q5_k" if layer < layers // 16 else "q4_k"
        if goal == "iq3_m" and (first or (self.facts.experts == 8 and _gets_more(layer, layers))):
            return "q4_k"
        if goal == "q3_k_l":
            return "q5_k"
        if goal in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _gets_more(layer, layers) else None
        if goal in ("iq4_nl", "iq4_xs") and first and not self.wishes.has_importance:
            return "q5_k"
        if goal == "q4_k_s" and first:
            return "q5_k"
        if goal in ("q4_0", "q5_0") and first and self.wishes.has_importance:
            return "q4_1" if goal == "q4_0" else "q5_1"
        return None

    def _gate_or_up(self, name: str) -> str | None:
        kind, layers = "ffn_gate" if "ffn_gate" in name else "ffn_up", self.facts.layers
        layer = self._layer(self._count(kind), name)
        if self.goal.name == "iq3_xs" and layers // 8 <= layer < 7 * layers // 8:
            return "iq3_xxs"
        return None

    def _count(self, kind: str) -> int:
        """How many of this kind came before; counts this one."""
        before = self.seen[kind]
        self.seen[kind] += 1
        return before

    def _layer(self, counted: int, name: str) -> int:
        """A mixture of experts has several such matrices in a layer, so that its names are asked instead."""
        match = re.match(r"blk\.(\d+)\.", name)
        return int(match[1]) if self.facts.experts > 1 and match else counted


def _gets_more(layer: int, layers: int) -> bool:
    """llama-quant.cpp, use_more_bits: of 32 layers 0–3, 6, 9, 12, 15, 18, 21, 24 and 27–31."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
