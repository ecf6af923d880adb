"""The parts of a long text that have most to do with a question, as many as there is room for."""

from __future__ import annotations

import collections
import math
import re
import unicodedata
from collections.abc import Callable, Sequence

_WORD = re.compile(
    r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]|\w+"
)  # one letter of Chinese, Japanese, Korean; words else
_K1, _B = 1.2, 0.75  # Robertson, Zaragoza: The Probabilistic Relevance Framework: BM25 and Beyond, 2009
_PASSAGE = 1200  # letters, about 300 tokens


def pick_passages(text: str, question: str, most: int, count: Callable[[str], int]) -> str:
    """
    Passages of `text` for `question` that are at most `most` tokens together, by `count`; in the order of the text.

    Where they do not follow each other, a line with … stands between them.
    """
    passages = _passages(text)
    scores = _scores(passages, question)
    chosen: set[int] = set()
    left = most
    for place in sorted(range(len(passages)), key=lambda place: (-scores[place], place)):
        tokens = count(passages[place]) + 2
        if tokens <= left:
            chosen.add(place)
            left -= tokens
    parts, before = [], -1
    for place in sorted(chosen):
        if place != before + 1:
            parts.append("…")
        parts.append(passages[place])
        before = place
    if before != len(passages) - 1:
        parts.append("…")
    return "\n\n".join(parts)


def head(text: str, most: int, count: Callable[[str], int]) -> str:
    """The beginning of `text`, whole lines of it, at most `most` tokens."""
    lines, least, largest = text.splitlines(), 0, len(text.splitlines())
    while least < largest:
        middle = (least + largest + 1) // 2
        fits = count("\n".join(lines[:middle])) <= most
        least, largest = (middle, largest) if fits else (least, middle - 1)
    if least:
        return "\n".join(lines[:least]) + "\n…"
    return text[: most * 2] + "…"  # one line that is too long: two letters a token are rather few


def _passages(text: str) -> list[str]:
    """Paragraphs, short ones joined, long ones cut between lines."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for start in range(0, max(1, len(paragraph)), _PASSAGE * 2):
            piece = paragraph[start : start + _PASSAGE * 2].strip("\n")
            if found and len(found[-1]) + len(piece) < _PASSAGE:
                found[-1] += f"\n\n{piece}"
            elif piece.strip():
                found.append(piece)
    return found


def _scores(passages: Sequence[str], question: str) -> list[float]:
    """BM25 of each passage."""
    words = [collections.Counter(_words(passage)) for passage in passages]
    lengths = [sum(counter.values()) for counter in words]
    average = sum(lengths) / max(1, len(lengths)) or 1.0
    scores = [0.0] * len(passages)
    for term in set(_words(question)):
        having = sum(term in counter for counter in words)
        if not having:
            continue
        rare = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
        for place, counter in enumerate(words):
            often = counter[term]
            scores[place] += rare * often * (_K1 + 1) / (often + _K1 * (1 - _B + _B * lengths[place] / average))
    return scores


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
