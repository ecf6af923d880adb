"""Prompt lookup: drafts from earlier text give the same answers in fewer steps."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from generation import CHEAP, GREEDY, OpenContext, answer
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import DEFAULT_COSTS, CostCurve, NgramIndex, Speculation

# --- guesses


def test_the_draft_is_the_earlier_continuation_of_the_last_tokens() -> None:
    index = NgramIndex()
    index.extend([5, 6, 7, 8, 9, 5, 6, 7])
    assert index.guess(3) == ([8, 9, 5], 3, False)
    assert index.guess(1) == ([8], 3, False)


def test_the_latest_occurrence_with_the_longest_agreement_counts() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 5, 6, 77, 4, 5, 6, 9, 1, 2, 3, 4, 5, 6])
    assert index.guess(1) == ([77], 6, False)
    index.extend([9, 8, 4, 5, 6])
    assert index.guess(1) == ([9], 3, True)


def test_a_guess_ends_where_two_occurrences_differ() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 40, 41, 50, 1, 2, 3, 40, 41, 60, 1, 2, 3])
    assert index.guess(9) == ([40, 41], 3, True)
    index.extend([70, 1, 2, 3])
    assert index.guess(9) == ((), 0, False)  # two ways on, and nothing speaks for one of them


def test_a_guess_says_how_many_tokens_agree() -> None:
    index = NgramIndex()
    index.extend([*range(100, 140), *range(100, 123)])
    assert index.guess(2) == ([123, 124], 12, False)
    index.extend([123])
    assert index.guess(2) == ([124, 125], 24, False)


@given(st.lists(st.integers(0, 3), max_size=60))
def test_a_guess_followed_an_equal_ngram_before(ids: list[int]) -> None:
    index = NgramIndex()
    index.extend(ids)
    tokens, agreed, twice = index.guess(5)
    if not tokens:
        assert (agreed, twice) == (0, False)
        return
    last = ids[-agreed:]
    places = [at for at in range(agreed, len(ids)) if ids[at - agreed : at] == last]
    came = [ids[at : at + len(tokens)] for at in places]
    assert list(tokens) == came[-1]
    assert not twice or list(tokens) == came[-2]


# --- the length of drafts


def test_nothing_is_drafted_if_checking_costs_more_than_it_gains() -> None:
    dear = Speculation(CostCurve({count: float(count) for count in DEFAULT_COSTS}))
    dear.begin([1, 2, 3, 4] * 8)
    assert list(dear.propose(31)) == []


def test_wrong_drafts_become_shorter_and_return_once_they_would_have_been_right() -> None:
    speculation = Speculation(CostCurve())
    pattern = [*range(10, 30)]
    text = pattern * 2
    speculation.begin(text)
    assert len(speculation.propose(31)) >= 7
    for wrong in range(200, 220):
        checked = len(speculation.propose(31))
        speculation.learn([wrong], checked, 0.01)
        text = [*text, wrong, *pattern]
        speculation.begin(text)
    assert len(speculation.propose(31)) == 0
    for token in pattern * 6:  # nothing is checked, but the text repeats itself
        speculation.learn([token], 0, 0.01)
        speculation.propose(31)
    assert len(speculation.propose(31)) > 0


def test_costs_are_learned_from_timed_steps() -> None:
    costs = CostCurve()
    for _ in range(60):
        costs.observe(1, 0.010)
        costs.observe(4, 0.012)
        costs.observe(5, 9.0)  # never decoded, and so not known
    assert costs.known[4] == pytest.approx(1.2, abs=0.01)
    assert set(costs.known) == set(DEFAULT_COSTS)


# --- the same answers


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(temperature=1.0, top_k=5, seed=8)])
def test_answers_are_the_same_with_and_without_prompt_lookup(
    sampling: Sampling, random_model: Path, open_context: OpenContext
) -> None:
    """The same draws from the same scores: also of sampled text not one token differs."""
    prompt = [40, 41, 42, 43, 44, 45] * 30
    plain = answer(TokenSequence(open_context(random_model)), prompt, 200, sampling)
    speculation = Speculation(CostCurve(CHEAP))
    looking = TokenSequence(open_context(random_model), speculation=speculation)
    assert answer(looking, prompt, 200, sampling) == plain
    assert speculation.drafted > 0


def test_sampled_tokens_keep_their_distribution(random_model: Path, open_context: OpenContext) -> None:
    """Third tokens of 600 answers with and without, compared by their counts (chi-square, two samples)."""
    prompt = [40, 41, 42] * 8
    sampling = Sampling(temperature=1.2, top_k=6, top_p=1.0, repeat_penalty=1.0)
    context = open_context(random_model)
    counts = []
    for speculation in (None, Speculation(CostCurve(CHEAP))):
        sequence = TokenSequence(context, speculation=speculation)
        sequence.adopt([])
        counts.append(collections.Counter(answer(sequence, prompt, 3, sampling)[2] for _ in range(600)))
    often = [token for token in counts[0] | counts[1] if counts[0][token] + counts[1][token] >= 10]
    square = sum((counts[0][t] - counts[1][t]) ** 2 / (counts[0][t] + counts[1][t]) for t in often)
    assert len(often) > 5
    assert square < 3 * len(often) + 30


def test_a_text_that_repeats_itself_takes_fewer_steps(endless_model: Path, open_context: OpenContext) -> None:
    context = open_context(endless_model)
    speculation = Speculation(CostCurve(CHEAP))
    sequence = TokenSequence(context, speculation=speculation)
    ids = context.model.tokenizer.tokenize("x\nabcdefgh abcdefgh abcdefgh abcdefgh ab", special=True)
    tokens = answer(sequence, ids, 300)
    assert context.model.tokenizer.tokenize("cdefgh abcdefgh ", special=False) == tokens[:16]
    assert speculation.accepted > 250
    assert speculation.accepted > 0.9 * speculation.drafted


def test_rejected_tokens_are_removed_from_the_cache(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model)
    sequence = TokenSequence(context, speculation=Speculation(CostCurve(CHEAP)))
    prompt = [40, 41, 42, 43] * 20
    steps = sequence.generate(prompt, GREEDY, limit=50)
    for _, step in zip(range(9), steps, strict=False):
        del step
        assert len(sequence.cached_ids) <= context.length(0)
    steps.close()  # in the middle of a draft
    assert context.length(0) == len(sequence.cached_ids)
    more = [*sequence.cached_ids, 7, 8, 9]
    assert answer(sequence, more, 20) == answer(TokenSequence(open_context(random_model)), more, 20)


def test_a_draft_never_reaches_beyond_the_context_or_the_limit(endless_model: Path, open_context: OpenContext) -> None:
    context = open_context(endless_model, 256)
    sequence = TokenSequence(context, speculation=Speculation(CostCurve(CHEAP)))
    ids = context.model.tokenizer.tokenize("x\n" + "abcdefgh " * 20, special=True)
    assert len(answer(sequence, ids, 17)) == 17
    tokens = answer(sequence, ids, 10_000)
    assert sequence.is_full
    assert len(ids) + len(tokens) == 257
