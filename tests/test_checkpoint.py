"""Reading checkpoints, which come from strangers: what is taken, and what is refused with which reason."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwenlocal import ggml
from qwenlocal.chat.template import CHATML
from qwenlocal.errors import BadCheckpoint, BadWeights, CannotExpress, ModelNotFound, UsageProblem
from qwenlocal.testing import CONFIG, MOE_CONFIG, SPECIALS, write_checkpoint, write_safetensors
from qwenlocal.weights import gguf
from qwenlocal.weights.about import Parameters, read_about
from qwenlocal.weights.architecture import examine
from qwenlocal.weights.checkpoint import Checkpoint, is_checkpoint
from qwenlocal.weights.convert import Options, plan_conversion
from qwenlocal.weights.header import read_pairs
from qwenlocal.weights.importance import Importance, read_importance
from qwenlocal.weights.kinds import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from qwenlocal.weights.mix import file_type
from qwenlocal.weights.plan import Plan
from qwenlocal.weights.safetensors import LONGEST_HEADER, read_tensors
from qwenlocal.weights.sentencepiece import Piece, read_pieces
from qwenlocal.weights.vocabulary import Vocabulary, read_vocabulary

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_hidden_layers": 1}  # fmt: skip
EXPERTS = {**MOE_CONFIG, **SIZES, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
ROWS = CONFIG["vocab_size"]
INDEX = "model.safetensors.index.json"

needs_permissions = pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def small(folder: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """A checkpoint of one layer, 32 wide."""
    return write_checkpoint(folder / "model", config={**SIZES, **(config or {})}, **options)


def change(folder: Path, file: str, **values: Any) -> Path:
    """Set values in one of a checkpoint's JSON files; `...` takes one away."""
    path = folder / file
    found = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return folder


def planned(folder: Path, **options: Any) -> Plan:
    """All that is read before anything is written."""
    return plan_conversion(Checkpoint.open(folder), [(folder / "out.gguf", file_type("f16"))], Options(**options))


def said(folder: Path, **options: Any) -> dict[str, Any]:
    """The keys that the GGUF file would have."""
    path = folder / "header"
    path.write_bytes(planned(folder, **options).job.outputs[0].header)
    return {key: gguf.decode(value) for key, value in read_pairs(path).items()}


def names(folder: Path) -> set[str]:
    """The tensors that the GGUF file would have."""
    return {tensor.name for tensor in planned(folder).files[0].tensors}


# --- one safetensors file


def described(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value.reason


class TestSafetensors:
    def test_every_tensor_is_told_with_its_place_in_the_order_of_the_file(self, tmp_path: Path) -> None:
        path = with_header(
            tmp_path / "x.safetensors",
            {
                "b": described("F32", [2], 12, 20),
                "__metadata__": {"format": "pt"},
                "a": described("BF16", [2, 3], 0, 12),
            },
            bytes(20),
        )
        begin = path.stat().st_size - 20
        found = [(t.name, t.dtype, t.shape, t.offset, t.size, t.elements) for t in read_tensors(path)]
        assert found == [("a", "BF16", (2, 3), begin, 12, 6), ("b", "F32", (2,), begin + 12, 8, 2)]

    def test_numbers_without_dimensions_and_tensors_without_numbers_are_allowed(self, tmp_path: Path) -> None:
        tensors = {"none": ("F32", (0, 3), b""), "one": ("F16", (), b"12"), "none either": ("BF16", (0,), b"")}
        found = read_tensors(write_safetensors(tmp_path / "x.safetensors", tensors))
        assert {t.name: (t.shape, t.elements) for t in found} == {
            "none": ((0, 3), 0), "one": ((), 1), "none either": ((0,), 0)
        }  # fmt: skip

    def test_a_file_without_tensors_has_none(self, tmp_path: Path) -> None:
        assert read_tensors(with_header(tmp_path / "x.safetensors", {})) == []

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "the file is empty"),
            (b"\x10\0\0", "cut off"),
            (bytes(8), "no JSON object"),
            (b"<html><body>Not found</body></html>", "not a safetensors file, or cut off"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-lfs pointer.*git lfs pull"),
            ((100).to_bytes(8, "little") + b"{}", "a header of 100 bytes in a file of 10"),
            ((100 * 10**9).to_bytes(8, "little") + b"{}", "a header of 100,000,000,000 bytes in a file of 10"),
            (b"\xff" * 16, "a header of 18,446,744,073,709,551,615 bytes in a file of 16"),
        ],
    )
    def test_a_file_that_is_cut_off_or_another_kind_of_file_says_so(
        self, content: bytes, reason: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        assert re.search(reason, refusal(read_tensors, path))

    def test_a_header_of_a_hundred_gigabytes_is_not_read_even_where_the_file_is_that_long(self, tmp_path: Path) -> None:
        path = with_header(tmp_path / "x.safetensors", {}, length=100 * 10**9)
        with path.open("r+b") as file:
            file.truncate(8 + 100 * 10**9)
        assert f"{LONGEST_HEADER:,} are allowed" in refusal(read_tensors, path)

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (b"[]", "no JSON object"),
            (b" {}", "no JSON object"),
            (b"{", "not readable JSON"),
            (b'{"a": \xff}', "not readable JSON"),
            (b"{}{}", "not readable JSON"),
            (b'{"a":' * 50_000, "not readable JSON"),
            (b'{"a": ' + b"[" * 50_000, r"not readable JSON \(too many brackets within brackets\)"),
            (
                b'{"a": ' + b"9" * 5000 + b"}",
                r"not readable JSON \(a number of thousands of digits\)|not a description",
            ),
        ],
    )
    def test_a_header_that_is_not_json_is_refused_however_deep(
        self, header: bytes, reason: str, tmp_path: Path
    ) -> None:
        assert re.search(reason, refusal(read_tensors, with_header(tmp_path / "x.safetensors", header)))

    def test_a_name_that_stands_in_the_header_twice_is_refused(self, tmp_path: Path) -> None:
        entry = json.dumps(described("U8", [1], 0, 1))
        header = f'{{"a": {entry}, "b": {entry}, "a": {entry}}}'.encode()
        assert (
            refusal(read_tensors, with_header(tmp_path / "x.safetensors", header, b"1")) == "its header names “a” twice"
        )

    @pytest.mark.parametrize("entry", [None, 3, "F32", [], ["F32", [1], [0, 4]]])
    def test_an_entry_that_is_no_description_is_refused(self, entry: object, tmp_path: Path) -> None:
        assert "is not a description" in refusal(read_tensors, with_header(tmp_path / "x.safetensors", {"a": entry}))

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
    def test_a_description_that_lacks_something_is_refused(self, entry: object, tmp_path: Path) -> None:
        path = with_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4))
        assert "does not say what “a” is" in refusal(read_tensors, path)

    @pytest.mark.parametrize("shape", [{}, {"0": 1}])
    def test_an_object_is_no_shape(self, shape: object, tmp_path: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
        assert refusal(read_tensors, with_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4)))

    def test_a_description_that_says_something_twice_is_refused(self, tmp_path: Path) -> None:
        header = b'{"a": {"dtype": "F32", "shape": [2, 1], "shape": [1, 2], "data_offsets": [0, 8]}}'
        assert refusal(read_tensors, with_header(tmp_path / "x.safetensors", header, bytes(8)))

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
    def test_impossible_shapes_and_places_are_refused(self, shape: list[Any], span: list[Any], tmp_path: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": span}
        path = with_header(tmp_path / "x.safetensors", {"a": entry}, bytes(4))
        assert "impossible numbers" in refusal(read_tensors, path)

    @pytest.mark.parametrize("dtype", ["F33", "f32", "", "Q4_K", "F32 "])
    def test_a_type_that_the_format_does_not_know_is_refused(self, dtype: str, tmp_path: Path) -> None:
        path = with_header(tmp_path / "x.safetensors", {"a": described(dtype, [1], 0, 4)}, bytes(4))
        assert "which the format does not know" in refusal(read_tensors, path)

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            (described("F32", [2], 0, 4), "“a” is F32 [2], 8 bytes, but its place has 4"),
            (described("BF16", [2], 0, 8), "“a” is BF16 [2], 4 bytes, but its place has 8"),
            (described("F32", [1], 4, 0), "“a” is F32 [1], 4 bytes, but its place has -4"),
            (described("F32", [1 << 40, 1 << 40], 0, 4), "bytes, but its place has 4"),
        ],
    )
    def test_a_size_that_contradicts_shape_and_type_is_refused(
        self, entry: object, reason: str, tmp_path: Path
    ) -> None:
        assert reason in refusal(read_tensors, with_header(tmp_path / "x.safetensors", {"a": entry}, bytes(8)))

    @pytest.mark.parametrize(
        ("places", "reason"),
        [
            ([(0, 4), (2, 6)], "“b” overlaps the tensor before it"),
            ([(0, 4), (0, 4)], "overlaps the tensor before it"),
            ([(0, 8), (0, 4)], "overlaps the tensor before it"),
            ([(0, 4), (6, 8)], "2 bytes before “b” belong to no tensor"),
            ([(1, 4), (4, 8)], "1 bytes before “a” belong to no tensor"),
            ([(0, 4), (4, 9)], "but the file has .*; it is cut off"),
            ([(0, 4), (4, 1 << 40)], "it is cut off"),
            ([(0, 4), (4, 7)], "1 bytes at its end belong to no tensor"),
        ],
    )
    def test_tensors_must_cover_the_file_without_gaps_and_overlaps(
        self, places: list[tuple[int, int]], reason: str, tmp_path: Path
    ) -> None:
        header = {
            name: described("U8", [end - begin], begin, end) for name, (begin, end) in zip("ab", places, strict=True)
        }
        assert re.search(reason, refusal(read_tensors, with_header(tmp_path / "x.safetensors", header, bytes(8))))

    def test_what_cannot_be_opened_is_refused_with_the_systems_reason(self, tmp_path: Path) -> None:
        assert "Is a directory" in refusal(read_tensors, tmp_path)
        (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
        assert "No such file" in refusal(read_tensors, tmp_path / "link.safetensors")

    @needs_permissions
    def test_what_may_not_be_read_is_refused_with_the_systems_reason(self, tmp_path: Path) -> None:
        path = with_header(tmp_path / "x.safetensors", {})
        path.chmod(0)
        assert "Permission denied" in refusal(read_tensors, path)


WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@quickly
@given(
    layout=st.dictionaries(
        NAMES, st.tuples(st.sampled_from(list(WIDTHS)), st.lists(st.integers(0, 4), max_size=3)), max_size=6
    )
)
def test_whatever_tensors_are_written_the_same_are_read(layout: dict[str, Any], tmp_path: Path) -> None:
    sizes = {name: WIDTHS[dtype] * int(numpy.prod(shape, dtype=int)) for name, (dtype, shape) in layout.items()}
    data = {name: os.urandom(size) for name, size in sizes.items()}
    path = write_safetensors(
        tmp_path / "x.safetensors", {name: (d, tuple(shape), data[name]) for name, (d, shape) in layout.items()}
    )
    found, content = read_tensors(path), path.read_bytes()
    assert {t.name: (t.dtype, list(t.shape)) for t in found} == layout
    assert {t.name: content[t.offset : t.offset + t.size] for t in found} == data


@quickly
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_any_bytes_are_a_safetensors_file_or_refused(content: bytes, framed: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
    try:
        read_tensors(path)
    except BadCheckpoint as refused:
        assert str(path) in str(refused)


# --- the folder


def files_of(checkpoint: Checkpoint) -> set[Path]:
    return {tensor.file for tensor in checkpoint.tensors.values()}


class TestFolder:
    def test_a_folder_is_a_checkpoint_if_it_has_a_config(self, tmp_path: Path) -> None:
        assert not is_checkpoint(tmp_path)
        assert is_checkpoint(small(tmp_path))

    @pytest.mark.parametrize("shards", [1, 2, 3])
    def test_weights_in_one_file_or_several_are_the_same_checkpoint(self, shards: int, tmp_path: Path) -> None:
        opened = Checkpoint.open(small(tmp_path, shards=shards))
        assert len(files_of(opened)) == shards
        assert len(opened.tensors) == 15
        assert opened.has_weights

    def test_shards_are_known_by_their_numbers_where_there_is_no_index(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=3)
        (folder / INDEX).unlink()
        assert len(Checkpoint.open(folder).tensors) == 15
        (folder / "model-00002-of-00003.safetensors").unlink()
        assert refusal(Checkpoint.open, folder) == "part 2 of 3 is missing"

    def test_shards_of_several_models_are_not_taken_for_one(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=2)
        (folder / INDEX).unlink()
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other-00001-of-00002.safetensors")
        assert refusal(Checkpoint.open, folder) == "files of several models are mixed"

    def test_a_shard_that_the_index_names_must_be_there(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=5)
        (folder / "model-00004-of-00005.safetensors").unlink()
        reason = refusal(Checkpoint.open, folder)
        assert "model-00004-of-00005.safetensors (1 of 5 files)" in reason
        assert "missing" in reason

    def test_only_some_of_many_missing_shards_are_listed(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=6)
        for path in list(folder.glob("*.safetensors"))[:5]:
            path.unlink()
        assert "and others (5 of 6 files) are" in refusal(Checkpoint.open, folder)

    def test_a_name_of_a_shard_that_no_file_can_have_is_refused(self, tmp_path: Path) -> None:
        for name in ("x" * 300, "a\0b", "\ud800"):
            change(small(tmp_path), INDEX, weight_map={"a": name})
            assert "missing" in refusal(Checkpoint.open, tmp_path / "model")

    @pytest.mark.parametrize(
        "elsewhere", ["../x", "/etc/passwd", "a/b", "a\\b", "..\\x", "", ".", "..", "./x", "x/", 5, None, ["x"], {}]
    )
    def test_an_index_that_names_files_elsewhere_is_refused(self, elsewhere: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), INDEX, weight_map={"model.norm.weight": elsewhere})
        (tmp_path / "x").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(BadCheckpoint, match="which is not a file beside it") as caught:
            Checkpoint.open(folder)
        assert "means harm" in caught.value.hint

    def test_an_index_that_names_a_tensor_twice_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
        assert "“a” stands there twice" in refusal(Checkpoint.open, folder)

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "model.safetensors"}])
    def test_an_index_without_a_map_is_refused(self, index: object, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / INDEX).write_text(json.dumps(index))
        assert refusal(Checkpoint.open, folder) == "it has no “weight_map”"

    def test_an_index_and_files_that_disagree_are_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=2)
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        first, second = (next(name for name, file in index.items() if f"-0000{n}-" in file) for n in (1, 2))
        change(folder, INDEX, weight_map={**index, first: index[second]})
        assert f"“{first}” is not in it" in refusal(Checkpoint.open, folder)
        change(folder, INDEX, weight_map={**index, "model.other.weight": index[first]})
        assert f"it does not hold “model.other.weight”, which {INDEX} says" in refusal(Checkpoint.open, folder)

    def test_a_tensor_in_two_files_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path, shards=2)
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
        assert "is in model-00001-of-00002.safetensors, too" in refusal(Checkpoint.open, folder)

    def test_of_several_unrelated_files_the_one_that_is_meant_must_be_given(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        assert "2 safetensors files (model.safetensors, other.safetensors)" in refusal(Checkpoint.open, folder)
        assert files_of(Checkpoint.open(folder / "other.safetensors")) == {folder / "other.safetensors"}

    def test_an_adapter_beside_the_weights_is_not_taken_for_weights(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        assert files_of(Checkpoint.open(folder)) == {folder / "model.safetensors"}
        (folder / "model.safetensors").unlink()
        assert "it is an adapter (LoRA)" in refusal(Checkpoint.open, folder)
        (folder / "adapter_model.safetensors").unlink()
        assert refusal(Checkpoint.open, folder) == "there are no safetensors files in it"

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "epoch.ckpt"])
    def test_pickled_weights_are_refused_and_the_program_inside_does_not_run(self, name: str, tmp_path: Path) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'harm'}",)

        folder = small(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Harm()))
        with pytest.raises(BadCheckpoint, match=f"pickled .{name}.*can run any program") as caught:
            Checkpoint.open(folder)
        assert "save_pretrained" in caught.value.hint
        assert not (tmp_path / "harm").exists()

    def test_a_file_that_is_a_link_into_nothing_is_refused(self, tmp_path: Path) -> None:
        """As in the hub's cache, when the download of a blob was not finished."""
        folder = small(tmp_path)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "blob")
        with pytest.raises(BadCheckpoint, match="No such file"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize(
        ("method", "name"), [("gptq", "“-GPTQ”"), ("awq", "“-AWQ”"), ("bitsandbytes", "made from.")]
    )
    def test_packed_weights_are_refused_and_the_hint_names_what_to_convert_instead(
        self, method: str, name: str, tmp_path: Path
    ) -> None:
        folder = small(tmp_path, {"quantization_config": {"quant_method": method, "bits": 4}})
        for read in (Checkpoint.open, examine):
            with pytest.raises(CannotExpress, match=f"packed already .{method}.") as caught:
                read(folder)
            assert name in caught.value.hint

    @pytest.mark.parametrize("strange", [{"bits": 4}, "gptq", [1]])
    def test_packed_weights_are_refused_even_where_it_is_not_said_how(self, strange: object, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match=r"packed already .some method."):
            Checkpoint.open(small(tmp_path, {"quantization_config": strange}))

    @pytest.mark.parametrize("nothing", [None, {}, False])
    def test_a_config_that_says_there_is_no_packing_is_fine(self, nothing: object, tmp_path: Path) -> None:
        assert Checkpoint.open(small(tmp_path, {"quantization_config": nothing}))


UNREADABLE = [
    ("", "not readable JSON"),
    ("{", "not readable JSON"),
    ("[]", "not a JSON object"),
    ('"text"', "not a JSON object"),
    ("null", "not a JSON object"),
    ("<html>", "not readable JSON"),
    ("[" * 100_000, "not readable JSON"),
    ('{"a":' * 100_000, "not readable JSON"),
    ('{"a": 1, "a": 2}', "“a” stands there twice"),
    ('{"a": ' + "1" * 10_000 + "}", "not readable JSON"),
]
DOCUMENTS = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]


