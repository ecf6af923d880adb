"""
The vocabulary of a checkpoint for a GGUF file: tokens, types, merges or scores, special tokens, chat templates.

Two kinds are supported: byte-level BPE (`byte_bpe`) and SentencePiece (`sentencepiece`). An inconsistent vocabulary is
an error, because the model would load and answer with nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint, UsageError
from qwenlocal.formatting import brief_repr
from qwenlocal.jinja import find_template_error
from qwenlocal.weights.added_tokens import ROLE_NAMES, read_added_tokens, read_settings, token_text
from qwenlocal.weights.byte_bpe import PRE_TOKENIZER_NAMES, build_byte_bpe, build_from_vocab_json, check_merging
from qwenlocal.weights.gguf_reader import UNUSED
from qwenlocal.weights.json_files import is_integer, read_json, read_optional_json
from qwenlocal.weights.sentencepiece import build_byte_fallback, build_sentencepiece
from qwenlocal.weights.vocabulary import Vocabulary, parse_merges

if TYPE_CHECKING:
    from typing import TypeGuard

_END_OF_TURN = "<|im_end|>"


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
    settings, files = read_settings(folder)
    if (folder / "tokenizer.model").exists():
        vocabulary = build_sentencepiece(folder, settings, size)
    elif (folder / "tokenizer.json").exists():
        vocabulary = _build_from_tokenizer_json(folder, settings, size, pre)
    elif (folder / "vocab.json").exists():
        vocabulary = build_from_vocab_json(folder, settings, size, pre)
    else:
        raise BadCheckpoint(folder, "it has no tokenizer.json (nor tokenizer.model, nor vocab.json)")
    vocabulary.check_texts()
    notes = _read_special_tokens(folder, settings, files, config, vocabulary)
    vocabulary.templates = _read_chat_templates(folder, settings)
    if vocabulary.pre not in PRE_TOKENIZER_NAMES:
        raise UsageError(
            f"llama.cpp has no pre-tokenizer called “{vocabulary.pre}”.", hint="Use Qwen1.5's: --pre qwen2"
        )
    vocabulary.notes += [*notes, *_template_notes(vocabulary.templates)]
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
    added = read_added_tokens(folder, data.get("added_tokens"), settings, size)
    if model.get("byte_fallback"):
        check_merging(file, model)
        return build_byte_fallback(file, data, parse_merges(file, model.get("merges")), added, settings, size)
    return build_byte_bpe(file, data, added, settings, size, pre)


# --- special tokens and chat templates, which several files define


def _read_special_tokens(
    folder: Path,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
) -> list[str]:
    """
    Set the ids of special tokens by role, and return notes about contradictions.

    The tokenizer's `settings`, from the `files`, take precedence over config.json; generation_config.json adds end
    tokens.

    Raises
    ------
    BadCheckpoint: the end of a text is no token, so answers would not end.
    UnsupportedCheckpoint: another token is put around a text.
    """
    ids = {token: number for number, token in enumerate(vocabulary.tokens) if vocabulary.token_types[number] != UNUSED}
    special: dict[str, int] = {}
    notes: list[str] = []
    for role in ROLE_NAMES:
        key = f"{role}_token"
        text, listed = token_text(settings.get(key)), config.get(f"{key}_id")
        number = listed[0] if isinstance(listed, list) and listed else listed
        if isinstance(text, str) and text in ids:
            special[role] = ids[text]
        elif text and role == "eos":
            raise _missing_end(folder / files[key], f"its {key}, {brief_repr(text)}, is not a token")
        elif text:
            notes.append(f"Ignored {key} in {files[key]}: {brief_repr(text)} is not a token.")
        if _is_token(number, vocabulary):
            if role in special and special[role] != number:
                kept, other = vocabulary.tokens[special[role]], vocabulary.tokens[number]
                notes.append(f"The {role} token is {kept}, as in {files[key]}, although config.json says {other}.")
            special.setdefault(role, number)
        elif number is not None:
            notes.append(f"Ignored {key}_id in config.json: {brief_repr(number)} is not the id of a token.")
    for role, number in vocabulary.special.items():
        if special.setdefault(role, number) != number:
            added, other = vocabulary.tokens[number], vocabulary.tokens[special[role]]
            raise UnsupportedCheckpoint(
                vocabulary.file, f"it adds “{added}” to every text, but the {role} token is “{other}”"
            )
    ends = _end_tokens(folder, special, config, vocabulary, ids)
    if config.get("eos_token_id") is not None and "eos" not in special and not ends:
        raise _missing_end(folder / "config.json", "its eos_token_id is not the id of a token")
    for role, number in zip(("eot", "eom"), ends, strict=False):
        special[role] = number
    left_out = [vocabulary.tokens[number] for number in ends[2:]]
    if left_out:
        notes.append(f"Left out end tokens for which GGUF has no key: {', '.join(left_out)}.")
    vocabulary.special = special
    vocabulary.add_flags |= {
        role: False for role in ("bos", "eos") if role in vocabulary.add_flags and role not in special
    }
    return notes


def _missing_end(path: Path, reason: str) -> BadCheckpoint:
    return BadCheckpoint(path, reason, hint=f"Copy the tokenizer files of its base model to {path.parent}")


def _end_tokens(
    folder: Path,
    special: Mapping[str, int],
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    ids: Mapping[str, int],
) -> list[int]:
    """Return the end tokens other than eos: the end of a turn, then those in generation_config.json and config.json."""
    numbers = [ids[_END_OF_TURN]] if _END_OF_TURN in ids else []
    generation = read_optional_json(folder / "generation_config.json")
    for listed in (generation.get("eos_token_id"), config.get("eos_token_id")):
        numbers += [n for n in (listed if isinstance(listed, list) else ()) if _is_token(n, vocabulary)]
    if _is_token(generation.get("eos_token_id"), vocabulary):
        numbers.append(generation["eos_token_id"])
    known = {number for number in (special.get("eos"), ids.get("<|endoftext|>")) if number != ids.get(_END_OF_TURN)}
    return [number for number in dict.fromkeys(numbers) if number not in known]


def _is_token(number: Any, vocabulary: Vocabulary) -> TypeGuard[int]:
    return is_integer(number) and 0 <= number < len(vocabulary.tokens) and vocabulary.token_types[number] != UNUSED


def _read_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """
    Return the chat templates by name; the default one has the name "".

    As in transformers, chat_template.jinja takes precedence over tokenizer_config.json (`settings`), and that over
    chat_template.json.

    Raises
    ------
    BadCheckpoint: a file cannot be read, or is malformed.
    """
    file = folder / "chat_template.jinja"
    template: Any = settings.get("chat_template")
    if file.exists():
        template = _read_text(file)
    elif template is None:
        template = read_optional_json(folder / "chat_template.json").get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"": template, **_read_additional_templates(folder)}
    named = {
        _sanitize(entry["name"]): entry["template"]
        for entry in (template if isinstance(template, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not named:
        raise BadCheckpoint(folder / "tokenizer_config.json", "its “chat_template” is malformed")
    named[""] = named.pop("default", next(iter(named.values())))
    return dict(sorted(named.items()))


def _read_additional_templates(folder: Path) -> dict[str, str]:
    """Read the named templates of transformers 5, one per file."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {_sanitize(file.stem): _read_text(file) for file in files}


def _read_text(file: Path) -> str:
    """Read a file byte for byte, without translating line breaks."""
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise BadCheckpoint.unreadable(file, reason) from reason


def _sanitize(name: str) -> str:
    """Keep letters and digits, since the name becomes part of a key (gguf-py, gguf_writer.py: add_chat_template)."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)
