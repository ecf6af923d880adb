"""`qwenlocal bench`, on a model of a few hundred kilobytes: which tests run, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run

from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.measure import bench
from qwenlocal.measure.bench import Speed, decode_speed, fill_cache, prefill_speed
from qwenlocal.testing import write_model


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


def test_a_table_and_bars_are_printed(random_model: Path, invoke: Run) -> None:
    result = invoke("bench", str(random_model), "-r", "1", "--depths", "0", "--plot", "--flash-attention", "on")
    assert "flash attention on" in result.stdout
    assert "pp512" in result.stdout
    assert "█" in result.stdout
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
    bench.run_benchmarks(random_model, ContextOptions(0, threads=1), repetitions=1, depths=[0, 256])
    assert depths == [0, 0, 256, 256]


def test_a_model_with_a_tiny_context_is_benchmarked(invoke: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", context=100)
    result = invoke("bench", "./x.gguf", "-r", "1")
    assert result.returncode == 0, result.stderr
