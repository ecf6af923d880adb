"""
The pieces of a SentencePiece model (tokenizer.model), as CodeQwen1.5 has one.

The file is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto): ModelProto has the pieces as field
1 (piece: 1 string, score: 2 float, type: 3 enum), trainer_spec as field 2 (model_type: 3 enum) and normalizer_spec as
field 3 (precompiled_charsmap: 2, add_dummy_prefix: 3, remove_extra_whitespaces: 4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.kinds import BYTE, NORMAL

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A token: its text, its score (higher ones are merged first), and its kind, in GGUF's numbers, too."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Pieces:
    """The vocabulary, and whether a space is put before every text."""

    pieces: list[Piece]
    adds_space: bool


def read_pieces(path: Path) -> Pieces:
    """
    Raises
    ------
    BadCheckpoint: the file cannot be read, or is no SentencePiece model.
    UnsupportedCheckpoint: it is not BPE, or changes texts before cutting them; llama.cpp would find other tokens.
    """
    try:
        data = path.read_bytes()
        pieces, adds_space = list[Piece](), True
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif field == 2 and isinstance(value, bytes):
                _check_kind(path, dict(_fields(value)))
            elif field == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
                _check_normalizer(path, normalizer)
                adds_space = bool(normalizer.get(3, True))
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason
    except (ValueError, struct.error) as reason:
        raise BadCheckpoint(path, f"it is no SentencePiece model ({reason})") from reason
    if not pieces:
        raise BadCheckpoint(path, "it is no SentencePiece model: there are no pieces in it")
    return Pieces(pieces, adds_space)


def _check_kind(path: Path, trainer: Mapping[int, object]) -> None:
    """TrainerSpec.model_type: 1 is unigram (also where nothing is said), 2 BPE, 3 words, 4 letters."""
    if trainer.get(3, 1) != 2:
        raise UnsupportedCheckpoint(path, "it is no BPE model, and llama.cpp would cut texts otherwise")


def _check_normalizer(path: Path, normalizer: Mapping[int, object]) -> None:
    """NormalizerSpec: 2 is a table of characters to be changed, 4 takes spaces away (also where nothing is said)."""
    if normalizer.get(2) or normalizer.get(4, True):
        raise UnsupportedCheckpoint(
            path, "it changes letters or takes spaces away before cutting a text; llama.cpp does not"
        )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, float) or kind not in range(NORMAL, BYTE + 1):
        raise ValueError("a piece of it has the wrong form")
    return Piece(text.decode("utf-8"), score, int(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Field numbers and values of a protocol buffer message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
        elif wire == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("it ends too early")
            yield field, data[at : at + size]
            at += size
        elif wire == _FIXED32:
            (number,) = struct.unpack_from("<f", data, at)
            yield field, float(number)
            at += 4
        elif wire == _FIXED64:
            at += 8
        else:
            raise ValueError(f"a field of the unknown kind {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise ValueError("a number without end")
