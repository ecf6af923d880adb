"""`qwenlocal bench`, on a model of a few hundred kilobytes: which tests run, not how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import Run

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure import bench
from qwenlocal.measure.bench import BenchPlan, BenchResult, Speed, decode_speed, fill_cache, prefill_speed
from qwenlocal.measure.limits import MachineLimits, TokenWork
from qwenlocal.testing import write_model
from qwenlocal.weights.gguf_reader import read_header


def test_speeds_have_a_mean_and_a_standard_deviation() -> None:
    speed = Speed([10.0, 12.0, 14.0])
    assert (speed.mean, speed.deviation) == (12.0, 2.0)
    assert Speed([7.0]).deviation == 0.0


def test_measuring_decoding_keeps_the_cache_length(random_model: Path) -> None:
    model = Model(random_model)
    context = Context(model, ContextOptions(1024, threads=1))
    fill_cache(context, 300)
    assert context.length(0) == 300
    assert decode_speed(context, 20) > 0
    assert context.length(0) == 300
    fill_cache(context, 200)
    assert context.length(0) == 200
    assert prefill_speed(context, 128) > 0
    assert context.length(0) == 128
    context.close()
    model.close()


def test_energy_is_the_difference_of_the_counters(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.write_text("1000000")
    with bench.measure_energy(tmp_path) as used:
        counter.write_text("3500000")
    assert used == [2.5]
    with bench.measure_energy(tmp_path) as used:
        counter.write_text("5")  # the counter restarted
    assert used == []
    with bench.measure_energy(tmp_path / "nowhere") as used:
        pass
    assert used == []


def test_json_has_llama_bench_tests_and_times_to_first_token(random_model: Path, invoke: Run) -> None:
    result = invoke("bench", str(random_model), str(random_model), "--json", "-r", "2", "--depths", "0,256", "-t", "1")
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout)
    assert first["model"] == second["model"] == str(random_model)
    for name in ("pp512", "tg128", "tg128_@_d256", "end_to_end"):
        assert first[name]["tok_s"] > 0
        assert first[name]["stddev"] >= 0
        assert len(first[name]["samples"]) == 2
    assert first["load_s"] > 0
    assert first["first_token_warm_s"] > 0
    assert first["memory_bytes"] is None or first["memory_bytes"] > 1e6
    assert (first["threads"], first["flash_attention"]) == (1, False)
    assert (
        0
        < first["bandwidth_share"]
        == pytest.approx(first["bytes_per_token"] * first["tg128"]["tok_s"] / first["bandwidth_bytes_s"], rel=0.01)
    )


def test_the_quick_benchmark_measures_warm_starts_without_depths(random_model: Path, invoke: Run) -> None:
    (facts,) = json.loads(invoke("bench", str(random_model), "--json").stdout)
    (prefill,) = (test for test in facts if test.startswith("pp"))  # fewer tokens on a slow machine
    assert len(facts[prefill]["samples"]) == 2
    assert facts["first_token_cold_s"] is None
    assert not [test for test in facts if "@" in test]


def test_the_full_benchmark_measures_cold_starts_and_depths(random_model: Path, invoke: Run) -> None:
    (facts,) = json.loads(invoke("bench", str(random_model), "--full", "-r", "1", "--json").stdout)
    assert facts["tg128_@_d512"]["tok_s"] > 0
    assert (facts["first_token_cold_s"] is None) == (not hasattr(os, "posix_fadvise"))


@pytest.mark.parametrize(("speed", "size"), [(1000.0, 512), (100.0, 256), (10.0, 32), (0.1, 16)])
def test_slow_models_are_measured_on_fewer_tokens(
    speed: float, size: int, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prefill_speed", lambda context, tokens: speed)
    header = read_header(random_model)
    result = bench.run_benchmarks(random_model, header, ContextOptions(0, threads=1), BenchPlan(2, seconds=10))
    assert f"pp{size}" in result.speeds


def test_the_shares_are_those_of_the_limits() -> None:
    speeds = {"pp512": Speed([200.0]), "tg128": Speed([38.0]), "end to end": Speed([36.0])}
    limits, work = MachineLimits(18.4e9, 4e12), TokenWork(307_000_000, 620_000_000)
    result = BenchResult(speeds, 1.0, None, 1.0, None, None, ContextOptions(512), limits, work)
    assert result.bandwidth_share == pytest.approx(0.634, abs=0.001)
    assert result.operations_share == pytest.approx(0.031, abs=0.001)
    assert result.text_seconds == pytest.approx(1 / 36 - 1 / 38)


def test_a_table_and_bars_are_printed(random_model: Path, invoke: Run) -> None:
    result = invoke("bench", str(random_model), "-r", "1", "--depths", "0", "--plot", "--flash-attention", "on")
    assert "flash attention on" in result.stdout
    assert "pp512" in result.stdout
    assert "█" in result.stdout
    assert "per token" in result.stdout
    assert "±" not in result.stdout, "one repetition has no deviation"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-r", "0"], "-r must be between"),
        (["--depths", "a"], "--depths must be a list of token counts"),
        (["--depths", "-1"], "--depths must be a list of token counts"),
        (["-t", "-2"], "-t must be between"),
        (["--ubatch", "0"], "--ubatch must be between"),
        (["--kv", "q9"], "--kv must be f16, bf16"),
    ],
)
def test_invalid_options_are_refused(options: list[str], message: str, random_model: Path, invoke: Run) -> None:
    result = invoke("bench", str(random_model), *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_missing_model_is_reported(invoke: Run) -> None:
    assert invoke("bench", "./nowhere.gguf").returncode == 3


def test_tg128_starts_with_an_empty_cache_and_the_others_at_their_depth(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depths: list[int] = []

    def recording(context: Context, tokens: int) -> float:
        depths.append(context.length(0))
        return 1.0

    monkeypatch.setattr(bench, "decode_speed", recording)
    bench.run_benchmarks(random_model, read_header(random_model), ContextOptions(0, threads=1), BenchPlan(1, [256]))
    assert depths == [0, 0, 0, 256, 256]  # first to choose the size, and before each test without counting


def test_a_model_with_a_tiny_context_is_benchmarked(invoke: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", context=100)
    result = invoke("bench", "./x.gguf", "-r", "1")
    assert result.returncode == 0, result.stderr
