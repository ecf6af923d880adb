"""What happens while a model answers. Terminal, one-shot command and server only show these."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qwenlocal.language import mark, tr


class Why(str, Enum):
    """Why an answer ended; the values are words for people, in English."""

    END = mark("end of answer")
    STOP = mark("stop string")
    LENGTH = mark("token limit")
    CONTEXT = mark("context full")
    INTERRUPTED = mark("interrupted")


@dataclass(frozen=True)
class Reading:
    """`done` of `total` prompt tokens are read; `reused` of them were in the cache from the turn before."""

    done: int
    total: int
    reused: int


@dataclass(frozen=True)
class Summarising:
    """The oldest `turns` no longer fit; the model has written `words` of what shall stand for them."""

    turns: int
    words: int


@dataclass(frozen=True)
class LeftOut:
    """
    The oldest `turns` of the conversation no longer fit and are not read any more; the first began with `first`.

    `summary` stands for all that was left out, "" where nothing does.
    """

    turns: int
    first: str
    summary: str = ""

    def sentence(self) -> str:
        """`The context is full: the oldest 3 turns, from “Hello, …” on, are no longer read.`"""
        if self.turns == 1:
            said = tr("The context is full: the oldest turn, from “{first}” on, is no longer read.", first=self.first)
        else:
            said = tr(
                "The context is full: the oldest {turns} turns, from “{first}” on, are no longer read.",
                turns=self.turns,
                first=self.first,
            )
        return said + " " + tr("Read instead: {summary}", summary=self.summary) if self.summary else said


@dataclass(frozen=True)
class Text:
    """More of the answer: whole characters, no control tokens. With it, `tokens` of the answer have come."""

    text: str
    tokens: int = 0


@dataclass(frozen=True)
class Stats:
    """Counts in tokens, times in seconds. `first_token` runs from the question to the first token of the answer."""

    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    first_token: float
    answer: float

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens read per second (without the reused ones)."""
        return (self.prompt_tokens - self.reused_tokens) / self.first_token if self.first_token else 0.0

    @property
    def answer_speed(self) -> float:
        """Answer tokens per second, from the first to the last; 0 for answers of a single token."""
        return (self.answer_tokens - 1) / self.answer if self.answer and self.answer_tokens > 1 else 0.0

    def sentence(self, why: Why) -> str:
        """All of it in one line."""
        reused = " " + tr("({count:,} reused)", count=self.reused_tokens) if self.reused_tokens else ""
        parts = (
            tr("prompt {count:,} tokens", count=self.prompt_tokens) + reused + ", " + _pace(self.prompt_speed),
            tr("first token after {seconds:.2f} s", seconds=self.first_token),
            tr("answer {count:,} tokens", count=self.answer_tokens) + ", " + _pace(self.answer_speed),
            tr(why.value),
        )
        return " | ".join(parts)


def _pace(speed: float) -> str:
    return tr("{speed:.1f} tokens/s", speed=speed)


@dataclass(frozen=True)
class Done:
    """
    The answer is over. `ids` are its tokens, without the one that ended it; none where a stop string cut it, which may
    lie in the middle of a token.
    """

    why: Why
    stats: Stats
    ids: tuple[int, ...] = ()


Event = Reading | Summarising | LeftOut | Text | Done
