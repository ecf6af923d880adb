"""The context window: the turns that fit into it, and how many tokens they take."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlocal.chat.chat_template import ChatTemplate, encode_messages
from qwenlocal.chat.thread import ASSISTANT, USER, Message, Thread, Turn

if TYPE_CHECKING:
    from qwenlocal.engine.tokenizer import Tokenizer

OVERFLOW_POLICIES = ("shift", "summarize", "stop")  # values of --overflow
OVERFLOW_ALIASES = {"summarise": "summarize"}
# As fractions of the context: above the first, turns are evicted, until the prompt is no longer than the second.
EVICTION_THRESHOLD, EVICTION_TARGET = 0.875, 0.5
_SUMMARY_REQUEST = (
    "Summarise our conversation so far for yourself, in at most 120 words and in its language: who wants what, names, "
    "numbers, decisions, open questions. Only the summary."
)
_EMPTY_QUESTION = [{"role": USER, "content": ""}]


class ContextWindow:
    """A context of `n_ctx` tokens, and the tokens that messages take in it: with the template's markup."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, n_ctx: int) -> None:
        self._tokenizer, self._template, self.n_ctx = tokenizer, template, n_ctx
        self._last_encoded: tuple[list[dict[str, str]] | None, list[int]] = None, []

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of the prompt. The latest are cached: tokenizing takes about a second per megabyte."""
        last = self._last_encoded  # other threads encode, too: commands while the model answers
        if messages != last[0]:
            self._last_encoded = last = messages, encode_messages(self._template, messages, self._tokenizer)
        return last[1]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokenizer.tokenize(text, special=False))

    def count_prompt_tokens(self, thread: Thread) -> int:
        """
        Return the number of tokens that a thread takes in the context; if it is empty, those of an empty question.

        It may be more than `n_ctx`: turns are evicted with the next question.
        """
        return len(self.encode(select_messages(thread) or _EMPTY_QUESTION)) - self._header_tokens

    def count_used_tokens(self, thread: Thread) -> int:
        """Return the number of tokens in the context, for people: those of the prompt, but at most `n_ctx`."""
        return min(self.count_prompt_tokens(thread), self.n_ctx)

    def count_system_tokens(self, thread: Thread) -> int:
        """Return the number of tokens of the system prompt, with an empty question."""
        messages = [{"role": "system", "content": thread.system}, *_EMPTY_QUESTION]
        return len(encode_messages(self._template, messages, self._tokenizer))

    def count_turn_tokens(self, turn: Turn) -> int:
        """Return the number of tokens that a turn adds to the prompt, including the template's markup."""
        before = [{"role": USER, "content": ""}, {"role": ASSISTANT, "content": ""}]
        messages = [message.to_dict() for message in turn.messages]
        without = encode_messages(self._template, before, self._tokenizer)
        return len(encode_messages(self._template, [*before, *messages], self._tokenizer)) - len(without)

    @functools.cached_property
    def _header_tokens(self) -> int:
        """The number of tokens of the markup that begins an answer."""
        prompt = self._template.render(_EMPTY_QUESTION)
        question = self._template.render(_EMPTY_QUESTION, add_generation_prompt=False)
        return len(self._tokenizer.tokenize(prompt.removeprefix(question), special=True))


def select_messages(thread: Thread, evicted: Collection[int] = ()) -> list[dict[str, str]]:
    """
    Return the messages that the model reads: the system prompt, with the summary of older turns, and the turns in the
    context. `evicted` are the numbers of further questions whose turns are left out.
    """
    turns = [turn for turn in thread.turns if is_in_context(thread, turn) and turn.question.number not in evicted]
    return [*_system_message(thread), *_turn_messages(turns)]


def select_messages_before(thread: Thread, answer: Message) -> list[dict[str, str]]:
    """Return the messages that the model reads when it continues `answer`, the thread's last message."""
    return select_messages(replace(thread, leaf=answer.parent))


def evictable_turns(thread: Thread) -> list[Turn]:
    """Return the turns that may leave the context, the oldest first: not the pinned ones, and not the last one."""
    in_context = [turn for turn in thread.turns if is_in_context(thread, turn)]
    return [turn for turn in in_context[:-1] if not turn.question.pinned]


def is_in_context(thread: Thread, turn: Turn) -> bool:
    """True if the model reads the turn: it is waiting for an answer, or was neither dropped nor evicted."""
    return turn.answer is None or not (turn.question.dropped or turn.question.number in thread.evicted)


def build_summary_request(thread: Thread, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the messages that ask the model to summarize `turns` together with the summary of earlier ones."""
    return [*_system_message(thread), *_turn_messages(turns), {"role": "user", "content": _SUMMARY_REQUEST}]


def _turn_messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [message.to_dict() for turn in turns for message in turn.messages]


def _system_message(thread: Thread) -> list[dict[str, str]]:
    text = thread.system
    if thread.summary:
        text = f"{text or 'You are a helpful assistant.'}\n\nSummary of the earlier conversation:\n{thread.summary}"
    return [{"role": "system", "content": text}] if text else []
