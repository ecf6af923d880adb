"""Texts whose token ids are known from the real tokenizer of Qwen1.5, to check a file's vocabulary with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qwenlocal.weights.kinds import NORMAL

Text = tuple[str, Sequence[int] | None]


def known_texts(tokens: Sequence[str], kinds: Sequence[int]) -> list[Text]:
    """
    Texts of many kinds. With Qwen1.5's own vocabulary they come with the ids of its real tokenizer, otherwise without.

    Made by tests/goldens/make_tokens.py with Hugging Face's tokenizers.
    """
    found = json.loads((Path(__file__).parent / "qwen1.5-tokens.json").read_text(encoding="utf-8"))
    plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL]
    is_qwen = hashlib.sha256("\n".join(plain).encode()).hexdigest() == found["vocabulary"]
    return [(text, ids if is_qwen else None) for text, ids in found["texts"]]
