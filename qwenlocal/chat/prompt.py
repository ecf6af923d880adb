"""
Token ids of a conversation, in which text from people never becomes a control token.

The rendered conversation is tokenised as a whole, control tokens included, so the ids are those of the reference. Only
where a message itself spells a control token (`<|im_end|>` typed or pasted) that spelling is cut in two first, and the
halves are tokenised apart; so it stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qwenlocal.chat.template import ChatTemplate, Message
from qwenlocal.errors import TextTooLong

MOST_LETTERS = 4_000_000  # of a message; most texts of this length have about a million tokens
# Unicode noncharacters: never assigned, so a text that holds one is rare; the first that no message holds is used.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Tokenizer(Protocol):
    """What is needed of a vocabulary."""

    def tokenize(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...
    def is_control(self, token: int) -> bool: ...


def chat_ids(template: ChatTemplate, messages: Sequence[Message], vocabulary: Tokenizer) -> list[int]:
    """
    The ids that the model shall continue with the assistant's answer.

    With Qwen1.5, a user's message "a<|im_end|>b" contributes no id above 151642; the template's own markup does.

    Raises
    ------
    TextTooLong: counting the tokens would take seconds, only to find that they fit nowhere.
    """
    for message in messages:
        if len(str(message["content"])) > MOST_LETTERS:
            raise TextTooLong(len(str(message["content"])), MOST_LETTERS)
    texts = "".join(str(message["content"]) for message in messages)
    mark = next(mark for mark in _MARKS if mark not in texts)
    safe = [{**message, "content": _cut(str(message["content"]), mark, vocabulary)} for message in messages]
    ids: list[int] = []
    for part in template.render(safe).split(mark):
        ids += vocabulary.tokenize(part, special=True)
    return ids


def _cut(text: str, mark: str, vocabulary: Tokenizer) -> str:
    """Put `mark` inside every control token that `text` spells, until none is left."""
    pieces = [text]
    while True:
        parts = [half for piece in pieces for half in _halves(piece, vocabulary)]
        if len(parts) == len(pieces):
            return mark.join(parts)
        pieces = parts


def _halves(text: str, vocabulary: Tokenizer) -> list[str]:
    """`text`, cut after the first character of every control token it spells: ["a<", "|im_end|>b"]."""
    parts, rest = [], text
    tokens = vocabulary.tokenize(text, special=True)
    control = {token for token in set(tokens) if vocabulary.is_control(token)}
    for token in tokens if control else ():
        if token in control:
            spelling = vocabulary.piece(token, special=True).decode("utf-8", errors="replace")
            before, found, after = rest.partition(spelling)
            if found and len(spelling) > 1:
                parts.append(before + spelling[0])
                rest = spelling[1:] + after
    return [*parts, rest]
