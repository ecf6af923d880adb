"""
Tokens that other files add to a vocabulary, and the roles of tokens, in transformers' order of precedence.

A tokenizer_config.json with "added_tokens_decoder" lists every added token, and the other files do not count. Without
it, special_tokens_map.json takes precedence over tokenizer_config.json, and the added tokens are those of
added_tokens.json, as slow tokenizers write it, and of tokenizer.json (transformers, tokenization_utils_base.py:
_from_pretrained).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr
from qwenlocal.weights.gguf_reader import CONTROL, CONTROL_LOOK, USER_DEFINED
from qwenlocal.weights.json_files import is_integer, read_optional_json
from qwenlocal.weights.vocabulary import no_such_row, same_id

ROLE_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order of transformers
SETTINGS, ROLES, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")

# What the tokenizers do around an added token, and llama.cpp does not.
_FLAGS = {
    "lstrip": "removes the spaces before “{token}” (lstrip)",
    "rstrip": "removes the spaces after “{token}” (rstrip)",
    "single_word": "finds “{token}” only as a separate word (single_word)",
}


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Read tokenizer_config.json, with the roles in special_tokens_map.json if these take precedence.

    Returns the settings, and the name of the file that each is from.

    Raises
    ------
    BadCheckpoint: a file cannot be read.
    """
    settings, roles = read_optional_json(folder / SETTINGS), dict[str, Any]()
    if _DECODER not in settings:
        roles = read_optional_json(folder / ROLES)
    additional = {key: [*_as_list(settings.get(key)), *_as_list(roles.get(key))] for key in _ADDITIONAL}
    files = {**dict.fromkeys(settings, SETTINGS), **dict.fromkeys(roles, ROLES)}
    return {**settings, **roles, **{key: tokens for key, tokens in additional.items() if tokens}}, files


def token_text(entry: Any) -> Any:
    """Return the text of a token, which may be an object with the flags of an added token."""
    return entry.get("content") if isinstance(entry, dict) else entry


def special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """Return the texts of the special tokens: those with a role, then the others."""
    entries = [settings.get(f"{role}_token") for role in ROLE_NAMES]
    for key in _ADDITIONAL:
        entries += _as_list(settings.get(key))
    return [token_text(entry) for entry in entries]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_added_tokens(folder: Path, entries: Any, settings: Mapping[str, Any], size: int) -> dict[int, tuple[str, int]]:
    """
    Return the text and the type of each added token by id.

    `entries` are the "added_tokens" of tokenizer.json, None without that file; `settings` are from `read_settings`; the
    embeddings have `size` rows.

    Raises
    ------
    BadCheckpoint: a list or an entry is malformed, or two contradict each other.
    UnsupportedCheckpoint: the tokenizers do something around a token that llama.cpp does not.
    """
    file = folder / "tokenizer.json"
    if not isinstance(entries, (list, type(None))):
        raise BadCheckpoint(file, f"its “added_tokens” is not a list of tokens but {brief_repr(entries)}")
    listed, others = [(file, entry) for entry in entries or ()], list(_read_other_files(folder, settings))
    tokens: dict[int, dict[str, Any]] = {}
    for path, entry in [*others, *listed] if _DECODER in settings else [*listed, *others]:
        number, token = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not is_integer(number) or number < 0 or not isinstance(token, str) or not token:
            raise BadCheckpoint(path, f"the added token {brief_repr(entry)} is malformed")
        if number >= size:
            raise no_such_row(path, token, number, size)
        _check_flags(path, token, entry)
        known = tokens.setdefault(number, entry)
        if known["content"] != token:
            raise same_id(path, number, known["content"], token)
        tokens[number] = {**entry, **known}
    return {number: (entry["content"], _token_type(entry)) for number, entry in tokens.items()}


def _read_other_files(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the file and the added tokens of tokenizer_config.json or, if it has no list, of added_tokens.json."""
    if _DECODER in settings:
        file, decoder = folder / SETTINGS, settings[_DECODER]
        if not isinstance(decoder, dict):
            raise BadCheckpoint(file, f"its “{_DECODER}” is not an object but {brief_repr(decoder)}")
        for text, entry in decoder.items():
            number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text
            yield file, {**entry, "id": number} if isinstance(entry, dict) else entry
        return
    file = folder / ADDED_TOKENS
    special = special_tokens(settings)
    for token, number in read_optional_json(file).items():
        yield file, {"id": number, "content": token, "special": token in special}


def _token_type(entry: Mapping[str, Any]) -> int:
    return CONTROL if entry.get("special") or CONTROL_LOOK.fullmatch(entry["content"]) else USER_DEFINED


def _check_flags(file: Path, token: str, entry: Mapping[str, Any]) -> None:
    for flag, effect in _FLAGS.items():
        if entry.get(flag):
            raise UnsupportedCheckpoint(
                file,
                f"its tokenizer {effect.format(token=token)}, which llama.cpp does not",
                hint=f'To convert it without that, set "{flag}" of the token to false in its tokenizer files.',
            )
