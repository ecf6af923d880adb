"""Models in several files: "model-00001-of-00003.gguf" and its like, and "model-00001-of-00002.safetensors"."""

from __future__ import annotations

import re
from typing import NamedTuple

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)", re.IGNORECASE)


class Shard(NamedTuple):
    """What a file's name says: `Shard("model", 2, 3, ".gguf")` is of model-00002-of-00003.gguf."""

    stem: str
    number: int
    total: int
    ending: str

    @property
    def siblings(self) -> list[str]:
        """The names of all files of the model, in order."""
        numbers = range(1, self.total + 1)
        return [f"{self.stem}-{number:05}-of-{self.total:05}{self.ending}" for number in numbers]


def shard_of(name: str) -> Shard | None:
    """The shard that a file of that name is; None for one that is whole."""
    match = _SHARD.fullmatch(name)
    return Shard(match[1], int(match[2]), int(match[3]), match[4]) if match else None
