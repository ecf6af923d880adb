"""
SentencePiece vocabularies (CodeQwen1.5): tokenizer.model, or a tokenizer.json with byte fallback.

tokenizer.model is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto). ModelProto has the pieces as
field 1 (piece: 1 string, score: 2 float, type: 3 enum), trainer_spec as field 2 (model_type: 3 enum) and
normalizer_spec as field 3 (precompiled_charsmap: 2, add_dummy_prefix: 3, remove_extra_whitespaces: 4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights.added_tokens import read_added_tokens
from qwenlocal.weights.gguf_reader import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from qwenlocal.weights.json_files import read_optional_json
from qwenlocal.weights.vocabulary import Vocabulary, apply_post_processor, flatten_steps, same_id

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0  # conversion/base.py: _create_vocab_sentencepiece


class Piece(NamedTuple):
    """A token: its text, its score (higher ones merge first), and its type, whose numbers are those of GGUF."""

    text: str
    score: float
    token_type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of tokenizer.model: the pieces, and whether a space is put before every text."""

    pieces: list[Piece]
    adds_space: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """
    Read a tokenizer.model.

    Raises
    ------
    BadCheckpoint: the file cannot be read, or is not a SentencePiece model.
    UnsupportedCheckpoint: it is not BPE, or it changes texts before tokenizing; llama.cpp would give other tokens.
    """
    try:
        data = path.read_bytes()
        pieces, adds_space = list[Piece](), True
        for field, value in _read_fields(data):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_parse_piece(value))
            elif field == 2 and isinstance(value, bytes):
                _check_trainer(path, dict(_read_fields(value)))
            elif field == 3 and isinstance(value, bytes):
                normalizer = dict(_read_fields(value))
                _check_normalizer(path, normalizer)
                adds_space = bool(normalizer.get(3, True))
    except OSError as reason:
        raise BadCheckpoint.unreadable(path, reason) from reason
    except (ValueError, struct.error) as reason:
        raise BadCheckpoint(path, f"it is not a SentencePiece model ({reason})") from reason
    if not pieces:
        raise BadCheckpoint(path, "it is not a SentencePiece model: it contains no pieces")
    return SentencePieceModel(pieces, adds_space)


def _check_trainer(path: Path, trainer: Mapping[int, object]) -> None:
    """TrainerSpec.model_type: 1 is unigram (the default), 2 BPE, 3 words, 4 characters."""
    if trainer.get(3, 1) != 2:
        raise UnsupportedCheckpoint(path, "it is not a BPE model, so llama.cpp would tokenize differently")


def _check_normalizer(path: Path, normalizer: Mapping[int, object]) -> None:
    """NormalizerSpec: 2 is a table of characters to replace, 4 (true by default) removes extra spaces."""
    if normalizer.get(2) or normalizer.get(4, True):
        raise UnsupportedCheckpoint(
            path, "it replaces characters or removes spaces before tokenizing; llama.cpp does not"
        )


def _parse_piece(data: bytes) -> Piece:
    fields = dict(_read_fields(data))
    text, score, token_type = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, float) or token_type not in range(NORMAL, BYTE + 1):
        raise ValueError("one of its pieces is malformed")
    return Piece(text.decode("utf-8"), score, int(token_type))


def _read_fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield field numbers and values of a protocol buffer message."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
            yield field, value
        elif wire_type == _BYTES:
            size, position = _read_varint(data, position)
            if size > len(data) - position:
                raise ValueError("it ends too early")
            yield field, data[position : position + size]
            position += size
        elif wire_type == _FIXED32:
            (number,) = struct.unpack_from("<f", data, position)
            yield field, float(number)
            position += 4
        elif wire_type == _FIXED64:
            position += 8
        else:
            raise ValueError(f"a field has the unknown wire type {wire_type}")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError("a number does not end")


# --- vocabularies


