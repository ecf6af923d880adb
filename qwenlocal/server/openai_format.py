"""Answers in the format of the OpenAI API, with llama-server's timings."""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from qwenlocal import __version__
from qwenlocal.chat.events import Done, FinishReason, GenerationStats, Text, TokenLogprob
from qwenlocal.progress import PromptProgress
from qwenlocal.server.engine import EngineEvent

_LOWEST = -9999.0  # OpenAI's logprob of an impossible token; JSON has no infinity
FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_FULL: "length",
}


def new_header(kind: str, model: str, id_prefix: str) -> dict[str, Any]:
    """Return the fields that all chunks of a response share."""
    return {
        "id": new_id(id_prefix),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"qwenlocal-{__version__}",
    }


def new_id(prefix: str) -> str:
    """`new_id("chatcmpl-")` is "chatcmpl-" and 24 random characters."""
    return f"{prefix}{secrets.token_hex(12)}"


def format_usage(ends: Sequence[Done], choices: int) -> dict[str, Any]:
    """Count the tokens of answers, `choices` of them to each prompt; a prompt counts once."""
    stats = [end.stats for end in ends]
    prompts, answers = sum(one.prompt_tokens for one in stats[::choices]), sum(one.answer_tokens for one in stats)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": answers,
        "total_tokens": prompts + answers,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in stats[::choices])},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class RunningStats:
    """The counts and times of an answer that is still growing."""

    def __init__(self) -> None:
        self._start, self._first = time.monotonic(), 0.0
        self._prompt = PromptProgress(0, 0, 0)

    def add(self, event: EngineEvent) -> GenerationStats:
        """Count an event and return the numbers so far."""
        now = time.monotonic()
        if isinstance(event, PromptProgress):
            self._prompt = event
        self._first = self._first or (now if isinstance(event, Text) else 0.0)
        count = event.tokens if isinstance(event, Text) else 0
        first, answer = (self._first - self._start, now - self._first) if self._first else (0.0, 0.0)
        return GenerationStats(self._prompt.total, self._prompt.reused, count, first, answer)


def format_timings(stats: GenerationStats) -> dict[str, Any]:
    """Return llama-server's timings of an answer (tools/server/server-task.cpp: result_timings)."""
    n_prompt = stats.prompt_tokens - stats.reused_tokens
    return {
        "cache_n": stats.reused_tokens,
        **_format_speed("prompt", n_prompt, stats.first_token),
        **_format_speed("predicted", stats.answer_tokens, stats.answer),
    }


def _format_speed(name: str, count: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": 1e3 * seconds,
        f"{name}_per_token_ms": 1e3 * seconds / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds else 0.0,
    }


# --- probabilities


def format_chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Return the `logprobs` of a choice of a chat."""
    content = [
        {
            **_format_token(token.piece, token.logprob),
            "top_logprobs": [_format_token(piece, logprob) for _, piece, logprob in token.alternatives],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _format_token(piece: bytes, logprob: float) -> dict[str, Any]:
    text = piece.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(piece)}


class CompletionLogprobs:
    """The `logprobs` of a completion; their offsets in its text continue from chunk to chunk."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def format(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the lists for the next tokens; the first token of a prompt has no probability (null)."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._decoder.decode(token.piece))
        return {
            "tokens": [_spell(token.piece) for token in tokens],
            "token_logprobs": [None if math.isnan(t.logprob) else max(t.logprob, _LOWEST) for t in tokens],
            "top_logprobs": [None if math.isnan(t.logprob) else _format_top(t) for t in tokens],
            "text_offset": offsets,
        }


def _format_top(token: TokenLogprob) -> dict[str, float]:
    """Return the most probable tokens, and always the chosen one."""
    tops = {_spell(piece): max(logprob, _LOWEST) for _, piece, logprob in reversed(token.alternatives)}
    return {**tops, _spell(token.piece): max(token.logprob, _LOWEST)}


def _spell(piece: bytes) -> str:
    """Spell a token as OpenAI does: parts of characters as bytes, so that they differ from each other."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
