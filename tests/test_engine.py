"""Token ids in, token ids out, through the real llama.cpp on tiny models."""

from __future__ import annotations

import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenlocal.engine.context import Aborted, AbortFlag, Context, ContextOptions, NoRoom
from qwenlocal.engine.llama import LoadStopped, Model, library
from qwenlocal.engine.prefix import common_prefix
from qwenlocal.engine.sampler import Sampler
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import Prefill, TokenSequence
from qwenlocal.engine.watch import MemoryWatch
from qwenlocal.errors import BadWeights, ContextFull, MemoryLow, UsageProblem
from qwenlocal.machine import Memory
from qwenlocal.testing import write_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)


@pytest.fixture
def opened() -> Iterator[Callable[..., Context]]:
    """Opens contexts and closes them after the test."""
    contexts: list[Context] = []

    def open_(path: Path, **options: int) -> Context:
        context = Context(Model(path), ContextOptions(**{"n_ctx": 512, "threads": 1, **options}))
        contexts.append(context)
        return context

    yield open_
    for context in contexts:
        context.close()
        context.model.close()


def answer(sequence: TokenSequence, ids: list[int], limit: int, sampling: Sampling = GREEDY) -> list[int]:
    return [step for step in sequence.generate(ids, sampling, limit=limit) if isinstance(step, int)]


