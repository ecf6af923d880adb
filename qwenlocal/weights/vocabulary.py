"""
The vocabulary of a checkpoint for a GGUF file: tokens, types, merges or scores, special tokens, chat templates.

Two kinds are supported: byte-level BPE (`byte_bpe`) and SentencePiece (`sentencepiece`). An inconsistent vocabulary is
an error, because the model would load and answer with nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint, UsageError
from qwenlocal.jinja import find_template_error
from qwenlocal.weights.byte_bpe import PRE_TOKENIZER_NAMES, build_byte_bpe, build_from_vocab_json
from qwenlocal.weights.checkpoint import read_json, read_optional_json
from qwenlocal.weights.gguf_reader import UNUSED
from qwenlocal.weights.sentencepiece import build_byte_fallback, build_sentencepiece
from qwenlocal.weights.tokenizer_config import read_chat_templates, read_special_tokens
from qwenlocal.weights.vocab_builder import VocabBuilder, parse_added_tokens, parse_merges


@dataclass(frozen=True)
class Vocabulary:
    """
    `tokens[id]` and `token_types[id]` (GGUF's numbers: 1 normal, 3 control, 5 unused, …) for each embedding row.

    Byte-level BPE has `merges` ("a b" in order of rank), SentencePiece has `scores`. `special` are ids by role ("eos",
    "bos", "pad", "eot", …). `add_flags` say whether a "bos" or "eos" token or a "space" is added to a text. `templates`
    are chat templates by name, the default one under "".
    """

    model: str
    pre: str
    tokens: Sequence[str]
    token_types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    special: Mapping[str, int] = field(default_factory=dict)
    add_flags: Mapping[str, bool] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def first_unused(self) -> int:
        """The id from which on all ids are unused."""
        end = len(self.token_types)
        while end and self.token_types[end - 1] == UNUSED:
            end -= 1
        return end


def read_vocabulary(folder: Path, config: Mapping[str, Any], size: int, *, pre: str | None = None) -> Vocabulary:
    """
    Read the vocabulary of the checkpoint in `folder`, padded to `size` ids, the rows of its embedding matrix.

    `pre` names the pre-tokenizer if the checkpoint's regular expression is not a known one.

    Raises
    ------
    BadCheckpoint: a file is missing or damaged, or ids are duplicate, out of range or missing in between.
    UnsupportedCheckpoint: llama.cpp has no such tokenizer.
    UsageError: llama.cpp has no pre-tokenizer `pre`.
    """
    settings = read_optional_json(folder / "tokenizer_config.json", "the special tokens")
    if (folder / "tokenizer.model").exists():
        builder = build_sentencepiece(folder, settings, size)
    elif (folder / "tokenizer.json").exists():
        builder = _build_from_tokenizer_json(folder, settings, size, pre)
    elif (folder / "vocab.json").exists():
        builder = build_from_vocab_json(folder, settings, size, pre)
    else:
        raise BadCheckpoint(folder, "it has no tokenizer.json (nor tokenizer.model, nor vocab.json)")
    builder.check_texts()
    special, notes = read_special_tokens(folder, settings, config, builder)
    templates = read_chat_templates(folder, settings)
    if builder.pre not in PRE_TOKENIZER_NAMES:
        raise UsageError(f"llama.cpp has no pre-tokenizer called “{builder.pre}”.", hint="Use Qwen1.5's: --pre qwen2")
    return Vocabulary(
        builder.model,
        builder.pre,
        builder.tokens,
        builder.token_types,
        builder.merges,
        builder.scores,
        special,
        builder.add_flags,
        templates,
        [*notes, *_template_notes(templates)],
    )


def _template_notes(templates: Mapping[str, str]) -> list[str]:
    return [
        f"The chat template{f' “{name}”' if name else ''} is invalid ({error}); it is copied unchanged."
        for name, text in templates.items()
        if (error := find_template_error(text))
    ]


def _build_from_tokenizer_json(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> VocabBuilder:
    """Build either kind of vocabulary; byte fallback is SentencePiece's."""
    file = folder / "tokenizer.json"
    data = read_json(file, "the vocabulary")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedCheckpoint(file, "its tokenizer is not BPE, as that of every Qwen1.5 model is")
    added = parse_added_tokens(file, data.get("added_tokens"), settings)
    if model.get("byte_fallback"):
        return build_byte_fallback(file, data, parse_merges(file, model.get("merges")), added, settings, size)
    return build_byte_bpe(file, data, added, settings, size, pre)
