"""Speculative decoding with a draft model: the same answers, and hardly any time lost if it does not pay."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from commands import expect_exit
from conftest import Run
from generation import CHEAP, GREEDY, OpenContext, answer
from terminal import Open, start_chat

from qwenlocal.chat.chat_model import ChatModel, load_chat_model
from qwenlocal.engine.context import Aborted, Context, ContextOptions
from qwenlocal.engine.device_plan import DraftSpec
from qwenlocal.engine.draft_model import DraftModel, ModelDrafter, shares_vocabulary
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import CostCurve, NoSpeculation, Speculation
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.machine import Machine, Memory, this_machine
from qwenlocal.terminal.load_notes import describe_plan
from qwenlocal.testing import write_model

PROMPT = [40, 41, 42, 43, 44]
LIMIT = 80


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedDraftModel:
    """
    A draft model whose every token takes `drafting`, and every token that it reads `reading`, on a clock of its own.

    A step of the target model takes 1. It drafts `right` tokens, wrong ones, or with `sure` False none at all.
    """

    def __init__(self, clock: Clock, *, drafting: float = 0.1, reading: float = 0.03, right: bool = True) -> None:
        self._clock, self._drafting, self.reading = clock, drafting, reading
        self.right, self.sure = right, True
        self.is_closed, self.drafts, self.read = False, 0, 0
        self._length = self._held = 0

    def begin(self, ids: Sequence[int]) -> None:
        self._length, self._held = len(ids), min(self._held, len(ids))

    def extend(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)

    @property
    def unread(self) -> int:
        return max(0, self._length - 1 - self._held)

    def catch_up(self, most: int) -> int:
        count = min(most, self.unread)
        self._clock.now += count * self.reading
        self._held, self.read = self._length - 1, self.read + count
        return count

    def draft(self, most: int) -> list[int]:
        assert not self.is_closed
        self.drafts += 1
        self._clock.now += self.unread * self.reading
        self._held = self._length - 1
        count = most if self.sure else 0
        self._clock.now += max(count, 1) * self._drafting
        return [self._length + place if self.right else -1 for place in range(count)]

    def close(self) -> None:
        self.is_closed = True


# The time of a batch of k tokens relative to one token, on the machine of the scripted models.
COSTS = {1: 1.0, 2: 1.8, 4: 2.3, 8: 3.8, 12: 5.0, 16: 6.0, 20: 7.4, 24: 8.8, 28: 10.2, 32: 11.4}


class ScriptedAnswers:
    """A target model whose every token is the number of tokens before it; k at once take `COSTS[k]`."""

    def __init__(self, **draft_model: float | bool) -> None:
        self.clock = Clock()
        self.draft_model = ScriptedDraftModel(self.clock, **draft_model)  # type: ignore[arg-type]
        self.drafter = ModelDrafter(self.draft_model, NoSpeculation(), CostCurve(COSTS), self.clock)  # type: ignore[arg-type]
        self._length = 0

    def time(self, prompt: int, answer: int) -> float:
        """Answer after so many new tokens of prompt; return the time for a token, which is 1 without drafts."""
        self._length += prompt
        self.drafter.begin(range(self._length))
        began, end, draft = self.clock.now, self._length + answer, list[int]()
        while self._length < end:
            accepted = next((n for n, token in enumerate(draft) if token != self._length + n), len(draft))
            seconds = COSTS[len(draft) + 1]
            self.clock.now += seconds
            self.drafter.learn(range(self._length, self._length + accepted + 1), len(draft), seconds)
            self._length += accepted + 1
            draft = list(self.drafter.propose(min(31, max(1, end - self._length))))
        return (self.clock.now - began) / answer


def open_beside(target: Context, draft: Path) -> Context:
    """Open a draft model that a stop of the target model ends, too."""
    return Context(Model(draft), ContextOptions(1024, threads=1, flash_attention=False), target.abort)


# --- the draft model


def test_a_draft_is_the_greedy_continuation(endless_model: Path, open_context: OpenContext) -> None:
    ids = open_context(endless_model).model.tokenizer.tokenize("abcd", special=False)
    small = DraftModel(open_context(endless_model), 1 << 20)
    small.begin(ids)
    assert bytes(ord("e") + place for place in range(4)) == b"".join(
        open_context(endless_model).model.tokenizer.piece(token) for token in small.draft(4)
    )


def test_a_draft_ends_at_a_token_of_low_probability(random_model: Path, open_context: OpenContext) -> None:
    small = DraftModel(open_context(random_model), 1 << 20)
    small.begin(PROMPT)
    assert len(small.draft(8)) < 8


def test_a_draft_continues_the_text_after_its_last_draft_was_rejected(
    endless_model: Path, open_context: OpenContext
) -> None:
    opened = open_context(endless_model)
    word = opened.model.tokenizer
    small = DraftModel(opened, 1 << 20)
    small.begin(word.tokenize("abcd", special=False))
    small.draft(4)
    small.extend(word.tokenize("ab", special=False))  # not what it drafted
    assert b"".join(map(word.piece, small.draft(3))) == b"cde"
    small.begin(word.tokenize("abcdefg", special=False))  # another text altogether
    assert b"".join(map(word.piece, small.draft(1))) == b"h"


def test_only_the_last_tokens_are_read_if_many_are_unread(endless_model: Path, open_context: OpenContext) -> None:
    opened = open_context(endless_model)
    word = opened.model.tokenizer
    small = DraftModel(opened, 1 << 20)
    ids = word.tokenize("abcdefgh " * 20 + "abc", special=False)
    small.begin(ids)
    assert small.unread == len(ids) - 1
    assert small.catch_up(9) == 9
    assert (small.unread, opened.length(0)) == (0, 9)
    drafted = small.draft(3)
    assert b"".join(map(word.piece, drafted)) == b"def"
    small.extend(drafted)
    assert small.unread == 0
    small.extend(word.tokenize("gh a", special=False))
    assert small.catch_up(9) == small.catch_up(9) + 4 == 4  # one token of a draft is never read by it
    assert b"".join(map(word.piece, small.draft(3))) == b"bcd"
    small.begin(word.tokenize("abcdefgh abcde", special=False))  # another text
    assert b"".join(map(word.piece, small.draft(3))) == b"fgh"
    assert opened.length(0) > 9


def test_nothing_is_drafted_beyond_the_context(endless_model: Path, open_context: OpenContext) -> None:
    small = DraftModel(open_context(endless_model, n_ctx=256), 1 << 20)
    small.begin([40] * 255)
    assert len(small.draft(8)) <= 2
    small.begin([40] * 300)
    assert small.draft(8) == []


def test_one_stop_ends_both_models(endless_model: Path, open_context: OpenContext) -> None:
    large = open_context(endless_model)
    beside = open_beside(large, endless_model)
    small = DraftModel(beside, 1 << 20)
    small.begin([40] * 300)
    large.abort.set()
    with pytest.raises(Aborted):
        small.draft(4)
    large.abort.clear()
    small.draft(4)
    small.close()


def with_another_token(path: Path, to: Path) -> Path:
    to.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|im_and|>"))
    return to


def test_vocabularies_with_different_tokens_are_not_shared(endless_model: Path, tmp_path: Path) -> None:
    one, other = Model(endless_model), Model(with_another_token(endless_model, tmp_path / "other.gguf"))
    assert shares_vocabulary(one, one)
    assert not shares_vocabulary(one, other)
    one.close()
    other.close()


# --- the same answers


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(temperature=1.0, top_k=5, seed=8)])
@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("repeats", [1, 80])  # 400 tokens are more than it reads to catch up
def test_answers_are_the_same_with_good_and_bad_drafts(
    sampling: Sampling, seed: int, repeats: int, random_model: Path, open_context: OpenContext, tmp_path: Path
) -> None:
    prompt = PROMPT * repeats
    plain = answer(TokenSequence(open_context(random_model)), prompt, LIMIT, sampling)
    target, costs = open_context(random_model), CostCurve(CHEAP)
    beside = open_beside(target, write_model(tmp_path / "s.gguf", seed=seed))
    draft_model = DraftModel(beside, 1 << 20, min_probability=0.0)
    drafter = ModelDrafter(draft_model, Speculation(costs), costs, clock=lambda: 0.0)
    assert answer(TokenSequence(target, speculation=drafter), prompt, LIMIT, sampling) == plain
    assert drafter.drafted > 0
    draft_model.close()


def test_a_good_draft_saves_steps(endless_model: Path, open_context: OpenContext) -> None:
    target, costs = open_context(endless_model), CostCurve(CHEAP)
    draft_model = DraftModel(open_beside(target, endless_model), 1 << 20)
    drafter = ModelDrafter(draft_model, NoSpeculation(), costs, clock=lambda: 0.0)
    ids = target.model.tokenizer.tokenize("abcd", special=False)
    answer(TokenSequence(target, speculation=drafter), ids, LIMIT)
    answer(TokenSequence(target, speculation=drafter), [*ids, *ids], LIMIT)
    assert drafter.accepted > 0
    assert drafter.accepted > 0.9 * drafter.drafted
    draft_model.close()


# --- whether it pays


def test_right_and_fast_drafts_are_used() -> None:
    answers = ScriptedAnswers()
    assert answers.time(60, 600) < 0.5
    assert answers.time(60, 600) < 0.5
    assert answers.drafter.accepted > 900


LOSING = [
    pytest.param({"right": False}, True, id="wrong"),
    pytest.param({"right": False, "drafting": 0.01, "reading": 0.003}, True, id="wrong and fast"),
    pytest.param({"drafting": 0.6, "reading": 0.06}, True, id="right and slow"),
    pytest.param({}, False, id="never sure"),
]


@pytest.mark.parametrize(("draft_model", "sure"), LOSING)
def test_a_draft_model_that_does_not_pay_costs_less_than_two_percent(
    draft_model: dict[str, float | bool], sure: bool
) -> None:
    """Over a chat of 1,000 tokens, and less over 8,000; what it reads after a pause counts."""
    answers = ScriptedAnswers(**draft_model)
    answers.draft_model.sure = sure
    times = [answers.time(50, 500) for _ in range(16)]
    assert 1 < sum(times[:2]) / 2 < 1.02
    assert 1 < sum(times) / 16 < 1.01
    assert answers.draft_model.read > 300


@pytest.mark.parametrize(("draft_model", "sure"), LOSING)
def test_probes_become_rarer(draft_model: dict[str, float | bool], sure: bool) -> None:
    answers = ScriptedAnswers(**draft_model)
    answers.draft_model.sure = sure
    counts = []
    for _ in range(3):
        before = answers.draft_model.drafts
        answers.time(50, 4000)
        counts.append(answers.draft_model.drafts - before)
    assert counts[0] > counts[1] >= counts[2]
    assert counts[2] <= 3


def test_drafts_are_used_again_once_they_are_right() -> None:
    answers = ScriptedAnswers(right=False)
    assert answers.time(60, 300) > 1
    answers.draft_model.right = True
    answers.time(20, 1000)
    assert answers.time(20, 300) < 0.6


def test_reading_a_long_prompt_takes_limited_time() -> None:
    answers = ScriptedAnswers()
    assert answers.time(20_000, 300) < 0.55
    assert answers.draft_model.read < 400


def test_right_drafts_are_not_used_if_reading_takes_longer_than_they_save() -> None:
    answers = ScriptedAnswers(reading=0.4)
    answers.time(100, 20)  # it is known from here on
    read = answers.draft_model.read
    assert [answers.time(1000, 40) for _ in range(30)] == [pytest.approx(1)] * 30
    assert answers.draft_model.read == read


def test_reading_that_does_not_pay_is_not_tried_either() -> None:
    answers = ScriptedAnswers()
    answers.time(60, 300)
    answers.draft_model.reading = 0.4
    answers.time(300, 600)  # it is known from here on, and was paid back
    assert [answers.time(1000, 40) for _ in range(30)] == [pytest.approx(1)] * 30


def test_reading_long_prompts_for_short_answers_costs_little() -> None:
    answers = ScriptedAnswers()
    assert sum(answers.time(400, 10) for _ in range(400)) / 400 < 1.02


def test_a_machine_that_slept_during_a_draft_does_not_end_drafting() -> None:
    answers = ScriptedAnswers()
    answers.time(60, 300)
    draft = answers.draft_model.draft

    def sleep(most: int) -> list[int]:
        answers.clock.now += 30_000
        answers.draft_model.draft = draft  # type: ignore[method-assign]
        return draft(most)

    answers.draft_model.draft = sleep  # type: ignore[method-assign]
    answers.time(20, 100)
    assert answers.time(20, 300) < 0.5


# --- without it


def test_a_draft_model_that_was_given_up_in_the_middle_of_a_step_is_closed_once() -> None:
    clock, costs = Clock(), CostCurve(CHEAP)
    draft_model = ScriptedDraftModel(clock)
    drafter = ModelDrafter(draft_model, Speculation(costs), costs, clock)  # type: ignore[arg-type]
    drafter.begin(range(10))
    drafter.learn([10], 0, 1.0)
    draft = drafter.propose(7)
    assert list(draft) == list(range(11, 11 + len(draft)))
    assert drafter.give_up()
    assert (drafter.has_given_up, draft_model.is_closed) == (True, True)
    drafter.learn([*draft, 99], len(draft), 1.0)
    assert drafter.accepted == drafter.drafted == len(draft)
    assert not drafter.give_up()
    drafter.begin([1, 2, 3, 4, 5] * 4)
    assert list(drafter.propose(3)) == [1, 2, 3]  # by lookup
    drafter.close()


def test_a_closed_draft_model_was_not_given_up() -> None:
    draft_model = ScriptedDraftModel(Clock())
    drafter = ModelDrafter(draft_model, NoSpeculation(), CostCurve())  # type: ignore[arg-type]
    drafter.close()
    assert (draft_model.is_closed, drafter.has_given_up) == (True, False)


# --- in the program


@pytest.fixture(scope="module")
def large_and_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return write_model(folder / "large.gguf", seed=7, layers=3), write_model(folder / "small.gguf", seed=7)


@contextlib.contextmanager
def loaded(large: Path, small: Path | None, machine: Machine | None = None) -> Iterator[ChatModel]:
    draft = DraftSpec("small", small, small.stat().st_size) if small else None
    options = LoadOptions(LoadRequest(n_ctx=512, threads=1), draft=draft)
    machine = machine or this_machine()
    model = load_chat_model(large, options, machine, name="large", size=large.stat().st_size)
    try:
        yield model
    finally:
        model.close()


def load(large: Path, small: Path | None, machine: Machine | None = None) -> tuple[list[int], str]:
    with loaded(large, small, machine) as model:
        return answer(model.sequence, PROMPT, LIMIT), describe_plan(model.plan)


def test_a_draft_model_is_part_of_the_plan(large_and_small: tuple[Path, Path]) -> None:
    _, sentence = load(*large_and_small)
    assert " + draft model 0.2 of " in sentence


def machine_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a machine whose memory is low once: when it is checked in the middle of an answer."""
    monkeypatch.setattr("qwenlocal.engine.memory._CHECK_INTERVAL", 0.0)
    number = itertools.count()  # 0 for the plan, 1 before the prompt, then one per step
    return Machine(1, lambda: Memory(8 << 30, 50 << 20 if next(number) == 6 else 8 << 30))


