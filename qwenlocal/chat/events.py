"""What happens while a model answers. Terminal, one-shot command and server only show these."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Why(str, Enum):
    """Why an answer ended; the values are words for people."""

    END = "end of answer"
    STOP = "stop string"
    LENGTH = "token limit"
    CONTEXT = "context full"
    INTERRUPTED = "interrupted"


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
        turns = "the oldest turn" if self.turns == 1 else f"the oldest {self.turns} turns"
        verb = "is" if self.turns == 1 else "are"
        instead = f" Read instead: {self.summary}" if self.summary else ""
        return f"The context is full: {turns}, from “{self.first}” on, {verb} no longer read.{instead}"


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
        reused = f" ({self.reused_tokens:,} reused)" if self.reused_tokens else ""
        return (
            f"prompt {self.prompt_tokens:,} tokens{reused}, {self.prompt_speed:.1f} tokens/s | "
            f"first token after {self.first_token:.2f} s | "
            f"answer {self.answer_tokens:,} tokens, {self.answer_speed:.1f} tokens/s | {why.value}"
        )


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