def test_a_scripted_model_says_its_text_and_ends(speaking_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(speaking_model)
    vocabulary = context.model.vocabulary
    ids = answer(TokenSequence(context), vocabulary.tokenize("say\n", special=True), 50)
    position = next(n for n, token in enumerate(ids) if vocabulary.is_end(token))
    assert b"".join(vocabulary.piece(token) for token in ids[:position]) == b"Paris, fun"


def test_what_the_cache_holds_is_not_computed_again(random_model: Path, opened: Callable[..., Context]) -> None:
    """And the answer is the same as from an empty cache: one wrong token in it would show."""
    context = opened(random_model)
    sequence = TokenSequence(context)
    first = answer(sequence, [1, 2, 3, 4, 5], 6)
    again = [1, 2, 3, 4, 5, *first, 9, 10]
    steps = list(sequence.generate(again, GREEDY, limit=8))
    assert steps[0] == Prefill(done=10, total=13, reused=10)  # the sixth token of the answer was never fed back
    fresh = TokenSequence(opened(random_model))
    assert [step for step in steps if isinstance(step, int)] == answer(fresh, again, 8)


def test_an_edited_prompt_is_computed_from_the_edit_on(random_model: Path, opened: Callable[..., Context]) -> None:
    sequence = TokenSequence(opened(random_model))
    answer(sequence, [1, 2, 3, 4, 5], 4)
    edited = [1, 2, 9, 4, 5]
    steps = list(sequence.generate(edited, GREEDY, limit=5))
    assert steps[0] == Prefill(done=2, total=5, reused=2)
    fresh = TokenSequence(opened(random_model))
    assert [step for step in steps if isinstance(step, int)] == answer(fresh, edited, 5)


def test_the_same_prompt_again_computes_only_its_last_token(random_model: Path, opened: Callable[..., Context]) -> None:
    sequence = TokenSequence(opened(random_model))
    first = answer(sequence, [1, 2, 3], 5)
    steps = list(sequence.generate([1, 2, 3], GREEDY, limit=5))
    assert steps[0] == Prefill(done=2, total=3, reused=2)
    assert [step for step in steps if isinstance(step, int)] == first


def test_what_another_sequence_object_left_is_not_seen(random_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(random_model)
    answer(TokenSequence(context), [7, 8, 9, 10, 11, 12], 5)
    ids = [1, 2, 3]
    assert answer(TokenSequence(context), ids, 8) == answer(TokenSequence(opened(random_model)), ids, 8)


def test_sequences_of_one_batch_do_not_see_each_other(random_model: Path, opened: Callable[..., Context]) -> None:
    both = opened(random_model, sequences=2)
    rows = both.decode([(0, [1, 2, 3]), (1, [7, 8])])
    together = [list(both.logits(row)[:259]) for row in rows]
    alone = opened(random_model)
    (row,) = alone.decode([(0, [7, 8])])
    assert together[1] == pytest.approx(list(alone.logits(row)[:259]), rel=1e-4, abs=1e-4)
    assert (both.length(0), both.length(1)) == (3, 2)


def test_all_logits_give_a_row_for_every_token(random_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(random_model)
    (first,) = context.decode([(0, [1, 2, 3])], all_logits=True)
    rows = [list(context.logits(first + n)[:259]) for n in range(3)]
    alone = opened(random_model)
    (row,) = alone.decode([(0, [1, 2])])
    assert rows[1] == pytest.approx(list(alone.logits(row)[:259]), rel=1e-4, abs=1e-4)


def test_a_prompt_is_read_in_chunks_that_are_counted(endless_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(endless_model, n_ctx=2048)
    steps = list(TokenSequence(context).generate([65] * 1000, GREEDY, limit=1))
    counts = [step.done for step in steps if isinstance(step, Prefill)]
    assert counts[0] == 0
    assert counts[-1] == 1000
    assert counts == sorted(counts)
    assert len(counts) > 3


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(
    random_model: Path, opened: Callable[..., Context]
) -> None:
    sequence = TokenSequence(opened(random_model, n_ctx=256))
    with pytest.raises(ContextFull) as caught:
        answer(sequence, [1] * 256, 1)
    assert (caught.value.n_prompt, caught.value.n_ctx, caught.value.n_ctx_train) == (256, 256, 4096)
    assert caught.value.hint == "Load the model with more room: -c 1024"


def test_an_answer_ends_where_the_context_does(endless_model: Path, opened: Callable[..., Context]) -> None:
    sequence = TokenSequence(opened(endless_model, n_ctx=256))
    tokens = answer(sequence, [10] * 200, 1000)
    assert sequence.is_full
    assert len(tokens) == 57  # 56 more fit into the cache, and the last one is not fed back


def test_a_full_cache_is_reported_and_keeps_what_it_held(random_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(random_model, n_ctx=256)
    context.decode([(0, [1] * 250)])
    with pytest.raises(NoRoom):
        context.decode([(0, [1] * 10)])
    assert context.length(0) == 250


def test_stopping_from_another_thread_ends_an_answer(endless_model: Path, opened: Callable[..., Context]) -> None:
    sequence = TokenSequence(opened(endless_model, n_ctx=100_000))
    threading.Timer(0.1, sequence.stop).start()
    tokens = answer(sequence, [10, 11], 99_000)
    assert sequence.was_stopped
    assert 0 < len(tokens) < 99_000


def test_stopping_while_the_prompt_is_read_takes_milliseconds(
    endless_model: Path, opened: Callable[..., Context]
) -> None:
    """And what was read is kept: the next try goes on from there."""
    sequence = TokenSequence(opened(endless_model, n_ctx=60_000))
    stopped_at: list[float] = []

    def stop() -> None:
        stopped_at.append(time.monotonic())
        sequence.stop()

    threading.Timer(0.3, stop).start()
    prompt = [65] * 50_000
    steps = list(sequence.generate(prompt, GREEDY, limit=1))
    assert sequence.was_stopped
    assert time.monotonic() - stopped_at[0] < 2
    read = max(step.done for step in steps if isinstance(step, Prefill))
    assert 0 < read < 50_000
    first = next(sequence.generate(prompt, GREEDY, limit=1))
    assert first == Prefill(read, 50_000, read)


def test_the_abort_flag_ends_a_running_decode(endless_model: Path, opened: Callable[..., Context]) -> None:
    context = opened(endless_model, n_ctx=4096)
    context.abort.set()
    with pytest.raises(Aborted):
        context.decode([(0, [1] * 512)])
    context.abort.clear()
    context.truncate(0, 0)
    assert context.decode([(0, [1, 2])]) == [1]


def test_the_abort_flag_is_a_flag() -> None:
    flag = AbortFlag()
    assert not flag
    flag.set()
    assert flag
    flag.clear()
    assert not flag


def test_the_same_seed_gives_the_same_answer(random_model: Path, opened: Callable[..., Context]) -> None:
    sampling = Sampling(temperature=5, top_k=0, top_p=1, seed=11)
    first = answer(TokenSequence(opened(random_model)), [1, 2], 20, sampling)
    second = answer(TokenSequence(opened(random_model)), [1, 2], 20, sampling)
    other = answer(TokenSequence(opened(random_model)), [1, 2], 20, Sampling(temperature=5, top_k=0, top_p=1, seed=12))
    assert first == second != other


def test_a_repeat_penalty_makes_a_model_repeat_less(random_model: Path, opened: Callable[..., Context]) -> None:
    plain = answer(TokenSequence(opened(random_model)), [1, 2], 60)
    penalised = answer(TokenSequence(opened(random_model)), [1, 2], 60, Sampling(temperature=0, repeat_penalty=10))
    assert len(set(penalised)) > len(set(plain))


def test_penalised_choices_are_exact(random_model: Path, opened: Callable[..., Context]) -> None:
    """Candidates are cut down before the penalty is applied; the choice must be that of penalising all of them."""
    context = opened(random_model)
    said = list(range(40, 100))
    (row,) = context.decode([(0, said)])
    logits = list(context.logits(row)[:259])
    for penalty in (1.05, 1.5, 10.0):
        sampler = Sampler(Sampling(temperature=0, repeat_penalty=penalty), context.model.vocabulary)
        sampler.remember(said)
        penalised = [
            (score / penalty if score > 0 else score * penalty) if token in said else score
            for token, score in enumerate(logits)
        ]
        assert sampler.sample(context, row) == max(range(259), key=lambda token: penalised[token])
        sampler.close()


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 1.5), ("seed", -3), ("repeat_penalty", 0)])
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageProblem, match="must lie between"):
        Sampling().with_known({name: value})


def test_why_a_file_does_not_load_is_in_the_error(tmp_path: Path) -> None:
    """llama.cpp says the reason in its log only."""
    strange = write_model(tmp_path / "strange.gguf", architecture="novel")
    with pytest.raises(BadWeights, match="unknown model architecture: 'novel'"):
        Model(strange)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_model(tmp_path / "whole.gguf").read_bytes()[:-5000])
    with pytest.raises(BadWeights, match="corrupted or incomplete"):
        Model(cut)


