"""Continuous batching gives each prompt the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from generation import GREEDY, OpenContext, answer

from qwenlocal.cli.text_input import fill_placeholders
from qwenlocal.engine.batching import BatchGenerator, BatchRequest, BatchResult, choose_batch_size
from qwenlocal.engine.context import Context
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import DEFAULT_COSTS, CostCurve
from qwenlocal.errors import UsageError


def never(_token: int) -> bool:
    return False


def prompts(count: int) -> list[list[int]]:
    return [[40, 41, 42, 43, 44, 50 + n, 51, 52][: 6 + n % 3] for n in range(count)]


def alone(context: Context, ids: list[int], limit: int) -> tuple[int, ...]:
    sequence = TokenSequence(context)
    sequence.adopt([])
    return tuple(answer(sequence, ids, limit))


def by_key(results: Iterator[BatchResult]) -> dict[int, BatchResult]:
    return {result.key: result for result in results}


def test_answers_equal_those_of_separate_runs(random_model: Path, open_context: OpenContext) -> None:
    generator = BatchGenerator(open_context(random_model, n_seq_max=5))
    expected = {key: alone(open_context(random_model), ids, 10 + key) for key, ids in enumerate(prompts(9))}
    requests = [BatchRequest(key, ids, GREEDY, 10 + key) for key, ids in enumerate(prompts(9))]
    results_by_key = by_key(generator.generate(requests, never))
    assert {key: result.ids for key, result in results_by_key.items()} == expected
    assert not any(result.hit_eos or result.is_full for result in results_by_key.values())


def test_an_end_token_ends_an_answer_and_is_not_part_of_it(speaking_model: Path, open_context: OpenContext) -> None:
    context = open_context(speaking_model, n_seq_max=3)
    tokenizer = context.model.tokenizer
    requests = [BatchRequest(key, tokenizer.tokenize("x\n", special=False), GREEDY, 50) for key in range(4)]
    results_by_key = by_key(BatchGenerator(context).generate(requests, tokenizer.is_end))
    assert all(result.hit_eos for result in results_by_key.values())
    assert {b"".join(map(tokenizer.piece, result.ids)) for result in results_by_key.values()} == {b"Paris, fun"}


def test_results_are_yielded_as_they_finish(random_model: Path, open_context: OpenContext) -> None:
    requests = [
        BatchRequest(key, ids, GREEDY, limit) for key, (ids, limit) in enumerate(zip(prompts(2), (30, 3), strict=True))
    ]
    order = [result.key for result in BatchGenerator(open_context(random_model, n_seq_max=3)).generate(requests, never)]
    assert order == [1, 0]


def test_requests_wait_while_the_cache_is_full_and_all_are_answered(
    random_model: Path, open_context: OpenContext
) -> None:
    generator = BatchGenerator(open_context(random_model, n_ctx=256, n_seq_max=5))
    requests = [BatchRequest(key, ids, GREEDY, 90) for key, ids in enumerate(prompts(6))]
    results_by_key = by_key(generator.generate(requests, never))
    assert {key: result.ids for key, result in results_by_key.items()} == {
        key: alone(open_context(random_model, n_ctx=256), ids, 90) for key, ids in enumerate(prompts(6))
    }


def test_the_shared_prefix_makes_room_for_prompts_without_it(random_model: Path, open_context: OpenContext) -> None:
    long = [[40 + start + place % 20 for place in range(300)] for start in (0, 30, 60)]
    generator = BatchGenerator(open_context(random_model, n_ctx=512, n_seq_max=3))
    results_by_key = by_key(
        generator.generate([BatchRequest(key, ids, GREEDY, 4) for key, ids in enumerate(long)], never)
    )
    assert [results_by_key[key].ids for key in range(3)] == [alone(open_context(random_model), ids, 4) for ids in long]


def test_an_answer_ends_at_the_end_of_the_context(random_model: Path, open_context: OpenContext) -> None:
    generator = BatchGenerator(open_context(random_model, n_ctx=256, n_seq_max=3))
    requests = [BatchRequest(0, prompts(1)[0], GREEDY, 1000), BatchRequest(1, [40] * 300, GREEDY, 5)]
    results_by_key = by_key(generator.generate(requests, never))
    assert results_by_key[0].is_full and len(results_by_key[0].ids) >= 240
    assert results_by_key[1] == BatchResult(1, (), hit_eos=False, is_full=True)


def test_stopping_ends_all_answers(endless_model: Path, open_context: OpenContext) -> None:
    generator = BatchGenerator(open_context(endless_model, n_seq_max=3))
    requests = [BatchRequest(key, [40, 41], GREEDY, 5 + 90 * key) for key in range(3)]
    results = generator.generate(requests, never)
    assert next(results).key == 0
    generator.stop()
    assert list(results) == []


def test_the_batch_size_follows_the_costs() -> None:
    assert choose_batch_size(CostCurve(dict.fromkeys(DEFAULT_COSTS, 1.0)), 16) == 16
    assert choose_batch_size(CostCurve({count: float(count) for count in DEFAULT_COSTS}), 16) == 1
    assert choose_batch_size(CostCurve(), 8) == 8


# --- templates


def test_placeholders_are_filled() -> None:
    assert (
        fill_placeholders("To {lang}: {input} {{x}}", {"lang": "French", "input": "{lang}"}) == "To French: {lang} {x}"
    )


def test_a_placeholder_without_a_value_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"placeholder {lang} of the template has no value"):
        fill_placeholders("To {lang}", {})
