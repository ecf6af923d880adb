"""The work per token, and the limits of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenlocal.ggml import integer_operations, tensor_type
from qwenlocal.measure.limits import TokenWork, measure_limits, token_work
from qwenlocal.testing import write_model
from qwenlocal.weights.gguf_reader import Header, TensorInfo, read_header


def header(*tensors: tuple[str, tuple[int, ...]], **metadata: int) -> Header:
    """Describe a model of float16 tensors."""
    values = {"general.architecture": "qwen2moe", **{f"qwen2moe.{key}": value for key, value in metadata.items()}}
    return Header(
        3, values, tuple(TensorInfo(name, shape, tensor_type("f16"), Path("x"), 0) for name, shape in tensors), 0
    )


def test_a_token_reads_every_matrix_and_one_row_of_the_embeddings() -> None:
    model = header(("token_embd.weight", (64, 1000)), ("output.weight", (64, 1000)), ("blk.0.ffn_up.weight", (64, 128)))
    assert token_work(model) == TokenWork(bytes=2 * 64 * 1128, operations=2 * 64 * 128)


def test_embeddings_that_are_the_output_matrix_as_well_are_read_in_full() -> None:
    model = header(("token_embd.weight", (64, 1000)), ("blk.0.ffn_up.weight", (64, 128)))
    assert token_work(model) == TokenWork(bytes=2 * 64 * 1128, operations=2 * 64 * 128)


def test_of_a_mixture_the_active_experts_count() -> None:
    model = header(("blk.0.ffn_up_exps.weight", (64, 32, 60)), expert_count=60, expert_used_count=4)
    assert token_work(model) == TokenWork(bytes=2 * 64 * 32 * 4, operations=2 * 64 * 32 * 4)


def test_vectors_are_read_but_not_multiplied() -> None:
    assert token_work(header(("output_norm.weight", (64,)))) == TokenWork(bytes=128, operations=0)


def test_a_whole_model_reads_less_than_its_file(tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf")
    assert 0 < token_work(read_header(tmp_path / "x.gguf")).bytes < (tmp_path / "x.gguf").stat().st_size


def test_the_limits_are_those_of_a_computer() -> None:
    limits = measure_limits(1)
    assert 1e8 < limits.bandwidth < 1e13
    assert limits.operations is None or 1e9 < limits.operations < 1e15


def test_the_operations_of_a_run_are_counted() -> None:
    once = integer_operations(1)
    if not once:
        pytest.skip("needs the library that make setup compiles, and a processor with 8-bit multiply-accumulate")
    assert integer_operations(1000) == 1000 * once
    assert once % (2 * 16 * 12) == 0