class TestJson:
    @pytest.mark.parametrize("file", DOCUMENTS)
    @pytest.mark.parametrize(("content", "reason"), UNREADABLE)
    def test_an_unreadable_file_is_refused_by_its_name(
        self, file: str, content: str, reason: str, tmp_path: Path
    ) -> None:
        path = small(tmp_path) / file
        path.write_text(content)
        with pytest.raises(BadCheckpoint, match=reason) as caught:
            planned(path.parent)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("file", DOCUMENTS)
    @pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"a": "\xc3("}', b"\x80" * 8])
    def test_a_file_that_is_not_text_is_refused_by_its_name(self, file: str, content: bytes, tmp_path: Path) -> None:
        path = small(tmp_path) / file
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint) as caught:
            planned(path.parent)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("file", DOCUMENTS)
    def test_a_file_larger_than_any_real_one_is_not_read(self, file: str, tmp_path: Path) -> None:
        path = small(tmp_path) / file
        with path.open("r+b" if path.exists() else "wb") as opened:
            opened.truncate(200_000_001)
        with pytest.raises(BadCheckpoint, match="200,000,001 bytes, which no real one has"):
            planned(path.parent)

    @pytest.mark.parametrize(
        ("file", "what"), [("config.json", "it has no config.json"), ("tokenizer.json", "it has no tokenizer.json")]
    )
    def test_what_is_missing_is_named(self, file: str, what: str, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / file).unlink()
        with pytest.raises(BadCheckpoint, match=what):
            planned(folder)

    @pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
    def test_what_is_not_needed_may_be_missing(self, file: str, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / file).unlink()
        assert planned(folder).files

    @pytest.mark.parametrize("file", DOCUMENTS)
    def test_a_folder_in_a_files_place_is_refused(self, file: str, tmp_path: Path) -> None:
        path = small(tmp_path) / file
        path.unlink(missing_ok=True)
        path.mkdir()
        with pytest.raises(BadCheckpoint, match="Is a directory"):
            planned(path.parent)

    @pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "rope_scaling", "hidden_act", "qkv_bias"])
    def test_a_value_nested_just_as_deep_as_can_be_read_is_refused_in_words(self, key: str, tmp_path: Path) -> None:
        folder = small(tmp_path)
        path, text = folder / "config.json", json.dumps({**CONFIG, **SIZES, key: "HERE"})
        for depth in (10, 300, *range(880, 1000, 2), 3000):
            path.write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
            with pytest.raises((BadCheckpoint, CannotExpress)):
                examine(folder)

    @pytest.mark.parametrize("depth", [10, 200, 400, 2000, 4000])
    def test_pre_tokenizers_nested_in_each_other_are_looked_into_or_refused(self, depth: int, tmp_path: Path) -> None:
        path = small(tmp_path) / "tokenizer.json"
        text = json.dumps({**json.loads(path.read_text()), "pre_tokenizer": "HERE"})
        path.write_text(text.replace('"HERE"', '{"pretokenizers": [' * depth + "]}" * depth))
        with pytest.raises((BadCheckpoint, CannotExpress)):
            planned(path.parent)