def test_a_draft_model_is_unloaded_when_memory_is_low_and_the_answer_continues(
    large_and_small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = large_and_small
    plain, _ = load(large, None)
    machine = machine_short_of_memory(monkeypatch)
    with loaded(large, small, machine) as model:
        assert model.drafter is not None
        assert not model.drafter.has_given_up
        assert answer(model.sequence, PROMPT, LIMIT) == plain
        assert model.drafter.has_given_up


def test_run_says_that_the_draft_model_was_unloaded(
    large_and_small: tuple[Path, Path], invoke: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = map(str, large_and_small)
    command = ("run", large, "Hi", "--draft", small, "-n", "80", "-c", "512")
    assert "unloaded" not in expect_exit(invoke(*command), 0)
    machine = machine_short_of_memory(monkeypatch)
    monkeypatch.setattr("qwenlocal.api.model_loader.this_machine", lambda: machine)
    assert "The draft model was unloaded because memory is low." in expect_exit(invoke(*command), 0)


def test_the_numbers_of_an_answer_tell_how_many_drafted_tokens_were_accepted(
    large_and_small: tuple[Path, Path], qwenlocal: Run
) -> None:
    large, small = map(str, large_and_small)
    run = qwenlocal("run", large, "Hi", "--draft", small, "--stats", "-n", "40", "-c", "512")
    assert run.returncode == 0, run.stderr
    assert re.search(r"^draft model: \d+ of \d+ drafted tokens accepted$", run.stderr, re.MULTILINE)
    assert "draft model:" not in qwenlocal("run", large, "Hi", "--stats", "-n", "4", "-c", "512").stderr


def test_a_draft_model_that_is_not_smaller_is_refused(large_and_small: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="small is not smaller than large"):
        load(large_and_small[1], large_and_small[0])


def test_a_draft_model_with_another_vocabulary_is_refused(large_and_small: tuple[Path, Path], tmp_path: Path) -> None:
    large, small = large_and_small
    with pytest.raises(UsageError, match="their vocabularies differ"):
        load(large, with_another_token(small, tmp_path / "other.gguf"))


def test_both_models_must_fit(large_and_small: tuple[Path, Path]) -> None:
    tight = Machine(1, lambda: Memory(8 << 30, 250 << 20))
    with pytest.raises(NotEnoughMemory, match="large with the draft model small"):
        load(*large_and_small, tight)


def test_a_chat_shows_accepted_tokens_with_its_numbers(large_and_small: tuple[Path, Path], terminal: Open) -> None:
    large, small = map(str, large_and_small)
    chat = start_chat(terminal, large, "--draft", small, "--stats", "-n", "40", "-c", "512")
    chat.enter("Hi", r"draft model: \d+ of \d+ drafted tokens accepted")
