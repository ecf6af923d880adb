"""The checkpoint's tokenizer in Hugging Face's libraries, where one is installed: independent of this converter."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qwenlocal.weights.gguf_reader import CONTROL, USER_DEFINED

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
    encode: Callable[[str], list[int]] | None
    error: str = ""


def open_independent_tokenizer(folder: Path) -> IndependentTokenizer | None:
    """Open the tokenizer of the checkpoint in `folder` with transformers, or else tokenizers; None without both."""
    for open_tokenizer in (_open_with_transformers, _open_with_tokenizers):
        try:
            return open_tokenizer(folder)
        except ImportError:
            continue
    return None


def _open_with_transformers(folder: Path) -> IndependentTokenizer:
    transformers = importlib.import_module("transformers")
    name = f"transformers {transformers.__version__}"
    try:
        transformers.logging.set_verbosity_error()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as reason:  # whatever the library raises is its opinion on these files, which is reported
        return IndependentTokenizer(name, None, _first_line(reason))
    return IndependentTokenizer(name, lambda text: list(tokenizer.encode(text, add_special_tokens=False)))


def _open_with_tokenizers(folder: Path) -> IndependentTokenizer:
    tokenizers = importlib.import_module("tokenizers")
    name = f"tokenizers {tokenizers.__version__}"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as reason:  # the library raises nothing more specific
        return IndependentTokenizer(name, None, _first_line(reason))
    return IndependentTokenizer(name, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))


def _first_line(reason: Exception) -> str:
    return next(iter(str(reason).splitlines()), type(reason).__name__)


def added_token_texts(tokens: Iterable[str], token_types: Iterable[int]) -> list[str]:
    """Return texts that spell the added tokens of a vocabulary, or look as if they did."""
    pairs = zip(tokens, token_types, strict=True)
    added = [token for token, token_type in pairs if token_type in (CONTROL, USER_DEFINED)]
    return [*_LOOKALIKES, *(f"a {token} b\n{token}{token}\n c{token}d" for token in added[:_MAX_TOKENS])]
