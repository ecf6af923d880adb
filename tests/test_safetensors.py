"""safetensors files: reading headers, and refusing defective ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
from checkpoint_files import expect_refusal
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import BadCheckpoint
from qwenlocal.testing import write_safetensors
from qwenlocal.weights.safetensors import MAX_HEADER_SIZE, read_tensors


def tensor_entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


needs_permissions = pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")


class TestReading:
    def test_tensors_are_listed_in_file_order_with_their_offsets(self, tmp_path: Path) -> None:
        path = write_header(
            tmp_path / "x.safetensors",
            {
                "b": tensor_entry("F32", [2], 12, 20),
                "__metadata__": {"format": "pt"},
                "a": tensor_entry("BF16", [2, 3], 0, 12),
            },
            bytes(20),
        )
        begin = path.stat().st_size - 20
        tensors = [(t.name, t.dtype, t.shape, t.offset, t.size) for t in read_tensors(path)]
        assert tensors == [("a", "BF16", (2, 3), begin, 12), ("b", "F32", (2,), begin + 12, 8)]

    def test_scalars_and_empty_tensors_are_allowed(self, tmp_path: Path) -> None:
        tensors = {"none": ("F32", (0, 3), b""), "one": ("F16", (), b"12"), "none either": ("BF16", (0,), b"")}
        listed = read_tensors(write_safetensors(tmp_path / "x.safetensors", tensors))
        assert {t.name: (t.shape, t.size) for t in listed} == {
            "none": ((0, 3), 0), "one": ((), 2), "none either": ((0,), 0)
        }  # fmt: skip

    def test_a_file_without_tensors_is_read(self, tmp_path: Path) -> None:
        assert read_tensors(write_header(tmp_path / "x.safetensors", {})) == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "the file is empty"),
            (b"\x10\0\0", "incomplete"),
            (bytes(8), "not a JSON object"),
            (b"<html><body>Not found</body></html>", "not a safetensors file, or incomplete"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-lfs pointer.*git lfs pull"),
            ((100).to_bytes(8, "little") + b"{}", "a header of 100 bytes in a file of 10"),
            ((100 * 10**9).to_bytes(8, "little") + b"{}", "a header of 100,000,000,000 bytes in a file of 10"),
            (b"\xff" * 16, "a header of 18,446,744,073,709,551,615 bytes in a file of 16"),
        ],
    )
    def test_a_truncated_file_and_another_format_are_refused_with_the_reason(
        self, content: bytes, reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        assert re.search(reason, expect_refusal(read_tensors, path))

    def test_a_header_of_100_gb_is_refused_even_if_the_file_is_that_long(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "x.safetensors", {}, length=100 * 10**9)
        with path.open("r+b") as file:
            file.truncate(8 + 100 * 10**9)
        assert f"the limit is {MAX_HEADER_SIZE:,}" in expect_refusal(read_tensors, path)

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (b"[]", "not a JSON object"),
            (b" {}", "not a JSON object"),
            (b"{", "not valid JSON"),
            (b'{"a": \xff}', "not valid JSON"),
            (b"{}{}", "not valid JSON"),
            (b'{"a":' * 50_000, "not valid JSON"),
            (b'{"a": ' + b"[" * 50_000, r"not valid JSON \(too deeply nested\)"),
            (
                b'{"a": ' + b"9" * 5000 + b"}",
                r"not valid JSON \(a number with thousands of digits\)|not a description",
            ),
        ],
    )
    def test_a_header_that_is_not_json_is_refused(self, header: bytes, reason: str, tmp_path: Path) -> None:
        assert re.search(reason, expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", header)))

    def test_a_duplicate_tensor_name_is_refused(self, tmp_path: Path) -> None:
        entry = json.dumps(tensor_entry("U8", [1], 0, 1))
        header = f'{{"a": {entry}, "b": {entry}, "a": {entry}}}'.encode()
        assert (
            expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", header, b"1"))
            == "its header names “a” twice"
        )

    @pytest.mark.parametrize("entry", [None, 3, "F32", [], ["F32", [1], [0, 4]]])
    def test_an_entry_that_is_not_an_object_is_refused(self, entry: object, tmp_path: Path) -> None:
        assert "is not a description" in expect_refusal(
            read_tensors, write_header(tmp_path / "x.safetensors", {"a": entry})
        )

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"dtype": "F32", "shape": [1]},
            {"dtype": "F32", "data_offsets": [0, 4]},
            {"shape": [1], "data_offsets": [0, 4]},
            {"dtype": 7, "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": "0-4"},
        ],
    )
    def test_an_entry_with_a_missing_or_mistyped_field_is_refused(self, entry: object, tmp_path: Path) -> None:
        path = write_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4))
        assert "description of “a” is incomplete" in expect_refusal(read_tensors, path)

    @pytest.mark.parametrize("shape", [{}, {"0": 1}])
    def test_an_object_as_shape_is_refused(self, shape: object, tmp_path: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
        assert expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4)))

    def test_an_entry_with_a_duplicate_field_is_refused(self, tmp_path: Path) -> None:
        header = b'{"a": {"dtype": "F32", "shape": [2, 1], "shape": [1, 2], "data_offsets": [0, 8]}}'
        assert expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", header, bytes(8)))

    @pytest.mark.parametrize(
        ("shape", "span"),
        [
            ([-1], [0, 4]),
            ([1.0], [0, 4]),
            ([True], [0, 4]),
            (["1"], [0, 4]),
            ([None], [0, 4]),
            ([[1]], [0, 4]),
            ([1 << 62], [0, 4]),
            ([1] * 17, [0, 4]),
            ([1], [-4, 0]),
            ([1], [0, 4, 8]),
            ([1], [4]),
            ([1], []),
            ([1], [0, True]),
            ([1], [0, 1 << 64]),
        ],
    )
    def test_impossible_shapes_and_offsets_are_refused(self, shape: list[Any], span: list[Any], tmp_path: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": span}
        path = write_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4))
        assert "impossible numbers" in expect_refusal(read_tensors, path)

    @pytest.mark.parametrize("dtype", ["F33", "f32", "", "Q4_K", "F32 "])
    def test_an_unknown_dtype_is_refused(self, dtype: str, tmp_path: Path) -> None:
        path = write_header(tmp_path / "x.safetensors", {"a": tensor_entry(dtype, [1], 0, 4)}, bytes(4))
        assert "which the format does not have" in expect_refusal(read_tensors, path)

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            (tensor_entry("F32", [2], 0, 4), "“a” is F32 [2], which takes 8 bytes, but its offsets span 4"),
            (tensor_entry("BF16", [2], 0, 8), "“a” is BF16 [2], which takes 4 bytes, but its offsets span 8"),
            (tensor_entry("F32", [1], 4, 0), "“a” is F32 [1], which takes 4 bytes, but its offsets span -4"),
            (tensor_entry("F32", [1 << 40, 1 << 40], 0, 4), "bytes, but its offsets span 4"),
        ],
    )
    def test_a_byte_count_that_contradicts_shape_and_dtype_is_refused(
        self, entry: object, reason: str, tmp_path: Path
    ) -> None:
        assert reason in expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", {"a": entry}, bytes(8)))

    @pytest.mark.parametrize(
        ("places", "reason"),
        [
            ([(0, 4), (2, 6)], "“b” overlaps the tensor before it"),
            ([(0, 4), (0, 4)], "overlaps the tensor before it"),
            ([(0, 8), (0, 4)], "overlaps the tensor before it"),
            ([(0, 4), (6, 8)], "2 bytes before “b” belong to no tensor"),
            ([(1, 4), (4, 8)], "1 bytes before “a” belong to no tensor"),
            ([(0, 4), (4, 9)], "but the file has .*; it is incomplete"),
            ([(0, 4), (4, 1 << 40)], "it is incomplete"),
            ([(0, 4), (4, 7)], "1 bytes at its end belong to no tensor"),
        ],
    )
    def test_gaps_and_overlaps_between_tensors_are_refused(
        self, places: list[tuple[int, int]], reason: str, tmp_path: Path
    ) -> None:
        header = {
            name: tensor_entry("U8", [end - begin], begin, end) for name, (begin, end) in zip("ab", places, strict=True)
        }
        assert re.search(
            reason, expect_refusal(read_tensors, write_header(tmp_path / "x.safetensors", header, bytes(8)))
        )

    def test_a_path_that_cannot_be_opened_is_refused_with_the_system_error(self, tmp_path: Path) -> None:
        assert "Is a directory" in expect_refusal(read_tensors, tmp_path)
        (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
        assert "No such file" in expect_refusal(read_tensors, tmp_path / "link.safetensors")

    @needs_permissions
    def test_a_file_without_read_permission_is_refused_with_the_system_error(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "x.safetensors", {})
        path.chmod(0)
        assert "Permission denied" in expect_refusal(read_tensors, path)


WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}


TENSOR_NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@fuzz
@given(
    layout=st.dictionaries(
        TENSOR_NAMES, st.tuples(st.sampled_from(list(WIDTHS)), st.lists(st.integers(0, 4), max_size=3)), max_size=6
    )
)
def test_written_tensors_are_read_back_unchanged(layout: dict[str, Any], tmp_path: Path) -> None:
    sizes = {name: WIDTHS[dtype] * int(numpy.prod(shape, dtype=int)) for name, (dtype, shape) in layout.items()}
    data = {name: os.urandom(size) for name, size in sizes.items()}
    path = write_safetensors(
        tmp_path / "x.safetensors", {name: (d, tuple(shape), data[name]) for name, (d, shape) in layout.items()}
    )
    tensors, content = read_tensors(path), path.read_bytes()
    assert {t.name: (t.dtype, list(t.shape)) for t in tensors} == layout
    assert {t.name: content[t.offset : t.offset + t.size] for t in tensors} == data


@fuzz
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_are_read_or_refused(content: bytes, framed: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
    try:
        read_tensors(path)
    except BadCheckpoint as refused:
        assert str(path) in str(refused)
