"""Abandoned branches of a conversation stay in the KV cache, so that returning to one computes nothing."""

from __future__ import annotations

from pathlib import Path

from generation import OpenContext, answer, answer_and_count

from qwenlocal.engine.context import Context
from qwenlocal.engine.prefix_cache import PrefixCache
from qwenlocal.engine.sequence import TokenSequence

COMMON = [n % 200 for n in range(100)]
ONE, OTHER = [*COMMON, *[201] * 150], [*COMMON, *[202] * 150]


def cached_sequence(context: Context) -> TokenSequence:
    return TokenSequence(context, prefix_cache=PrefixCache(context))


def ask(sequence: TokenSequence, ids: list[int]) -> tuple[int, list[int]]:
    return answer_and_count(sequence, ids, 12)


def test_returning_to_a_branch_computes_only_the_last_token(random_model: Path, open_context: OpenContext) -> None:
    sequence, fresh = (
        cached_sequence(open_context(random_model, n_seq_max=4)),
        TokenSequence(open_context(random_model)),
    )
    first = ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    again = ask(sequence, ONE)
    assert again == (len(ONE) - 1, first[1])
    assert ask(sequence, OTHER)[0] == len(OTHER) - 1
    assert again[1] == ask(fresh, ONE)[1]


def test_a_regenerated_answer_stays_cached(random_model: Path, open_context: OpenContext) -> None:
    sequence = cached_sequence(open_context(random_model, n_seq_max=4))
    text = answer(sequence, COMMON, 90)
    assert ask(sequence, COMMON)[0] == len(COMMON) - 1
    reused, _ = ask(sequence, [*COMMON, *text, 5])
    assert reused == len(COMMON) + len(text) - 1


def test_a_context_of_one_sequence_caches_no_branches(random_model: Path, open_context: OpenContext) -> None:
    sequence = cached_sequence(open_context(random_model))
    ask(sequence, ONE)
    assert ask(sequence, OTHER)[0] == len(COMMON)
    assert ask(sequence, ONE)[0] == len(COMMON)


def test_branches_are_evicted_if_the_kv_cache_is_full(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, 512, n_seq_max=4)
    sequence, fresh = cached_sequence(context), TokenSequence(open_context(random_model, 512))
    ask(sequence, ONE)
    ask(sequence, OTHER)
    long = [*COMMON, *[203] * 390]
    assert ask(sequence, long)[1] == ask(fresh, long)[1]


def test_the_oldest_entry_is_evicted_first(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_seq_max=4)
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


def test_a_prefix_of_a_new_entry_is_dropped(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_seq_max=4)
    cache = PrefixCache(context)
    for length in (70, 90, 110):
        context.truncate(0, 0)
        context.decode([(0, [7] * length)])
        cache.insert(0, [7] * length)
    assert cache.evict_oldest()
    assert not cache.evict_oldest()
