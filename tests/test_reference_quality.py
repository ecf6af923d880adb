"""`qwenlocal quality`, compared with llama-perplexity on the same files and text (benchmarks/rival.sh builds it)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import convert_checkpoint
from commands import parse_json
from conftest import Run
from starter import ROOT

from qwenlocal.testing import write_checkpoint

PROGRAM = ROOT / "build" / "rival" / "bin" / "llama-perplexity"
TEXT = ROOT / "qwenlocal" / "measure" / "calibration.txt"
pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM.exists(), reason="llama-perplexity is not built: benchmarks/rival.sh"),
]


def run_llama(last_line: str, model: Path, *options: str) -> str:
    """Run llama-perplexity until it prints `last_line`: one run of ten exits before its log is written."""
    command = [str(PROGRAM), "-m", str(model), "-f", str(TEXT), "-t", "2", *options]
    for _ in range(5):
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
        if last_line in result.stdout + result.stderr:
            return result.stdout + result.stderr
    pytest.fail(f"llama-perplexity never printed {last_line!r}")


def read_number(output: str, label: str) -> float:
    """`read_number("Mean    KLD:   0.097 ± 0.003", "Mean +KLD:")` is 0.097."""
    match = re.search(rf"{label}\s*(-?[\d.]+)", output)
    assert match, output
    return float(match[1])


def measure(invoke: Run, model: Path, *options: str) -> dict[str, Any]:
    result = invoke("quality", str(model), "--text", str(TEXT), "-t", "2", "--json", *options)
    assert result.returncode == 0, result.stderr
    return dict(parse_json(result.stdout))


def compare(invoke: Run, base: Path, model: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str, str]:
    """Return the facts of `model`, compared with `base`, and llama-perplexity's output of `base` and of `model`."""
    stored = ("--kl-divergence-base", str(folder / "base.kld"))
    of_base = run_llama("Final estimate:", base, *options, *stored)
    theirs = run_llama("Same top p:", model, *options, *stored, "--kl-divergence")
    (folder / "base.kld").unlink()
    return measure(invoke, model, "--base", str(base), *options), of_base, theirs


def check_divergence(ours: dict[str, Any], of_base: str, theirs: str) -> None:
    """
    Check all statistics.

    The perplexity of the base is that of its own run: with --kl-divergence, llama-perplexity reads it from its file, in
    which no token is less likely than e⁻¹⁶ times the likeliest.
    """
    assert ours["perplexity"] == pytest.approx(read_number(theirs, r"Mean PPL\(Q\) +:"), rel=1e-3)
    assert ours["base_perplexity"] == pytest.approx(read_number(of_base, "Final estimate: PPL ="), rel=1e-3)
    assert ours["kl"] == pytest.approx(read_number(theirs, "Mean +KLD:"), rel=0.01)
    assert ours["kl_error"] == pytest.approx(read_number(theirs, r"Mean +KLD: +[\d.]+ ±"), rel=0.03)
    assert ours["kl_quantiles"]["median"] == pytest.approx(read_number(theirs, "Median +KLD:"), rel=0.03)
    assert ours["kl_quantiles"]["99%"] == pytest.approx(read_number(theirs, "99.0% +KLD:"), rel=0.05)
    assert ours["same_top"] == pytest.approx(read_number(theirs, "Same top p:") / 100, abs=0.01)
    assert ours["rms_delta_p"] == pytest.approx(read_number(theirs, "RMS Δp +:") / 100, rel=0.05, abs=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model as f32 and in smaller types."""
    folder = tmp_path_factory.mktemp("quality")
    checkpoint = write_checkpoint(folder / "Tiny")
    return {name: convert_checkpoint(checkpoint, folder / f"{name}.gguf", name) for name in ("f32", "q8_0", "q4_0")}


@pytest.mark.parametrize("n_ctx", [128, 512, 1000])
def test_perplexity_equals_that_of_llama_perplexity(n_ctx: int, files: dict[str, Path], invoke: Run) -> None:
    options = ("-c", str(n_ctx), "--chunks", "20")
    theirs = run_llama("Final estimate:", files["f32"], *options, "-b", str(n_ctx))
    ours = measure(invoke, files["f32"], *options)
    assert ours["windows"] == 20
    assert ours["perplexity"] == pytest.approx(read_number(theirs, "Final estimate: PPL ="), rel=1e-3)
    assert ours["perplexity_error"] == pytest.approx(read_number(theirs, r"PPL = [\d.]+ \+/-"), rel=1e-2)


@pytest.mark.parametrize("level", ["q8_0", "q4_0"])
def test_the_divergence_equals_that_of_llama_perplexity(
    level: str, files: dict[str, Path], invoke: Run, tmp_path: Path
) -> None:
    check_divergence(*compare(invoke, files["f32"], files[level], tmp_path, "--chunks", "20"))


@pytest.mark.real
def test_the_starter_has_the_perplexity_and_divergence_that_llama_perplexity_measures(
    starter: Path, invoke: Run, tmp_path: Path
) -> None:
    f16, q4_0 = tmp_path / "f16.gguf", tmp_path / "q4_0.gguf"
    assert invoke("quantize", str(starter), str(f16), "f16", "--requantize").returncode == 0
    assert invoke("quantize", str(f16), str(q4_0), "q4_0").returncode == 0
    check_divergence(*compare(invoke, f16, q4_0, tmp_path, "--chunks", "8"))
