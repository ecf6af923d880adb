"""Abandoned branches of a conversation stay in the KV cache, so that returning to one computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.engine.prefix_cache import PrefixCache
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.progress import PromptProgress

GREEDY = Sampling(temperature=0, repeat_penalty=1)
COMMON = [n % 200 for n in range(100)]
ONE, OTHER = [*COMMON, *[201] * 150], [*COMMON, *[202] * 150]


@pytest.fixture
def opened(random_model: Path) -> Iterator[Callable[..., Context]]:
    contexts: list[Context] = []

    def open_(n_ctx: int = 1024, n_seq_max: int = 4) -> Context:
        options = ContextOptions(n_ctx, threads=1, n_seq_max=n_seq_max, flash_attention=False)
        contexts.append(Context(Model(random_model), options))
        return contexts[-1]

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


def cached_sequence(context: Context) -> TokenSequence:
    return TokenSequence(context, prefix_cache=PrefixCache(context))


def ask(sequence: TokenSequence, ids: list[int]) -> tuple[int, list[int]]:
    """Return the number of reused tokens, and the answer."""
    steps = list(sequence.generate(ids, GREEDY, limit=12))
    assert isinstance(steps[0], PromptProgress)
    return steps[0].reused, [step for step in steps if isinstance(step, int)]


def test_returning_to_a_branch_computes_only_the_last_token(opened: Callable[..., Context]) -> None:
    sequence, fresh = cached_sequence(opened()), TokenSequence(opened(n_seq_max=1))
    first = ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    again = ask(sequence, ONE)
    assert again == (len(ONE) - 1, first[1])
    assert ask(sequence, OTHER)[0] == len(OTHER) - 1
    assert again[1] == ask(fresh, ONE)[1]


def test_a_regenerated_answer_stays_cached(opened: Callable[..., Context]) -> None:
    sequence = cached_sequence(opened())
    answer = [step for step in sequence.generate(COMMON, GREEDY, limit=90) if isinstance(step, int)]
    assert ask(sequence, COMMON)[0] == len(COMMON) - 1
    reused, _ = ask(sequence, [*COMMON, *answer, 5])
    assert reused == len(COMMON) + len(answer) - 1


def test_a_context_of_one_sequence_caches_no_branches(opened: Callable[..., Context]) -> None:
    sequence = cached_sequence(opened(n_seq_max=1))
    ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    assert ask(sequence, ONE)[0] == len(COMMON)


def test_branches_are_evicted_if_the_kv_cache_is_full(opened: Callable[..., Context]) -> None:
    context = opened(n_ctx=512)
    sequence, fresh = cached_sequence(context), TokenSequence(opened(n_ctx=512, n_seq_max=1))
    ask(sequence, ONE)
    ask(sequence, OTHER)
    long = [*COMMON, *[203] * 390]
    assert ask(sequence, long)[1] == ask(fresh, long)[1]


def test_the_oldest_entry_is_evicted_first(opened: Callable[..., Context]) -> None:
    context = opened()
    cache = PrefixCache(context)
    for number in range(5):
        ids = [number] * 80
        context.truncate(0, 0)
        context.decode([(0, ids)])
        cache.insert(0, ids)
    assert cache.find_longest_prefix([0] * 80, 0) is None
    assert cache.find_longest_prefix([1] * 80, 0) is None
    for number in (2, 3, 4):
        entry = cache.find_longest_prefix([number] * 80, 10)
        assert entry is not None
        assert cache.copy_to(0, entry) == [number] * 80
        assert context.length(0) == 80


def test_a_prefix_of_a_new_entry_is_dropped(opened: Callable[..., Context]) -> None:
    context = opened()
    cache = PrefixCache(context)
    for length in (70, 90, 110):
        context.truncate(0, 0)
        context.decode([(0, [7] * length)])
        cache.insert(0, [7] * length)
    assert cache.evict_oldest()
    assert not cache.evict_oldest()
