"""
Naming conventions of model files: quantization types such as q4_k_m, shards such as x-00001-of-00003.gguf, and pieces
of large files such as x.gguf.part1of3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# llama.h, enum llama_ftype: the number stored in the file, and the type of most of its tensors.
FILE_TYPES: Mapping[str, tuple[int, str]] = {
    "f32": (0, "f32"),
    "f16": (1, "f16"),
    "bf16": (32, "bf16"),
    "q4_0": (2, "q4_0"),
    "q4_1": (3, "q4_1"),
    "q5_0": (8, "q5_0"),
    "q5_1": (9, "q5_1"),
    "q8_0": (7, "q8_0"),
    "q2_k": (10, "q2_k"),
    "q2_k_s": (21, "q2_k"),
    "q3_k_s": (11, "q3_k"),
    "q3_k_m": (12, "q3_k"),
    "q3_k_l": (13, "q3_k"),
    "q4_k_s": (14, "q4_k"),
    "q4_k_m": (15, "q4_k"),
    "q5_k_s": (16, "q5_k"),
    "q5_k_m": (17, "q5_k"),
    "q6_k": (18, "q6_k"),
    "iq1_s": (24, "iq1_s"),
    "iq1_m": (31, "iq1_m"),
    "iq2_xxs": (19, "iq2_xxs"),
    "iq2_xs": (20, "iq2_xs"),
    "iq2_s": (28, "iq2_xs"),
    "iq2_m": (29, "iq2_s"),
    "iq3_xxs": (23, "iq3_xxs"),
    "iq3_xs": (22, "iq3_s"),
    "iq3_s": (26, "iq3_s"),
    "iq3_m": (27, "iq3_s"),
    "iq4_nl": (25, "iq4_nl"),
    "iq4_xs": (30, "iq4_xs"),
    "tq1_0": (36, "tq1_0"),
    "tq2_0": (37, "tq2_0"),
    "mxfp4": (38, "mxfp4"),
    "q1_0": (40, "q1_0"),
    "q2_0": (41, "q2_0"),
}
# Spellings that users and file names use for the same types.
FILE_TYPE_ALIASES: Mapping[str, str] = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "mxfp4_moe": "mxfp4",
    "fp16": "f16",
    "fp32": "f32",
}

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)", re.IGNORECASE)
_PIECE = re.compile(
    r"(.*\.gguf)[.-](?:(?:split-)?(?:a?(?P<letter>[a-z])|(?P<digits>\d{2,3}))|part(?P<part>\d+)(?:of(?P<total>\d+))?)",
    re.IGNORECASE,
)


class Shard(NamedTuple):
    """A file of a model split into several, by its name: model-00002-of-00003.gguf is `("model", 2, 3, ".gguf")`."""

    stem: str
    number: int
    total: int
    ending: str

    @property
    def siblings(self) -> list[str]:
        """The names of all files of the model, in order."""
        numbers = range(1, self.total + 1)
        return [f"{self.stem}-{number:05}-of-{self.total:05}{self.ending}" for number in numbers]


def parse_shard(name: str) -> Shard | None:
    """Return the shard that a file name denotes, None for a file that is not split."""
    match = _SHARD.fullmatch(name)
    return Shard(match[1], int(match[2]), int(match[3]), match[4]) if match else None


class FilePiece(NamedTuple):
    """
    A piece of a GGUF file that was cut by size, by its name: x.gguf.part2of3 is `("x.gguf", 2, 3)`.

    x.gguf.b, x.gguf-split-ab and x.gguf.002 are `("x.gguf", 2, 0)`: such names do not tell how many there are.
    """

    file: str
    number: int
    total: int


def parse_piece(name: str) -> FilePiece | None:
    """Return the piece of a file that a file name denotes, None for a whole file."""
    match = _PIECE.fullmatch(name)
    if not match:
        return None
    letter = match["letter"]
    number = ord(letter.lower()) - ord("a") + 1 if letter else int(match["digits"] or match["part"])
    return FilePiece(match[1], number, int(match["total"] or 0))
