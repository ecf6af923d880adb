"""
The types of tokens as the model file states them.

llama.cpp overrides some types by the names of the tokens (llama-vocab.cpp: "control-looking token"): `</s>`, id 128247
of Qwen's vocabulary, is an ordinary token that no text of the reference contains, but llama.cpp finds it in every text
with special tokens, prints nothing for it, and ends the answer. Such a token has the attributes NORMAL and CONTROL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from qwenlocal.weights.gguf_reader import CONTROL_LOOK, NORMAL, USER_DEFINED

# llama.h: enum llama_token_attr
ATTR_UNKNOWN, ATTR_UNUSED, ATTR_NORMAL, ATTR_CONTROL, ATTR_USER_DEFINED = (1 << bit for bit in range(5))
_OVERRIDDEN = ATTR_NORMAL | ATTR_USER_DEFINED

# Tokens that llama.cpp makes user-defined, whatever the file calls them; their old types are lost (llama-vocab.cpp:
# "quick hack for gpt-oss", "workaround for o200k_harmony").
FORCED_TEXTS = frozenset(f"<|{name}|>" for name in ("channel", "message", "start", "constrain", "end"))


class TokenTypes:
    """
    The types in a file's "tokenizer.ggml.token_type".

    `read_types` reads that list, which takes 0.3 s, once llama.cpp may have another type for a token; it is empty if
    the file has none, and then llama.cpp's types are kept.
    """

    def __init__(self, c: Any, vocab: Any, read_types: Callable[[], Sequence[int]]) -> None:
        self._c, self._vocab, self._read_types = c, vocab, read_types

    @functools.cached_property
    def _declared(self) -> Sequence[int]:
        return self._read_types()

    def attributes(self, token: int) -> int:
        """Return a token's attributes (llama.h: enum llama_token_attr) by the type that the file gives it."""
        attributes = int(self._c.llama_vocab_get_attr(self._vocab, token))
        if not self._may_be_overridden(token, attributes) or not self._declared:
            return attributes
        if self._declared[token] == NORMAL:
            return ATTR_NORMAL
        if self._declared[token] == USER_DEFINED and not CONTROL_LOOK.fullmatch(self._text(token)):
            return ATTR_USER_DEFINED
        return ATTR_CONTROL

    def _may_be_overridden(self, token: int, attributes: int) -> bool:
        if attributes & ATTR_CONTROL:
            return bool(attributes & _OVERRIDDEN)
        return attributes == ATTR_USER_DEFINED and self._text(token) in FORCED_TEXTS

    def _text(self, token: int) -> str:
        return str(self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace"))
