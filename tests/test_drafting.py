"""A small model drafts for a large one: the same answers, and only where that is quicker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qwenlocal.chat.loading import Draft, Loading, LoadOptions
from qwenlocal.engine.context import Aborted, Context, ContextOptions
from qwenlocal.engine.draft_model import DraftModel, shares_vocabulary
from qwenlocal.engine.drafting import ModelDrafts, Trial
from qwenlocal.engine.llama import Model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.sampling import Sampling
from qwenlocal.engine.sequence import TokenSequence
from qwenlocal.engine.speculation import USUAL_COSTS, CostCurve, NoSpeculation, Speculation
from qwenlocal.errors import NotEnoughMemory, UsageError
from qwenlocal.machine import Machine, Memory, this_machine
from qwenlocal.terminal.load_notes import describe_plan
from qwenlocal.testing import write_model

GREEDY = Sampling(temperature=0, repeat_penalty=1)
CHEAP = dict.fromkeys(USUAL_COSTS, 1.0)
PROMPT = [40, 41, 42, 43, 44]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Guesser:
    """A small model that takes `seconds` for a token and knows everything, or nothing."""

    def __init__(self, clock: Clock, seconds: float, *, right: bool) -> None:
        self._clock, self._seconds, self._right = clock, seconds, right
        self.closed, self.said = False, 0

    def begin(self, ids: Sequence[int]) -> None:
        self.said = len(ids)

    def extend(self, tokens: Sequence[int]) -> None:
        self.said += len(tokens)

    def catch_up(self) -> None:
        pass

    def draft(self, most: int) -> list[int]:
        assert not self.closed
        self._clock.now += most * self._seconds
        return [self.said + place if self._right else -1 for place in range(most)]

    def close(self) -> None:
        self.closed = True


def say(drafts: Trial | ModelDrafts, clock: Clock, count: int, *, already: int = 10) -> None:
    """A large model whose every token is the number of tokens before it, 0.1 s each, 0.12 s for several at once."""
    drafts.begin(range(already))
    end = already + count
    while already < end:
        draft = drafts.propose(31)
        right = next((place for place, token in enumerate(draft) if token != already + place), len(draft))
        clock.now += 0.12 if draft else 0.1
        drafts.learn(range(already, already + right + 1), len(draft), 0.12 if draft else 0.1)
        already += right + 1


@pytest.fixture
def context() -> Iterator[Callable[..., Context]]:
    contexts: list[Context] = []

    def open_(path: Path, **options: int) -> Context:
        contexts.append(Context(Model(path), ContextOptions(**{"n_ctx": 1024, "threads": 1, **options})))
        return contexts[-1]

    yield open_
    for opened in contexts:
        opened.close()
        opened.model.close()


def answer(sequence: TokenSequence, ids: Sequence[int], sampling: Sampling = GREEDY) -> list[int]:
    return [step for step in sequence.generate(ids, sampling, limit=80) if isinstance(step, int)]


# --- the small model


def test_a_model_drafts_what_it_would_say_itself(endless_model: Path, context: Callable[..., Context]) -> None:
    ids = context(endless_model).model.tokenizer.tokenize("abcd", special=False)
    small = DraftModel(context(endless_model), 1 << 20)
    small.begin(ids)
    assert bytes(ord("e") + place for place in range(4)) == b"".join(
        context(endless_model).model.tokenizer.piece(token) for token in small.draft(4)
    )


def test_a_draft_ends_where_the_small_model_is_not_sure(random_model: Path, context: Callable[..., Context]) -> None:
    small = DraftModel(context(random_model), 1 << 20)
    small.begin(PROMPT)
    assert len(small.draft(8)) < 8


def test_it_goes_on_from_whatever_was_said_instead_of_its_draft(
    endless_model: Path, context: Callable[..., Context]
) -> None:
    opened = context(endless_model)
    word = opened.model.tokenizer
    small = DraftModel(opened, 1 << 20)
    small.begin(word.tokenize("abcd", special=False))
    small.draft(4)
    small.extend(word.tokenize("ab", special=False))  # not what it drafted
    assert b"".join(map(word.piece, small.draft(3))) == b"cde"
    small.begin(word.tokenize("abcdefg", special=False))  # another text altogether
    assert b"".join(map(word.piece, small.draft(1))) == b"h"


def test_it_drafts_nothing_where_its_context_ends(endless_model: Path, context: Callable[..., Context]) -> None:
    small = DraftModel(context(endless_model, n_ctx=256), 1 << 20)
    small.begin([40] * 255)
    assert len(small.draft(8)) <= 2
    small.begin([40] * 300)
    assert small.draft(8) == []


def test_one_stop_ends_both_models(endless_model: Path, context: Callable[..., Context]) -> None:
    large = context(endless_model)
    beside = Context(Model(endless_model), ContextOptions(512, threads=1), large.abort)
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


def test_models_with_other_tokens_are_told_apart(endless_model: Path, tmp_path: Path) -> None:
    one, other = Model(endless_model), Model(with_another_token(endless_model, tmp_path / "other.gguf"))
    assert shares_vocabulary(one, one)
    assert not shares_vocabulary(one, other)
    one.close()
    other.close()


# --- the same answers


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(temperature=1.0, top_k=5, seed=8)])
@pytest.mark.parametrize("seed", [7, 8])
def test_answers_are_the_same_whether_drafts_are_good_or_bad(
    sampling: Sampling, seed: int, random_model: Path, context: Callable[..., Context], tmp_path: Path
) -> None:
    plain = answer(TokenSequence(context(random_model)), PROMPT, sampling)
    large, costs = context(random_model), CostCurve(CHEAP)
    beside = Context(Model(write_model(tmp_path / "s.gguf", seed=seed)), ContextOptions(1024, threads=1), large.abort)
    small = DraftModel(beside, 1 << 20, sure=0.0)
    drafts = ModelDrafts(small, Speculation(costs), costs, clock=lambda: 0.0)
    assert answer(TokenSequence(large, speculation=drafts), PROMPT, sampling) == plain
    assert drafts.drafted > 0
    small.close()


def test_a_good_draft_saves_steps(endless_model: Path, context: Callable[..., Context]) -> None:
    large, costs = context(endless_model), CostCurve(CHEAP)
    small = DraftModel(Context(Model(endless_model), ContextOptions(1024, threads=1), large.abort), 1 << 20)
    drafts = ModelDrafts(small, NoSpeculation(), costs, clock=lambda: 0.0)
    ids = large.model.tokenizer.tokenize("abcd", special=False)
    answer(TokenSequence(large, speculation=drafts), ids)
    answer(TokenSequence(large, speculation=drafts), [*ids, *ids])
    assert drafts.accepted > 0
    assert drafts.accepted > 0.9 * drafts.drafted
    small.close()


# --- whether it pays


def test_drafts_that_are_right_and_quick_stay() -> None:
    clock = Clock()
    small = Guesser(clock, 0.01, right=True)
    trial = Trial(small, NoSpeculation(), CostCurve(CHEAP), clock=clock)
    say(trial, clock, 600)
    assert trial.verdict.startswith("The draft model stays: ")
    assert not small.closed
    before = clock.now
    say(trial, clock, 300, already=610)
    assert clock.now - before < 0.5 * 30


@pytest.mark.parametrize(("seconds", "right"), [(0.01, False), (0.2, True)])
def test_drafts_that_are_wrong_or_slow_are_put_away_after_ten_seconds(seconds: float, right: bool) -> None:
    clock = Clock()
    small = Guesser(clock, seconds, right=right)
    trial = Trial(small, NoSpeculation(), CostCurve(CHEAP), clock=clock)
    say(trial, clock, 130)
    assert small.closed
    assert "does not pay" in trial.verdict
    before = clock.now
    say(trial, clock, 30)
    assert clock.now - before == pytest.approx(3.0)


def test_drafts_stop_where_they_are_wrong_and_are_tried_again_now_and_then() -> None:
    clock = Clock()
    drafts = ModelDrafts(Guesser(clock, 0.01, right=False), NoSpeculation(), CostCurve(), clock)
    say(drafts, clock, 300)
    drafted = drafts.drafted
    say(drafts, clock, 300)
    assert 0 < drafts.drafted - drafted < 30


# --- in the program


@pytest.fixture(scope="module")
def large_and_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return write_model(folder / "large.gguf", seed=7, layers=3), write_model(folder / "small.gguf", seed=7)


def load(large: Path, small: Path, machine: Machine | None = None) -> tuple[list[int], str]:
    draft = Draft("small", small, small.stat().st_size)
    options = LoadOptions(LoadRequest(n_ctx=512, threads=1), draft=draft)
    machine = machine or this_machine()
    loaded = Loading().load(large, options, machine, name="large", size=large.stat().st_size)
    try:
        return answer(loaded.sequence, PROMPT), describe_plan(loaded.plan)
    finally:
        loaded.close()


def test_a_draft_model_is_loaded_beside_and_counted_in_the_plan(large_and_small: tuple[Path, Path]) -> None:
    _, sentence = load(*large_and_small)
    assert " + draft model 0.2 of " in sentence


def test_a_draft_model_that_is_no_smaller_is_refused(large_and_small: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="small is no smaller than large"):
        load(large_and_small[1], large_and_small[0])


def test_a_draft_model_with_another_vocabulary_is_refused(large_and_small: tuple[Path, Path], tmp_path: Path) -> None:
    large, small = large_and_small
    with pytest.raises(UsageError, match="their vocabularies differ"):
        load(large, with_another_token(small, tmp_path / "other.gguf"))


def test_both_models_must_fit(large_and_small: tuple[Path, Path]) -> None:
    tight = Machine(1, lambda: Memory(8 << 30, 250 << 20))
    with pytest.raises(NotEnoughMemory, match="large with small"):
        load(*large_and_small, tight)