# --- config.json

COUNTS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
]  # fmt: skip
EXPERT_COUNTS = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
NO_COUNTS = ["256", 256.0, True, False, 0, -1, 1 << 31, 10**30, [256], {}, float("nan"), float("inf"), ""]
NO_NUMBERS = ["1e-6", True, 0, -1e-6, [1], {}, float("nan"), float("inf"), float("-inf"), None]


class TestConfig:
    @pytest.mark.parametrize("key", COUNTS)
    @pytest.mark.parametrize("value", NO_COUNTS)
    def test_a_size_that_cannot_be_is_refused_by_its_name(self, key: str, value: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "config.json", **{key: value})
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which cannot be") as caught:
            examine(folder)
        assert str(folder / "config.json") in str(caught.value)

    @pytest.mark.parametrize("key", EXPERT_COUNTS)
    @pytest.mark.parametrize("value", ["4", 0, -1, 1.5, 1 << 31])
    def test_so_is_one_of_experts(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which cannot be"):
            examine(change(small(tmp_path, EXPERTS), "config.json", **{key: value}))

    @pytest.mark.parametrize("key", [key for key in COUNTS if key != "num_key_value_heads"])
    @pytest.mark.parametrize("value", [..., None])
    def test_a_size_that_is_missing_is_refused_by_its_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is missing"):
            examine(change(small(tmp_path), "config.json", **{key: value}))

    def test_without_a_number_of_key_value_heads_there_are_as_many_as_heads(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path, {"num_key_value_heads": 2}), "config.json", num_key_value_heads=...)
        assert said(folder)["qwen2.attention.head_count_kv"] == 2

    @pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
    @pytest.mark.parametrize("value", NO_NUMBERS)
    def test_a_number_that_cannot_be_is_refused_by_its_name(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which cannot be"):
            examine(change(small(tmp_path), "config.json", **{key: value}))

    @pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
    @pytest.mark.parametrize("value", [10**400, 1e300, 1e39, 1e-60], ids=["10**400", "1e300", "1e39", "1e-60"])
    def test_a_number_that_four_bytes_cannot_hold_is_refused_by_its_name(
        self, key: str, value: object, tmp_path: Path
    ) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which cannot be"):
            planned(change(small(tmp_path), "config.json", **{key: value}))

    @pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-6), ("rope_theta", 10000.0)])
    def test_a_number_that_is_not_said_is_what_transformers_takes(self, key: str, value: float, tmp_path: Path) -> None:
        found = said(change(small(tmp_path), "config.json", **{key: ...}))
        theirs = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}[key]
        assert found[f"qwen2.{theirs}"] == pytest.approx(value)

    @pytest.mark.parametrize("key", ["tie_word_embeddings", "use_sliding_window", "qkv_bias"])
    @pytest.mark.parametrize("value", ["false", "true", 0, 1, [], {}])
    def test_a_flag_is_true_or_false(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*; it should be true or false"):
            examine(change(small(tmp_path), "config.json", **{key: value}))

    @pytest.mark.parametrize("value", [..., None, [], "Qwen2ForCausalLM", {}, 5])
    def test_a_config_that_does_not_say_what_it_is_of_is_refused(self, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="does not say what kind of model it is") as caught:
            examine(change(small(tmp_path), "config.json", architectures=value))
        assert "Qwen2MoeForCausalLM" in caught.value.hint

    @pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen2ForSequenceClassification", ""])
    def test_another_architecture_is_refused_by_its_name(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match=f"a {name} is not a Qwen1.5 model") as caught:
            examine(change(small(tmp_path), "config.json", architectures=[name]))
        assert "convert_hf_to_gguf.py" in caught.value.hint

    @pytest.mark.parametrize("name", [[], {}, ["Qwen2ForCausalLM"], 5, True])
    def test_an_architecture_that_is_no_name_is_refused(self, name: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, CannotExpress)):
            examine(change(small(tmp_path), "config.json", architectures=[name]))

    @pytest.mark.parametrize("act", ["gelu", "relu", "swish", None, 5, ["silu"]])
    def test_another_activation_is_refused(self, act: object, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="activation"):
            examine(change(small(tmp_path), "config.json", hidden_act=act))

    def test_a_model_whose_tokens_see_those_after_them_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="is_causal"):
            examine(small(tmp_path, {"is_causal": False}))
        with pytest.raises(BadCheckpoint, match="“is_causal” is"):
            examine(change(tmp_path / "model", "config.json", is_causal="no"))

    def test_heads_that_do_not_share_the_width_evenly_are_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(CannotExpress, match="3 heads do not share a width of 32 evenly"):
            examine(change(folder, "config.json", num_attention_heads=3))
        with pytest.raises(CannotExpress, match=r"its heads are .* wide \(head_dim\), not 16"):
            examine(change(folder, "config.json", num_attention_heads=2, head_dim=64))
        examine(change(folder, "config.json", head_dim=16))

    def test_heads_that_are_turned_in_part_are_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(CannotExpress, match=r"partial_rotary_factor 0\.5"):
            examine(change(folder, "config.json", partial_rotary_factor=0.5))
        examine(change(folder, "config.json", partial_rotary_factor=1.0))

    def test_key_value_heads_that_do_not_divide_the_heads_are_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        for heads, keys in ((4, 3), (2, 4)):
            with pytest.raises(BadCheckpoint, match=f"{heads} heads over {keys} key-value heads"):
                examine(change(folder, "config.json", num_attention_heads=heads, num_key_value_heads=keys))


