"""Importance matrices: the file, what it says about a model, and --imatrix."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from commands import expect_exit
from conftest import Run
from fuzzing import fuzz, mutations
from gguf_files import write_f32_gguf
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import BadWeights, ModelNotFound
from qwenlocal.testing import write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import decode_value, read_header
from qwenlocal.weights.imatrix import ImportanceMatrix, read_imatrix

IMATRIX = {"general.type": gguf_writer.string("imatrix")}


def imatrix_tensors(sums: Any = ((2.0, 4.0),), counts: Any = ((2.0,),)) -> dict[str, numpy.ndarray]:
    return {"blk.0.x.weight.in_sum2": numpy.array(sums), "blk.0.x.weight.counts": numpy.array(counts)}


class TestReading:
    def test_the_weight_of_a_column_is_its_sum_divided_by_its_count(self, tmp_path: Path) -> None:
        sums, counts = [[2.0, 4.0], [3.0, 9.0], [5.0, 5.0]], [[2.0], [3.0], [0.0]]
        imatrix = read_imatrix(write_f32_gguf(tmp_path / "im.gguf", IMATRIX, imatrix_tensors(sums, counts)))
        assert imatrix.weights["blk.0.x.weight"].tolist() == [[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]], "1 if never measured"
        assert imatrix.column_weights("blk.0.x.weight", 1, 3, 2).tolist() == [1.0, 3.0]
        assert imatrix.column_weights("blk.0.y.weight", 0, 1, 2) is None

    def test_the_metadata_of_the_imatrix_is_kept_for_the_gguf_file(self, tmp_path: Path) -> None:
        more = {"imatrix.datasets": gguf_writer.strings(["wiki.txt"]), "imatrix.chunk_count": gguf_writer.u32(5)}
        imatrix = read_imatrix(write_f32_gguf(tmp_path / "im.gguf", {**IMATRIX, **more}, imatrix_tensors()))
        assert {key: decode_value(value) for key, value in imatrix.metadata.items()} == {
            "quantize.imatrix.file": "im.gguf",
            "quantize.imatrix.dataset": "wiki.txt",
            "quantize.imatrix.entries_count": 1,
            "quantize.imatrix.chunks_count": 5,
        }

    @pytest.mark.parametrize(("experts", "columns"), [(2, 2), (1, 3), (1, 1)])
    def test_an_imatrix_of_another_model_is_refused(self, experts: int, columns: int) -> None:
        imatrix = ImportanceMatrix({"x": numpy.ones((1, 2), numpy.float32)}, {})
        with pytest.raises(BadWeights, match="1 x 2 weights for “x”") as caught:
            imatrix.column_weights("x", 0, experts, columns)
        assert "another model" in caught.value.hint

    @pytest.mark.parametrize(
        ("pairs", "tensors", "reason"),
        [
            ({}, imatrix_tensors(), "is not an importance matrix"),
            ({"general.type": gguf_writer.string("model")}, imatrix_tensors(), "is not an importance matrix"),
            (IMATRIX, {}, "it contains no weights"),
            (IMATRIX, {"other": numpy.ones(2)}, "it contains no weights"),
            (IMATRIX, {"x.in_sum2": numpy.ones((1, 2))}, "the counts of “x” are missing"),
            (IMATRIX, imatrix_tensors(counts=[[1.0], [1.0]]), "counts of “blk.0.x.weight” do not match"),
            (IMATRIX, imatrix_tensors(sums=[[numpy.nan, 1.0]]), "NaN or infinite"),
            (IMATRIX, imatrix_tensors(sums=[[numpy.inf, 1.0]]), "NaN or infinite"),
            (IMATRIX, imatrix_tensors(sums=numpy.ones((1, 1, 1, 2))), "is not a float32 matrix"),
        ],
    )
    def test_a_damaged_imatrix_is_refused_with_the_reason(
        self, pairs: Any, tensors: Any, reason: str, tmp_path: Path
    ) -> None:
        path = write_f32_gguf(tmp_path / "im.gguf", pairs, tensors)
        with pytest.raises(BadWeights, match=reason) as caught:
            read_imatrix(path)
        assert str(path) in str(caught.value)

    def test_a_matrix_without_columns_is_refused(self, tmp_path: Path) -> None:
        tensors = imatrix_tensors(sums=numpy.ones((3, 0)), counts=numpy.ones((3, 1)))
        with pytest.raises(BadWeights):
            read_imatrix(write_f32_gguf(tmp_path / "im.gguf", IMATRIX, tensors))

    @pytest.mark.parametrize("chunks", [gguf_writer.i32(-1), struct.pack("<IQ", 10, 1 << 40)])
    def test_an_impossible_chunk_count_is_refused_or_ignored(self, chunks: bytes, tmp_path: Path) -> None:
        pairs = {**IMATRIX, "imatrix.chunk_count": chunks}
        try:
            imatrix = read_imatrix(write_f32_gguf(tmp_path / "im.gguf", pairs, imatrix_tensors()))
        except BadWeights:
            return
        assert "quantize.imatrix.chunks_count" not in imatrix.metadata

    def test_a_missing_file_and_another_format_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match="There is no file"):
            read_imatrix(tmp_path / "im.gguf")
        with pytest.raises(BadWeights, match="Is a directory"):
            read_imatrix(tmp_path)
        (tmp_path / "im.dat").write_bytes(b"\x02\0\0\0 the old form of it")
        with pytest.raises(BadWeights, match="not a GGUF file"):
            read_imatrix(tmp_path / "im.dat")


@fuzz
@given(data=st.data())
def test_any_damaged_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    more = {"imatrix.datasets": gguf_writer.strings(["a"]), "imatrix.chunk_count": gguf_writer.u32(5)}
    path = write_f32_gguf(tmp_path / "im.gguf", {**IMATRIX, **more}, imatrix_tensors())
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    try:
        assert read_imatrix(path).weights
    except BadWeights as refused:
        assert str(path) in str(refused)


class TestConversion:
    def write_imatrix(self, path: Path, columns: int) -> Path:
        names = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate")]
        tensors = {}
        for name in (*names, "blk.0.ffn_down.weight"):
            tensors[f"{name}.in_sum2"] = numpy.ones((1, columns))
            tensors[f"{name}.counts"] = numpy.ones((1, 1))
        return write_f32_gguf(path, {"general.type": gguf_writer.string("imatrix")}, tensors)

    def test_the_smallest_types_need_an_imatrix(self, invoke: Run, tmp_path: Path) -> None:
        config = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        wide = str(write_checkpoint(tmp_path / "wide", config=config))
        message = expect_exit(invoke("convert", wide, "--type", "iq2_xxs", "-o", "x.gguf"), 2)
        assert "is garbage as iq2_xxs without an importance matrix" in message
        assert "--imatrix FILE" in message
        self.write_imatrix(tmp_path / "im.gguf", 256)
        expect_exit(invoke("convert", wide, "--type", "iq2_xxs", "-o", "x.gguf", "--imatrix", "im.gguf"), 0)
        assert read_header(tmp_path / "x.gguf").metadata["quantize.imatrix.file"] == "im.gguf"

    def test_an_imatrix_of_another_model_is_refused(self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path) -> None:
        self.write_imatrix(tmp_path / "im.gguf", 32)
        message = expect_exit(invoke("convert", str(tiny_checkpoint), "--imatrix", "im.gguf", "-o", "x.gguf"), 5)
        assert "measured with another model" in message

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"\x01\0\0\0old"])
    def test_a_file_that_is_not_an_imatrix_is_refused(
        self, content: bytes, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "im.gguf").write_bytes(content)
        assert "im.gguf" in expect_exit(
            invoke("convert", str(tiny_checkpoint), "--imatrix", "im.gguf", "-o", "x.gguf"), 5
        )
        assert not (tmp_path / "x.gguf").exists()

    def test_a_missing_imatrix_is_reported(self, tiny_checkpoint: Path, invoke: Run) -> None:
        assert "There is no file nowhere" in expect_exit(
            invoke("convert", str(tiny_checkpoint), "--imatrix", "nowhere"), 3
        )

    def test_a_text_file_as_imatrix_is_refused_with_a_hint_to_the_command(
        self, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "m.json").write_text('{"blk.0.ffn_up.weight": [1.0]}' * 9)
        assert "Create one: qwenlocal imatrix" in expect_exit(
            invoke("convert", str(tiny_checkpoint), "--imatrix", "m.json"), 5
        )