def build_sentencepiece(folder: Path, settings: Mapping[str, Any], size: int) -> Vocabulary:
    """
    Build the vocabulary of tokenizer.model and the tokens that the other files add.

    Raises
    ------
    As `build_byte_fallback`.
    """
    file = folder / "tokenizer.model"
    model = read_sentencepiece(file)
    vocabulary = Vocabulary.empty(file, "llama", "default", size)
    vocabulary.scores = [_UNUSED_SCORE] * size
    for number, piece in enumerate(model.pieces):
        vocabulary.put(number, *_for_llama_cpp(piece.text, piece.token_type))
        vocabulary.scores[number] = piece.score
    tokenizer = read_optional_json(folder / "tokenizer.json")
    vocabulary.add_flags = {"space": model.adds_space}
    for number, (token, token_type) in read_added_tokens(folder, tokenizer.get("added_tokens"), settings, size).items():
        known, known_type = vocabulary.tokens[number], vocabulary.token_types[number]
        if known_type in (UNKNOWN, CONTROL) and known == token:
            continue
        if known_type in (NORMAL, BYTE) and known != token:
            raise same_id(file, number, known, token)
        _put_added(vocabulary, number, token, token_type)
    apply_post_processor(vocabulary, tokenizer.get("post_processor"), settings)
    return vocabulary


def _put_added(vocabulary: Vocabulary, number: int, token: str, token_type: int) -> None:
    text, token_type = _for_llama_cpp(token, token_type)
    vocabulary.put(number, text, token_type)
    if token_type != NORMAL:
        vocabulary.scores[number] = _ADDED_SCORE


def _for_llama_cpp(text: str, token_type: int) -> tuple[str, int]:
    """
    Spell a token as llama.cpp expects it, and return its type.

    User-defined tokens are searched for in the text itself, so they have spaces; only pieces have "▁". Pieces of spaces
    alone, or of one character, become normal tokens, which merging finds, as in llama.cpp's converter.
    """
    if token_type != USER_DEFINED:
        return text, token_type
    if not text.strip("▁ ") or len(text) == 1:
        return text.replace(" ", "▁"), NORMAL
    return text.replace("▁", " "), token_type


def build_byte_fallback(
    file: Path,
    data: Mapping[str, Any],
    merges: list[tuple[str, str]],
    added: Mapping[int, tuple[str, int]],
    settings: Mapping[str, Any],
    size: int,
) -> Vocabulary:
    """
    Build a SentencePiece vocabulary from the content `data` of a tokenizer.json, which has merges instead of scores.

    Of the neighbors that can be merged, the tokenizers take the pair of the lowest rank, and llama.cpp that of the
    highest score. So a token's score is the negative rank of the first merge that produces it.

    Raises
    ------
    BadCheckpoint: the vocabulary is inconsistent.
    UnsupportedCheckpoint: llama.cpp would tokenize differently.
    """
    ids = data["model"]["vocab"]
    vocabulary = Vocabulary.empty(file, "llama", "default", size)
    vocabulary.scores = [_UNUSED_SCORE] * size
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left.replace("Ġ", " ") + right.replace("Ġ", " "), rank)
    for token, number in ids.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        vocabulary.put(number, token, BYTE if is_byte else NORMAL)
        vocabulary.scores[number] = -float(ranks.get(token, len(merges)))
    vocabulary.check_ids(ids)
    steps = [
        *flatten_steps(data.get("normalizer"), "normalizers"),
        *flatten_steps(data.get("pre_tokenizer"), "pretokenizers"),
    ]
    for step in steps:
        _check_step(file, step)
    if all(step.get("type") == "Prepend" for step in steps):
        raise UnsupportedCheckpoint(file, "it keeps spaces before tokenizing; llama.cpp replaces them by “▁”")
    for number, (token, token_type) in added.items():
        vocabulary.check_free(number, token)
        _put_added(vocabulary, number, token, UNKNOWN if token == "<unk>" else token_type)
    vocabulary.add_flags = {"space": any(_prepends_space(step) for step in steps)}
    if any(step.get("prepend_scheme") == "first" for step in steps):
        vocabulary.notes.append(
            "The tokenizer puts a space before the first word of a prompt; llama.cpp also does after control tokens."
        )
    apply_post_processor(vocabulary, data.get("post_processor"), settings)
    return vocabulary


def _check_step(file: Path, step: Mapping[str, Any]) -> None:
    """Check that a step is one that llama.cpp has: it writes "▁" for spaces, and may put one before a text."""
    rules: Mapping[str, Mapping[str, Any]] = {
        "Prepend": {"prepend": "▁"},
        "Replace": {"pattern": {"String": " "}, "content": "▁"},
        "Metaspace": {"replacement": "▁"},
    }
    rule = rules.get(str(step.get("type")))
    if rule is None or any(step.get(key, value) != value for key, value in rule.items()):
        raise UnsupportedCheckpoint(
            file, f"it changes text before tokenizing ({brief_repr(step)}), which llama.cpp does not"
        )


def _prepends_space(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return step.get("type") == "Prepend"