class TestSlidingWindow:
    def test_one_that_is_there_but_not_used_is_no_hindrance(self, tmp_path: Path) -> None:
        assert said(small(tmp_path, {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}))

    @pytest.mark.parametrize(
        "config",
        [
            {"sliding_window": None},
            {"sliding_window": 2048},
            {"sliding_window": 16, "max_window_layers": 1},
            {"sliding_window": 16, "max_window_layers": 28},
            {"sliding_window": 16, "layer_types": ["full_attention"]},
        ],
    )
    def test_one_that_no_layer_and_no_text_gets_to_see_is_no_hindrance(
        self, config: dict[str, Any], tmp_path: Path
    ) -> None:
        examine(small(tmp_path, {"use_sliding_window": True, **config}))

    @pytest.mark.parametrize(
        "config", [{"max_window_layers": 0}, {"layer_types": ["sliding_attention"], "max_window_layers": 28}]
    )
    def test_one_in_use_is_refused_and_the_way_out_is_named(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = small(tmp_path, {"use_sliding_window": True, "sliding_window": 16, **config})
        with pytest.raises(CannotExpress, match="only the last 16 tokens") as caught:
            examine(folder)
        assert "“max_position_embeddings” to 16" in caught.value.hint
        examine(change(folder, "config.json", use_sliding_window=False, max_position_embeddings=16))

    @pytest.mark.parametrize("window", [0, -1, "16", 1.5])
    def test_one_of_an_impossible_length_is_refused(self, window: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“sliding_window” is"):
            examine(small(tmp_path, {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}))

    @pytest.mark.parametrize("first", ["none", [], {}, float("nan"), float("inf")])
    def test_a_first_layer_of_it_that_is_no_number_is_refused(self, first: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, CannotExpress)):
            examine(small(tmp_path, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": first}))

    def test_a_first_layer_of_it_that_is_null_is_refused_or_not_said(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": None})
        is_planned_or_refused(folder)


class TestRope:
    def test_the_base_is_written_as_it_stands_there(self, tmp_path: Path) -> None:
        assert said(small(tmp_path, {"rope_theta": 5000000}))["qwen2.rope.freq_base"] == 5_000_000.0

    @pytest.mark.parametrize("kind", ["type", "rope_type"])
    def test_linear_scaling_is_written(self, kind: str, tmp_path: Path) -> None:
        found = said(small(tmp_path, {"rope_scaling": {kind: "linear", "factor": 4}}))
        assert (found["qwen2.rope.scaling.type"], found["qwen2.rope.scaling.factor"]) == ("linear", 4.0)
        assert "qwen2.rope.scaling.original_context_length" not in found

    def test_yarn_scaling_is_written_in_llama_cpps_terms(self, tmp_path: Path) -> None:
        """Which multiplies its own factor of the attention, 0.1 ln 4 + 1, with the file's."""
        yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5,
                "beta_fast": 32, "beta_slow": 1}  # fmt: skip
        found = said(small(tmp_path, {"rope_scaling": yarn}))
        keys = {key.removeprefix("qwen2.rope.scaling."): value for key, value in found.items() if ".scaling." in key}
        assert keys == {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 512,
            "attn_factor": pytest.approx(1.5 / (0.1 * math.log(4) + 1)),
        }

    @pytest.mark.parametrize("other", [{"beta_fast": 16}, {"beta_slow": 2}, {"truncate": False}])
    def test_yarn_that_llama_cpp_does_not_compute_is_refused(self, other: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="YaRN with"):
            examine(small(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0, **other}}))

    def test_yarn_that_does_not_say_the_original_context_means_the_whole(self, tmp_path: Path) -> None:
        found = said(small(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0}}))
        assert found["qwen2.rope.scaling.original_context_length"] == CONFIG["max_position_embeddings"]

    @pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama3", "mrope", "su", "", None, 5, ["yarn"], {}])
    def test_other_kinds_are_refused(self, kind: object, tmp_path: Path) -> None:
        with pytest.raises((BadCheckpoint, CannotExpress), match="rope"):
            examine(small(tmp_path, {"rope_scaling": {"type": kind, "factor": 2.0}}))

    @pytest.mark.parametrize(
        "scaling",
        [
            {"type": "linear"},
            {"type": "linear", "factor": 0},
            {"type": "linear", "factor": "4"},
            {"type": "yarn", "factor": -1.0},
            {"type": "yarn", "factor": 4.0, "beta_fast": "32"},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": -512},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": "512"},
        ],
    )
    def test_scaling_by_impossible_numbers_is_refused(self, scaling: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="which cannot be"):
            examine(small(tmp_path, {"rope_scaling": scaling}))

    @pytest.mark.parametrize(
        "more", [{"original_max_position_embeddings": 1 << 40}, {"factor": 1e300}, {"beta_fast": 1e39}]
    )
    def test_scaling_by_numbers_that_do_not_fit_into_a_file_is_refused(
        self, more: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(BadCheckpoint, match="which cannot be"):
            planned(small(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0, **more}}))

    @pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
    @pytest.mark.parametrize("value", ["linear", ["linear"], 4.0, True])
    def test_parameters_of_another_form_are_refused(self, key: str, value: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="the rope parameters are"):
            examine(small(tmp_path, {key: value}))

    def test_what_transformers_5_writes_means_the_same(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"rope_parameters": {"rope_theta": 7000.0, "rope_type": "default"}})
        found = said(change(folder, "config.json", rope_theta=...))
        assert found["qwen2.rope.freq_base"] == 7000.0
        assert "qwen2.rope.scaling.type" not in found
        yarn = {"rope_theta": 7000.0, "rope_type": "yarn", "factor": 2.0}
        found = said(change(folder, "config.json", rope_parameters=yarn))
        assert (found["qwen2.rope.freq_base"], found["qwen2.rope.scaling.type"]) == (7000.0, "yarn")

    def test_what_both_write_must_agree(self, tmp_path: Path) -> None:
        new = {"rope_theta": 7000.0, "rope_type": "yarn", "factor": 2.0}
        with pytest.raises(BadCheckpoint, match="contradict each other"):
            examine(
                small(tmp_path, {"rope_parameters": new, "rope_scaling": {"type": "linear", "rope_type": "linear"}})
            )
        examine(change(tmp_path / "model", "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}))
        for strange in (True, 5, [5], "yarn", {"rope_type": {}}):
            is_planned_or_refused(change(tmp_path / "model", "config.json", rope_scaling=strange))


class TestExperts:
    def test_their_sizes_are_written(self, tmp_path: Path) -> None:
        found = said(small(tmp_path, {**EXPERTS, "moe_intermediate_size": 64}))
        keys = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
        assert [found[f"qwen2moe.{key}"] for key in keys] == [4, 2, 64, 32]

    def test_more_experts_a_token_than_there_are_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="5 experts a token, of 4"):
            examine(change(small(tmp_path, EXPERTS), "config.json", num_experts_per_tok=5))

    def test_weights_that_would_be_normalised_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="norm_topk_prob"):
            examine(small(tmp_path, {**EXPERTS, "norm_topk_prob": True}))

    @pytest.mark.parametrize(
        "config", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 0}]
    )
    def test_layers_without_experts_are_refused(self, config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="some of its layers have no experts"):
            examine(change(small(tmp_path, EXPERTS), "config.json", **config))

    @pytest.mark.parametrize(
        "config", [{"mlp_only_layers": []}, {"mlp_only_layers": None}, {"decoder_sparse_step": ...}]
    )
    def test_a_config_that_says_all_layers_have_them_is_fine(self, config: dict[str, Any], tmp_path: Path) -> None:
        examine(change(small(tmp_path, EXPERTS), "config.json", **config))

    @pytest.mark.parametrize("config", [{"decoder_sparse_step": 2}, {"norm_topk_prob": True}, {"mlp_only_layers": [0]}])
    def test_a_model_without_experts_is_not_asked_about_them(self, config: dict[str, Any], tmp_path: Path) -> None:
        examine(change(small(tmp_path), "config.json", **config))

    def test_a_tied_head_is_written_from_the_embeddings_since_llama_cpp_asks_for_it(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {**EXPERTS, "tie_word_embeddings": True})
        assert "output.weight" in names(folder)
        plan = planned(folder)
        assert [len(strip.targets) for strip in plan.job.strips].count(2) == 1, "one reading, two places"

    def test_an_expert_that_is_missing_is_named(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.3.up_proj.weight"
        with pytest.raises(BadCheckpoint, match=f"“{name}” is missing"):
            planned(small(tmp_path, EXPERTS, tensors={name: None}))

    def test_one_expert_too_many_is_refused(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.4.up_proj.weight"
        with pytest.raises(BadCheckpoint, match="it holds what this architecture does not have"):
            planned(small(tmp_path, EXPERTS, tensors={name: (32, 32)}))

    def test_fused_experts_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        with pytest.raises(BadCheckpoint, match=r"is \[4, 32, 32\]; by config.json it should be \[4, 64, 32\]"):
            planned(small(tmp_path, EXPERTS, fused_experts=True, tensors={name: (4, 32, 32)}))


# --- tensors

BIAS = "model.layers.0.self_attn.o_proj.bias"


def zero(folder: Path, name: str) -> Path:
    stored = Checkpoint.open(folder).tensors[name]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(bytes(stored.size))
    return folder


class TestTensors:
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.bias",
            "model.layers.0.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.down_proj.weight",
        ],
    )  # fmt: skip
    def test_one_that_is_missing_is_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"“{name}” is missing"):
            planned(small(tmp_path, tensors={name: None}))

    def test_a_layer_too_few_or_too_many_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"num_hidden_layers": 2})
        with pytest.raises(BadCheckpoint, match=r"“model.layers.2.\S+” is missing"):
            planned(change(folder, "config.json", num_hidden_layers=3))
        with pytest.raises(BadCheckpoint, match=r"“model.layers.1.*and 9 more"):
            planned(change(folder, "config.json", num_hidden_layers=1))

    def test_as_many_layers_as_a_number_can_say_are_refused_at_the_first_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=r"“model.layers.1.*is missing"):
            planned(change(small(tmp_path), "config.json", num_hidden_layers=(1 << 31) - 1))

    @pytest.mark.parametrize(
        "name", ["model.layers.0.lora_A.weight", "score.weight", "model.layers.0.self_attn.q_norm.weight"]
    )
    def test_one_that_has_no_place_is_refused_and_named(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=f"does not have: “{name}”") as caught:
            planned(small(tmp_path, tensors={name: (4, 4)}))
        assert "adapter" in caught.value.hint

    @pytest.mark.parametrize("shape", [(32, 33), (33, 32), (1024,), (32, 32, 1), ()])
    def test_one_of_another_shape_is_refused(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        folder = small(tmp_path, tensors={name: shape or (1,)})
        with pytest.raises(BadCheckpoint, match=r"by config.json it should be \[32, 32\]"):
            planned(folder)

    @pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "U8", "I64", "BOOL"])
    def test_one_of_a_type_that_is_not_plain_is_refused(self, dtype: str, tmp_path: Path) -> None:
        folder = small(tmp_path)
        path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
        data = path.read_bytes()
        stored = {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.size]) for t in read_tensors(path)}
        width = {"F64": 8, "I64": 8}.get(dtype, 1)
        write_safetensors(path, {**stored, name: (dtype, (32, 32), bytes(1024 * width))})
        with pytest.raises(CannotExpress, match=f"of type {dtype}; plain f32, f16 and bf16 are converted"):
            planned(folder)

    @pytest.mark.parametrize("name", [BIAS, "model.layers.0.mlp.down_proj.bias", "model.layers.0.mlp.gate_proj.bias"])
    def test_a_bias_that_the_model_should_not_have_is_left_out_if_it_is_nothing_but_zeros(
        self, name: str, tmp_path: Path
    ) -> None:
        folder = small(tmp_path, tensors={name: (32,)})
        with pytest.raises(CannotExpress, match=f"“{name}” is not zero"):
            planned(folder)
        notes = planned(zero(folder, name)).notes
        assert [note for note in notes if name in note and "a bias of nothing but zeros" in note]

    def test_what_llama_cpp_computes_itself_is_left_out(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        (note,) = planned(small(tmp_path, tensors={name: (8,)})).notes
        assert note == f"Left out: {name}, computed anew by llama.cpp (0.0 MB)."

    def test_several_that_are_left_out_make_one_note(self, tmp_path: Path) -> None:
        freqs = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (8,) for n in range(2)}
        (note,) = planned(small(tmp_path, {"num_hidden_layers": 2}, tensors=freqs)).notes
        assert note.startswith("Left out: 2 tensors, computed anew")

    def test_a_model_without_biases_of_attention_says_so_in_its_config(self, tmp_path: Path) -> None:
        biases = {f"model.layers.0.self_attn.{letter}_proj.bias": None for letter in "qkv"}
        folder = small(tmp_path, {"qkv_bias": False}, tensors=biases)
        assert not [name for name in names(folder) if name.endswith(".bias")]
        with pytest.raises(BadCheckpoint, match=r"q_proj.bias” is missing"):
            planned(change(folder, "config.json", qkv_bias=...))


