"""Many prompts at once: the answers that each would get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenlocal.chat.fill import filled
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import USUAL_COSTS, CostCurve
from qwenlocal.engine.together import Request, Result, Together, worth_at_once
from qwenlocal.errors import UsageProblem

GREEDY = Sampling(temperature=0, repeat_penalty=1)
Opened = Callable[..., Context]


@pytest.fixture
def opened() -> Iterator[Opened]:
    contexts: list[Context] = []

    def open_(path: Path, *, n_ctx: int = 1024, sequences: int = 1) -> Context:
        options = ContextOptions(n_ctx, threads=1, sequences=sequences, flash_attention=False)
        contexts.append(Context(Model(path), options))
        return contexts[-1]

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


def never(_token: int) -> bool:
    return False


def prompts(count: int) -> list[list[int]]:
    return [[40, 41, 42, 43, 44, 50 + n, 51, 52][: 6 + n % 3] for n in range(count)]


def alone(context: Context, ids: list[int], limit: int) -> tuple[int, ...]:
    sequence = TokenSequence(context)
    sequence.adopt([])
    return tuple(step for step in sequence.generate(ids, GREEDY, limit=limit) if isinstance(step, int))


def by_key(results: Iterator[Result]) -> dict[int, Result]:
    return {result.key: result for result in results}


def test_answers_are_those_that_each_prompt_gets_alone(random_model: Path, opened: Opened) -> None:
    together = Together(opened(random_model, sequences=5))
    wanted = {key: alone(opened(random_model), ids, 10 + key) for key, ids in enumerate(prompts(9))}
    requests = [Request(key, ids, GREEDY, 10 + key) for key, ids in enumerate(prompts(9))]
    found = by_key(together.answer(requests, never))
    assert {key: result.ids for key, result in found.items()} == wanted
    assert not any(result.ended or result.is_full for result in found.values())


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(speaking_model: Path, opened: Opened) -> None:
    context = opened(speaking_model, sequences=3)
    word = context.model.vocabulary
    requests = [Request(key, word.tokenize("x\n", special=False), GREEDY, 50) for key in range(4)]
    found = by_key(Together(context).answer(requests, word.is_end))
    assert all(result.ended for result in found.values())
    assert {b"".join(map(word.piece, result.ids)) for result in found.values()} == {b"Paris, fun"}


def test_results_come_as_they_are_finished(random_model: Path, opened: Opened) -> None:
    requests = [Request(key, ids, GREEDY, limit) for key, (ids, limit) in enumerate(zip(prompts(2), (30, 3)))]  # noqa: B905
    order = [result.key for result in Together(opened(random_model, sequences=3)).answer(requests, never)]
    assert order == [1, 0]


def test_where_the_cache_becomes_full_some_wait_and_all_are_answered(random_model: Path, opened: Opened) -> None:
    together = Together(opened(random_model, n_ctx=256, sequences=5))
    requests = [Request(key, ids, GREEDY, 90) for key, ids in enumerate(prompts(6))]
    found = by_key(together.answer(requests, never))
    assert {key: result.ids for key, result in found.items()} == {
        key: alone(opened(random_model, n_ctx=256), ids, 90) for key, ids in enumerate(prompts(6))
    }


def test_a_first_prompt_does_not_take_the_room_of_others_that_begin_otherwise(
    random_model: Path, opened: Opened
) -> None:
    long = [[40 + start + place % 20 for place in range(300)] for start in (0, 30, 60)]
    together = Together(opened(random_model, n_ctx=512, sequences=3))
    found = by_key(together.answer([Request(key, ids, GREEDY, 4) for key, ids in enumerate(long)], never))
    assert [found[key].ids for key in range(3)] == [alone(opened(random_model), ids, 4) for ids in long]


def test_an_answer_that_outgrows_the_context_ends_there(random_model: Path, opened: Opened) -> None:
    together = Together(opened(random_model, n_ctx=256, sequences=3))
    requests = [Request(0, prompts(1)[0], GREEDY, 1000), Request(1, [40] * 300, GREEDY, 5)]
    found = by_key(together.answer(requests, never))
    assert found[0].is_full and len(found[0].ids) >= 240
    assert found[1] == Result(1, (), ended=False, is_full=True)


def test_it_can_be_stopped(endless_model: Path, opened: Opened) -> None:
    together = Together(opened(endless_model, sequences=3))
    requests = [Request(key, [40, 41], GREEDY, 5 + 90 * key) for key in range(3)]
    results = together.answer(requests, never)
    assert next(results).key == 0
    together.stop()
    assert list(results) == []


def test_as_many_at_once_as_pay() -> None:
    assert worth_at_once(CostCurve(dict.fromkeys(USUAL_COSTS, 1.0)), 16) == 16
    assert worth_at_once(CostCurve({count: float(count) for count in USUAL_COSTS}), 16) == 1
    assert worth_at_once(CostCurve(), 8) == 8


# --- templates


def test_places_are_filled() -> None:
    assert filled("To {lang}: {input} {{x}}", {"lang": "French", "input": "{lang}"}) == "To French: {lang} {x}"


def test_a_place_without_a_value_is_an_error() -> None:
    with pytest.raises(UsageProblem, match=r"a place {lang}, for which there is nothing"):
        filled("To {lang}", {})
