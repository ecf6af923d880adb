"""Reading the front of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenlocal.errors import BadWeights
from qwenlocal.weights.header import LongArray, read_header, read_metadata


def test_a_models_keys_and_tensors_are_read(speaking_model: Path) -> None:
    header = read_header(speaking_model)
    assert header.architecture == "qwen2"
    assert header.hyperparameter("block_count") == 2
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 258
    assert {tensor.name: tensor.shape for tensor in header.tensors}["token_embd.weight"] == (288, 259)


def test_metadata_stops_before_the_vocabulary(speaking_model: Path) -> None:
    metadata = read_metadata(speaking_model)
    assert metadata["general.architecture"] == "qwen2"
    assert "tokenizer.ggml.tokens" not in metadata


def test_the_header_agrees_with_the_reference_reader(random_model: Path) -> None:
    """gguf's own reader is the second implementation."""
    from gguf import GGUFReader

    reader = GGUFReader(random_model)
    header = read_header(random_model)
    assert [(t.name, t.shape, header.data_offset + t.offset) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in t.shape), int(t.data_offset)) for t in reader.tensors
    ]
    assert set(header.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}


def test_a_long_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_token_list([f"token {n}" for n in range(5000)])
    writer.add_string("after", "still read")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_header(path)
    assert header.metadata["tokenizer.ggml.tokens"] == LongArray(8, 5000)
    assert header.metadata["after"] == "still read"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "like a web page"),
        (b"PK\x03\x04 zip", "this is not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "its version is 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "it is big-endian"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "the file ends inside the number of tensors"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "which no real file has"),
    ],
)
def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match=reason):
        read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_and_never_crashes(
    speaking_model: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = speaking_model.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BadWeights):
        read_header(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(4, 4000), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused_but_never_crashes(
    speaking_model: Path, tmp_path: Path, position: int, value: int
) -> None:
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