class TestHead:
    def test_a_tied_one_need_not_be_stored(self, tmp_path: Path) -> None:
        assert "output.weight" not in names(small(tmp_path, {"tie_word_embeddings": True}))

    def test_a_tied_one_that_is_stored_all_the_same_is_left_out_and_that_is_said(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        assert "output.weight" not in names(folder)
        (note,) = planned(folder).notes
        assert "lm_head.weight, the same as the embeddings, to which it is tied" in note

    def test_llama_cpps_own_converter_keeps_it(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        found = planned(folder, like_llama_cpp=True).files[0].tensors
        assert "output.weight" in {tensor.name for tensor in found}

    @pytest.mark.parametrize("at", [0, 1, ROWS * 32 // 2 * 2, ROWS * 32 * 2 - 1])
    def test_a_tied_one_of_which_any_byte_differs_is_refused(self, at: int, tmp_path: Path) -> None:
        folder = small(tmp_path, {"tie_word_embeddings": True}, store_tied_head=True)
        stored = Checkpoint.open(folder).tensors["lm_head.weight"]
        with stored.file.open("r+b") as file:
            file.seek(stored.offset + at)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(BadCheckpoint, match="ties the head to the embeddings, but another") as caught:
            planned(folder)
        assert "“tie_word_embeddings” to false" in caught.value.hint
        assert "output.weight" in names(change(folder, "config.json", tie_word_embeddings=False))

    def test_one_that_is_not_tied_must_be_stored(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match=r"“lm_head.weight” is missing, and config.json does not say"):
            planned(small(tmp_path, tensors={"lm_head.weight": None}))

    def test_a_bare_model_has_none_and_names_without_a_prefix(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"architectures": ["Qwen2Model"]})
        assert "embed_tokens.weight" in Checkpoint.open(folder).tensors
        found = names(folder)
        assert "token_embd.weight" in found
        assert "output.weight" not in found

    def test_a_bare_model_with_a_head_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"architectures": ["Qwen2Model"]}, tensors={"lm_head.weight": (ROWS, 32)})
        with pytest.raises(BadCheckpoint, match=r"“lm_head.weight”"):
            planned(folder)


# --- the vocabulary


def vocabulary(folder: Path, size: int = ROWS, **options: Any) -> Vocabulary:
    config = json.loads((folder / "config.json").read_text())
    return read_vocabulary(folder, config, size, **options)


def change_model(folder: Path, **values: Any) -> Path:
    """Set values of the vocabulary proper in tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return change(folder, "tokenizer.json", model={**model, **values})


def tokens_of(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return found


class TestVocabulary:
    def test_every_row_of_the_embeddings_has_a_token_and_those_without_one_cannot_be_reached(
        self, tmp_path: Path
    ) -> None:
        found = vocabulary(small(tmp_path))
        assert (found.model, found.pre) == ("gpt2", "qwen2")
        assert len(found.tokens) == len(found.kinds) == ROWS
        assert list(found.tokens[256:263]) == ["th", "the", *SPECIALS, "[PAD261]", "[PAD262]"]
        assert list(found.kinds[256:263]) == [1, 1, 3, 3, 3, 5, 5]
        assert found.first_unused == 261
        assert list(found.merges) == ["t h", "th e"]

    def test_a_vocabulary_with_a_hole_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        tokens = tokens_of(folder)
        del tokens["A"]
        with pytest.raises(BadCheckpoint, match="no token has the id 65, though others go up to 257"):
            vocabulary(change_model(folder, vocab=tokens))

    def test_an_id_that_is_given_twice_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(BadCheckpoint, match="the id 65 is given twice, to “A” and to “B”"):
            vocabulary(change_model(folder, vocab={**tokens_of(folder), "B": 65}))

    @pytest.mark.parametrize("number", [ROWS, 10**9, 10**30])
    def test_an_id_beyond_the_embeddings_is_refused(self, number: int, tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(BadCheckpoint, match=f"“new” has the id {number:,}, but the embeddings have only 288 rows"):
            vocabulary(change_model(folder, vocab={**tokens_of(folder), "new": number}))

    @pytest.mark.parametrize("number", [-1, "65", 65.0, None, True, [65], {}])
    def test_an_id_that_is_no_number_is_refused(self, number: object, tmp_path: Path) -> None:
        folder = small(tmp_path)
        with pytest.raises(BadCheckpoint, match="has the wrong form"):
            vocabulary(change_model(folder, vocab={**tokens_of(folder), "new": number}))

    def test_an_empty_vocabulary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="its vocabulary is empty"):
            vocabulary(change_model(small(tmp_path), vocab={}))

    @pytest.mark.parametrize("values", [{"type": "Unigram"}, {"type": "WordPiece"}, {"vocab": []}, {"vocab": ...}])
    def test_a_tokenizer_of_another_kind_is_refused(self, values: dict[str, Any], tmp_path: Path) -> None:
        folder = small(tmp_path)
        model = {**json.loads((folder / "tokenizer.json").read_text())["model"], **values}
        change(folder, "tokenizer.json", model={key: value for key, value in model.items() if value is not ...})
        with pytest.raises(CannotExpress, match="its tokenizer is not BPE"):
            vocabulary(folder)

    @pytest.mark.parametrize("model", [..., None, [], "BPE"])
    def test_a_tokenizer_that_says_nothing_is_refused(self, model: object, tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="its tokenizer is not BPE"):
            vocabulary(change(small(tmp_path), "tokenizer.json", model=model))

    def test_more_tokens_than_rows_are_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path, {"vocab_size": 260})
        with pytest.raises(BadCheckpoint, match="has the id 260, but the embeddings have only 260 rows"):
            planned(folder)


class TestMerges:
    @pytest.mark.parametrize("merges", [["t h", "th e"], [["t", "h"], ["th", "e"]], ["t h", ["th", "e"]]])
    def test_they_are_text_or_pairs(self, merges: list[Any], tmp_path: Path) -> None:
        assert list(vocabulary(change_model(small(tmp_path), merges=merges)).merges) == ["t h", "th e"]

    @pytest.mark.parametrize("merges", [[], None, {}, "t h", 5])
    def test_a_vocabulary_without_them_is_refused(self, merges: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="there are no merges in it"):
            vocabulary(change_model(small(tmp_path), merges=merges))

    @pytest.mark.parametrize(
        "merge", ["th", "t h e", " h", "t ", "", [], ["t"], ["t", "h", "e"], ["", "h"], ["t", 5], [1, 2], 5, None, True]
    )
    def test_one_that_is_no_pair_is_refused(self, merge: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="is not a pair of tokens"):
            vocabulary(change_model(small(tmp_path), merges=["t h", merge]))

    @pytest.mark.parametrize("merge", ["t x", "th x", "xx yy", "e th"])
    def test_one_that_needs_a_token_that_is_not_there_is_refused(self, merge: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="needs a token that is not there"):
            vocabulary(change_model(small(tmp_path), merges=["t h", merge]))

    def test_an_object_is_no_pair(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="is not a pair of tokens"):
            vocabulary(change_model(small(tmp_path), merges=[{"t": 0, "h": 1}]))


class TestPreTokenizer:
    @pytest.mark.parametrize(
        "pre",
        [
            None,
            {"type": "ByteLevel", "use_regex": True},
            {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}},
            {"type": "Split", "pattern": {"String": " "}},
            {"type": "Split", "pattern": "x"},
            {"type": "Sequence", "pretokenizers": 5},
            {"type": "Split", "pattern": {"Regex": "\ud800"}},
            [],
            "qwen2",
        ],
    )
    def test_an_unknown_one_is_refused_unless_its_name_is_given(self, pre: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", pre_tokenizer=pre)
        with pytest.raises(CannotExpress, match=r"in a way that is not Qwen1.5's") as caught:
            vocabulary(folder)
        assert "--pre NAME" in caught.value.hint
        assert vocabulary(folder, pre="qwen2").pre == "qwen2"
        assert said(folder, pre="qwen2")["tokenizer.ggml.pre"] == "qwen2"

    def test_a_name_that_llama_cpp_does_not_have_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises((CannotExpress, UsageProblem), match="nonsense"):
            planned(small(tmp_path), pre="nonsense")

    def test_a_long_expression_is_shown_in_part(self, tmp_path: Path) -> None:
        pre = {"type": "Split", "pattern": {"Regex": "x" * 10_000}}
        with pytest.raises(CannotExpress) as caught:
            vocabulary(change(small(tmp_path), "tokenizer.json", pre_tokenizer=pre))
        assert len(str(caught.value)) < 500


class TestParts:
    """vocab.json and merges.txt, where there is no tokenizer.json."""

    def parts(self, folder: Path) -> Path:
        made = small(folder)
        tokens = tokens_of(made)
        (made / "tokenizer.json").unlink()
        (made / "vocab.json").write_text(json.dumps(tokens))
        (made / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
        return made

    def test_they_give_the_same_vocabulary(self, tmp_path: Path) -> None:
        assert vocabulary(self.parts(tmp_path / "parts")) == vocabulary(small(tmp_path))

    def test_merges_with_other_line_ends_are_the_same(self, tmp_path: Path) -> None:
        folder = self.parts(tmp_path)
        (folder / "merges.txt").write_bytes(b"#version: 0.2\r\nt h\r\nth e\r\n")
        assert list(vocabulary(folder).merges) == ["t h", "th e"]

    @pytest.mark.parametrize("kind", [..., None, "LlamaTokenizer", 5])
    def test_how_text_is_cut_must_be_known_or_given(self, kind: object, tmp_path: Path) -> None:
        folder = change(self.parts(tmp_path), "tokenizer_config.json", tokenizer_class=kind)
        with pytest.raises(CannotExpress, match="not said how text is cut") as caught:
            vocabulary(folder)
        assert "--pre qwen2" in caught.value.hint
        assert vocabulary(folder, pre="qwen2").pre == "qwen2"

    def test_merges_that_are_missing_are_named(self, tmp_path: Path) -> None:
        folder = self.parts(tmp_path)
        (folder / "merges.txt").unlink()
        with pytest.raises(BadCheckpoint, match=r"merges.txt: it cannot be read"):
            vocabulary(folder)

    @pytest.mark.parametrize("content", [b"\xff\xfe t h", b"", b"#version: 0.2\n", b"th\n", b"t h e\n", b"x y\n"])
    def test_merges_that_are_damaged_are_refused(self, content: bytes, tmp_path: Path) -> None:
        folder = self.parts(tmp_path)
        (folder / "merges.txt").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"merges.txt|vocab.json"):
            vocabulary(folder)


class TestAddedTokens:
    def test_they_come_from_both_files(self, tmp_path: Path) -> None:
        folder = change(
            small(tmp_path), "tokenizer.json", added_tokens=[{"id": 270, "content": "xx", "special": False}]
        )
        found = vocabulary(folder)
        assert (found.tokens[270], found.kinds[270]) == ("xx", USER_DEFINED)
        assert (found.tokens[260], found.kinds[260]) == ("<|im_end|>", CONTROL)

    def test_one_that_looks_like_a_mark_is_one_whatever_is_said(self, tmp_path: Path) -> None:
        listed = [{"id": 270, "content": "<|extra|>", "special": False}]
        assert vocabulary(change(small(tmp_path), "tokenizer.json", added_tokens=listed)).kinds[270] == CONTROL

    def test_files_that_give_an_id_to_two_tokens_are_refused(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", added_tokens=[{"id": 260, "content": "x"}])
        with pytest.raises(BadCheckpoint, match=r"the id 260 is given twice, to “<\|im_end\|>” and to “x”"):
            vocabulary(folder)

    def test_an_id_that_the_vocabulary_has_given_to_another_token_is_refused(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", added_tokens=[{"id": 65, "content": "new", "special": True}])
        with pytest.raises(BadCheckpoint, match="the id 65 is given twice"):
            vocabulary(folder)

    def test_one_that_is_in_the_vocabulary_too_is_one_token(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", added_tokens=[{"id": 65, "content": "A", "special": True}])
        assert vocabulary(folder).kinds[65] == CONTROL

    @pytest.mark.parametrize(
        "entry",
        [5, None, "x", [], {}, {"id": 270}, {"content": "x"}, {"id": "270", "content": "x"}, {"id": 270, "content": 5},
         {"id": -1, "content": "x"}, {"id": True, "content": "x"}, {"id": ROWS, "content": "x"}],
    )  # fmt: skip
    def test_one_of_another_form_or_out_of_range_is_refused(self, entry: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint):
            vocabulary(change(small(tmp_path), "tokenizer.json", added_tokens=[entry]))

    @pytest.mark.parametrize("number", ["x", "-1", "", "1.5", "²", "٣٤x", "9" * 5000])
    def test_an_id_in_the_settings_that_is_no_number_is_refused(self, number: str, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer_config.json", added_tokens_decoder={number: {"content": "x"}})
        with pytest.raises(BadCheckpoint):
            vocabulary(folder)

    # llama.cpp aborts where it loads a file in which two ids have one text; a text ends there at a zero byte, and what
    # is no character would be written as "?"
    @pytest.mark.parametrize("text", ["A", "[PAD262]", "A\0b", "\ud800"], ids=ascii)
    def test_a_text_that_two_ids_would_have_is_refused(self, text: str, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", added_tokens=[{"id": 261, "content": text}])
        with pytest.raises((BadCheckpoint, CannotExpress)):
            vocabulary(folder)


class TestSpecialTokens:
    def test_they_are_found_by_their_text_and_by_their_id(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, pad_token=...)
        found = vocabulary(change(folder, "config.json", pad_token_id=258, bos_token_id=...))
        assert dict(found.special) == {"eos": 260, "pad": 258, "eot": 260}

    def test_files_that_disagree_are_noted_and_the_tokenizers_is_kept(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "config.json", eos_token_id=258)
        found = vocabulary(folder)
        assert found.special["eos"] == 260
        assert list(found.notes) == [
            "The files disagree on eos: tokenizer_config.json's <|im_end|> is kept, not <|endoftext|>."
        ]

    def test_the_end_of_a_turn_is_named_beside_the_end_of_a_text(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer_config.json", eos_token="<|endoftext|>")
        found = vocabulary(change(folder, "config.json", eos_token_id=...))
        assert (found.special["eos"], found.special["eot"]) == (258, 260)

    def test_every_end_that_the_makers_list_gets_a_place_or_a_note(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "generation_config.json", eos_token_id=[260, 258, 65, 66])
        found = vocabulary(folder)
        assert (found.special["eot"], found.special["eom"]) == (260, 65)
        assert list(found.notes) == ["GGUF has no place for further end tokens: B."]

    @pytest.mark.parametrize("strange", [-1, ROWS, 10**30, "260", 260.0, True, None, [[260]], {"a": 1}])
    def test_ends_that_are_no_ids_are_passed_over(self, strange: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "generation_config.json", eos_token_id=strange)
        assert dict(vocabulary(folder).special) == {"bos": 258, "eos": 260, "pad": 258, "eot": 260}

    @pytest.mark.parametrize("strange", ["<|nothing|>", "", 5, ["<|im_end|>"], {"content": 5}, {}, "[PAD270]"])
    def test_a_token_that_is_not_there_is_passed_over(self, strange: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer_config.json", pad_token=strange)
        assert "pad" not in vocabulary(folder).special

    def test_nothing_is_put_before_or_after_a_text_where_the_tokenizer_says_so(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        nothing = {"bos": False, "eos": False}
        assert dict(vocabulary(folder).adds) == nothing
        post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "ByteLevel"}]}
        assert dict(vocabulary(change(folder, "tokenizer.json", post_processor=post)).adds) == nothing

    @pytest.mark.parametrize(
        "post", [None, {"type": "TemplateProcessing"}, [], 5, {"processors": [5]}, {"type": []}, {"type": {}}]
    )
    def test_otherwise_that_is_left_open(self, post: object, tmp_path: Path) -> None:
        assert dict(vocabulary(change(small(tmp_path), "tokenizer.json", post_processor=post)).adds) == {}

    @pytest.mark.parametrize(
        ("single", "adds"),
        [
            ([{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], {"bos": True, "eos": False}),
            ([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}], {"bos": False, "eos": True}),
            ([5, None], {"bos": False, "eos": False}),
        ],
    )
    def test_what_is_put_before_or_after_a_text_is_read_off_the_post_processor(
        self, single: list[Any], adds: dict[str, bool], tmp_path: Path
    ) -> None:
        post = {"type": "TemplateProcessing", "single": single}
        assert dict(vocabulary(change(small(tmp_path), "tokenizer.json", post_processor=post)).adds) == adds

    @pytest.mark.parametrize("post", [None, {"single": [{}]}, {"processors": [{"single": [5]}]}])
    def test_or_off_the_settings(self, post: object, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer.json", post_processor=post)
        change(folder, "tokenizer_config.json", add_bos_token=True, add_eos_token="no")
        assert dict(vocabulary(folder).adds) == {"bos": True}


class TestTemplates:
    def test_the_settings_one_is_taken(self, tmp_path: Path) -> None:
        assert dict(vocabulary(small(tmp_path)).templates) == {"": CHATML}

    def test_a_file_of_its_own_goes_before_the_settings(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
        assert dict(vocabulary(folder).templates) == {"": "{{ 'é' }}\r\n"}

    def test_chat_template_json_goes_after_both(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path, template=None), "chat_template.json", chat_template="from json")
        assert dict(vocabulary(folder).templates) == {"": "from json"}
        change(folder, "tokenizer_config.json", chat_template="first")
        assert dict(vocabulary(folder).templates) == {"": "first"}

    def test_a_checkpoint_without_one_has_none(self, tmp_path: Path) -> None:
        folder = small(tmp_path, template=None)
        assert dict(vocabulary(folder).templates) == {}
        assert not [key for key in said(folder) if "template" in key]

    def test_a_list_gives_each_its_name_and_default_is_the_usual_one(self, tmp_path: Path) -> None:
        listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        folder = change(small(tmp_path), "tokenizer_config.json", chat_template=listed)
        assert dict(vocabulary(folder).templates) == {"": "d", "tool_use": "t"}
        found = said(folder)
        assert found["tokenizer.chat_template"] == "d"
        assert found["tokenizer.chat_template.tool_use"] == "t"
        assert found["tokenizer.chat_templates"] == ["tool_use"]

    def test_a_list_without_a_default_has_its_first_as_the_usual_one(self, tmp_path: Path) -> None:
        folder = change(small(tmp_path), "tokenizer_config.json", chat_template=[{"name": "rag", "template": "r"}])
        assert vocabulary(folder).templates[""] == "r"

    def test_further_ones_may_have_files_of_their_own(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool-use.jinja").write_text("t")
        assert dict(vocabulary(folder).templates) == {"": CHATML, "tool_use": "t"}

    @pytest.mark.parametrize("wrong", [5, True, {}, [], ["text"], [{"name": "x"}], [{"name": 5, "template": "t"}]])
    def test_one_of_the_wrong_form_is_refused(self, wrong: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“chat_template” has the wrong form"):
            vocabulary(change(small(tmp_path), "tokenizer_config.json", chat_template=wrong))

    def test_a_file_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(BadCheckpoint, match=r"chat_template.jinja: it cannot be read"):
            vocabulary(folder)


# --- SentencePiece


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float, kind: int) -> bytes:
    return message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)


def pieces_file(path: Path, pieces: list[Piece], *, adds_space: bool | None = None) -> Path:
    """A BPE model, as CodeQwen1.5's is; its normalizer does nothing else than adding a space, or not even that."""
    content = b"".join(message(1, piece(*each)) for each in pieces) + message(2, b"\x18\x02")
    if adds_space is not None:
        content += message(3, message(1, b"identity") + b"\x18" + varint(adds_space) + b"\x20\x00")
    path.write_bytes(content)
    return path


PIECES = [
    Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL), Piece("<0x0A>", 0.0, BYTE),
    Piece("▁the", -1.5, NORMAL), Piece("a", -2.5, NORMAL),
]  # fmt: skip


