"""Choose the turns that fit into the context window."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from qwenlocal.chat.thread import Thread, Turn

OVERFLOW_POLICIES = ("shift", "summarize", "stop")  # values of --overflow
OVERFLOW_ALIASES = {"summarise": "summarize"}
# As fractions of the context: above the first, turns are evicted, until the prompt is no longer than the second.
EVICTION_THRESHOLD, EVICTION_TARGET = 0.875, 0.5
_SUMMARY_REQUEST = (
    "Summarise our conversation so far for yourself, in at most 120 words and in its language: who wants what, names, "
    "numbers, decisions, open questions. Only the summary."
)


def select_messages(thread: Thread, evicted: Collection[int] = ()) -> list[dict[str, str]]:
    """
    Return the messages that the model reads: the system prompt, with the summary of older turns, and the turns in the
    context. `evicted` are the numbers of further questions whose turns are left out.
    """
    turns = [turn for turn in thread.turns if is_in_context(thread, turn) and turn.question.number not in evicted]
    return [*_system_message(thread), *_turn_messages(turns)]


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
