"""Sequences that share a context: each gets the answer that it gets alone, and nobody waits for a long prompt."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import pytest
from generation import CHEAP, GREEDY, OpenContext, answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.gbnf import grammar_from_gbnf
from qwenlocal.engine.llama import Model
from qwenlocal.engine.logprobs import log_softmax
from qwenlocal.engine.memory_cache import MemoryCache
from qwenlocal.engine.prompt_cache import PromptCache
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.scheduler import Ended, Prefilled, Sampled, Scheduler, SchedulerEvent, SequenceRequest
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, Speculation
from qwenlocal.errors import ContextFull, LowMemory, OutOfRange, QwenlocalError, UsageError
from qwenlocal.progress import PromptProgress


def text(length: int, start: int = 0) -> list[int]:
    """Return a prompt of `length` tokens that repeats itself late."""
    return [40 + (start + place * (1 + place // 31)) % 60 for place in range(length)]


def alone(context: Context, ids: Sequence[int], limit: int) -> list[int]:
    sequence = TokenSequence(context)
    sequence.adopt([])
    return answer(sequence, ids, limit)


def run(scheduler: Scheduler) -> list[SchedulerEvent]:
    """Run until everything has ended."""
    events: list[SchedulerEvent] = []
    while not scheduler.is_idle:
        events += scheduler.step()
    return events


def tokens_of(events: Sequence[SchedulerEvent], key: int) -> list[int]:
    return [event.id for event in events if isinstance(event, Sampled) and event.key == key]


def reused_of(events: Sequence[SchedulerEvent], key: int) -> int:
    return next(event.progress.reused for event in events if isinstance(event, Prefilled) and event.key == key)


def submit(
    scheduler: Scheduler, key: int, ids: Sequence[int], limit: int = 8, client: str = "", sampling: Sampling = GREEDY
) -> None:
    scheduler.submit(SequenceRequest(key, ids, sampling, limit, client))


# --- answers


def test_a_sampler_of_another_thread_is_used_and_closed(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_seq_max=2)
    scheduler, tokenizer = Scheduler(context, 1), context.model.tokenizer
    only_77 = Sampling(temperature=0, repeat_penalty=1, logit_bias=((77, 100.0),))
    sampler = Sampler(only_77, tokenizer)
    scheduler.submit(SequenceRequest(0, text(20), GREEDY, 2), sampler)
    assert tokens_of(run(scheduler), 0) == [77, 77]
    refused = Sampler(only_77, tokenizer)
    with pytest.raises(ContextFull):
        scheduler.submit(SequenceRequest(1, [1] * context.n_ctx, GREEDY, 2), refused)
    assert not sampler._chain and not refused._chain


def test_answers_are_those_of_separate_runs(random_model: Path, open_context: OpenContext) -> None:
    prompts = {key: text(5 + 70 * key, key) for key in range(5)}
    scheduler = Scheduler(open_context(random_model, n_ctx=2048, n_seq_max=6), 3)
    for key, ids in prompts.items():
        submit(scheduler, key, ids, 10 + key)
    events = run(scheduler)
    for key, ids in prompts.items():
        assert tokens_of(events, key) == alone(open_context(random_model), ids, 10 + key)
        assert Ended(key) in events


def test_a_prompt_without_an_answer_only_fills_the_cache(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    submit(scheduler, 0, text(100), 0)
    assert tokens_of(run(scheduler), 0) == []
    submit(scheduler, 1, text(101), 1)
    assert reused_of(run(scheduler), 1) == 100


def test_a_prompt_that_never_fits_is_refused(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=256, n_seq_max=3), 2)
    with pytest.raises(ContextFull):
        submit(scheduler, 0, text(256))
    assert scheduler.is_idle


def test_an_answer_ends_at_the_end_of_the_context(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=256, n_seq_max=3), 2)
    submit(scheduler, 0, text(100), 1000)
    events = run(scheduler)
    assert events[-1] == Ended(0, is_full=True)
    assert len(tokens_of(events, 0)) == 156


def test_speculation_continues_a_sequence_that_runs_alone(random_model: Path, open_context: OpenContext) -> None:
    ids = [*text(40), *text(40), *text(20)]
    context = open_context(random_model, n_seq_max=3)
    scheduler = Scheduler(context, 2, speculation=Speculation(CostCurve(CHEAP)))
    submit(scheduler, 0, ids, 60)
    first = [event for _ in range(5) for event in scheduler.step()]
    submit(scheduler, 1, text(30, 5), 10)
    events = first + run(scheduler)
    assert tokens_of(events, 0) == alone(open_context(random_model), ids, 60)
    assert tokens_of(events, 1) == alone(open_context(random_model), text(30, 5), 10)


def test_drafts_that_are_accepted_save_steps(endless_model: Path, open_context: OpenContext) -> None:
    context = open_context(endless_model, n_seq_max=2)
    scheduler = Scheduler(context, 1, speculation=Speculation(CostCurve(CHEAP)))
    submit(scheduler, 0, context.model.tokenizer.tokenize("abcdefgh abcdefgh abcdefgh ", special=False), 60)
    steps = 0
    while not scheduler.is_idle:
        scheduler.step()
        steps += 1
    assert steps < 30


def test_forced_tokens_are_computed_together(random_model: Path, open_context: OpenContext) -> None:
    grammar = grammar_from_gbnf('root ::= "abcdefghijklmnop" [xyz] "qrstuvw"')
    scheduler = Scheduler(context := open_context(random_model, n_seq_max=4), 3)
    for key in range(2):
        submit(scheduler, key, text(20, key), 40, sampling=Sampling(temperature=0, repeat_penalty=1, grammar=grammar))
    steps, events = 0, list[SchedulerEvent]()
    while not scheduler.is_idle:
        new = scheduler.step()
        for event in new:
            if isinstance(event, Sampled) and context.model.tokenizer.is_end(event.id):
                scheduler.finish(event.key)
        events += new
        steps += 1
    for key in range(2):
        answer_bytes = b"".join(map(context.model.tokenizer.piece, tokens_of(events, key)))
        assert answer_bytes[:16] == b"abcdefghijklmnop" and answer_bytes[17:] == b"qrstuvw"
    assert steps < 15


def test_an_invalid_grammar_is_refused(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    with pytest.raises(UsageError):
        submit(scheduler, 0, text(5), sampling=Sampling(grammar="nonsense"))
    assert scheduler.is_idle


# --- sharing


def test_requests_share_a_prefix_that_is_being_computed(random_model: Path, open_context: OpenContext) -> None:
    system = text(300)
    scheduler = Scheduler(open_context(random_model, n_ctx=2048, n_seq_max=6), 4)
    for key in range(4):
        submit(scheduler, key, [*system, 41 + key, 42], 6)
    events = run(scheduler)
    assert [reused_of(events, key) for key in range(4)] == [0, 300, 300, 300]
    for key in range(4):
        assert tokens_of(events, key) == alone(open_context(random_model), [*system, 41 + key, 42], 6)


def test_other_requests_overtake_one_that_waits_for_a_prefix(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=2048, n_seq_max=6), 4)
    submit(scheduler, 0, text(500), 5, "a")
    submit(scheduler, 1, [*text(500), 41], 5, "b")
    submit(scheduler, 2, text(10, 7), 5, "c")
    first = next(event for event in run(scheduler) if isinstance(event, Sampled))
    assert first.key == 2


def test_a_continued_chat_computes_only_the_new_tokens(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 1)
    submit(scheduler, 0, text(100), 10)
    said = tokens_of(run(scheduler), 0)
    submit(scheduler, 1, [*text(100), *said, 45, 46], 10)
    events = run(scheduler)
    assert reused_of(events, 1) == 109  # all but the last token, which was never computed
    assert tokens_of(events, 1) == alone(open_context(random_model), [*text(100), *said, 45, 46], 10)


def test_a_request_can_refuse_the_cache(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 1)
    submit(scheduler, 0, text(100))
    run(scheduler)
    scheduler.submit(SequenceRequest(1, text(100), GREEDY, 8, reuses_cache=False))
    assert reused_of(run(scheduler), 1) == 0


def test_prefixes_come_back_from_the_disk(random_model: Path, open_context: OpenContext, tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "key", share=1.0)
    seconds = iter(range(10_000))
    scheduler = Scheduler(
        open_context(random_model, n_seq_max=3), 1, prompt_cache=cache, clock=lambda: float(next(seconds))
    )
    submit(scheduler, 0, text(200))
    run(scheduler)
    scheduler.save_prompt_caches()
    restarted = Scheduler(open_context(random_model, n_seq_max=3), 1, prompt_cache=cache)
    submit(restarted, 1, text(200))
    events = run(restarted)
    assert reused_of(events, 1) == 199
    assert tokens_of(events, 1) == alone(open_context(random_model), text(200), 8)


def test_a_finished_sequence_moves_to_memory_and_back(random_model: Path, open_context: OpenContext) -> None:
    context, cache = open_context(random_model, n_seq_max=4), MemoryCache(1 << 30)
    scheduler = Scheduler(context, 1, memory_cache=cache)
    submit(scheduler, 0, text(150))
    run(scheduler)
    assert cache.size == 0
    submit(scheduler, 1, text(150, 3))  # nothing in common: the first one leaves the KV cache
    run(scheduler)
    assert [len(stored.tokens) for stored in cache] == [157]
    assert sum(context.length(number) > 0 for number in range(4)) == 1
    submit(scheduler, 2, [*text(150), 45, 46])
    events = run(scheduler)
    assert reused_of(events, 2) == 150
    assert tokens_of(events, 2) == alone(open_context(random_model), [*text(150), 45, 46], 8)


def test_a_short_prompt_that_comes_again_has_the_same_answer(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=4), 1, memory_cache=MemoryCache(1 << 30))
    submit(scheduler, 0, text(50), 30)
    expected = tokens_of(run(scheduler), 0)
    submit(scheduler, 1, text(50), 30)
    assert tokens_of(run(scheduler), 1) == expected


def test_sequences_in_memory_are_dropped_if_memory_is_short(random_model: Path, open_context: OpenContext) -> None:
    cache = MemoryCache(1 << 30)
    checks: list[bool] = []
    scheduler = Scheduler(
        open_context(random_model, n_ctx=2048, n_seq_max=4),
        1,
        memory_cache=cache,
        check_memory=lambda: checks.append(cache.clear()),
    )
    for key in range(3):
        submit(scheduler, key, text(150, key + 1), 200)
        run(scheduler)
    assert True in checks and len(list(cache)) <= 1


def test_memory_holds_no_more_than_its_budget(random_model: Path, open_context: OpenContext) -> None:
    sizes = MemoryCache(1 << 30)
    sequence = open_context(random_model, n_seq_max=2)
    sequence.decode([(0, text(100))])
    assert sizes.save(sequence, 0, text(100))
    cache = MemoryCache(int(2.5 * sizes.size))
    scheduler = Scheduler(open_context(random_model, n_ctx=2048, n_seq_max=8), 1, memory_cache=cache)
    for key in range(6):
        submit(scheduler, key, text(100, key + 1), 1)
        run(scheduler)
    assert [stored.tokens[0] for stored in cache] == [text(100, 4)[0], text(100, 5)[0]]
    assert cache.size <= 2.5 * sizes.size
    assert not MemoryCache(10).save(sequence, 0, text(100))


def test_two_sequences_change_places_if_memory_has_room_for_one(random_model: Path, open_context: OpenContext) -> None:
    sizes, context = MemoryCache(1 << 30), open_context(random_model, n_seq_max=4)
    context.decode([(0, text(157))])
    assert sizes.save(context, 0, text(157))
    context.truncate(0, 0)
    scheduler = Scheduler(context, 1, memory_cache=MemoryCache(int(1.5 * sizes.size)))
    reused = []
    for key in range(4):
        submit(scheduler, key, text(150, key % 2))
        reused.append(reused_of(run(scheduler), key))
    assert reused == [0, 0, 149, 149]


def test_sequences_in_memory_are_saved_on_disk_as_well(
    random_model: Path, open_context: OpenContext, tmp_path: Path
) -> None:
    disk = PromptCache(tmp_path, "key", share=1.0)
    seconds = iter(range(10_000))
    scheduler = Scheduler(
        open_context(random_model, n_seq_max=3),
        1,
        memory_cache=MemoryCache(1 << 30),
        prompt_cache=disk,
        clock=lambda: float(next(seconds)),
    )
    for key in range(2):
        submit(scheduler, key, text(150, key + 1))
        run(scheduler)
    scheduler.save_prompt_caches()
    for key in range(2):
        found = disk.find_longest_prefix(text(150, key + 1), 100)
        assert found and len(found.tokens) == 157


# --- fairness


def test_a_long_prompt_delays_no_answer_by_more_than_a_step(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_ctx=4096, n_seq_max=4)
    scheduler = Scheduler(context, 3)
    submit(scheduler, 0, text(10), 40)
    scheduler.step()
    submit(scheduler, 1, text(1500, 3), 4)
    events = run(scheduler)
    parts = [event.progress.done for event in events if isinstance(event, Prefilled) and event.key == 1]
    assert len(parts) > 3
    for before, after in itertools.pairwise(parts):
        positions = [
            place
            for place, event in enumerate(events)
            if isinstance(event, Prefilled) and event.key == 1 and event.progress.done in (before, after)
        ]
        between = events[positions[0] : positions[1]]
        answered = [event for event in between if isinstance(event, Sampled) and event.key == 0]
        assert answered or len(tokens_of(events[: positions[0]], 0)) == 39


def test_parts_of_prompts_shrink_to_the_time_that_a_step_may_take(
    random_model: Path, open_context: OpenContext
) -> None:
    now = [0.0]

    class SlowContext(Context):
        def decode(self, batch, **options):  # type: ignore[no-untyped-def]
            now[0] += 0.01 * sum(len(ids) for _, ids in batch)  # 100 tokens per second
            return super().decode(batch, **options)

    context = SlowContext(Model(random_model), ContextOptions(4096, n_seq_max=4, threads=1, flash_attention=False))
    scheduler = Scheduler(context, 3, clock=lambda: now[0])
    submit(scheduler, 0, text(10), 100)
    scheduler.step()
    submit(scheduler, 1, text(1000, 3), 4)
    durations = []
    while not scheduler.is_idle:
        before = now[0]
        scheduler.step()
        durations.append(now[0] - before)
    assert max(durations[5:]) <= 0.25
    context.close()
    context.model.close()


def test_clients_take_turns(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 1)
    for key in range(5):
        submit(scheduler, key, text(10, key), 3, "greedy client")
    submit(scheduler, 5, text(10, 5), 3, "modest client")
    ended = [event.key for event in run(scheduler) if isinstance(event, Ended)]
    assert ended == [0, 5, 1, 2, 3, 4] or ended == [0, 1, 5, 2, 3, 4]


# --- ends and interruptions


def test_a_finished_request_frees_its_slot(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 1)
    submit(scheduler, 0, text(10), 1000)
    submit(scheduler, 1, text(20, 3), 5)
    submit(scheduler, 2, text(20, 4), 5)
    scheduler.step()
    scheduler.finish(2)
    scheduler.finish(0)
    events = run(scheduler)
    assert {event.key for event in events} == {1}
    assert tokens_of(events, 1) == alone(open_context(random_model), text(20, 3), 5)


def test_a_full_cache_pauses_the_newest_answer_which_loses_nothing(
    random_model: Path, open_context: OpenContext
) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=512, n_seq_max=5), 4)
    for key in range(4):
        submit(scheduler, key, text(60, key * 7), 150)
    events = run(scheduler)
    for key in range(4):
        assert tokens_of(events, key) == alone(open_context(random_model), text(60, key * 7), 150)


def test_an_interrupted_step_loses_nothing(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_ctx=4096, n_seq_max=4)
    scheduler = Scheduler(context, 3)
    submit(scheduler, 0, text(3000), 5)
    submit(scheduler, 1, text(40, 9), 30)
    stop = threading.Event()

    def interrupt() -> None:
        while not stop.wait(0.02):
            scheduler.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    events = [event for _ in range(60) for event in scheduler.step()]
    stop.set()
    thread.join()
    events += run(scheduler)
    assert tokens_of(events, 0) == alone(open_context(random_model, n_ctx=4096), text(3000), 5)
    assert tokens_of(events, 1) == alone(open_context(random_model), text(40, 9), 30)


def test_an_interrupt_between_two_steps_ends_the_next_one(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    submit(scheduler, 0, text(100), 5)
    scheduler.interrupt()
    assert scheduler.step() == []
    assert tokens_of(run(scheduler), 0) == alone(open_context(random_model), text(100), 5)


def test_a_request_is_interrupted_while_its_prompt_is_computed_or_alone(
    random_model: Path, open_context: OpenContext
) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=4096, n_seq_max=4), 3)
    submit(scheduler, 0, text(40), 50)
    scheduler.step()
    assert scheduler.is_interruptible(0) and not scheduler.is_interruptible(1)
    submit(scheduler, 1, text(3000, 9), 5)
    scheduler.step()
    assert scheduler.is_interruptible(1) and not scheduler.is_interruptible(0)


def test_low_memory_ends_the_newest_answer_only(random_model: Path, open_context: OpenContext) -> None:
    failures: Iterator[QwenlocalError] = iter([LowMemory(1)])

    def check() -> None:
        for failure in failures:
            raise failure

    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 2, check_memory=check)
    submit(scheduler, 0, text(10), 60)
    submit(scheduler, 1, text(10, 5), 60)
    events = run(scheduler)
    assert [event.key for event in events if isinstance(event, Ended) and event.error] == [1]
    assert len(tokens_of(events, 0)) == 60


# --- probabilities and biases


def test_probabilities_of_tokens_are_the_models(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 2)
    scheduler.submit(SequenceRequest(0, text(20), Sampling(temperature=1.5, seed=1), 3, top_logprobs=4))
    events = [event for event in run(scheduler) if isinstance(event, Sampled)]
    context = open_context(random_model)
    ids = text(20)
    for event in events:
        expected = log_softmax(context, context.decode([(0, ids)])[0])
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(expected[event.id], abs=1e-4)
        best = sorted(range(len(expected)), key=lambda id: -expected[id])[:4]
        assert [id for id, _ in event.logprobs.alternatives] == best
        ids = [event.id]


def test_probabilities_of_a_prompt_are_those_of_its_tokens(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=3), 2)
    submit(scheduler, 1, text(30, 4), 40)
    scheduler.submit(SequenceRequest(0, text(100), GREEDY, 2, top_logprobs=1, prompt_logprobs=True))
    events = run(scheduler)
    actual = [
        logprobs for event in events if isinstance(event, Prefilled) and event.key == 0 for logprobs in event.logprobs
    ]
    context = open_context(random_model)
    expected = [
        log_softmax(context, context.decode([(0, [id])])[0])[following]
        for id, following in zip(text(100), text(100)[1:], strict=False)
    ]
    assert [logprobs.logprob for logprobs in actual] == pytest.approx(expected, abs=1e-3)
    assert all(math.isfinite(logprobs.alternatives[0][1]) for logprobs in actual)
    assert tokens_of(events, 0) == alone(open_context(random_model), text(100), 2)


@pytest.mark.parametrize("length", [9, 100])
def test_several_prompts_with_probabilities_are_computed_at_once(
    random_model: Path, open_context: OpenContext, length: int
) -> None:
    """llama.cpp aborts the process at more than `ContextOptions.n_outputs` rows of logits."""
    scheduler = Scheduler(open_context(random_model, n_seq_max=10), 10)
    for key in range(10):
        has_probabilities = key != 5
        scheduler.submit(
            SequenceRequest(key, text(length, key), GREEDY, 2, top_logprobs=1, prompt_logprobs=has_probabilities)
        )
    events = run(scheduler)
    counts = dict.fromkeys(range(10), 0)
    for event in events:
        if isinstance(event, Prefilled):
            counts[event.key] += len(event.logprobs)
    assert counts == {key: 0 if key == 5 else length - 1 for key in range(10)}
    for key in range(10):
        assert tokens_of(events, key) == alone(open_context(random_model), text(length, key), 2)


def test_a_bias_excludes_or_requires_tokens(random_model: Path, open_context: OpenContext) -> None:
    (usual,) = alone(open_context(random_model), text(20), 1)
    for bias, expected in (((usual, -100.0),), False), (((77, 100.0),), True):
        scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
        submit(scheduler, 0, text(20), 1, sampling=Sampling(temperature=0, logit_bias=bias))
        assert (tokens_of(run(scheduler), 0) == [77]) is expected
        assert tokens_of(run(scheduler), 0) != [usual]


def test_a_bias_for_a_token_that_does_not_exist_is_refused(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    with pytest.raises(OutOfRange):
        submit(scheduler, 0, text(5), sampling=Sampling(logit_bias=((100_000, 1.0),)))


def test_an_answer_continues_if_its_end_is_ignored(speaking_model: Path, open_context: OpenContext) -> None:
    context = open_context(speaking_model, n_seq_max=2)
    scheduler = Scheduler(context, 1)
    ids = context.model.tokenizer.tokenize("x\n", special=False)
    submit(scheduler, 0, ids, 30, sampling=Sampling(temperature=0, ignore_eos=True))
    tokens = tokens_of(run(scheduler), 0)
    assert len(tokens) == 30 and not any(map(context.model.tokenizer.is_end, tokens))


def test_penalties_keep_tokens_from_repeating(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    plain = Sampling(temperature=0, repeat_penalty=1)
    submit(scheduler, 0, text(20), 60, sampling=plain)
    submit(scheduler, 1, text(20), 60, sampling=plain.with_overrides({"frequency_penalty": 2, "presence_penalty": 2}))
    events = run(scheduler)
    assert len(set(tokens_of(events, 1))) > len(set(tokens_of(events, 0)))


def logits_after(context: Context, ids: Sequence[int]) -> numpy.ndarray:
    context.truncate(0, 0)
    (row,) = context.decode([(0, ids)])
    return numpy.ctypeslib.as_array(context.logits(row), (len(context.model.tokenizer),)).copy()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.integers(0, 3), st.integers(0, 40), st.integers(0, 12)),
        min_size=1,
        max_size=8,
    )
)
def test_any_mix_of_requests_is_answered_as_if_each_ran_alone(
    random_model: Path, open_context: OpenContext, requests: list[tuple[int, int, int, int]]
) -> None:
    scheduler = Scheduler(open_context(random_model, n_ctx=512, n_seq_max=5), 3)
    events: list[SchedulerEvent] = []
    for key, (length, start, limit, wait) in enumerate(requests):
        submit(scheduler, key, text(length, start), limit, str(start))
        for _ in range(wait):
            events += scheduler.step()
    events += run(scheduler)
    context = open_context(random_model)
    for key, (length, start, limit, _) in enumerate(requests):
        tokens, expected = tokens_of(events, key), alone(context, text(length, start), limit) if limit else []
        differing = (place for place, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1])
        same = next(differing, max(len(tokens), len(expected)))
        if same < min(len(tokens), len(expected)):  # batches of other sizes add in another order: only a tie may differ
            logits = logits_after(context, [*text(length, start), *expected[:same]])
            assert abs(logits[tokens[same]] - logits[expected[same]]) < 1e-3 * numpy.ptp(logits)
        else:
            assert tokens == expected
        context.truncate(0, 0)


def test_progress_counts_to_the_end_of_the_prompt(random_model: Path, open_context: OpenContext) -> None:
    scheduler = Scheduler(open_context(random_model, n_seq_max=2), 1)
    submit(scheduler, 0, text(400), 1)
    progress = [event.progress for event in run(scheduler) if isinstance(event, Prefilled)]
    assert progress[-1] == PromptProgress(400, 400, 0)
    assert [part.done for part in progress] == sorted(part.done for part in progress)
