"""`qwenlocal tune`: measure settings, save them per power source, and use them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.chat.chat_model import load_chat_model
from qwenlocal.engine.load_plan import LoadRequest
from qwenlocal.engine.loader import LoadOptions
from qwenlocal.engine.speculation import DEFAULT_COSTS
from qwenlocal.engine.tuned_settings import TunedSettings, read_tuned_settings, write_costs, write_tuned_settings
from qwenlocal.machine import this_machine
from qwenlocal.measure.tune import find_fastest, thread_counts, tune


class Clock:
    """Each speed that is asked for takes a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[int] = []

    def __call__(self) -> float:
        return self.now

    def speed(self, candidate: int) -> float:
        self.now += 1
        self.asked.append(candidate)
        return {1: 10.0, 2: 19.0, 3: 19.4, 4: 15.0}[candidate]


def test_the_first_candidate_wins_unless_another_is_clearly_faster() -> None:
    clock = Clock()
    assert find_fastest([1, 2, 3, 4], clock.speed, 9, clock) == 2
    assert clock.asked == [1, 2, 3, 4] * 3
    assert find_fastest([3, 4], clock.speed, 1, clock) == 3
    assert find_fastest([4], clock.speed, 1, clock) == 4


def test_one_slow_sample_does_not_decide() -> None:
    samples = {"a": iter([10.0, 1.0, 10.0]), "b": iter([9.0, 9.0, 9.0])}
    times = iter(range(100))
    assert find_fastest(["a", "b"], lambda name: next(samples[name]), 3, lambda: next(times)) == "a"


@pytest.mark.parametrize(
    ("cores", "processors", "expected"), [(2, 2, [1, 2]), (4, 8, [2, 3, 4, 8]), (1, 1, [1]), (8, 8, [4, 7, 8])]
)
def test_thread_counts_are_below_at_and_above_the_cores(cores: int, processors: int, expected: list[int]) -> None:
    assert thread_counts(cores, processors) == expected


def test_settings_are_saved_per_power_source(tmp_path: Path) -> None:
    mains, battery = TunedSettings(4, False, 128), TunedSettings(2, True, 512, {**DEFAULT_COSTS, 4: 1.5})
    write_tuned_settings(tmp_path / "tuned", "abc", "mains", mains)
    write_tuned_settings(tmp_path / "tuned", "abc", "battery", battery)
    assert read_tuned_settings(tmp_path / "tuned", "abc", "mains") == mains
    assert read_tuned_settings(tmp_path / "tuned", "abc", "battery") == battery
    assert read_tuned_settings(tmp_path / "tuned", "other", "mains") == TunedSettings()


def test_costs_learned_while_answering_are_saved_with_the_settings(tmp_path: Path) -> None:
    learnt = {**DEFAULT_COSTS, 8: 2.2}
    write_costs(tmp_path, "abc", "battery", learnt)
    assert read_tuned_settings(tmp_path, "abc", "battery") == TunedSettings(costs=learnt)
    write_tuned_settings(tmp_path, "abc", "mains", TunedSettings(4, False, 128))
    write_costs(tmp_path, "abc", "mains", learnt)
    assert read_tuned_settings(tmp_path, "abc", "mains") == TunedSettings(4, False, 128, learnt)
    assert read_tuned_settings(tmp_path, "abc", "battery") == TunedSettings(costs=learnt)


GOOD = {"threads": 2, "flash_attention": False, "together": 128, "costs": {str(k): v for k, v in DEFAULT_COSTS.items()}}


ANYTHING = st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.just({}) | st.just({"1": -1})


@given(st.dictionaries(st.sampled_from([*GOOD, "x"]), ANYTHING))
def test_any_file_content_gives_valid_settings_or_none(changes: dict[str, object]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "m.json").write_text(json.dumps({"mains": {**GOOD, **changes}}))
        found = read_tuned_settings(Path(folder), "m", "mains")
        assert 0 <= found.threads <= 512 and set(found.costs) == set(DEFAULT_COSTS)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff", '{"mains": 3}'])
def test_a_damaged_file_is_ignored_and_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(content, encoding="latin-1")
    assert read_tuned_settings(tmp_path, "m", "mains") == TunedSettings()
    write_tuned_settings(tmp_path, "m", "mains", TunedSettings(1, False, 128))
    assert read_tuned_settings(tmp_path, "m", "mains") == TunedSettings(1, False, 128)


def test_tuning_measures_every_setting_of_a_real_model(random_model: Path) -> None:
    steps: list[str] = []
    tuned = tune(random_model, [1, 2], seconds=0.4, report=steps.append)
    assert tuned.threads in (1, 2)
    assert tuned.n_ubatch in (128, 512)
    assert set(tuned.costs) == set(DEFAULT_COSTS)
    assert tuned.costs[1] == 1.0
    assert steps == ["threads", "flash attention", "decoding several tokens at once", "micro-batch size"]


def test_tuned_settings_apply_unless_options_override_them(random_model: Path) -> None:
    tuned = TunedSettings(1, True, 512, {**DEFAULT_COSTS, 32: 3.0})

    def load(request: LoadRequest) -> tuple[int, bool | None, int]:
        loaded = load_chat_model(random_model, LoadOptions(request, tuned=tuned), this_machine(), name="x", size=1)
        loaded.close()
        options = loaded.plan.options
        return options.threads, options.flash_attention, options.n_ubatch

    assert load(LoadRequest()) == (1, True, 512)
    assert load(LoadRequest(threads=2, flash_attention=False, n_ubatch=64)) == (2, False, 64)


def test_a_container_with_fewer_processors_limits_the_tuned_threads(random_model: Path) -> None:
    machine = replace(this_machine(), cores=1, logical_cores=2)
    loaded = load_chat_model(
        random_model, LoadOptions(LoadRequest(), tuned=TunedSettings(8, True, 512)), machine, name="x", size=1
    )
    loaded.close()
    assert loaded.plan.options.threads == 2


def test_the_command_saves_the_settings_that_run_uses(random_model: Path, invoke: Run) -> None:
    result = invoke("tune", str(random_model), "--seconds", "1")
    assert result.returncode == 0, result.stderr
    assert "Saved; qwenlocal run uses these settings" in result.stdout
    assert json.loads(invoke("tune", str(random_model), "--seconds", "1", "--json").stdout)["threads"] >= 1
    assert invoke("run", str(random_model), "Hi", "-n", "3").returncode == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "1e9", "nan"])
def test_an_invalid_time_is_refused(seconds: str, random_model: Path, invoke: Run) -> None:
    result = invoke("tune", str(random_model), "--seconds", seconds)
    assert result.returncode == 2
    assert "--seconds must be between" in result.stderr


def test_tuning_a_missing_model_is_reported(invoke: Run) -> None:
    assert invoke("tune", "./nowhere.gguf").returncode == 3
