"""Token ids of known texts, compared between a GGUF file and its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.engine.llama import Model
from qwenlocal.weights.gguf_reader import NORMAL

KnownText = tuple[str, Sequence[int] | None]
"""A text and its token ids; None if they are those of the checkpoint's own vocabulary."""


@dataclass(frozen=True)
class TokenizationError:
    """A text whose token ids differ: `expected` from the checkpoint, `actual` from the file."""

    text: str
    expected: Sequence[int]
    actual: Sequence[int]


def known_texts(tokens: Sequence[str], types: Sequence[int]) -> list[KnownText]:
    """
    Return texts of many kinds and languages to compare a vocabulary of `tokens` with token `types`.

    If it is Qwen1.5's vocabulary, the texts come with the ids of the original tokenizer (made with Hugging Face's
    tokenizers by tests/goldens/make_tokens.py), otherwise with None.
    """
    golden = json.loads((Path(__file__).parent / "qwen1.5-tokens.json").read_text(encoding="utf-8"))
    normal = [token for token, type_ in zip(tokens, types, strict=True) if type_ == NORMAL]
    is_qwen = hashlib.sha256("\n".join(normal).encode()).hexdigest() == golden["vocabulary"]
    return [(text, ids if is_qwen else None) for text, ids in golden["texts"]]


def compare_tokens(reference: Model, model: Model, texts: Sequence[KnownText]) -> list[TokenizationError]:
    """Tokenize `texts` with both models and return those whose ids differ."""
    errors = []
    for text, known in texts:
        expected = list(known) if known is not None else reference.tokenizer.tokenize(text, special=False)
        actual = model.tokenizer.tokenize(text, special=False)
        if expected != actual:
            errors.append(TokenizationError(text, expected, actual))
    return errors
