"""The kinds of tokens, in GGUF's numbers (llama.h: enum llama_token_type)."""

from __future__ import annotations

import re

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What converters call an id of the embeddings that no token has; nobody shall get it by typing this.
PADDING = re.compile(r"\[PAD\d+\]")
