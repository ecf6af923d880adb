"""A vocabulary while it is put together from the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.checkpoint import shortly
from qwenlocal.weights.kinds import CONTROL, UNUSED, USER_DEFINED


@dataclass
class Draft:
    """A vocabulary while it is put together. `file` is where it comes from."""

    file: Path
    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    adds: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def empty(cls, file: Path, model: str, pre: str, size: int) -> Draft:
        """Nothing but ids without a token, which no text can reach."""
        return cls(file, model, pre, [f"[PAD{number}]" for number in range(size)], [UNUSED] * size)

    def put(self, number: Any, token: Any, kind: int) -> None:
        """
        Give an id its token, whatever it was before.

        Raises
        ------
        BadCheckpoint: the embeddings have no such row, or it is no id and token at all.
        """
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(token, str) or number < 0:
            raise BadCheckpoint(
                self.file, f"the token {shortly(token)} with the id {shortly(number)} has the wrong form"
            )
        if number >= len(self.tokens):
            raise BadCheckpoint(
                self.file, f"“{token}” has the id {number:,}, but the embeddings have only {len(self.tokens):,} rows"
            )
        self.tokens[number], self.kinds[number] = token, kind

    def put_all(self, vocabulary: Mapping[str, Any], kind: int) -> None:
        """`put` for many; a hundred and fifty thousand at once where all have the right form."""
        numbers = vocabulary.values()
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= len(self.tokens):
            for token, number in vocabulary.items():
                self.put(number, token, kind)
            return
        for token, number in vocabulary.items():
            self.tokens[number] = token
            self.kinds[number] = kind

    def add(self, added: Mapping[int, tuple[str, int]]) -> None:
        """Tokens beside the vocabulary proper; an id that it has given to another token is not theirs."""
        for number, (token, kind) in added.items():
            self.check_free(number, token)
            self.put(number, token, kind)

    def check_free(self, number: int, token: str) -> None:
        """The id has no token yet, or this very one."""
        known = self.tokens[number] if 0 <= number < len(self.tokens) else token
        if known != token and self.kinds[number] != UNUSED:
            raise BadCheckpoint(self.file, f"the id {number} is given twice, to “{known}” and to “{token}”")

    def check_holes(self, vocabulary: Mapping[str, Any]) -> None:
        """Ids of the vocabulary proper are given to one token each, without gaps."""
        if not vocabulary:
            raise BadCheckpoint(self.file, "its vocabulary is empty")
        last = max(vocabulary.values())
        if last + 1 == len(vocabulary):
            numbers = set(vocabulary.values())
            if len(numbers) == len(vocabulary):
                return
        seen: dict[int, str] = {}
        for token, number in vocabulary.items():
            if number in seen:
                raise BadCheckpoint(self.file, f"the id {number} is given twice, to “{seen[number]}” and to “{token}”")
            seen[number] = token
        hole = next(number for number in range(last) if number not in seen)
        raise BadCheckpoint(self.file, f"no token has the id {hole}, though others go up to {last}")

    def check_texts(self) -> None:
        """Each token has a text of its own, and one that llama.cpp can keep: it ends texts at a zero byte."""
        whole = "".join(self.tokens)
        if "\0" in whole or not _is_text(whole):
            wrong = next(token for token in self.tokens if "\0" in token or not _is_text(token))
            raise UnsupportedCheckpoint(self.file, f"the token {shortly(wrong)} cannot stand in a GGUF file")
        if len(set(self.tokens)) < len(self.tokens):
            first: dict[str, int] = {}
            for number, token in enumerate(self.tokens):
                if token in first:
                    raise BadCheckpoint(self.file, f"“{token}” has two ids, {first[token]} and {number}")
                first[token] = number


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def adds(post: Any, settings: Mapping[str, Any]) -> dict[str, bool]:
    """
    Whether a token is put at a text's beginning or end.

    tokenizer.json's post-processor says so, or does not (ByteLevel, as Qwen's is); where it is silent, the settings do.
    """
    found = {role: flag for role in ("bos", "eos") if isinstance(flag := settings.get(f"add_{role}_token"), bool)}
    inner = post.get("processors") if isinstance(post, dict) else None
    for step in inner if isinstance(inner, list) else [post]:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(step, dict) and step.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False}
        elif isinstance(single, list) and single and step.get("type") == "TemplateProcessing":
            ends = (isinstance(single[n], dict) and "SpecialToken" in single[n] for n in (0, -1))
            found = dict(zip(("bos", "eos"), ends, strict=True))
    return found


def added_tokens(file: Path, listed: Any, settings: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """Tokens beside the vocabulary proper, as tokenizer.json and tokenizer_config.json list them: id → text, kind."""
    found: dict[int, tuple[str, int]] = {}
    decoder = settings.get("added_tokens_decoder")
    entries: list[Any] = [
        {**entry, "id": int(number) if re.fullmatch(r"[0-9]{1,9}", number) else number}
        for number, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict)
    ]
    if not isinstance(listed, (list, type(None))):
        raise BadCheckpoint(file, f"its “added_tokens” is {shortly(listed)}, no list of tokens")
    entries += listed or []
    for entry in entries:
        number, token = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(token, str) or not token:
            raise BadCheckpoint(file, f"the added token {shortly(entry)} has the wrong form")
        known = found.get(number)
        if known and known[0] != token:
            raise BadCheckpoint(file, f"the id {number} is given twice, to “{known[0]}” and to “{token}”")
        found[number] = (token, CONTROL if entry.get("special") or _looks_special(token) else USER_DEFINED)
    return found


def _looks_special(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")


def merge_pairs(file: Path, found: Any) -> list[tuple[str, str]]:
    """transformers 4 writes "a b", transformers 5 pairs."""
    if not isinstance(found, list) or not found:
        raise BadCheckpoint(file, "there are no merges in it")
    if set(map(type, found)) == {str}:
        pairs = [entry.partition(" ") for entry in found]
        if all(left and right and " " not in right for left, _, right in pairs):
            return [(left, right) for left, _, right in pairs]
    merges: list[tuple[str, str]] = []
    for entry in found:
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            if not left or not right or type(entry) is dict:
                raise ValueError
            merges.append((left.replace(" ", "Ġ"), right.replace(" ", "Ġ")))
        except (ValueError, TypeError, AttributeError) as wrong:
            raise BadCheckpoint(file, f"the merge {shortly(entry)} is not a pair of tokens") from wrong
    return merges


def steps_of(found: Any, inside: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a sequence, or the one step that there is; `inside` is the name of the list."""
    if not isinstance(found, dict):
        return
    inner = found.get(inside)
    if found.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from steps_of(step, inside)
    else:
        yield found
