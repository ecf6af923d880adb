"""
Importance matrices equal those of llama-imatrix.

llama.cpp's programs: benchmarks/rival.sh; then: make test-reference
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy
import pytest
from checkpoint_files import convert_checkpoint

from qwenlocal.cli.commands.imatrix import create_imatrix
from qwenlocal.measure.importance import CALIBRATION_TEXT
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.file_types import QuantOverrides, file_type
from qwenlocal.weights.imatrix import read_imatrix
from qwenlocal.weights.quantization import plan_quantization
from qwenlocal.weights.write_workers import run_job

pytestmark = [pytest.mark.reference, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "build" / "rival" / "bin"
TEXT = CALIBRATION_TEXT
CHUNKS = 4  # of three, llama-imatrix computes 510 rows at once, and leaves out the 6 that remain


def run_llama_cpp(program: str, *arguments: str | Path) -> None:
    if not (PROGRAMS / program).exists():
        pytest.skip(f"{program} is not built: benchmarks/rival.sh")
    subprocess.run([PROGRAMS / program, *map(str, arguments)], check=True, capture_output=True, timeout=280)


@pytest.fixture(params=["dense", "mixture", "starter"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / "model.gguf"
    if request.param == "starter":
        starter = request.getfixturevalue("starter")
        run_job(plan_quantization(starter, [(target, file_type("f16"))], requantize=True).job, threads=2)
        return target
    config = {"hidden_size": 256, **(MOE_CONFIG if request.param == "mixture" else {})}
    return convert_checkpoint(write_checkpoint(tmp_path / "x", config=config), target, "f32")


def test_the_sums_are_those_of_llama_imatrix(model: Path, tmp_path: Path) -> None:
    """
    Relative to the whole matrix. Single columns of the real model differ more: the kernels of both programs add in
    another order, and llama-imatrix with and without flash attention differs from itself as much.
    """
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    create_imatrix(str(model), text=str(TEXT), out=str(ours), chunks=CHUNKS, threads=2, force=False)
    run_llama_cpp(
        "llama-imatrix", "-m", model, "-f", TEXT, "-o", theirs, "--chunks", str(CHUNKS), "-t", "2", "--no-ppl"
    )
    left, right = read_imatrix(ours), read_imatrix(theirs)
    assert set(left.weights) == set(right.weights)
    for name, weights in right.weights.items():
        difference = left.weights[name].astype(numpy.float64) - weights
        assert numpy.linalg.norm(difference) <= 1e-3 * numpy.linalg.norm(weights), name
        assert abs(difference.sum()) <= 1e-3 * weights.sum(dtype=numpy.float64), name
    assert left.metadata["quantize.imatrix.chunks_count"] == right.metadata["quantize.imatrix.chunks_count"]


def test_llama_quantize_reads_the_file(tmp_path: Path) -> None:
    model, matrix = tmp_path / "model.gguf", tmp_path / "matrix.gguf"
    convert_checkpoint(write_checkpoint(tmp_path / "x"), model, "f32")
    create_imatrix(str(model), text=str(TEXT), out=str(matrix), chunks=CHUNKS, threads=2, force=False)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    plan = plan_quantization(
        model, [(ours, file_type("iq3_xxs"))], QuantOverrides(has_imatrix=True), read_imatrix(matrix)
    )
    run_job(plan.job, threads=2)
    run_llama_cpp("llama-quantize", "--imatrix", matrix, model, theirs, "iq3_xxs", "2")
    assert ours.read_bytes()[-4096:] == theirs.read_bytes()[-4096:]