class TestSentencePiece:
    @pytest.mark.parametrize("adds_space", [True, False, None])
    def test_pieces_and_the_space_before_a_text_are_read(self, adds_space: bool | None, tmp_path: Path) -> None:
        found = read_pieces(pieces_file(tmp_path / "tokenizer.model", PIECES, adds_space=adds_space))
        assert found.pieces == PIECES
        assert found.adds_space is (adds_space is not False)

    def test_fields_that_do_not_matter_are_stepped_over(self, tmp_path: Path) -> None:
        path = pieces_file(tmp_path / "tokenizer.model", PIECES)
        more = message(4, b"self-test") + b"\x51" + bytes(8) + b"\x58\x05" + b"\x65" + bytes(4)
        path.write_bytes(more + path.read_bytes() + more)
        assert read_pieces(path).pieces == PIECES

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "there are no pieces in it"),
            (b"\x58\x05", "there are no pieces in it"),
            (b"\x0a", "it ends too early"),
            (b"\x0a\x7f", "it ends too early"),
            (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "it ends too early"),
            (b"\xff" * 20, "a number without end"),
            (b"\x0b", "unknown kind 3"),
            (b"\x15\0", "unpack"),
            (message(1, message(1, b"\xff")), "utf-8"),
            (message(1, b"\x08\x01"), "wrong form"),
            (message(1, message(1, b"a") + b"\x10\x01"), "wrong form"),
            (message(1, message(1, b"a") + b"\x18\x07"), "wrong form"),
            (message(1, message(1, b"a") + message(3, b"")), "wrong form"),
        ],
    )
    def test_what_is_no_model_is_refused_with_the_reason(self, content: bytes, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content)
        assert re.search(reason, refusal(read_pieces, path))

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (message(2, b""), "it is no BPE model"),
            (message(2, b"\x18\x01"), "it is no BPE model"),
            (message(2, b"\x18\x03"), "it is no BPE model"),
            (message(3, b""), "takes spaces away"),
            (message(3, b"\x20\x01"), "takes spaces away"),
            (message(3, message(2, b"table") + b"\x20\x00"), "changes letters"),
        ],
    )
    def test_what_llama_cpp_would_cut_otherwise_is_refused(self, spec: bytes, reason: str, tmp_path: Path) -> None:
        path = pieces_file(tmp_path / "tokenizer.model", PIECES)
        path.write_bytes(path.read_bytes() + spec)
        with pytest.raises(CannotExpress, match=reason):
            read_pieces(path)

    def test_one_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        assert "No such file" in refusal(read_pieces, tmp_path / "tokenizer.model")

    def pieced(self, folder: Path, **options: Any) -> Path:
        """A checkpoint with tokenizer.model."""
        made = small(folder, {"vocab_size": 12})
        (made / "tokenizer.json").unlink()
        (made / "tokenizer_config.json").write_text("{}")
        (made / "generation_config.json").unlink()
        pieces_file(made / "tokenizer.model", PIECES, **options)
        return made

    def test_a_checkpoint_with_pieces_gets_scores_and_no_merges(self, tmp_path: Path) -> None:
        found = vocabulary(self.pieced(tmp_path, adds_space=False), 12)
        assert (found.model, found.pre, list(found.merges)) == ("llama", "default", [])
        assert list(found.tokens[:7]) == ["<unk>", "<s>", "</s>", "<0x0A>", "▁the", "a", "[PAD6]"]
        assert list(found.kinds[:7]) == [2, 3, 3, 6, 1, 1, 5]
        assert list(found.scores[4:7]) == [-1.5, -2.5, -10000.0]
        assert dict(found.adds) == {"space": False}

    def test_added_tokens_come_from_three_files(self, tmp_path: Path) -> None:
        folder = self.pieced(tmp_path)
        change(folder, "added_tokens.json", one=6)
        change(folder, "tokenizer.json", added_tokens=[{"id": 7, "content": "two", "special": True}])
        change(folder, "tokenizer_config.json", added_tokens_decoder={"8": {"content": "<|im_end|>"}})
        found = vocabulary(folder, 12)
        assert list(zip(found.tokens[6:9], found.kinds[6:9], strict=True)) == [
            ("one", USER_DEFINED), ("two", CONTROL), ("<|im_end|>", CONTROL)
        ]  # fmt: skip
        assert list(found.scores[6:9]) == [-1000.0] * 3

    def test_an_added_token_that_is_a_piece_already_stays_what_it_was(self, tmp_path: Path) -> None:
        folder = change(self.pieced(tmp_path), "tokenizer.json", added_tokens=[{"id": 0, "content": "<unk>"}])
        assert vocabulary(folder, 12).kinds[0] == UNKNOWN

    def test_an_added_token_with_the_id_of_another_piece_is_refused(self, tmp_path: Path) -> None:
        folder = change(self.pieced(tmp_path), "tokenizer.json", added_tokens=[{"id": 5, "content": "b"}])
        with pytest.raises(BadCheckpoint, match="the id 5 is given twice"):
            vocabulary(folder, 12)

    @pytest.mark.parametrize("number", ["6", None, [], {}, 6.5, -1, 12, True])
    def test_an_added_id_that_is_none_is_refused(self, number: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint):
            vocabulary(change(self.pieced(tmp_path), "added_tokens.json", one=number), 12)

    def test_more_pieces_than_rows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“a” has the id 5, but the embeddings have only 5 rows"):
            vocabulary(self.pieced(tmp_path), 5)


