"""LoRA adapters merged into a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from adapter_files import (
    ATTENTION,
    EVERYTHING,
    LINEAR,
    change_of,
    convert_adapter,
    plan_merge,
    values_of,
    write_adapter,
    write_merged,
    write_untied,
)
from checkpoint_files import MINIMAL_MOE, convert_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import data_of

from qwenlocal.errors import BadWeights
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights.adapter import read_adapter
from qwenlocal.weights.checkpoint import Checkpoint
from qwenlocal.weights.conversion import plan_conversion
from qwenlocal.weights.conversion_plan import ConversionPlan
from qwenlocal.weights.file_types import file_type
from qwenlocal.weights.write_job import job_identity, memory_needed
from qwenlocal.weights.write_workers import run_job

QUERY = "model.layers.0.self_attn.q_proj"


class TestMerging:
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_merged_weights_are_the_definition(
        self, data: st.DataObject, base: Path, mixture: Path, tmp_path: Path
    ) -> None:
        source, weight = data.draw(st.sampled_from([base, mixture])), data.draw(st.sampled_from([1.0, 0.5, -2.0]))
        rank = data.draw(st.integers(1, 40))
        folder = write_adapter(
            tmp_path / "adapter", source, targets=data.draw(st.sampled_from([ATTENTION, EVERYTHING])), rank=rank,
            dtype=data.draw(st.sampled_from(["F32", "BF16"])), use_rslora=data.draw(st.booleans()),
        )  # fmt: skip
        (tmp_path / "before.gguf").unlink(missing_ok=True)
        before = values_of(convert_checkpoint(source, tmp_path / "before.gguf", "f32"))
        after = values_of(write_merged(source, folder, weight=weight))
        for module in read_adapter(folder).modules:
            change = change_of(folder, module.name, weight * module.scale)
            old, new = (values[module.target] for values in (before, after))
            if old.ndim == 3:
                old, new = old[module.expert], new[module.expert]
            assert numpy.allclose(new, old + change, rtol=1e-5, atol=1e-5), module.name
        changed = {module.target for module in read_adapter(folder).modules}
        assert all((after[name] == values).all() for name, values in before.items() if name not in changed)

    def test_fused_experts_are_merged_like_separate_ones(self, mixture: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", mixture, targets=LINEAR)
        fused = write_checkpoint(tmp_path / "Fused", config=MINIMAL_MOE, dtype="F32", fused_experts=True)
        before, after = (
            values_of(convert_checkpoint(fused, tmp_path / "b.gguf", "f32")),
            values_of(write_merged(fused, folder)),
        )
        name = "model.layers.0.mlp.experts.3.gate_proj"
        change = change_of(folder, name, 2.0)
        old, new = (values["blk.0.ffn_gate_exps.weight"][3] for values in (before, after))
        assert numpy.allclose(new, old + change, rtol=1e-5, atol=1e-5)

    def test_the_change_is_added_before_quantizing(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, targets=LINEAR)
        exact = write_merged(base, folder)
        quantized = data_of(write_merged(base, folder, kind="q8_0"))
        for name, values in values_of(exact).items():
            if quantized[name][0] == gguf.GGMLQuantizationType.Q8_0:
                expected = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                assert quantized[name][1] == expected.tobytes(), name

    @pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m", "q4_0"])
    def test_types_are_chosen_as_without_an_adapter(self, kind: str, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "Base")
        plain = plan_conversion(Checkpoint.open(source), [(tmp_path / "x.gguf", file_type(kind))])
        merged = plan_merge(source, write_adapter(tmp_path / "style", source, targets=LINEAR), kind=kind)
        types = [{tensor.name: tensor.choice.type for tensor in plan.files[0].tensors} for plan in (plain, merged)]
        assert types[0] == types[1]

    def test_several_adapters_are_added(self, base: Path, tmp_path: Path) -> None:
        folders = [write_adapter(tmp_path / f"style{seed}", base, seed=seed) for seed in (1, 2)]
        before = values_of(convert_checkpoint(base, tmp_path / "before.gguf", "f32"))["blk.0.attn_q.weight"]
        after = values_of(write_merged(base, *folders))["blk.0.attn_q.weight"]
        assert numpy.allclose(after, before + sum(change_of(folder, QUERY, 2.0) for folder in folders), atol=1e-5)

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_a_tied_matrix_becomes_two(self, target: str, tied: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", write_untied(tied, tmp_path / "untied"), targets=[target])
        before = values_of(convert_checkpoint(tied, tmp_path / "before.gguf", "f32"))["token_embd.weight"]
        plan = plan_merge(tied, folder)
        run_job(plan.job, threads=1, replace=True)
        after, module = values_of(plan.files[0].path), f"model.{target}" if target == "embed_tokens" else target
        changed, kept = "output.weight", "token_embd.weight"
        if target == "embed_tokens":
            changed, kept = kept, changed
        assert (after[kept] == before).all()
        assert numpy.allclose(after[changed], before + change_of(folder, module, 2.0), atol=1e-5)
        assert any("becomes one of its own" in note for note in plan.notes)

    def test_an_unfinished_merge_is_not_continued_with_another_adapter(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base)
        other = write_adapter(tmp_path / "other", base, seed=1)

        def identity(plan: ConversionPlan, **prints: str) -> dict[str, Any]:
            files = {path for rows in plan.job.ranges for path in rows.source.files}
            return job_identity(plan.job, {path: prints.get(path.parent.name, "") for path in files}, allow_nan=False)

        plain = identity(plan_conversion(Checkpoint.open(base), [(base.parent / "merged-1.gguf", file_type("f32"))]))
        merged, again = identity(plan_merge(base, folder)), identity(plan_merge(base, folder))
        assert merged == again
        different = [
            plain,
            merged,
            identity(plan_merge(base, folder), style="changed"),
            identity(plan_merge(base, other)),
            identity(plan_merge(base, folder, weight=0.5)),
            identity(plan_merge(base, folder, other)),
        ]
        assert len({each["identity"] for each in different}) == len(different)

    def test_memory_stays_bounded_with_a_high_rank(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "Base")
        folder = write_adapter(tmp_path / "style", source, targets=LINEAR, rank=256)
        assert memory_needed(plan_merge(source, folder, kind="q4_0").job, threads=2) < 300 << 20

    def test_a_nan_is_found(self, base: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "style", base, size=math.nan)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            write_merged(base, folder)
        with pytest.raises(BadWeights, match="NaN or infinite"):
            convert_adapter(folder, "f16")
