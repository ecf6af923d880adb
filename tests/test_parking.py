"""Ends of a conversation that were left are kept beside it: going back computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.parking import Parking
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Prefill, TokenSequence

GREEDY = Sampling(temperature=0, repeat_penalty=1)
COMMON = [n % 200 for n in range(100)]
ONE, OTHER = [*COMMON, *[201] * 150], [*COMMON, *[202] * 150]


@pytest.fixture
def opened(random_model: Path) -> Iterator[Callable[..., Context]]:
    contexts: list[Context] = []

    def open_(n_ctx: int = 1024, sequences: int = 4) -> Context:
        options = ContextOptions(n_ctx, threads=1, sequences=sequences, flash_attention=False)
        contexts.append(Context(Model(random_model), options))
        return contexts[-1]

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


def parking(context: Context) -> TokenSequence:
    return TokenSequence(context, parking=Parking(context))


def ask(sequence: TokenSequence, ids: list[int]) -> tuple[int, list[int]]:
    """How many tokens were not computed again, and the answer."""
    steps = list(sequence.generate(ids, GREEDY, limit=12))
    assert isinstance(steps[0], Prefill)
    return steps[0].reused, [step for step in steps if isinstance(step, int)]


def test_going_back_to_what_was_left_computes_only_the_last_token(opened: Callable[..., Context]) -> None:
    sequence, fresh = parking(opened()), TokenSequence(opened(sequences=1))
    first = ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    again = ask(sequence, ONE)
    assert again == (len(ONE) - 1, first[1])
    assert ask(sequence, OTHER)[0] == len(OTHER) - 1
    assert again[1] == ask(fresh, ONE)[1]


def test_an_answer_that_was_asked_for_again_is_still_there(opened: Callable[..., Context]) -> None:
    sequence = parking(opened())
    answer = [step for step in sequence.generate(COMMON, GREEDY, limit=90) if isinstance(step, int)]
    assert ask(sequence, COMMON)[0] == len(COMMON) - 1
    reused, _ = ask(sequence, [*COMMON, *answer, 5])
    assert reused == len(COMMON) + len(answer) - 1


def test_one_sequence_alone_parks_nothing_and_works_as_before(opened: Callable[..., Context]) -> None:
    sequence = parking(opened(sequences=1))
    ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    assert ask(sequence, ONE)[0] == len(COMMON)


def test_parked_ends_make_room_when_it_is_needed(opened: Callable[..., Context]) -> None:
    context = opened(n_ctx=512)
    sequence, fresh = parking(context), TokenSequence(opened(n_ctx=512, sequences=1))
    ask(sequence, ONE)
    ask(sequence, OTHER)
    long = [*COMMON, *[203] * 390]
    assert ask(sequence, long)[1] == ask(fresh, long)[1]


def test_the_oldest_goes_when_there_are_too_many(opened: Callable[..., Context]) -> None:
    context = opened()
    places = Parking(context)
    for number in range(5):
        ids = [number] * 80
        context.truncate(0, 0)
        context.decode([(0, ids)])
        places.park(0, ids)
    assert places.best([0] * 80, 0) is None
    assert places.best([1] * 80, 0) is None
    for number in (2, 3, 4):
        found = places.best([number] * 80, 10)
        assert found is not None
        assert places.take(found, 0) == [number] * 80
        assert context.length(0) == 80


def test_a_beginning_of_what_is_parked_is_not_parked_twice(opened: Callable[..., Context]) -> None:
    context = opened()
    places = Parking(context)
    for length in (70, 90, 110):
        context.truncate(0, 0)
        context.decode([(0, [7] * length)])
        places.park(0, [7] * length)
    assert places.drop_oldest()
    assert not places.drop_oldest()
