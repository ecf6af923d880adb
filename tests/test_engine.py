"""Token ids in, token ids out, through the real llama.cpp on tiny models."""

from __future__ import annotations

import concurrent.futures
import itertools
import signal
import threading
import time
from pathlib import Path

import pytest
from generation import GREEDY, OpenContext, answer

from qwenlocal.engine.context import Aborted, AbortFlag, CacheFull, Context, ContextOptions
from qwenlocal.engine.llama import LoadCancelled, Model, load_library
from qwenlocal.engine.memory import MemoryCheck
from qwenlocal.engine.prefix_cache import common_prefix
from qwenlocal.engine.sampling import Sampler, Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.errors import BadWeights, ContextFull, LowMemory, UsageError
from qwenlocal.machine import Memory
from qwenlocal.progress import PromptProgress
from qwenlocal.testing import write_model


def test_a_scripted_model_generates_its_text_and_ends(speaking_model: Path, open_context: OpenContext) -> None:
    context = open_context(speaking_model)
    tokenizer = context.model.tokenizer
    ids = answer(TokenSequence(context), tokenizer.tokenize("say\n", special=True), 50)
    position = next(n for n, token in enumerate(ids) if tokenizer.is_end(token))
    assert b"".join(tokenizer.piece(token) for token in ids[:position]) == b"Paris, fun"


def test_cached_tokens_are_not_computed_again(random_model: Path, open_context: OpenContext) -> None:
    """The answer equals that of an empty cache; a single wrong token in it would change the answer."""
    context = open_context(random_model)
    sequence = TokenSequence(context)
    first = answer(sequence, [1, 2, 3, 4, 5], 6)
    again = [1, 2, 3, 4, 5, *first, 9, 10]
    steps = list(sequence.generate(again, GREEDY, limit=8))
    assert steps[0] == PromptProgress(done=10, total=13, reused=10)  # the sixth token of the answer was never fed back
    fresh = TokenSequence(open_context(random_model))
    assert [step for step in steps if isinstance(step, int)] == answer(fresh, again, 8)


def test_an_edited_prompt_is_computed_from_the_edit_on(random_model: Path, open_context: OpenContext) -> None:
    sequence = TokenSequence(open_context(random_model))
    answer(sequence, [1, 2, 3, 4, 5], 4)
    edited = [1, 2, 9, 4, 5]
    steps = list(sequence.generate(edited, GREEDY, limit=5))
    assert steps[0] == PromptProgress(done=2, total=5, reused=2)
    fresh = TokenSequence(open_context(random_model))
    assert [step for step in steps if isinstance(step, int)] == answer(fresh, edited, 5)


def test_a_repeated_prompt_computes_only_its_last_token(random_model: Path, open_context: OpenContext) -> None:
    sequence = TokenSequence(open_context(random_model))
    first = answer(sequence, [1, 2, 3], 5)
    steps = list(sequence.generate([1, 2, 3], GREEDY, limit=5))
    assert steps[0] == PromptProgress(done=2, total=3, reused=2)
    assert [step for step in steps if isinstance(step, int)] == first


def test_tokens_of_another_sequence_object_are_removed(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model)
    answer(TokenSequence(context), [7, 8, 9, 10, 11, 12], 5)
    ids = [1, 2, 3]
    assert answer(TokenSequence(context), ids, 8) == answer(TokenSequence(open_context(random_model)), ids, 8)


def test_sequences_of_a_batch_are_independent(random_model: Path, open_context: OpenContext) -> None:
    both = open_context(random_model, n_seq_max=2)
    rows = both.decode([(0, [1, 2, 3]), (1, [7, 8])])
    batched = [list(both.logits(row)[:259]) for row in rows]
    alone = open_context(random_model)
    (row,) = alone.decode([(0, [7, 8])])
    assert batched[1] == pytest.approx(list(alone.logits(row)[:259]), rel=1e-4, abs=1e-4)
    assert (both.length(0), both.length(1)) == (3, 2)


