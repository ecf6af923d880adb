"""
SentencePiece vocabularies as GGUF wants them: tokenizer.model, or a tokenizer.json with byte fallback (CodeQwen1.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights import sentencepiece
from qwenlocal.weights.checkpoint import optional_json, shortly
from qwenlocal.weights.draft import Draft, added_tokens, adds, steps_of
from qwenlocal.weights.kinds import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED


def from_pieces(folder: Path, settings: Mapping[str, Any], size: int) -> Draft:
    """
    The vocabulary of tokenizer.model; what stands in the other files beside it is added.

    Raises
    ------
    As `from_byte_fallback`.
    """
    file = folder / "tokenizer.model"
    model = sentencepiece.read_pieces(file)
    draft = Draft.empty(file, "llama", "default", size)
    draft.scores = [-10000.0] * size
    for number, piece in enumerate(model.pieces):
        draft.put(number, *_as_matched(piece.text, piece.kind))
        draft.scores[number] = piece.score
    fast = optional_json(folder / "tokenizer.json", "the vocabulary")
    draft.adds = {"space": model.adds_space, **adds(fast.get("post_processor"), settings)}
    listed = fast.get("added_tokens")
    extra = optional_json(folder / "added_tokens.json", "further tokens")
    more = [{"id": number, "content": token} for token, number in extra.items()]
    added = {**added_tokens(folder / "added_tokens.json", more, {}), **added_tokens(file, listed, settings)}
    for number, (token, kind) in added.items():
        there = (draft.tokens[number], draft.kinds[number]) if 0 <= number < size else ("", UNUSED)
        if there[1] in (UNKNOWN, CONTROL) and there[0] == token:
            continue
        if there[1] in (NORMAL, BYTE) and there[0] != token:
            raise BadCheckpoint(file, f"the id {number} is given twice, to “{there[0]}” and to “{token}”")
        _put_added(draft, number, token, kind)
    return draft


def _put_added(draft: Draft, number: int, token: str, kind: int) -> None:
    """A token beside the pieces; one of spaces alone stays what it is among them, so that it is found by merging."""
    text, kind = _as_matched(token, kind)
    draft.put(number, text, kind)
    if kind != NORMAL:
        draft.scores[number] = -1000.0


def _as_matched(text: str, kind: int) -> tuple[str, int]:
    """
    Text that is matched as it stands (user defined) has spaces; "▁" is what llama.cpp writes for them in pieces only.

    A piece of spaces alone, or of one letter, is better found by merging, as llama.cpp's own converter has them all.
    """
    if kind != USER_DEFINED:
        return text, kind
    if not text.strip("▁ ") or len(text) == 1:
        return text.replace(" ", "▁"), NORMAL
    return text.replace("▁", " "), kind


def from_byte_fallback(
    file: Path,
    data: Mapping[str, Any],
    merges: list[tuple[str, str]],
    added: Mapping[int, tuple[str, int]],
    settings: Mapping[str, Any],
    size: int,
) -> Draft:
    """
    A SentencePiece vocabulary in the form of tokenizer.json, whose content `data` is; it has ranks instead of scores.

    Among the neighbours that may be merged, both take the best: the lowest rank, or the highest score. So a token's
    score is the negative rank of the first merge that makes it.

    Raises
    ------
    BadCheckpoint: it does not hang together.
    UnsupportedCheckpoint: llama.cpp would cut texts otherwise.
    """
    vocabulary = data["model"]["vocab"]
    draft = Draft.empty(file, "llama", "default", size)
    draft.scores = [-10000.0] * size
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left.replace("Ġ", " ") + right.replace("Ġ", " "), rank)
    for token, number in vocabulary.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        draft.put(number, token, BYTE if is_byte else NORMAL)
        draft.scores[number] = -float(ranks.get(token, len(merges)))
    draft.check_holes(vocabulary)
    steps = [*steps_of(data.get("normalizer"), "normalizers"), *steps_of(data.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        _check_step(file, step)
    for number, (token, kind) in added.items():
        draft.check_free(number, token)
        _put_added(draft, number, token, UNKNOWN if token == "<unk>" else kind)
    draft.adds = {"space": any(_prepends_space(step) for step in steps), **adds(data.get("post_processor"), settings)}
    return draft


def _check_step(file: Path, step: Mapping[str, Any]) -> None:
    """llama.cpp writes "▁" for spaces, and may put one before a text; it does nothing else."""
    rules: Mapping[str, Mapping[str, Any]] = {
        "Prepend": {"prepend": "▁"},
        "Replace": {"pattern": {"String": " "}, "content": "▁"},
        "Metaspace": {"replacement": "▁"},
    }
    known = rules.get(str(step.get("type")))
    if known is None or any(step.get(key, value) != value for key, value in known.items()):
        raise UnsupportedCheckpoint(
            file, f"it changes text before cutting it ({shortly(step)}), which llama.cpp does not"
        )


def _prepends_space(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return step.get("type") == "Prepend"