def test_loading_can_be_stopped(speaking_model: Path) -> None:
    with pytest.raises(LoadStopped):
        Model(speaking_model, on_progress=lambda _fraction: False)


def test_ctrl_c_while_a_model_is_loaded_ends_that_and_nothing_else_is_said(
    speaking_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def press(_fraction: float) -> bool:
        signal.raise_signal(signal.SIGINT)
        return True

    with pytest.raises(KeyboardInterrupt):
        Model(speaking_model, on_progress=press)
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_text_becomes_ids_and_back(speaking_model: Path) -> None:
    vocabulary = Model(speaking_model).vocabulary
    text = "Zwölf Boxkämpfer, 你好\n\t<|im_end|>"
    ids = vocabulary.tokenize(text, special=False)
    assert b"".join(vocabulary.piece(token) for token in ids).decode() == text
    assert not any(vocabulary.is_control(token) for token in ids)
    assert vocabulary.tokenize("<|im_end|>", special=True) == [258]
    assert vocabulary.is_end(258)


def test_the_bytes_of_tokens_can_be_asked_for_in_several_threads(speaking_model: Path) -> None:
    vocabulary = Model(speaking_model, vocabulary_only=True).vocabulary
    wanted = {token: vocabulary.piece(token) for token in range(200)}
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda token: (token, vocabulary.piece(token)), [*wanted] * 100))
    assert all(wanted[token] == piece for token, piece in found)


def test_decomposed_accents_are_composed_first_as_qwens_tokenizer_does(speaking_model: Path) -> None:
    vocabulary = Model(speaking_model).vocabulary
    assert vocabulary.tokenize("e\u0301", special=False) == vocabulary.tokenize("\u00e9", special=False)


def test_bytes_of_a_terminal_that_are_no_text_do_not_break_anything(speaking_model: Path) -> None:
    vocabulary = Model(speaking_model).vocabulary
    assert vocabulary.tokenize("a\udcffb", special=False) == vocabulary.tokenize("a?b", special=False)


def test_common_prefix_counts() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 9]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_llama_cpp_is_loaded_once_and_says_what_it_uses() -> None:
    assert library() is library()
    assert "CPU" in library().system_info


def test_an_answer_that_outlives_its_context_ends_quietly(random_model: Path) -> None:
    model = Model(random_model)
    context = Context(model, ContextOptions(256, threads=1))
    steps = TokenSequence(context).generate([1, 2, 3], GREEDY, limit=10)
    next(step for step in steps if isinstance(step, int))
    context.close()
    model.close()
    del steps


def test_an_answer_stops_before_memory_is_used_up_and_what_was_said_is_kept(
    endless_model: Path, opened: Callable[..., Context]
) -> None:
    left = iter([Memory(8 << 30, 4 << 30)] * 2 + [Memory(8 << 30, 90 << 20)] * 9)
    context = opened(endless_model)
    sequence = TokenSequence(context, watch=MemoryWatch(lambda: next(left)))
    said: list[int] = []
    with pytest.raises(MemoryLow) as caught:
        said.extend(step for step in sequence.generate([1, 2, 3, 10], GREEDY, limit=400) if isinstance(step, int))
    assert caught.value.available == 90 << 20
    assert context.length(0) == len(sequence.held) >= 4 + 32
    assert len(answer(TokenSequence(context), [9, 8, 7], 5)) == 5


def test_a_small_container_is_not_taken_for_a_machine_without_memory() -> None:
    MemoryWatch(lambda: Memory(1 << 30, 100 << 20))()
    with pytest.raises(MemoryLow):
        MemoryWatch(lambda: Memory(1 << 30, 50 << 20))()


def test_a_machine_that_only_moves_memory_about_ends_the_answer_and_says_so() -> None:
    plenty = Memory(8 << 30, 1 << 30)
    MemoryWatch(lambda: plenty, lambda: 0.2)()
    with pytest.raises(MemoryLow, match=r"does little but move memory about \(63% of its time; 1,024 MiB are left\)"):
        MemoryWatch(lambda: plenty, lambda: 0.63)()


def test_what_can_be_done_without_goes_before_the_answer_does() -> None:
    given = iter([True, False])
    watch = MemoryWatch(lambda: Memory(8 << 30, 50 << 20), relief=lambda: next(given))
    watch()
    with pytest.raises(MemoryLow):
        watch()
