"""Texts of a stream are joined while the model is fast, and nothing else waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.chat.answer_loop import AnswerItem
from qwenlocal.chat.events import Done, FinishReason, GenerationStats, Text, TokenLogprob
from qwenlocal.progress import PromptProgress
from qwenlocal.server.event_buffer import EventBuffer

Items = list[tuple[int, AnswerItem]]

DONE = Done(FinishReason.EOS, GenerationStats(1, 0, 1, 0.0, 0.0))


def token(number: int) -> Text:
    logprob = TokenLogprob(number, b"x", -1.0)
    return Text(f"{number} ", number, (logprob,), (number,))


class Clock:
    """A clock that the test sets, in milliseconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now / 1000


def pass_on(steps: Sequence[tuple[float, Items]]) -> Iterator[tuple[float, Items]]:
    """Add the items of each step at its time in milliseconds; yield what is passed on, with the time."""
    clock = Clock()
    emitted: list[tuple[float, Items]] = []
    buffer = EventBuffer(lambda items: emitted.append((clock.now, list(items))), clock=clock)
    for time, items in steps:
        clock.now = time
        buffer.add(items)
        yield from emitted
        emitted.clear()


def stream(step: float, count: int = 12) -> list[tuple[float, Items]]:
    """Return what is passed on of an answer with a token every `step` milliseconds."""
    return [*pass_on([(step * number, [(1, token(number))]) for number in range(1, count + 1)])]


def test_the_first_token_is_passed_on_at_once() -> None:
    assert stream(13)[0] == (13, [(1, token(1))])


def test_the_tokens_of_a_fast_model_are_joined_and_none_waits_longer_than_the_interval() -> None:
    times = [time for time, _ in stream(13)]
    assert times == [13, 65, 117]  # the next token would come 65 ms after the last text
    (_, item), *others = stream(13)[1][1]
    assert not others and isinstance(item, Text)
    assert (item.text, item.tokens, item.ids) == ("2 3 4 5 ", 5, (2, 3, 4, 5))
    assert [logprob.id for logprob in item.logprobs] == [2, 3, 4, 5]


@pytest.mark.parametrize("step", [31, 50, 400])
def test_the_tokens_of_a_slow_model_are_passed_on_one_by_one(step: float) -> None:
    assert stream(step) == [(step * number, [(1, token(number))]) for number in range(1, 13)]


def test_the_end_and_errors_take_along_what_waits() -> None:
    error = RuntimeError()
    for end in (DONE, error):
        steps: list[tuple[float, Items]] = [
            (100, [(1, token(1))]),
            (102, [(1, token(2))]),
            (104, [(1, token(3)), (1, end)]),
        ]
        (_, first), (time, second) = pass_on(steps)
        assert first == [(1, token(1))]
        assert time == 104 and second == [(1, token(2) + token(3)), (1, end)]


def test_another_answer_begins_at_once() -> None:
    steps: list[tuple[float, Items]] = [
        (100, [(1, token(1))]),
        (102, [(1, token(2))]),
        (104, [(1, token(3)), (2, PromptProgress(4, 4, 0)), (2, token(1))]),
        (106, [(1, token(4)), (2, token(2))]),
        (108, [(1, DONE)]),
        (110, [(1, token(1))]),
    ]
    assert [items for _, items in pass_on(steps)] == [
        [(1, token(1))],
        [(1, token(2) + token(3)), (2, PromptProgress(4, 4, 0)), (2, token(1))],
        [(1, token(4)), (2, token(2)), (1, DONE)],
        [(1, token(1))],  # the same key again
    ]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.sampled_from(["text", "progress", "done"]))))
def test_nothing_is_lost_and_every_answer_keeps_its_order(choices: list[tuple[int, int, str]]) -> None:
    time, steps = 0, list[tuple[float, Items]]()
    for number, (pause, key, kind) in enumerate(choices, 1):
        time += pause
        item = {"text": token(number), "progress": PromptProgress(number, number, 0), "done": DONE}[kind]
        steps.append((time, [(key, item)]))
    steps.append((time, [(9, DONE)]))  # passes on what waits

    def parts(items: Items, key: int) -> list[object]:
        """Return the tokens and events of an answer."""
        found: list[object] = []
        for owner, item in items:
            if owner == key:
                found.extend(item.ids if isinstance(item, Text) else [item])
        return found

    added = [item for _, items in steps for item in items]
    emitted = [item for _, items in pass_on(steps) for item in items]
    for key in range(4):
        assert parts(emitted, key) == parts(added, key)
