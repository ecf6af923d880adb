"""Logits of converted checkpoints, compared with those of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import convert_checkpoint

from qwenlocal.engine import context
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.errors import QwenlocalError, UnsupportedCheckpoint
from qwenlocal.measure.reference import ReferenceTensors, load_reference, plan_reference
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type

GOLDENS = Path(__file__).resolve().parent / "goldens"
GOLDEN = json.loads((GOLDENS / "logits.json").read_text("utf-8"))
IDS = GOLDEN["ids"]
CLOSE = 1e-4  # of the range of the logits

_F32, _NO_FLASH = 0, 0  # ggml.h: GGML_TYPE_F32; llama.h: LLAMA_FLASH_ATTN_TYPE_DISABLED

each_golden = pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module tests/goldens/make_logits.py; only new goldens need torch."""
    monkeypatch.syspath_prepend(str(GOLDENS))
    import make_logits

    return make_logits


@pytest.fixture
def f32_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache keys and values as float32; the usual 16 bits cause relative errors of 1e-3."""
    original = context.context_parameters

    def parameters(c: Any, options: ContextOptions) -> Any:
        result = original(c, options)
        result.type_k = result.type_v = _F32
        result.flash_attn_type = _NO_FLASH
        return result

    monkeypatch.setattr(context, "context_parameters", parameters)


@pytest.fixture
def checkpoint(case: dict[str, Any], maker: Any, tmp_path: Path) -> Path:
    """Build the checkpoint of a golden."""
    folder: Path = maker.build(tmp_path / "model", case["checkpoint"])
    assert maker.digest(folder) == case["weights"], (
        "the weights differ: numpy or write_checkpoint draws other random numbers"
    )
    return folder


def convert(source: Path) -> Path:
    return convert_checkpoint(source, source.parent / "f32.gguf", "f32", threads=2)


def compute_logits(model: Model) -> numpy.ndarray:
    """Compute the logits after each of `IDS`, and close the model."""
    context = Context(model, ContextOptions(256, threads=2, n_batch=32))
    try:
        (first,) = context.decode([(0, IDS)], all_logits=(0,))
        size = len(model.tokenizer)
        rows = [numpy.ctypeslib.as_array(context.logits(first + n), (size,)).copy() for n in range(len(IDS))]
        return numpy.stack(rows)
    finally:
        context.close()
        model.close()


def relative_error(logits: numpy.ndarray, case: dict[str, Any], maker: Any) -> float:
    """Return the largest difference from the golden, relative to its range."""
    golden = numpy.array(case["logits"])
    return float(abs(maker.excerpt(logits) - golden).max() / numpy.ptp(golden))


@each_golden
@pytest.mark.usefixtures("f32_cache")
def test_a_converted_checkpoint_has_the_logits_of_transformers(
    case: dict[str, Any], checkpoint: Path, maker: Any
) -> None:
    assert relative_error(compute_logits(Model(convert(checkpoint))), case, maker) <= CLOSE


@each_golden
@pytest.mark.usefixtures("f32_cache")
def test_a_checkpoint_in_memory_has_the_logits_of_transformers(
    case: dict[str, Any], checkpoint: Path, maker: Any, tmp_path: Path
) -> None:
    header = tmp_path / "header.gguf"
    plan = plan_conversion(Checkpoint.open(checkpoint), [(header, file_type("f32"))])
    assert relative_error(compute_logits(load_in_memory(plan)), case, maker) <= CLOSE


@each_golden
@pytest.mark.usefixtures("f32_cache")
def test_the_reference_of_verify_has_the_logits_of_transformers(
    case: dict[str, Any], checkpoint: Path, maker: Any, tmp_path: Path
) -> None:
    """If the weights have 16 bits, llama.cpp rounds the activations to the same type."""
    plan = plan_reference(Checkpoint.open(checkpoint), tmp_path / "header.gguf", ConversionOptions())
    allowed = {"f32": CLOSE, "f16": 2e-3, "bf16": 1e-2}[plan.files[0].type.name]
    assert relative_error(compute_logits(load_in_memory(plan)), case, maker) <= allowed


def load_in_memory(plan: ConversionPlan) -> Model:
    """Load the model of a plan with the weights of the checkpoint, without writing a GGUF file."""
    output = plan.job.outputs[0]
    output.path.write_bytes(output.header)
    return load_reference(output.path, ReferenceTensors(plan))


@pytest.mark.parametrize(
    "more", [{"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}], ids=["beta_fast", "beta_slow", "truncate"]
)
def test_yarn_settings_that_llama_cpp_ignores_are_refused(more: dict[str, Any], tmp_path: Path) -> None:
    """src/models/qwen2.cpp reads no `rope.scaling.yarn_*`: the betas are 32 and 1, whatever a file says."""
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, **more}
    folder = write_checkpoint(tmp_path / "model", config={"rope_theta": 10000.0, "rope_scaling": scaling})
    with pytest.raises(UnsupportedCheckpoint):
        convert(folder)


WINDOW = {"use_sliding_window": True, "sliding_window": 512}


@pytest.mark.parametrize(
    "config",
    [
        # With experts, transformers uses the window in every second layer BEFORE max_window_layers.
        pytest.param({**MOE_CONFIG, **WINDOW, "max_window_layers": 28}, id="experts with a sliding window"),
        pytest.param({"is_causal": False}, id="attention to later tokens"),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            id="contradicting RoPE settings",
        ),
    ],
)
def test_a_config_that_llama_cpp_would_compute_differently_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config=config)
    with pytest.raises(QwenlocalError):
        convert(folder)


@pytest.fixture
def quiet() -> Iterator[None]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.reference
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("quiet")
@each_golden
def test_the_goldens_match_the_installed_transformers(case: dict[str, Any], checkpoint: Path, maker: Any) -> None:
    assert relative_error(maker.logits_of_transformers(checkpoint, IDS), case, maker) <= CLOSE / 10
