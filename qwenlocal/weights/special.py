"""Tokens with a role: those that end an answer above all, which several files of a checkpoint name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlocal.weights.checkpoint import optional_json, shortly
from qwenlocal.weights.draft import Draft
from qwenlocal.weights.kinds import UNUSED

if TYPE_CHECKING:
    from typing import TypeGuard

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_END_OF_TURN = "<|im_end|>"


def special_tokens(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], draft: Draft
) -> tuple[dict[str, int], list[str]]:
    """Ids by role: tokenizer_config.json first, then config.json; every end that generation_config.json names."""
    ids = {token: number for number, token in enumerate(draft.tokens) if draft.kinds[number] != UNUSED}
    found: dict[str, int] = {}
    notes: list[str] = []
    for role in _SPECIAL:
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            found[role] = ids[text]
        elif text:
            notes.append(f"tokenizer_config.json's {role}_token, {shortly(text)}, is no token; it is passed over.")
        number = config.get(f"{role}_token_id")
        if _is_id(number, draft):
            if role in found and found[role] != number:
                written, other = draft.tokens[found[role]], draft.tokens[number]
                notes.append(f"The files disagree on {role}: tokenizer_config.json's {written} is kept, not {other}.")
            found.setdefault(role, number)
        elif number is not None:
            notes.append(f"config.json's {role}_token_id, {shortly(number)}, is no token's; it is passed over.")
    ends = _ends(folder, found, draft, ids)
    for role, number in zip(("eot", "eom"), ends, strict=False):
        found[role] = number
    unsaid = [draft.tokens[number] for number in ends[2:]]
    if unsaid:
        notes.append(f"GGUF has no place for further end tokens: {', '.join(unsaid)}.")
    return found, notes


def _ends(folder: Path, found: Mapping[str, int], draft: Draft, ids: Mapping[str, int]) -> list[int]:
    """Tokens beside eos with which the model ends: the end of a turn first, then what the makers' settings list."""
    listed = optional_json(folder / "generation_config.json", "").get("eos_token_id")
    numbers = [ids[_END_OF_TURN]] if _END_OF_TURN in ids else []
    numbers += [number for number in (listed if isinstance(listed, list) else [listed]) if _is_id(number, draft)]
    known = {number for number in (found.get("eos"), ids.get("<|endoftext|>")) if number != ids.get(_END_OF_TURN)}
    return [number for number in dict.fromkeys(numbers) if number not in known]


def _is_id(number: Any, draft: Draft) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(draft.tokens)