class TestByteFallback:
    """A SentencePiece vocabulary in the form of tokenizer.json, as fast tokenizers of CodeQwen1.5 have it."""

    def fallback(self, folder: Path, **more: Any) -> Path:
        made = small(folder, {"vocab_size": 12})
        vocab = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "t": 3, "h": 4, "th": 5, "▁th": 6}
        model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["t h", "▁ th"]}
        added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 7, "content": "<|im_end|>", "special": True}]
        (made / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added, **more}))
        (made / "tokenizer_config.json").write_text("{}")
        (made / "generation_config.json").unlink()
        return made

    def test_scores_are_the_ranks_of_the_merges(self, tmp_path: Path) -> None:
        found = vocabulary(self.fallback(tmp_path), 12)
        assert found.model == "llama"
        assert list(found.kinds[:9]) == [2, 6, 1, 1, 1, 1, 1, 3, 5]
        assert list(found.scores[2:7]) == [-2.0, -2.0, -2.0, 0.0, -1.0]

    @pytest.mark.parametrize(
        ("step", "adds"),
        [
            ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, True),
            ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}, True),
            ({"pre_tokenizer": {"type": "Metaspace"}}, True),
            ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
            ({"normalizer": None, "pre_tokenizer": 5}, False),
            ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, False),
        ],
    )
    def test_whether_a_space_is_put_before_a_text_is_read_off_its_steps(
        self, step: dict[str, Any], adds: bool, tmp_path: Path
    ) -> None:
        assert dict(vocabulary(self.fallback(tmp_path, **step), 12).adds) == {"space": adds}

    @pytest.mark.parametrize(
        "step", [{"type": "NFKC"}, {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, {}, {"type": []}]
    )
    def test_text_that_is_changed_otherwise_is_refused(self, step: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CannotExpress, match="it changes text before cutting it"):
            vocabulary(self.fallback(tmp_path, normalizer=step), 12)

    def test_a_hole_is_refused_here_too(self, tmp_path: Path) -> None:
        folder = change_model(self.fallback(tmp_path), vocab={"a": 0, "b": 2})
        with pytest.raises(BadCheckpoint, match="no token has the id 1"):
            vocabulary(folder, 12)


@quickly
@given(
    pieces=st.lists(
        st.builds(Piece, st.text(max_size=8), st.floats(-1000, 0, width=32), st.integers(1, 6)), min_size=1, max_size=8
    ),
    adds_space=st.booleans(),
)
def test_whatever_pieces_are_written_the_same_are_read(pieces: list[Piece], adds_space: bool, tmp_path: Path) -> None:
    found = read_pieces(pieces_file(tmp_path / "tokenizer.model", pieces, adds_space=adds_space))
    assert (found.pieces, found.adds_space) == (pieces, adds_space)


@quickly
@given(data=st.data())
def test_any_bytes_are_a_sentencepiece_model_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = pieces_file(tmp_path / "tokenizer.model", PIECES, adds_space=True)
    content = data.draw(st.one_of(st.binary(max_size=60), mutations(path.read_bytes())))
    path.write_bytes(content)
    try:
        assert read_pieces(path).pieces
    except (BadCheckpoint, CannotExpress) as refused:
        assert str(path) in str(refused)


# --- importance matrices


def gguf_file(path: Path, pairs: Mapping[str, gguf.Encoded], tensors: Mapping[str, numpy.ndarray]) -> Path:
    kind = ggml.tensor_type("f32")
    layout = gguf.lay_out(
        pairs, [gguf.Described(name, tuple(reversed(data.shape)), kind) for name, data in tensors.items()]
    )
    with path.open("wb") as file:
        file.write(layout.header)
        for name, data in tensors.items():
            file.seek(layout.offsets[name])
            file.write(data.astype(numpy.float32).tobytes())
        file.truncate(max(layout.size, file.tell()))
    return path


IMATRIX = {"general.type": gguf.string("imatrix")}


def measured(sums: Any = ((2.0, 4.0),), counts: Any = ((2.0,),)) -> dict[str, numpy.ndarray]:
    return {"blk.0.x.weight.in_sum2": numpy.array(sums), "blk.0.x.weight.counts": numpy.array(counts)}


class TestImportance:
    def test_a_columns_weight_is_its_sum_over_its_count(self, tmp_path: Path) -> None:
        sums, counts = [[2.0, 4.0], [3.0, 9.0], [5.0, 5.0]], [[2.0], [3.0], [0.0]]
        found = read_importance(gguf_file(tmp_path / "im.gguf", IMATRIX, measured(sums, counts)))
        assert found.weights["blk.0.x.weight"].tolist() == [[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]], "1 if never asked"
        assert found.of("blk.0.x.weight", 1, 3, 2).tolist() == [1.0, 3.0]
        assert found.of("blk.0.y.weight", 0, 1, 2) is None

    def test_what_was_used_is_noted_for_the_file(self, tmp_path: Path) -> None:
        more = {"imatrix.datasets": gguf.strings(["wiki.txt"]), "imatrix.chunk_count": gguf.u32(5)}
        found = read_importance(gguf_file(tmp_path / "im.gguf", {**IMATRIX, **more}, measured()))
        assert {key: gguf.decode(value) for key, value in found.pairs.items()} == {
            "quantize.imatrix.file": "im.gguf",
            "quantize.imatrix.dataset": "wiki.txt",
            "quantize.imatrix.entries_count": 1,
            "quantize.imatrix.chunks_count": 5,
        }

    @pytest.mark.parametrize(("experts", "columns"), [(2, 2), (1, 3), (1, 1)])
    def test_one_of_another_model_is_refused(self, experts: int, columns: int) -> None:
        found = Importance({"x": numpy.ones((1, 2), numpy.float32)}, {})
        with pytest.raises(BadWeights, match="1 x 2 weights for “x”") as caught:
            found.of("x", 0, experts, columns)
        assert "another model" in caught.value.hint

    @pytest.mark.parametrize(
        ("pairs", "tensors", "reason"),
        [
            ({}, measured(), "this is no importance matrix"),
            ({"general.type": gguf.string("model")}, measured(), "this is no importance matrix"),
            (IMATRIX, {}, "there are no weights in it"),
            (IMATRIX, {"other": numpy.ones(2)}, "there are no weights in it"),
            (IMATRIX, {"x.in_sum2": numpy.ones((1, 2))}, "does not say how often “x” was measured"),
            (IMATRIX, measured(counts=[[1.0], [1.0]]), "counts of “blk.0.x.weight” do not fit"),
            (IMATRIX, measured(sums=[[numpy.nan, 1.0]]), "NaN or infinite"),
            (IMATRIX, measured(sums=[[numpy.inf, 1.0]]), "NaN or infinite"),
            (IMATRIX, measured(sums=numpy.ones((1, 1, 1, 2))), "is no matrix of float32"),
        ],
    )
    def test_what_is_none_or_damaged_is_refused_with_the_reason(
        self, pairs: Any, tensors: Any, reason: str, tmp_path: Path
    ) -> None:
        path = gguf_file(tmp_path / "im.gguf", pairs, tensors)
        with pytest.raises(BadWeights, match=reason) as caught:
            read_importance(path)
        assert str(path) in str(caught.value)

    def test_a_matrix_without_columns_is_refused(self, tmp_path: Path) -> None:
        tensors = measured(sums=numpy.ones((3, 0)), counts=numpy.ones((3, 1)))
        with pytest.raises(BadWeights):
            read_importance(gguf_file(tmp_path / "im.gguf", IMATRIX, tensors))

    @pytest.mark.parametrize("chunks", [gguf.i32(-1), struct.pack("<IQ", 10, 1 << 40)])
    def test_a_count_of_chunks_that_cannot_be_is_refused_or_passed_over(self, chunks: bytes, tmp_path: Path) -> None:
        pairs = {**IMATRIX, "imatrix.chunk_count": chunks}
        try:
            found = read_importance(gguf_file(tmp_path / "im.gguf", pairs, measured()))
        except BadWeights:
            return
        assert "quantize.imatrix.chunks_count" not in found.pairs

    def test_a_file_that_is_not_there_or_something_else_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match="There is no file"):
            read_importance(tmp_path / "im.gguf")
        with pytest.raises(BadWeights, match="Is a directory"):
            read_importance(tmp_path)
        (tmp_path / "im.dat").write_bytes(b"\x02\0\0\0 the old form of it")
        with pytest.raises(BadWeights, match="not a GGUF file"):
            read_importance(tmp_path / "im.dat")


# --- what a model says of itself

FRONT = """---
license: other
license_name: tongyi-qianwen
license_link: https://example.org/LICENSE
language:
- en
- no
tags: [chat]
pipeline_tag: text-generation
base_model: Qwen/Qwen1.5-0.5B
datasets: [o/d]
---
# A model
"""


