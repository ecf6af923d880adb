"""What a converted checkpoint computes is what transformers computes for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from qwenlocal.engine import context
from qwenlocal.engine.context import Context, ContextOptions
from qwenlocal.engine.llama import Model
from qwenlocal.errors import QwenlocalError, UnsupportedCheckpoint
from qwenlocal.measure.reference import ReferenceTensors, load_reference, plan_reference
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.convert import ConversionOptions, plan_conversion
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.write_workers import run_job

GOLDENS = Path(__file__).resolve().parent / "goldens"
GOLDEN = json.loads((GOLDENS / "logits.json").read_text("utf-8"))
IDS = GOLDEN["ids"]
CLOSE = 1e-4  # of the range of the logits

_F32, _NO_FLASH = 0, 0  # ggml.h: GGML_TYPE_F32; llama.h: LLAMA_FLASH_ATTN_TYPE_DISABLED

each_golden = pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/goldens/make_logits.py; only computing anew needs torch."""
    monkeypatch.syspath_prepend(str(GOLDENS))
    import make_logits

    return make_logits


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are cached in float32: the 16 bits they usually have make errors of a thousandth."""
    usual = context._parameters

    def parameters(c: Any, options: ContextOptions) -> Any:
        found = usual(c, options)
        found.type_k = found.type_v = _F32
        found.flash_attn_type = _NO_FLASH
        return found

    monkeypatch.setattr(context, "_parameters", parameters)


@pytest.fixture
def checkpoint(case: dict[str, Any], maker: Any, tmp_path: Path) -> Path:
    """The checkpoint that a golden is about."""
    folder: Path = maker.build(tmp_path / "model", case["checkpoint"])
    assert maker.digest(folder) == case["weights"], "other weights: numpy draws other numbers, or write_checkpoint does"
    return folder


def converted(source: Path, kind: str = "f32") -> Path:
    target = source.parent / f"{kind}.gguf"
    run_job(plan_conversion(Checkpoint.open(source), [(target, file_type(kind))]).job, threads=2)
    return target


def logits(model: Model) -> numpy.ndarray:
    """What the model says after each of `IDS`."""
    context = Context(model, ContextOptions(256, threads=2, n_batch=32))
    try:
        (first,) = context.decode([(0, IDS)], all_logits=True)
        size = len(model.tokenizer)
        rows = [numpy.ctypeslib.as_array(context.logits(first + n), (size,)).copy() for n in range(len(IDS))]
        return numpy.stack(rows)
    finally:
        context.close()
        model.close()


def error(found: numpy.ndarray, case: dict[str, Any], maker: Any) -> float:
    """The largest difference to the golden, as a share of its range."""
    golden = numpy.array(case["logits"])
    return float(abs(maker.excerpt(found) - golden).max() / numpy.ptp(golden))


@each_golden
@pytest.mark.usefixtures("exact")
def test_a_converted_checkpoint_has_the_logits_of_transformers(
    case: dict[str, Any], checkpoint: Path, maker: Any
) -> None:
    assert error(logits(Model(converted(checkpoint))), case, maker) <= CLOSE


@each_golden
@pytest.mark.usefixtures("exact")
def test_a_checkpoint_in_memory_has_the_logits_of_transformers(
    case: dict[str, Any], checkpoint: Path, maker: Any, tmp_path: Path
) -> None:
    header = tmp_path / "header.gguf"
    plan = plan_conversion(Checkpoint.open(checkpoint), [(header, file_type("f32"))])
    assert error(logits(in_memory(plan)), case, maker) <= CLOSE


@each_golden
@pytest.mark.usefixtures("exact")
def test_what_verify_takes_for_the_truth_is_as_close_to_transformers_as_the_checkpoints_own_floats(
    case: dict[str, Any], checkpoint: Path, maker: Any, tmp_path: Path
) -> None:
    """With weights of 16 bits, llama.cpp rounds what they are multiplied with to the same 16 bits."""
    plan = plan_reference(Checkpoint.open(checkpoint), tmp_path / "header.gguf", ConversionOptions())
    allowed = {"f32": CLOSE, "f16": 2e-3, "bf16": 1e-2}[plan.files[0].type.name]
    assert error(logits(in_memory(plan)), case, maker) <= allowed


def in_memory(plan: ConversionPlan) -> Model:
    """The model of a plan whose weights are read from the checkpoint, without a file of them."""
    output = plan.job.outputs[0]
    output.path.write_bytes(output.header)
    return load_reference(output.path, ReferenceTensors(plan))


@pytest.mark.parametrize(
    "more", [{"beta_fast": 16.0}, {"beta_slow": 2.0}, {"truncate": False}], ids=["beta_fast", "beta_slow", "truncate"]
)
def test_a_yarn_scaling_that_llama_cpp_does_not_compute_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    """src/models/qwen2.cpp reads no `rope.scaling.yarn_*`: the betas are 32 and 1, whatever a file says."""
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, **more}
    folder = write_checkpoint(tmp_path / "model", config={"rope_theta": 10000.0, "rope_scaling": scaling})
    with pytest.raises(UnsupportedCheckpoint):
        converted(folder)


WINDOW = {"use_sliding_window": True, "sliding_window": 512}


@pytest.mark.parametrize(
    "config",
    [
        # In a mixture, transformers lets every second of the layers BEFORE max_window_layers slide.
        pytest.param({**MOE_CONFIG, **WINDOW, "max_window_layers": 28}, id="a mixture with a sliding window"),
        pytest.param({"is_causal": False}, id="attention to what comes later"),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            id="two ropes that contradict each other",
        ),
    ],
)
def test_a_config_whose_file_would_compute_something_else_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config=config)
    with pytest.raises(QwenlocalError):
        converted(folder)


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
def test_the_goldens_are_what_transformers_computes_today(case: dict[str, Any], checkpoint: Path, maker: Any) -> None:
    assert error(maker.logits_of_transformers(checkpoint, IDS), case, maker) <= CLOSE / 10