def test_all_logits_returns_a_row_per_token(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model)
    (first,) = context.decode([(0, [1, 2, 3])], all_logits=(0,))
    rows = [list(context.logits(first + n)[:259]) for n in range(3)]
    alone = open_context(random_model)
    (row,) = alone.decode([(0, [1, 2])])
    assert rows[1] == pytest.approx(list(alone.logits(row)[:259]), rel=1e-4, abs=1e-4)


def test_a_prompt_is_prefilled_in_chunks_with_progress(endless_model: Path, open_context: OpenContext) -> None:
    context = open_context(endless_model, n_ctx=2048)
    steps = list(TokenSequence(context).generate([65] * 1000, GREEDY, limit=1))
    counts = [step.done for step in steps if isinstance(step, PromptProgress)]
    assert counts[0] == 0
    assert counts[-1] == 1000
    assert counts == sorted(counts)
    assert len(counts) > 3


def test_a_prompt_that_fills_the_context_is_an_error(random_model: Path, open_context: OpenContext) -> None:
    sequence = TokenSequence(open_context(random_model, n_ctx=256))
    with pytest.raises(ContextFull) as caught:
        answer(sequence, [1] * 256, 1)
    assert (caught.value.n_prompt, caught.value.n_ctx, caught.value.n_ctx_train) == (256, 256, 4096)
    assert caught.value.hint == "Use a longer context: -c 1024"


def test_an_answer_ends_at_the_end_of_the_context(endless_model: Path, open_context: OpenContext) -> None:
    sequence = TokenSequence(open_context(endless_model, n_ctx=256))
    tokens = answer(sequence, [10] * 200, 1000)
    assert sequence.is_full
    assert len(tokens) == 57  # 56 more fit into the cache, and the last one is not fed back


def test_a_full_cache_is_an_error_and_keeps_its_tokens(random_model: Path, open_context: OpenContext) -> None:
    context = open_context(random_model, n_ctx=256)
    context.decode([(0, [1] * 250)])
    with pytest.raises(CacheFull):
        context.decode([(0, [1] * 10)])
    assert context.length(0) == 250


def test_stopping_from_another_thread_ends_an_answer(endless_model: Path, open_context: OpenContext) -> None:
    sequence = TokenSequence(open_context(endless_model, n_ctx=100_000))
    threading.Timer(0.1, sequence.stop).start()
    tokens = answer(sequence, [10, 11], 99_000)
    assert sequence.was_stopped
    assert 0 < len(tokens) < 99_000


def test_stopping_during_prefill_takes_milliseconds(endless_model: Path, open_context: OpenContext) -> None:
    """The computed part of the prompt stays cached for the next try."""
    sequence = TokenSequence(open_context(endless_model, n_ctx=60_000))
    stopped_at: list[float] = []

    def stop() -> None:
        stopped_at.append(time.monotonic())
        sequence.stop()

    threading.Timer(0.3, stop).start()
    prompt = [65] * 50_000
    steps = list(sequence.generate(prompt, GREEDY, limit=1))
    assert sequence.was_stopped
    assert time.monotonic() - stopped_at[0] < 2
    read = max(step.done for step in steps if isinstance(step, PromptProgress))
    assert 0 < read < 50_000
    first = next(sequence.generate(prompt, GREEDY, limit=1))
    assert first == PromptProgress(read, 50_000, read)


def test_the_abort_flag_ends_a_running_decode(endless_model: Path, open_context: OpenContext) -> None:
    context = open_context(endless_model, n_ctx=4096)
    context.abort.set()
    with pytest.raises(Aborted):
        context.decode([(0, [1] * 512)])
    context.abort.clear()
    context.truncate(0, 0)
    assert context.decode([(0, [1, 2])]) == [1]


def test_the_abort_flag_can_be_set_and_cleared() -> None:
    flag = AbortFlag()
    assert not flag
    flag.set()
    assert flag
    flag.clear()
    assert not flag


