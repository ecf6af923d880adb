"""Events while a model answers. The terminal, one-shot runs and servers only display them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qwenlocal.i18n import mark
from qwenlocal.progress import PromptProgress


class FinishReason(str, Enum):
    """
    Why an answer ended.

    The values are a file format: they are stored in the journal and in the output of --batch. Shown to people, they
    are translated.
    """

    EOS = mark("end of answer")
    STOP_STRING = mark("stop string")
    LENGTH = mark("token limit")
    CONTEXT_FULL = mark("context full")
    INTERRUPTED = mark("interrupted")


@dataclass(frozen=True)
class Summarizing:
    """The oldest `turns` do not fit into the context; the model has written `words` words of their summary."""

    turns: int
    words: int


@dataclass(frozen=True)
class TurnsEvicted:
    """
    The oldest `turns` did not fit and were removed from the context; the first of them began with `first`.

    `summary` is the model's text that replaces them and all turns that were evicted before, "" if it has written
    nothing; `lacks_room` if there was no room for it. An earlier summary stays then.
    """

    turns: int
    first: str
    summary: str = ""
    lacks_room: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """
    A token's bytes and the natural logarithm of its probability before sampling changes it: at temperature 1, without
    penalties. `alternatives` are the most probable tokens at its position, the most probable one first.
    """

    id: int
    piece: bytes
    logprob: float
    alternatives: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """The tokens of the prompt, if a request asked for their probabilities; the first one has none (NaN)."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Text:
    """
    The next text of the answer: whole characters, no control tokens.

    `tokens` counts the answer's tokens so far. `ids` are the tokens since the last event, `logprobs` their
    probabilities, if requested.
    """

    text: str
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    ids: tuple[int, ...] = ()

    def __add__(self, later: Text) -> Text:
        """Return one event instead of two."""
        return Text(self.text + later.text, later.tokens, self.logprobs + later.logprobs, self.ids + later.ids)


@dataclass(frozen=True)
class GenerationStats:
    """
    Counts in tokens, times in seconds. All counts are 0 if they are not known: a prompt has at least one token.

    `first_token` is the time from the question to the first token of the answer, `answer` from there to the last one.
    """

    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    first_token: float
    answer: float

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens processed per second, without the reused ones."""
        return (self.prompt_tokens - self.reused_tokens) / self.first_token if self.first_token else 0.0

    @property
    def answer_speed(self) -> float:
        """Answer tokens per second, from the first to the last; 0 for answers of a single token."""
        return (self.answer_tokens - 1) / self.answer if self.answer and self.answer_tokens > 1 else 0.0


@dataclass(frozen=True)
class Done:
    """
    The answer has ended.

    `ids` are its tokens without the one that ended it. They are empty after a stop string, which may begin in the
    middle of a token. `is_incomplete`: the answer was cut before it followed its grammar. `stop_string` ended it.
    """

    finish_reason: FinishReason
    stats: GenerationStats
    ids: tuple[int, ...] = ()
    is_incomplete: bool = False
    stop_string: str | None = None


Event = PromptProgress | Summarizing | TurnsEvicted | Text | Done
