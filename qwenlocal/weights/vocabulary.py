"""
A checkpoint's vocabulary as GGUF wants it: tokens, kinds, merges or scores, special tokens, chat template.

Everything is read from the checkpoint's own files; a vocabulary that does not hang together is an error, since its
model would load and speak nonsense. Two kinds are known: byte-level BPE (`byte_bpe.py`) and SentencePiece
(`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint, UsageError
from qwenlocal.jinja import find_template_error
from qwenlocal.weights.byte_bpe import PRE_TOKENIZER_NAMES, byte_level, from_parts
from qwenlocal.weights.checkpoint import optional_json, read_json
from qwenlocal.weights.draft import Draft, added_tokens, merge_pairs
from qwenlocal.weights.kinds import UNUSED
from qwenlocal.weights.pieces import from_byte_fallback, from_pieces
from qwenlocal.weights.special import special_tokens
from qwenlocal.weights.templates import chat_templates


@dataclass(frozen=True)
class Vocabulary:
    """
    `tokens[id]` and `kinds[id]` (GGUF's numbers: 1 normal, 3 control, 5 unused, …) for every row of the embeddings.

    Byte-level BPE has `merges` ("a b" in order of rank), SentencePiece has `scores`. `special` are ids by role ("eos",
    "bos", "pad", "eot", …). `templates` are chat templates by name, the usual one under "".
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(
        default_factory=dict
    )  # "bos", "eos": put one at the text's ends; "space": likewise
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def first_unused(self) -> int:
        """The id from which on there are only ids without a token."""
        at = len(self.kinds)
        while at and self.kinds[at - 1] == UNUSED:
            at -= 1
        return at


def read_vocabulary(folder: Path, config: Mapping[str, Any], size: int, *, pre: str | None = None) -> Vocabulary:
    """
    The vocabulary of the checkpoint in `folder`, filled up to `size` ids, the rows of its embedding matrix.

    `pre` names the pre-tokenizer where the checkpoint's regular expression is not a known one.

    Raises
    ------
    BadCheckpoint: a file is missing or damaged, an id is named twice or out of range, or ids are missing in between.
    UnsupportedCheckpoint: llama.cpp has no such tokenizer.
    """
    settings = optional_json(folder / "tokenizer_config.json", "special tokens")
    if (folder / "tokenizer.model").exists():
        draft = from_pieces(folder, settings, size)
    elif (folder / "tokenizer.json").exists():
        draft = _from_json(folder, settings, size, pre)
    elif (folder / "vocab.json").exists():
        draft = from_parts(folder, settings, size, pre)
    else:
        raise BadCheckpoint(folder, "it has no tokenizer.json (nor tokenizer.model, nor vocab.json)")
    draft.check_texts()
    special, notes = special_tokens(folder, settings, config, draft)
    templates = chat_templates(folder, settings)
    if draft.pre not in PRE_TOKENIZER_NAMES:
        raise UsageError(f"llama.cpp has no pre-tokenizer called “{draft.pre}”.", hint="Qwen1.5's is: --pre qwen2")
    return Vocabulary(
        draft.model,
        draft.pre,
        draft.tokens,
        draft.kinds,
        draft.merges,
        draft.scores,
        special,
        draft.adds,
        templates,
        [*notes, *_unreadable(templates)],
    )


def _unreadable(templates: Mapping[str, str]) -> list[str]:
    return [
        f"The chat template{f' “{name}”' if name else ''} cannot be read ({fault}); it is carried over as it is."
        for name, text in templates.items()
        if (fault := find_template_error(text))
    ]


def _from_json(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> Draft:
    """tokenizer.json holds either kind; byte fallback is SentencePiece's."""
    file = folder / "tokenizer.json"
    data = read_json(file, "the vocabulary")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedCheckpoint(file, "its tokenizer is not BPE, which all Qwen1.5 models have")
    added = added_tokens(file, data.get("added_tokens"), settings)
    if model.get("byte_fallback"):
        return from_byte_fallback(file, data, merge_pairs(file, model.get("merges")), added, settings, size)
    return byte_level(file, data, added, settings, size, pre)
