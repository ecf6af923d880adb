"""The checkpoint's tokenizer in Hugging Face's libraries, where one is installed: independent of this converter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlocal.weights.gguf_reader import CONTROL, USER_DEFINED

Encode = Callable[[str], list[int]]

_MAX_TOKENS = 200  # added tokens in texts

# Spellings of tokens that llama.cpp takes for control tokens by their names.
_LOOKALIKES = ("<s>old</s> new", "a <pad> <eos> <EOT> [PAD] [EOS] b", "<|end|><|eot_id|><end_of_turn>\n")


@dataclass(frozen=True)
class IndependentTokenizer:
    """
    A tokenizer of the library `name`; `encode` returns the ids of a text in which control tokens are parsed.

    If the library cannot read the checkpoint, `encode` is None and `error` is its reason.
    """

    name: str
    encode: Encode | None
    error: str = ""


def open_independent_tokenizer(folder: Path) -> IndependentTokenizer | None:
    """Open the tokenizer of the checkpoint in `folder` with transformers, or else tokenizers; None without both."""
    for name, open_tokenizer in (("transformers", _open_with_transformers), ("tokenizers", _open_with_tokenizers)):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        title = f"{name} {library.__version__}"
        try:
            return IndependentTokenizer(title, open_tokenizer(library, folder))
        except Exception as reason:  # whatever the library raises is its opinion on these files, which is reported
            return IndependentTokenizer(title, None, next(iter(str(reason).splitlines()), type(reason).__name__))
    return None


def _open_with_transformers(library: Any, folder: Path) -> Encode:
    library.logging.set_verbosity_error()
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False))


def _open_with_tokenizers(library: Any, folder: Path) -> Encode:
    tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def added_token_texts(tokens: Iterable[str], token_types: Iterable[int]) -> list[str]:
    """Return texts that spell the added tokens of a vocabulary, or look as if they did."""
    pairs = zip(tokens, token_types, strict=True)
    added = [token for token, token_type in pairs if token_type in (CONTROL, USER_DEFINED)]
    return [*_LOOKALIKES, *(f"a {token} b\n{token}{token}\n c{token}d" for token in added[:_MAX_TOKENS])]
