"""Vocabularies, and parsers of the parts that the tokenizer formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.formatting import brief_repr, format_quantity
from qwenlocal.weights.gguf_reader import UNUSED
from qwenlocal.weights.json_files import find_duplicate, is_integer


@dataclass
class Vocabulary:
    """
    The vocabulary of a model, with one token per row of the embeddings; `file` is its source, for errors.

    `tokens[id]` and `token_types[id]` (GGUF's numbers: 1 normal, 3 control, 5 unused, …) describe an id. Byte-level BPE
    has `merges` ("a b" in order of rank), SentencePiece has `scores`. `special` are ids by role ("eos", "bos", "pad",
    "eot", …). `add_flags` say whether a "bos" or "eos" token or a "space" is added to a text. `templates` are chat
    templates by name, the default one under "".
    """

    file: Path = field(compare=False)
    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_flags: dict[str, bool] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def first_unused(self) -> int:
        """The id from which on all ids are unused."""
        end = len(self.token_types)
        while end and self.token_types[end - 1] == UNUSED:
            end -= 1
        return end

    @classmethod
    def empty(cls, file: Path, model: str, pre: str, size: int) -> Vocabulary:
        """Return a vocabulary of `size` unused ids, which no text can produce."""
        return cls(file, model, pre, [f"[PAD{number}]" for number in range(size)], [UNUSED] * size)

    def put(self, number: Any, token: Any, token_type: int) -> None:
        """
        Give an id its token, replacing any earlier one.

        Raises
        ------
        BadCheckpoint: the embeddings have no such row, or the id or the token is malformed.
        """
        if not is_integer(number) or number < 0 or not isinstance(token, str):
            raise BadCheckpoint(
                self.file, f"the token {brief_repr(token)} with the id {brief_repr(number)} is malformed"
            )
        if number >= len(self.tokens):
            raise no_such_row(self.file, token, number, len(self.tokens))
        self.tokens[number], self.token_types[number] = token, token_type

    def put_all(self, vocabulary: Mapping[str, Any], token_type: int) -> None:
        """Call `put` for each token; if all ids are valid, without a function call for each of the 150,000."""
        numbers = vocabulary.values()
        if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= len(self.tokens):
            for token, number in vocabulary.items():
                self.put(number, token, token_type)
            return
        for token, number in vocabulary.items():
            self.tokens[number] = token
            self.token_types[number] = token_type

    def check_free(self, number: int, token: str) -> None:
        """Raise `BadCheckpoint` if the id has another token already."""
        known = self.tokens[number] if 0 <= number < len(self.tokens) else token
        if known != token and self.token_types[number] != UNUSED:
            raise same_id(self.file, number, known, token)

    def check_ids(self, vocabulary: Mapping[str, Any]) -> None:
        """Raise `BadCheckpoint` unless the ids of the vocabulary proper are contiguous, with one token each."""
        if not vocabulary:
            raise BadCheckpoint(self.file, "its vocabulary is empty")
        numbers, last = set(vocabulary.values()), max(vocabulary.values())
        if len(numbers) < len(vocabulary):
            number = find_duplicate(vocabulary.values())
            first, second, *_ = (token for token in vocabulary if vocabulary[token] == number)
            raise same_id(self.file, number, first, second)
        if last + 1 > len(numbers):
            gap = min(set(range(last)) - numbers)
            raise BadCheckpoint(self.file, f"no token has the id {gap}, although the ids go up to {last}")

    def check_texts(self) -> None:
        """
        Check that the tokens differ, and that llama.cpp can store them: it ends strings at a zero byte.

        Raises
        ------
        BadCheckpoint: two ids have the same token.
        UnsupportedCheckpoint: a token contains a zero byte or is not valid Unicode.
        """
        text = "".join(self.tokens)
        if "\0" in text or not _is_unicode(text):
            invalid = next(token for token in self.tokens if "\0" in token or not _is_unicode(token))
            raise UnsupportedCheckpoint(self.file, f"a GGUF file cannot store the token {brief_repr(invalid)}")
        if len(set(self.tokens)) < len(self.tokens):
            token = find_duplicate(self.tokens)
            first, second, *_ = (number for number, other in enumerate(self.tokens) if other == token)
            raise BadCheckpoint(self.file, f"“{token}” has two ids, {first} and {second}")


def same_id(file: Path, number: int, first: str, second: str) -> BadCheckpoint:
    """Create the error for an id that two tokens have."""
    return BadCheckpoint(file, f"“{first}” and “{second}” have the same id, {number}")


def no_such_row(file: Path, token: str, number: int, size: int) -> BadCheckpoint:
    """Create the error for an id beyond the `size` rows of the embeddings."""
    rows = format_quantity(size, "row")
    return BadCheckpoint(file, f"“{token}” has the id {number:,}, but the embeddings have only {rows}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def apply_post_processor(vocabulary: Vocabulary, post_processor: Any, settings: Mapping[str, Any]) -> None:
    """
    Set whether a token is added at the beginning ("bos") or the end ("eos") of a text, and which one that is.

    tokenizer.json's post-processor decides, if it is one that could add a token, or Qwen's (ByteLevel), which adds
    none; otherwise `settings`, which is tokenizer_config.json.

    Raises
    ------
    BadCheckpoint: the post-processor is malformed, or adds a token that does not exist.
    UnsupportedCheckpoint: it adds other tokens.
    """
    flags = {role: flag for role in ("bos", "eos") if isinstance(flag := settings.get(f"add_{role}_token"), bool)}
    for step in flatten_steps(post_processor, "processors"):
        if step.get("type") == "ByteLevel":
            flags = {"bos": False, "eos": False}
        elif step.get("type") == "TemplateProcessing":
            ends = dict(zip(("bos", "eos"), _parse_template(vocabulary.file, step.get("single")), strict=True))
            flags = {role: token is not None for role, token in ends.items()}
            vocabulary.special |= {role: _find_token(vocabulary, token) for role, token in ends.items() if token}
        else:
            raise UnsupportedCheckpoint(
                vocabulary.file,
                f"it changes tokens after tokenizing ({brief_repr(step.get('type'))}), which llama.cpp does not",
            )
    vocabulary.add_flags |= flags


def _parse_template(file: Path, parts: Any) -> tuple[str | None, str | None]:
    """
    Return the tokens that a template puts before and after a text.

    `_parse_template(file, [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}])` is `("<s>", None)`.
    """
    texts: list[str | None] = []
    for part in parts if isinstance(parts, list) else ():
        token = part.get("SpecialToken") if isinstance(part, dict) else None
        text = token.get("id") if isinstance(token, dict) else None
        if not isinstance(text, str) and not (isinstance(part, dict) and "Sequence" in part):
            raise BadCheckpoint(file, f"its post-processor contains {brief_repr(part)}, which is malformed")
        texts.append(text)
    if texts.count(None) != 1:
        raise BadCheckpoint(file, f"its post-processor is malformed: {brief_repr(parts)}")
    at = texts.index(None)
    if at > 1 or len(texts) - at > 2:
        raise UnsupportedCheckpoint(file, f"it adds several tokens to a text ({brief_repr(parts)}); llama.cpp does not")
    return (texts[0] if at else None), (texts[-1] if at + 1 < len(texts) else None)


def _find_token(vocabulary: Vocabulary, token: str) -> int:
    if token not in vocabulary.tokens:
        raise BadCheckpoint(vocabulary.file, f"its post-processor adds “{token}”, which is not a token")
    return vocabulary.tokens.index(token)


def parse_merges(file: Path, entries: Any) -> list[tuple[str, str]]:
    """
    Parse a list of merges: "a b" as transformers 4 writes it, pairs as transformers 5 does.

    Raises
    ------
    BadCheckpoint: the list is empty, or an entry is not a pair of tokens.
    """
    if not isinstance(entries, list) or not entries:
        raise BadCheckpoint(file, "it contains no merges")
    if set(map(type, entries)) == {str}:
        pairs = [entry.partition(" ") for entry in entries]
        if all(left and right and " " not in right for left, _, right in pairs):
            return [(left, right) for left, _, right in pairs]
    merges: list[tuple[str, str]] = []
    for entry in entries:
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            if not left or not right or type(entry) is dict:
                raise ValueError
            merges.append((left.replace(" ", "Ġ"), right.replace(" ", "Ġ")))
        except (ValueError, TypeError, AttributeError) as invalid:
            raise BadCheckpoint(file, f"the merge {brief_repr(entry)} is not a pair of tokens") from invalid
    return merges


def flatten_steps(step: Any, key: str) -> Iterable[Mapping[str, Any]]:
    """
    Yield the steps of a normalizer or pre-tokenizer; `key` is where a sequence of them has its list.

    A step that is no object becomes the type of one, which nobody knows.
    """
    steps = step.get(key) if isinstance(step, dict) else None
    if isinstance(steps, list) and step.get("type") == "Sequence":
        for inner in steps:
            yield from flatten_steps(inner, key)
    elif step is not None:
        yield step if isinstance(step, dict) else {"type": step}