def test_the_same_seed_gives_the_same_answer(random_model: Path, open_context: OpenContext) -> None:
    sampling = Sampling(temperature=5, top_k=0, top_p=1, seed=11)
    first = answer(TokenSequence(open_context(random_model)), [1, 2], 20, sampling)
    second = answer(TokenSequence(open_context(random_model)), [1, 2], 20, sampling)
    other = answer(
        TokenSequence(open_context(random_model)), [1, 2], 20, Sampling(temperature=5, top_k=0, top_p=1, seed=12)
    )
    assert first == second != other


def test_a_repeat_penalty_makes_a_model_repeat_less(random_model: Path, open_context: OpenContext) -> None:
    plain = answer(TokenSequence(open_context(random_model)), [1, 2], 60)
    penalized = answer(
        TokenSequence(open_context(random_model)), [1, 2], 60, Sampling(temperature=0, repeat_penalty=10)
    )
    assert len(set(penalized)) > len(set(plain))


def test_a_penalty_applies_to_the_last_tokens_only(random_model: Path, open_context: OpenContext) -> None:
    def ids(**fields: float) -> list[int]:
        sampling = Sampling(temperature=0, **fields)  # type: ignore[arg-type]
        return answer(TokenSequence(open_context(random_model)), [1, 2], 60, sampling)

    plain = ids(repeat_penalty=1)
    assert ids(repeat_penalty=10, repeat_last_n=0) == plain
    narrow = ids(repeat_penalty=10, repeat_last_n=4)
    assert narrow != plain and all(token not in narrow[at - 4 : at] for at, token in enumerate(narrow) if at >= 4)
    assert any(token in narrow[:at] for at, token in enumerate(narrow))
    wide = ids(repeat_penalty=10, repeat_last_n=131_072)
    assert len(set(wide)) == len(wide)


def test_penalized_choices_are_exact(random_model: Path, open_context: OpenContext) -> None:
    """The penalty is applied to a subset of the candidates; the choice must be that of penalizing all of them."""
    context = open_context(random_model)
    ids = list(range(40, 100))
    (row,) = context.decode([(0, ids)])
    logits = list(context.logits(row)[:259])
    for penalty in (1.05, 1.5, 10.0):
        sampler = Sampler(Sampling(temperature=0, repeat_penalty=penalty), context.model.tokenizer)
        sampler.accept_prompt(ids)
        penalized = [
            (score / penalty if score > 0 else score * penalty) if token in ids else score
            for token, score in enumerate(logits)
        ]
        assert sampler.sample(context, row) == max(range(259), key=lambda token: penalized[token])
        sampler.close()


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 1.5), ("seed", -3), ("repeat_penalty", 0)])
def test_sampling_values_out_of_range_are_errors(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="must be between"):
        Sampling().with_overrides({name: value})


