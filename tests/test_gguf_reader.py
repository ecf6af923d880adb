"""Reading GGUF files: headers, damaged and unreadable files, and models split into several files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from commands import expect_exit, parse_json
from conftest import Run
from gguf_files import copy_with_metadata, copy_with_weights, split_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.errors import BadWeights
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import LongArray, read_header, read_metadata, read_raw_metadata


class TestHeader:
    def test_keys_and_tensors_are_read(self, speaking_model: Path) -> None:
        header = read_header(speaking_model)
        assert header.architecture == "qwen2"
        assert header.hyperparameter("block_count") == 2
        assert header.metadata["tokenizer.ggml.eos_token_id"] == 258
        assert {tensor.name: tensor.shape for tensor in header.tensors}["token_embd.weight"] == (288, 259)

    def test_metadata_stops_before_the_vocabulary(self, speaking_model: Path) -> None:
        metadata = read_metadata(speaking_model)
        assert metadata["general.architecture"] == "qwen2"
        assert "tokenizer.ggml.tokens" not in metadata

    def test_the_header_agrees_with_the_reference_reader(self, random_model: Path) -> None:
        """gguf's own reader is the second implementation."""
        from gguf import GGUFReader

        reader = GGUFReader(random_model)
        header = read_header(random_model)
        assert [(t.name, t.shape, t.offset) for t in header.tensors] == [
            (t.name, tuple(int(n) for n in t.shape), int(t.data_offset)) for t in reader.tensors
        ]
        assert set(header.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}

    def test_a_long_vocabulary_is_skipped(self, tmp_path: Path) -> None:
        import gguf

        path = tmp_path / "long.gguf"
        writer = gguf.GGUFWriter(path, "qwen2")
        writer.add_token_list([f"token {n}" for n in range(5000)])
        writer.add_string("after", "still read")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        header = read_header(path)
        assert header.metadata["tokenizer.ggml.tokens"] == LongArray(5000)
        assert header.metadata["after"] == "still read"

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "the file is empty"),
            (b"<html>not found</html>", "is not a GGUF file: it is a web page."),
            (b"PK\x03\x04 zip", "is not a GGUF file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a git-lfs pointer"),
            (b"GGUF\x01\x00\x00\x00" + bytes(16), "its version is 1"),
            (b"GGUF\x00\x00\x00\x03" + bytes(16), "it is big-endian"),
            (b"GGUF\x03\x00\x00\x00\x00\x00", "the file ends inside the number of tensors"),
            (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "more than any real file has"),
        ],
    )
    def test_another_format_is_refused_with_the_reason(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(BadWeights, match=reason):
            read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_truncated_anywhere_is_refused(speaking_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = speaking_model.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BadWeights):
        read_header(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(4, 4000), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(speaking_model: Path, tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(speaking_model.read_bytes())
    content[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BadWeights as refused:
        assert str(path) in str(refused)
    else:
        assert header.version in (2, 3)


class TestDuplicates:
    def write_duplicate(self, good: Path, target: Path, what: str) -> Path:
        """Write a file with a duplicate key or tensor."""
        if what == "key":
            copy_with_metadata(good, target, {"my.key1": gguf_writer.u32(1), "my.key2": gguf_writer.u32(2)})
            target.write_bytes(target.read_bytes().replace(b"my.key2", b"my.key1"))
        elif what == "long key":
            words = gguf_writer.strings(["x"] * 2000)
            copy_with_metadata(good, target, {"my.key1": words, "my.key2": words})
            target.write_bytes(target.read_bytes().replace(b"my.key2", b"my.key1"))
        else:
            target.write_bytes(good.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
        return target

    @pytest.mark.parametrize(
        ("what", "message"),
        [("key", "the key “my.key1” occurs twice"), ("long key", "the key “my.key1” occurs twice"),
         ("tensor", "the tensor “blk.0.attn_q.weight” occurs twice")],
    )  # fmt: skip
    def test_a_duplicate_key_or_tensor_is_refused_by_every_command(
        self, what: str, message: str, tiny_f32: Path, tiny_checkpoint: Path, invoke: Run, tmp_path: Path
    ) -> None:
        file = self.write_duplicate(tiny_f32, tmp_path / "x.gguf", what)
        with pytest.raises(BadWeights, match=message):
            read_header(file)
        for command in (("inspect", "./x.gguf"), ("inspect", "./x.gguf", "--fix", "-o", "y.gguf"),
                        ("diff", "./x.gguf", str(tiny_f32)), ("diff", str(tiny_f32), "./x.gguf"),
                        ("quantize", "./x.gguf", "y.gguf", "q8_0"), ("show", "./x.gguf"), ("verify", "./x.gguf"),
                        ("verify", "./x.gguf", "--against", str(tiny_checkpoint)),
                        ("run", "./x.gguf", "Hi")):  # fmt: skip
            assert "x.gguf" in expect_exit(invoke(*command), 5), command
        assert not (tmp_path / "y.gguf").exists()

    @pytest.mark.parametrize("what", ["key", "long key"])
    def test_a_duplicate_key_is_refused_by_read_raw_metadata(self, what: str, tiny_f32: Path, tmp_path: Path) -> None:
        with pytest.raises(BadWeights, match="occurs twice"):
            read_raw_metadata(self.write_duplicate(tiny_f32, tmp_path / "x.gguf", what))


class TestUnreadableFiles:
    @pytest.mark.parametrize("text", [".", "./folder", "folder", "./folder/", "./folder.gguf", "folder.gguf", "/"])
    def test_a_directory_is_refused_by_every_command(
        self, text: str, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder.gguf").mkdir()
        for command in (("inspect", text), ("inspect", text, "--json"), ("diff", text, str(tiny_f32)),
                        ("diff", str(tiny_f32), text), ("quantize", text, "y.gguf", "q8_0"), ("run", text, "Hi"),
                        ("verify", text), ("show", text)):  # fmt: skip
            assert "is not a checkpoint" in expect_exit(invoke(*command), 5), command

    @pytest.fixture
    def unreadable(self, tiny_f32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """A file without read permission, even for root."""
        shutil.copy(tiny_f32, tmp_path / "x.gguf")
        open_ = Path.open

        def denied(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "x.gguf":
                raise PermissionError(13, "Permission denied", str(path))
            return open_(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", denied)
        return "./x.gguf"

    def test_a_file_without_read_permission_is_refused_by_every_command(
        self, unreadable: str, tiny_f32: Path, invoke: Run
    ) -> None:
        for command in (("inspect", unreadable), ("diff", unreadable, str(tiny_f32)),
                        ("diff", str(tiny_f32), unreadable),
                        ("quantize", unreadable, "y.gguf", "q8_0"), ("show", unreadable),
                        ("run", unreadable, "Hi")):  # fmt: skip
            assert "x.gguf: Permission denied" in expect_exit(invoke(*command), 5), command

    @pytest.mark.parametrize("options", [(), ("--json",), ("--no-repair",)], ids=str)
    def test_a_file_without_read_permission_is_refused_by_verify(
        self, options: tuple[str, ...], unreadable: str, invoke: Run
    ) -> None:
        assert "x.gguf: Permission denied" in expect_exit(invoke("verify", unreadable, *options), 5)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
    def test_a_file_of_mode_0_is_refused(self, tiny_f32: Path, qwenlocal: Run, tmp_path: Path) -> None:
        shutil.copy(tiny_f32, tmp_path / "x.gguf")
        (tmp_path / "x.gguf").chmod(0)
        for command in (("inspect", "./x.gguf"), ("diff", "./x.gguf", str(tiny_f32))):
            assert ": Permission denied." in expect_exit(qwenlocal(*command), 5)

    @pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is none")
    def test_a_device_is_refused(self, invoke: Run) -> None:
        expect_exit(invoke("inspect", "/dev/null"), 5)


class TestSplitFiles:
    def test_inspect_shows_all_parts_as_one_model(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        split_gguf(tiny_f32, tmp_path)
        result = invoke("inspect", "./x-00001-of-00002.gguf", "--json")
        expect_exit(result, 0)
        parts, whole = parse_json(result.stdout), parse_json(invoke("inspect", str(tiny_f32), "--json").stdout)
        for key in ("tensor list", "parameters", "findings"):
            assert parts[key] == whole[key], key
        assert parts["size"] == sum(path.stat().st_size for path in tmp_path.glob("x-0*.gguf"))

    def test_diff_finds_no_difference_to_the_merged_file(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        split_gguf(tiny_f32, tmp_path)
        result = invoke("diff", "./x-00001-of-00002.gguf", str(tiny_f32))
        assert expect_exit(result, 0) == ""
        assert "The files have the same metadata and tensors." in result.stdout

    def test_verify_compares_all_parts_with_the_checkpoint(
        self, tiny_checkpoint: Path, tiny_f32: Path, invoke: Run, tmp_path: Path
    ) -> None:
        split_gguf(tiny_f32, tmp_path)
        expect_exit(invoke("verify", "./x-00001-of-00002.gguf", "--against", str(tiny_checkpoint)), 0)

    def test_damage_in_the_second_part_is_found(self, tiny_f32: Path, invoke: Run, tmp_path: Path) -> None:
        copy_with_weights(tiny_f32, tmp_path / "nan.gguf", read_header(tiny_f32).tensors[-1].name, numpy.nan)
        split_gguf(tmp_path / "nan.gguf", tmp_path)
        assert "NaN or infinite" in invoke("inspect", "./x-00001-of-00002.gguf").stdout

    @pytest.mark.parametrize("part", [1, 2])
    def test_a_fix_writes_one_merged_file(
        self, part: int, tiny_f32: Path, no_rope_base: Path, invoke: Run, tmp_path: Path
    ) -> None:
        split_gguf(no_rope_base, tmp_path)
        first = f"./x-0000{part}-of-00002.gguf"
        expect_exit(invoke("inspect", first, "--fix", "-o", "y.gguf"), 0)
        assert expect_exit(invoke("diff", "./y.gguf", str(tiny_f32)), 0) == ""
        assert not [key for key in read_raw_metadata(tmp_path / "y.gguf") if key.startswith("split.")]

    def test_a_fix_in_place_is_refused(self, no_rope_base: Path, invoke: Run, tmp_path: Path) -> None:
        split_gguf(no_rope_base, tmp_path)
        before = [path.read_bytes() for path in sorted(tmp_path.glob("x-0*.gguf"))]
        assert "--fix -o FILE" in expect_exit(invoke("inspect", "./x-00001-of-00002.gguf", "--fix"), 2)
        assert [path.read_bytes() for path in sorted(tmp_path.glob("x-0*.gguf"))] == before