def about(folder: Path, name: str = "Qwen1.5-0.5B-Chat", repo: str = "") -> dict[str, Any]:
    found = read_about(folder, {}, name, Parameters(463_987_712), repo)
    return {key.removeprefix("general."): gguf.decode(value) for key, value in found.pairs.items()}


class TestAbout:
    def test_the_name_is_taken_apart(self, tmp_path: Path) -> None:
        found = about(tmp_path, repo="Qwen/Qwen1.5-0.5B-Chat")
        assert found["name"] == "Qwen1.5 0.5B Chat"
        assert (found["basename"], found["size_label"], found["finetune"]) == ("Qwen1.5", "0.5B", "Chat")
        assert found["source.repo_url"] == "https://huggingface.co/Qwen/Qwen1.5-0.5B-Chat"

    @pytest.mark.parametrize("ending", ["-GPTQ-Int4", "-GPTQ-Int8", "-AWQ", "-GGUF", "-gguf"])
    def test_how_its_bytes_were_packed_is_no_part_of_a_name(self, ending: str, tmp_path: Path) -> None:
        assert about(tmp_path, f"Qwen1.5-7B-Chat{ending}")["name"] == "Qwen1.5 7B Chat"

    @pytest.mark.parametrize(
        "name", ["", "-", ".", "模型", "x" * 300, "7B", "a/b", "-gguf", "1" * 50, "\x1b[2J", "Ⅷ-²B", "\udcff"]
    )
    def test_any_name_will_do(self, name: str, tmp_path: Path) -> None:
        assert about(tmp_path, name)["type"] == "model"

    def test_the_top_of_the_readme_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(FRONT)
        found = about(tmp_path)
        assert (found["license"], found["license.name"]) == ("other", "tongyi-qianwen")
        assert found["languages"] == ["en", "no"], "Norwegian, not False"
        assert found["tags"] == ["chat", "text-generation"]
        assert found["base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen1.5-0.5B"
        assert found["dataset.count"] == 1

    def test_several_licences_are_listed(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
        assert about(tmp_path)["license"] == "mit,apache-2.0"

    @pytest.mark.parametrize(
        "text", ["", "# A model\n", "no front", "---", "---\n---\n", "---\n- a\n- b\n---\n", "---\n5\n---"]
    )
    def test_a_readme_without_a_front_matter_says_nothing(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(text)
        assert "license" not in about(tmp_path)
        assert not read_about(tmp_path, {}, "x", Parameters(1)).notes

    @pytest.mark.parametrize(
        "front",
        [
            "a: [", "a: b: c", "\t- x\n- y", "key: *unknown", "? [a]\n: b\n{[c]: d}: e", "!!python/object:os.system x",
            "license: mit\nlicense: 'open", "date: 2024-13-45", "n: !!int x", "f: !!float x", "a: " + "[" * 5000,
        ],
    )  # fmt: skip
    def test_a_front_matter_that_is_broken_is_noted_and_no_hindrance(self, front: str, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / "README.md").write_text(f"---\n{front}\n---\n")
        plan = planned(folder)
        assert [note for note in plan.notes if "README.md cannot be read" in note]

    def test_a_readme_that_is_not_text_is_noted_and_no_hindrance(self, tmp_path: Path) -> None:
        folder = small(tmp_path)
        (folder / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert [note for note in planned(folder).notes if "README.md cannot be read" in note]

    @pytest.mark.parametrize(
        "front",
        [
            "license: 5", "license: true", "license: {a: b}", "license: [[mit], null]", "license:", "language: no",
            "language: {en: 1}", "tags: 5", "tags: [1, null, [x], {y: z}]", "base_model: 5",
            "base_model: [5, null, [x]]", "base_model: {name: x, repo_url: [y]}", "base_model: https://huggingface.co/a/b/c/d",
            "base_model: ''",
            "datasets: {a: b}", "datasets: [2024-01-01]", "name: [a]", "name: 2024-01-01", "model_name: {a: b}",
            "author: 5", "size_label: []", "basename: {}", "finetune: [x]", "version: 1.5", "5: 6", "null: null",
            "description: |\n  line\n  line", "license: \"\\ud800\"", "license_link: 5", "pipeline_tag: [a]",
        ],
    )  # fmt: skip
    def test_a_front_matter_with_strange_values_is_no_hindrance(self, front: str, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
        assert about(tmp_path)["type"] == "model"

    def test_a_front_matter_that_repeats_itself_does_not_swell_the_file(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 5)]
        for key in ("license", "tags", "name"):
            (tmp_path / "README.md").write_text("\n".join(["---", *lines, f"{key}: *a4", "---", ""]))
            found = read_about(tmp_path, {}, "x", Parameters(1))
            assert sum(len(value) for value in found.pairs.values()) < 10_000

    def test_the_makers_sampling_is_carried_over(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(
            '{"top_k": 20, "top_p": 0.5, "temperature": 0.75, "repetition_penalty": 1.5, "min_p": null, "x": []}'
        )
        found = {key: value for key, value in about(tmp_path).items() if key.startswith("sampling.")}
        assert found == {
            "sampling.top_k": 20, "sampling.top_p": 0.5, "sampling.temp": 0.75, "sampling.penalty_repeat": 1.5
        }  # fmt: skip

    @pytest.mark.parametrize("key", ["top_k", "temperature", "top_p"])
    @pytest.mark.parametrize("value", ['"20"', "true", "[20]", "{}", "1e10", "-1e10", "NaN", "Infinity", "9" * 400])
    def test_sampling_that_cannot_be_is_refused(self, key: str, value: str, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text(f'{{"{key}": {value}}}')
        with pytest.raises(BadCheckpoint, match=f"“{key}” is .*, which cannot be"):
            about(tmp_path)

    @pytest.mark.parametrize("strange", [5, None, [], "", "a/b/c", "/home/x/models/y", "Qwen/Qwen1.5-0.5B", "\0"])
    def test_where_the_config_says_it_came_from_is_only_a_hint(self, strange: object, tmp_path: Path) -> None:
        found = read_about(tmp_path, {"_name_or_path": strange}, "Qwen1.5-0.5B", Parameters(1))
        assert gguf.decode(found.pairs["general.type"]) == "model"


# --- whatever is in the files


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with some bytes changed, taken out or put in, or cut off."""

    def mutate(edits: list[tuple[float, int, bytes]], cut: float | None) -> bytes:
        found = bytearray(content)
        for where, kind, data in edits:
            at = int(where * len(found))
            if kind == 0:
                found[at : at + len(data)] = data
            elif kind == 1:
                found[at:at] = data
            else:
                del found[at : at + 1 + len(data)]
        return bytes(found if cut is None else found[: int(cut * len(found))])

    place = st.floats(0, 1, exclude_max=True)
    edit = st.tuples(place, st.integers(0, 2), st.binary(min_size=1, max_size=4))
    return st.builds(mutate, st.lists(edit, min_size=1, max_size=3), st.one_of(st.none(), st.none(), place))


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 300),
        st.sampled_from([1 << 31, 1 << 62, 1 << 64, -(1 << 63), 10**40, 10**400]),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["linear", "yarn", "Qwen2ForCausalLM", "Split", "BPE", "²", "\ud800", "<|im_end|>"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


def replaced(document: Any, data: st.DataObject) -> Any:
    """`document` with one value in it, however deep, replaced by any other, or taken out."""
    if isinstance(document, dict) and document and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(list(document)[:40]))
        if not data.draw(st.integers(0, 9)):
            return {other: value for other, value in document.items() if other != key}
        return {**document, key: replaced(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.integers(0, 3)):
        at = data.draw(st.integers(0, len(document) - 1))
        return [*document[:at], replaced(document[at], data), *document[at + 1 :]]
    return data.draw(ANYTHING)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has every kind of file."""
    folder = small(tmp_path_factory.mktemp("whole"), shards=2)
    (folder / "README.md").write_text(FRONT)
    change(folder, "config.json", rope_scaling={"type": "yarn", "factor": 2.0}, max_window_layers=1)
    return folder


def is_planned_or_refused(folder: Path) -> None:
    try:
        planned(folder)
    except BadWeights as refused:
        assert str(folder) in str(refused)
        assert refused.hint


@settings(quickly, max_examples=350)
@given(data=st.data())
def test_whatever_value_stands_in_a_json_file_the_checkpoint_is_planned_or_refused(
    data: st.DataObject, whole: Path
) -> None:
    name = data.draw(st.sampled_from(["config.json", "config.json", *DOCUMENTS, "tokenizer.json"]))
    path = whole / name
    original = path.read_text()
    try:
        path.write_text(json.dumps(replaced(json.loads(original), data)))
        is_planned_or_refused(whole)
    finally:
        path.write_text(original)


@settings(quickly, max_examples=250)
@given(data=st.data())
def test_whatever_bytes_of_a_checkpoint_are_damaged_it_is_planned_or_refused(data: st.DataObject, whole: Path) -> None:
    name = data.draw(st.sampled_from([*DOCUMENTS, "README.md", "model-00001-of-00002.safetensors"]))
    path = whole / name
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    front, rest = (original[:header], original[header:]) if name.endswith(".safetensors") else (original, b"")
    try:
        path.write_bytes(data.draw(mutations(front)) + rest)
        is_planned_or_refused(whole)
    finally:
        path.write_bytes(original)


LINES = st.one_of(
    st.text(max_size=12),
    st.builds(
        "{}: {}".format,
        st.sampled_from(["license", "language", "tags", "base_model", "datasets", "name", "version", "size_label"]),
        st.one_of(
            st.text(max_size=12), st.sampled_from(["[", "{}", "&a [*a]", "*a", "- x", "|", "2024-02-30", "!!int x"])
        ),
    ),
)


@settings(quickly, max_examples=100)
@given(lines=st.lists(LINES, max_size=4))
@example(lines=["name: 2024-02-30"])
def test_whatever_stands_at_the_top_of_the_readme_is_no_hindrance(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---", ""]), encoding="utf-8", errors="replace")
    assert read_about(tmp_path, {}, "Qwen1.5-0.5B", Parameters(1)).pairs


@quickly
@given(data=st.data())
def test_whatever_bytes_of_an_importance_matrix_are_damaged_it_is_read_or_refused(
    data: st.DataObject, tmp_path: Path
) -> None:
    more = {"imatrix.datasets": gguf.strings(["a"]), "imatrix.chunk_count": gguf.u32(5)}
    path = gguf_file(tmp_path / "im.gguf", {**IMATRIX, **more}, measured())
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    try:
        assert read_importance(path).weights
    except BadWeights as refused:
        assert str(path) in str(refused)