def test_a_load_error_quotes_the_reason_of_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp only logs the reason."""
    strange = write_model(tmp_path / "strange.gguf", architecture="novel")
    with pytest.raises(BadWeights, match="unknown model architecture: 'novel'"):
        Model(strange)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_model(tmp_path / "whole.gguf").read_bytes()[:-5000])
    with pytest.raises(BadWeights, match="corrupted or incomplete"):
        Model(cut)


def test_loading_can_be_cancelled(speaking_model: Path) -> None:
    with pytest.raises(LoadCancelled):
        Model(speaking_model, on_progress=lambda _fraction: False)


def test_ctrl_c_cancels_loading_without_output(speaking_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def press(_fraction: float) -> bool:
        signal.raise_signal(signal.SIGINT)
        return True

    with pytest.raises(KeyboardInterrupt):
        Model(speaking_model, on_progress=press)
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tokenizing_round_trips(speaking_model: Path) -> None:
    tokenizer = Model(speaking_model).tokenizer
    text = "Zwölf Boxkämpfer, 你好\n\t<|im_end|>"
    ids = tokenizer.tokenize(text, special=False)
    assert b"".join(tokenizer.piece(token) for token in ids).decode() == text
    assert not any(tokenizer.is_control(token) for token in ids)
    assert tokenizer.tokenize("<|im_end|>", special=True) == [258]
    assert tokenizer.is_end(258)


def test_pieces_can_be_read_in_several_threads(speaking_model: Path) -> None:
    tokenizer = Model(speaking_model, vocab_only=True).tokenizer
    expected = {token: tokenizer.piece(token) for token in range(200)}
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        pieces = list(threads.map(lambda token: (token, tokenizer.piece(token)), [*expected] * 100))
    assert all(expected[token] == piece for token, piece in pieces)


def test_text_is_normalized_to_nfc(speaking_model: Path) -> None:
    tokenizer = Model(speaking_model).tokenizer
    assert tokenizer.tokenize("e\u0301", special=False) == tokenizer.tokenize("\u00e9", special=False)


def test_lone_surrogates_become_question_marks(speaking_model: Path) -> None:
    tokenizer = Model(speaking_model).tokenizer
    assert tokenizer.tokenize("a\udcffb", special=False) == tokenizer.tokenize("a?b", special=False)


def test_common_prefix_length() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 9]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_llama_cpp_is_loaded_once_and_reports_its_features() -> None:
    assert load_library() is load_library()
    assert "CPU" in load_library().system_info


def test_a_generator_that_outlives_its_context_ends_quietly(random_model: Path) -> None:
    model = Model(random_model)
    context = Context(model, ContextOptions(256, threads=1))
    steps = TokenSequence(context).generate([1, 2, 3], GREEDY, limit=10)
    next(step for step in steps if isinstance(step, int))
    context.close()
    model.close()
    del steps


def test_low_memory_ends_an_answer_and_keeps_its_tokens(endless_model: Path, open_context: OpenContext) -> None:
    left = iter([Memory(8 << 30, 4 << 30)] * 2 + [Memory(8 << 30, 90 << 20)] * 9)
    context = open_context(endless_model)
    seconds = itertools.count(step=0.05)
    sequence = TokenSequence(context, check_memory=MemoryCheck(lambda: next(left), clock=lambda: next(seconds)))
    ids: list[int] = []
    with pytest.raises(LowMemory) as caught:
        ids.extend(step for step in sequence.generate([1, 2, 3, 10], GREEDY, limit=400) if isinstance(step, int))
    assert caught.value.available == 90 << 20
    assert context.length(0) == len(sequence.cached_ids) >= 4 + 30
    assert len(answer(TokenSequence(context), [9, 8, 7], 5)) == 5


def test_the_memory_limit_scales_with_small_containers() -> None:
    MemoryCheck(lambda: Memory(1 << 30, 100 << 20))()
    with pytest.raises(LowMemory):
        MemoryCheck(lambda: Memory(1 << 30, 50 << 20))()


def test_memory_pressure_ends_an_answer() -> None:
    plenty = Memory(8 << 30, 1 << 30)
    MemoryCheck(lambda: plenty, lambda: 0.2)()
    with pytest.raises(LowMemory, match=r"is swapping \(63% of its time; 1,024 MiB left\)"):
        MemoryCheck(lambda: plenty, lambda: 0.63)()


def test_optional_memory_is_freed_before_an_answer_ends() -> None:
    freed = iter([True, False])
    seconds = itertools.count()
    check = MemoryCheck(lambda: Memory(8 << 30, 50 << 20), free_memory=lambda: next(freed), clock=lambda: next(seconds))
    check()
    with pytest.raises(LowMemory):
        check()


def test_memory_is_checked_once_per_second() -> None:
    checks: list[bool] = []
    seconds = iter([0.0, 0.0, 0.4, 0.9, 1.1, 1.9])
    check = MemoryCheck(lambda: checks.append(True) or Memory(8 << 30, 4 << 30), clock=lambda: next(seconds))
    for _ in range(5):
        check()
    assert len(checks) == 2
