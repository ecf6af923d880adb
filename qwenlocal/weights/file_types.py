"""Types of GGUF files ("q4_k_m"), and the user's changes to the types of single tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwenlocal.errors import InvalidChoice, UsageError
from qwenlocal.ggml import TensorType, tensor_type
from qwenlocal.model_files import FILE_TYPE_ALIASES, FILE_TYPES


@dataclass(frozen=True)
class FileType:
    """A type of file: its name, its number in the metadata, and the type of most tensors."""

    name: str
    number: int
    default: TensorType


@dataclass(frozen=True)
class QuantOverrides:
    """
    Deviations from llama.cpp's mixes.

    The first of `tensor_types` whose regular expression is found in a tensor's name decides its type; `ends` is the
    type of the embeddings and the output matrix. With `pure`, all other tensors get the default type. `has_imatrix`: an
    importance matrix is used, which changes some mixes. `best`: use the mix of best_mix.py instead of llama.cpp's.
    """

    tensor_types: Sequence[tuple[re.Pattern[str], TensorType]] = ()
    pure: bool = False
    has_imatrix: bool = False
    ends: TensorType | None = None
    best: bool = False

    def find_tensor_type(self, name: str) -> tuple[re.Pattern[str], TensorType] | None:
        """Return the first of `tensor_types` that matches the name of a tensor."""
        return next((entry for entry in self.tensor_types if entry[0].search(name)), None)


def file_type(name: str, *, option: str = "--type") -> FileType:
    """
    Look up a file type in any spelling: `file_type("Q4_K_M").number` is 15. Errors name the `option`.

    Raises
    ------
    InvalidChoice: there is no such type; the hint names similar ones.
    """
    import difflib

    known = name.strip().lower().replace("-", "_")
    known = FILE_TYPE_ALIASES.get(known, known)
    if known not in FILE_TYPES:
        similar = difflib.get_close_matches(known, FILE_TYPES, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else ""
        raise InvalidChoice(option, tuple(FILE_TYPES), name, hint=hint)
    number, default = FILE_TYPES[known]
    return FileType(known, number, tensor_type(default))


def file_type_name(number: object) -> str:
    """`file_type_name(15)` is "q4_k_m"; "" for anything but a known number."""
    return next((name for name, (known, _) in FILE_TYPES.items() if known == number), "")


def parse_tensor_types(texts: Sequence[str]) -> list[tuple[re.Pattern[str], TensorType]]:
    """
    Parse the values of --tensor-type: `["ffn_down=q6_k"]` makes tensors with "ffn_down" in their names Q6_K.

    Raises
    ------
    UsageError: a text is not of the form REGEX=TYPE, or the expression or the type is invalid.
    """
    parsed = []
    for text in texts:
        expression, equals, type_name = text.rpartition("=")
        if not equals or not expression:
            raise UsageError(f"“{text}” is not of the form REGEX=TYPE.", hint="For example: ffn_down=q6_k")
        try:
            pattern = re.compile(expression)
        except re.error as reason:
            raise UsageError(
                f"“{expression}” is not a regular expression: {reason}.", hint="For example: 'blk.0.*ffn_down=q6_k'"
            ) from reason
        parsed.append((pattern, parse_type("The type of --tensor-type", type_name)))
    return parsed


def parse_type(option: str, name: str) -> TensorType:
    """
    Look up the type of a tensor, as the value of `option`.

    Raises
    ------
    InvalidChoice: there is no such type.
    """
    names = sorted({default for _, default in FILE_TYPES.values()})
    known = name.strip().lower()
    if known not in names:
        raise InvalidChoice(option, names, name)
    return tensor_type(known)
