"""`--mix best`: types with a smaller measured error than llama.cpp's, in the same number of bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest
from commands import expect_exit
from conftest import Run
from gguf_files import write_f32_gguf
from hub import HubServer
from hub_checkpoints import HF_NAME, publish

from qwenlocal.errors import UsageError
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import ConversionOptions, plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import QuantOverrides, file_type, parse_tensor_types
from qwenlocal.weights.imatrix import ImportanceMatrix, read_imatrix
from qwenlocal.weights.write_workers import run_job

AWKWARD = {"hidden_size": 256, "intermediate_size": 736, "num_hidden_layers": 4}  # 736 = 23 · 32, not a multiple of 256
MIXTURE = {**MOE_CONFIG, "moe_intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose ffn_down K-quants cannot divide."""
    return write_checkpoint(tmp_path_factory.mktemp("awkward") / "x", config=AWKWARD)


def plan(
    folder: Path, kind: str = "q4_k_m", imatrix: ImportanceMatrix | None = None, name: str = "x", **overrides: object
) -> ConversionPlan:
    options = ConversionOptions(
        overrides=QuantOverrides(has_imatrix=imatrix is not None, **overrides),  # type: ignore[arg-type]
        imatrix=imatrix,
    )
    return plan_conversion(Checkpoint.open(folder), [(folder / f"{name}.gguf", file_type(kind))], options)


def types_of(planned: ConversionPlan) -> dict[str, str]:
    return {tensor.name: tensor.choice.type.name for tensor in planned.files[0].tensors}


def error_of(planned: ConversionPlan, folder: Path, importance: ImportanceMatrix | None = None) -> float:
    """Write the file, and sum the relative squared errors of the matrices of all layers."""
    run_job(planned.job, threads=2, replace=True)
    true = {tensor.name: tensor for tensor in gguf.GGUFReader(_float_file(folder)).tensors}
    total = 0.0
    for tensor in gguf.GGUFReader(planned.files[0].path).tensors:
        if not tensor.name.startswith("blk.") or len(tensor.shape) < 2 or tensor.name.endswith("gate_inp.weight"):
            continue
        expected = true[tensor.name].data.astype(numpy.float64)
        difference = gguf.dequantize(tensor.data, tensor.tensor_type) - expected
        weights = importance.weights[tensor.name][0] if importance else 1.0
        total += float((difference**2 * weights).sum() / (expected**2 * weights).sum())
    return total


def _float_file(folder: Path) -> Path:
    path = folder / "true.gguf"
    if not path.exists():
        run_job(plan_conversion(Checkpoint.open(folder), [(path, file_type("f32"))]).job, threads=2)
    return path


class TestChoice:
    @pytest.mark.parametrize("kind", ["q3_k_m", "q4_k_m", "q5_k_m", "q4_0"])
    def test_the_file_is_not_larger_and_the_error_is_smaller(self, kind: str, awkward: Path) -> None:
        usual, best = plan(awkward, kind, name="usual"), plan(awkward, kind, name="best", best=True)
        assert best.files[0].size <= usual.files[0].size
        assert error_of(best, awkward) < error_of(usual, awkward)

    def test_experts_get_better_types_as_well(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "moe", config=MIXTURE)
        usual, best = plan(folder, name="usual"), plan(folder, name="best", best=True)
        assert best.files[0].size <= usual.files[0].size
        assert error_of(best, folder) < error_of(usual, folder)

    def test_important_columns_count_more(self, awkward: Path, tmp_path: Path) -> None:
        """Only ffn_down of layer 2 has inputs of different sizes; its error is then that of the large columns."""
        random = numpy.random.default_rng(0)
        tensors = {}
        for planned in plan(awkward).files[0].tensors:
            if planned.name.startswith("blk.") and len(planned.shape) > 1:
                tensors[f"{planned.name}.in_sum2"] = random.uniform(0.01, 10, (1, planned.shape[0]))
                tensors[f"{planned.name}.counts"] = numpy.ones((1, 1))
        path = write_f32_gguf(tmp_path / "im.gguf", {"general.type": gguf_writer.string("imatrix")}, tensors)
        matrix = read_imatrix(path)
        usual = plan(awkward, imatrix=matrix, name="usual")
        best = plan(awkward, imatrix=matrix, name="best", best=True)
        assert error_of(best, awkward, matrix) < error_of(usual, awkward, matrix)

    def test_the_choice_is_the_same_each_time(self, awkward: Path) -> None:
        assert types_of(plan(awkward, best=True)) == types_of(plan(awkward, best=True))

    def test_embeddings_output_and_chosen_types_stay(self, awkward: Path) -> None:
        chosen = parse_tensor_types(["ffn_down=q6_k"])
        usual = types_of(plan(awkward, tensor_types=chosen))
        best = types_of(plan(awkward, tensor_types=chosen, best=True))
        for name in ("token_embd.weight", "output.weight", *(f"blk.{layer}.ffn_down.weight" for layer in range(4))):
            assert best[name] == usual[name]

    @pytest.mark.parametrize("kind", ["f16", "f32"])
    def test_floats_have_no_mix(self, kind: str, awkward: Path) -> None:
        assert types_of(plan(awkward, kind, best=True)) == types_of(plan(awkward, kind))

    def test_types_that_the_user_chose_for_all_matrices_stay(self, awkward: Path) -> None:
        planned = plan(awkward, tensor_types=parse_tensor_types(["blk=q4_0"]), best=True)
        assert planned.notes == [
            "Mix for q4_k_m: no other types of this size have a smaller measured error than llama.cpp's."
        ]

    def test_types_without_a_smaller_alternative_stay(self, awkward: Path) -> None:
        planned = plan(awkward, "q8_0", best=True)
        assert types_of(planned) == types_of(plan(awkward, "q8_0"))
        assert "no other types of this size" in planned.notes[0]

    @pytest.mark.parametrize("kind", ["iq2_xxs", "iq1_s"])
    def test_types_that_need_an_importance_matrix_are_refused(self, kind: str, awkward: Path) -> None:
        with pytest.raises(UsageError, match="without an importance matrix"):
            plan(awkward, kind, best=True)

    def test_damaged_weights_do_not_stop_the_plan(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "x", config=AWKWARD)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4:] = b"\xc0\x7f\xc0\x7f"  # NaN
        path.write_bytes(data)
        assert types_of(plan(folder, best=True))


class TestCommand:
    def test_the_gain_is_printed(self, awkward: Path, invoke: Run) -> None:
        message = expect_exit(invoke("convert", str(awkward), "--mix", "best", "--dry-run"), 0)
        assert "Mix for q4_k_m: the measured error of the layers is " in message

    def test_the_plan_names_the_reason(self, awkward: Path, invoke: Run) -> None:
        assert "best mix" in invoke("convert", str(awkward), "--mix", "best", "--dry-run").stdout

    def test_the_mix_cannot_be_pure(self, awkward: Path, invoke: Run) -> None:
        assert "--pure" in expect_exit(invoke("convert", str(awkward), "--mix", "best", "--pure", "--dry-run"), 2)

    def test_a_preview_from_a_hub_has_llama_cpps_types(self, hub: HubServer, awkward: Path, invoke: Run) -> None:
        publish(hub, awkward)
        result = invoke("convert", HF_NAME, "--mix", "best", "--dry-run")
        assert "The best mix is chosen when the weights are on this disk" in expect_exit(result, 0)

    def test_another_mix_is_refused(self, awkward: Path, invoke: Run) -> None:
        message = expect_exit(invoke("convert", str(awkward), "--mix", "worst", "--dry-run"), 2)
        assert "--mix must be llama.cpp or best, not worst" in message
