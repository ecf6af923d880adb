"""
The vocabulary of a checkpoint for a GGUF file: tokens, types, merges or scores, special tokens, chat templates.

Two kinds are supported: byte-level BPE (`byte_bpe`) and SentencePiece (`sentencepiece`). An inconsistent vocabulary is
an error, because the model would load and answer with nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint, UsageError
from qwenlocal.jinja import find_template_error
from qwenlocal.weights.byte_bpe import PRE_TOKENIZER_NAMES, build_byte_bpe, build_from_vocab_json
from qwenlocal.weights.checkpoint import read_json, read_optional_json
from qwenlocal.weights.sentencepiece import build_byte_fallback, build_sentencepiece
from qwenlocal.weights.tokenizer_config import read_chat_templates, read_special_tokens
from qwenlocal.weights.vocabulary import Vocabulary, parse_added_tokens, parse_merges


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
        vocabulary = build_sentencepiece(folder, settings, size)
    elif (folder / "tokenizer.json").exists():
        vocabulary = _build_from_tokenizer_json(folder, settings, size, pre)
    elif (folder / "vocab.json").exists():
        vocabulary = build_from_vocab_json(folder, settings, size, pre)
    else:
        raise BadCheckpoint(folder, "it has no tokenizer.json (nor tokenizer.model, nor vocab.json)")
    vocabulary.check_texts()
    vocabulary.special, notes = read_special_tokens(folder, settings, config, vocabulary)
    vocabulary.templates = read_chat_templates(folder, settings)
    if vocabulary.pre not in PRE_TOKENIZER_NAMES:
        raise UsageError(
            f"llama.cpp has no pre-tokenizer called “{vocabulary.pre}”.", hint="Use Qwen1.5's: --pre qwen2"
        )
    vocabulary.notes = [*notes, *_template_notes(vocabulary.templates)]
    return vocabulary


def _template_notes(templates: Mapping[str, str]) -> list[str]:
    return [
        f"The chat template{f' “{name}”' if name else ''} is invalid ({error}); it is copied unchanged."
        for name, text in templates.items()
        if (error := find_template_error(text))
    ]


def _build_from_tokenizer_json(folder: Path, settings: Mapping[str, Any], size: int, pre: str | None) -> Vocabulary:
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
