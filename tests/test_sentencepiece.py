"""SentencePiece vocabularies, as CodeQwen1.5 has: tokenizer.model, or tokenizer.json with byte fallback."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import expect_refusal, load_vocabulary, set_bpe_model, set_json, write_minimal
from fuzzing import fuzz, mutations
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.weights.gguf_reader import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qwenlocal.weights.sentencepiece import Piece, read_sentencepiece


def encode_varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def encode_message(field: int, data: bytes) -> bytes:
    return encode_varint(field << 3 | 2) + encode_varint(len(data)) + data


def encode_piece(text: str, score: float, kind: int) -> bytes:
    return encode_message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + encode_varint(kind)


def write_sentencepiece(path: Path, pieces: list[Piece], *, adds_space: bool | None = None) -> Path:
    """Write a BPE model like that of CodeQwen1.5, with a normalizer that only adds a space or does nothing."""
    content = b"".join(encode_message(1, encode_piece(*each)) for each in pieces) + encode_message(2, b"\x18\x02")
    if adds_space is not None:
        content += encode_message(3, encode_message(1, b"identity") + b"\x18" + encode_varint(adds_space) + b"\x20\x00")
    path.write_bytes(content)
    return path


PIECES = [
    Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL), Piece("<0x0A>", 0.0, BYTE),
    Piece("▁the", -1.5, NORMAL), Piece("a", -2.5, NORMAL),
]  # fmt: skip


class TestTokenizerModel:
    @pytest.mark.parametrize("adds_space", [True, False, None])
    def test_pieces_and_the_leading_space_are_read(self, adds_space: bool | None, tmp_path: Path) -> None:
        model = read_sentencepiece(write_sentencepiece(tmp_path / "tokenizer.model", PIECES, adds_space=adds_space))
        assert model.pieces == PIECES
        assert model.adds_space is (adds_space is not False)

    def test_unknown_fields_are_skipped(self, tmp_path: Path) -> None:
        path = write_sentencepiece(tmp_path / "tokenizer.model", PIECES)
        more = encode_message(4, b"self-test") + b"\x51" + bytes(8) + b"\x58\x05" + b"\x65" + bytes(4)
        path.write_bytes(more + path.read_bytes() + more)
        assert read_sentencepiece(path).pieces == PIECES

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it contains no pieces"),
            (b"\x58\x05", "it contains no pieces"),
            (b"\x0a", "it ends too early"),
            (b"\x0a\x7f", "it ends too early"),
            (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "it ends too early"),
            (b"\xff" * 20, "a number does not end"),
            (b"\x0b", "unknown wire type 3"),
            (b"\x15\0", "unpack"),
            (encode_message(1, encode_message(1, b"\xff")), "utf-8"),
            (encode_message(1, b"\x08\x01"), "malformed"),
            (encode_message(1, encode_message(1, b"a") + b"\x10\x01"), "malformed"),
            (encode_message(1, encode_message(1, b"a") + b"\x18\x07"), "malformed"),
            (encode_message(1, encode_message(1, b"a") + encode_message(3, b"")), "malformed"),
        ],
    )
    def test_damaged_data_is_refused_with_the_reason(self, content: bytes, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content)
        assert re.search(reason, expect_refusal(read_sentencepiece, path))

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (encode_message(2, b""), "it is not a BPE model"),
            (encode_message(2, b"\x18\x01"), "it is not a BPE model"),
            (encode_message(2, b"\x18\x03"), "it is not a BPE model"),
            (encode_message(3, b""), "removes spaces"),
            (encode_message(3, b"\x20\x01"), "removes spaces"),
            (encode_message(3, encode_message(2, b"table") + b"\x20\x00"), "replaces characters"),
        ],
    )
    def test_settings_that_llama_cpp_lacks_are_refused(self, spec: bytes, reason: str, tmp_path: Path) -> None:
        path = write_sentencepiece(tmp_path / "tokenizer.model", PIECES)
        path.write_bytes(path.read_bytes() + spec)
        with pytest.raises(UnsupportedCheckpoint, match=reason):
            read_sentencepiece(path)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        assert "No such file" in expect_refusal(read_sentencepiece, tmp_path / "tokenizer.model")

    def write_checkpoint(self, folder: Path, **options: Any) -> Path:
        """A checkpoint with tokenizer.model."""
        checkpoint = write_minimal(folder, {"vocab_size": 12, "eos_token_id": 2})
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "tokenizer_config.json").write_text("{}")
        (checkpoint / "generation_config.json").unlink()
        write_sentencepiece(checkpoint / "tokenizer.model", PIECES, **options)
        return checkpoint

    def test_the_vocabulary_has_scores_and_no_merges(self, tmp_path: Path) -> None:
        vocabulary = load_vocabulary(self.write_checkpoint(tmp_path, adds_space=False), 12)
        assert (vocabulary.model, vocabulary.pre, list(vocabulary.merges)) == ("llama", "default", [])
        assert list(vocabulary.tokens[:7]) == ["<unk>", "<s>", "</s>", "<0x0A>", "▁the", "a", "[PAD6]"]
        assert list(vocabulary.token_types[:7]) == [2, 3, 3, 6, 1, 1, 5]
        assert list(vocabulary.scores[4:7]) == [-1.5, -2.5, -10000.0]
        assert dict(vocabulary.add_flags) == {"space": False}

    def test_added_tokens_come_from_tokenizer_json_and_one_of_two_other_files(self, tmp_path: Path) -> None:
        folder = self.write_checkpoint(tmp_path)
        set_json(folder, "added_tokens.json", one=6)
        set_json(folder, "tokenizer.json", added_tokens=[{"id": 7, "content": "two", "special": True}])
        vocabulary = load_vocabulary(folder, 12)
        assert list(zip(vocabulary.tokens[6:9], vocabulary.token_types[6:9], strict=True)) == [
            ("one", USER_DEFINED), ("two", CONTROL), ("[PAD8]", UNUSED)
        ]  # fmt: skip
        set_json(folder, "tokenizer_config.json", added_tokens_decoder={"8": {"content": "<|im_end|>"}})
        vocabulary = load_vocabulary(folder, 12)
        assert list(zip(vocabulary.tokens[6:9], vocabulary.token_types[6:9], strict=True)) == [
            ("[PAD6]", UNUSED), ("two", CONTROL), ("<|im_end|>", CONTROL)
        ]  # fmt: skip
        assert list(vocabulary.scores[7:9]) == [-1000.0] * 2

    def test_an_added_token_that_is_a_piece_keeps_its_type(self, tmp_path: Path) -> None:
        folder = set_json(
            self.write_checkpoint(tmp_path), "tokenizer.json", added_tokens=[{"id": 0, "content": "<unk>"}]
        )
        assert load_vocabulary(folder, 12).token_types[0] == UNKNOWN

    def test_an_added_token_with_the_id_of_another_piece_is_refused(self, tmp_path: Path) -> None:
        folder = set_json(self.write_checkpoint(tmp_path), "tokenizer.json", added_tokens=[{"id": 5, "content": "b"}])
        with pytest.raises(BadCheckpoint, match="“a” and “b” have the same id, 5"):
            load_vocabulary(folder, 12)

    @pytest.mark.parametrize("number", ["6", None, [], {}, 6.5, -1, 12, True])
    def test_an_invalid_added_id_is_refused(self, number: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint):
            load_vocabulary(set_json(self.write_checkpoint(tmp_path), "added_tokens.json", one=number), 12)

    def test_more_pieces_than_embedding_rows_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="“a” has the id 5, but the embeddings have only 5 rows"):
            load_vocabulary(self.write_checkpoint(tmp_path), 5)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


class TestByteFallback:
    """A SentencePiece vocabulary in tokenizer.json, as the fast tokenizer of CodeQwen1.5 has it."""

    def write_checkpoint(self, folder: Path, **more: Any) -> Path:
        checkpoint = write_minimal(folder, {"vocab_size": 12})
        vocab = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "t": 3, "h": 4, "th": 5, "▁th": 6}
        model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["t h", "▁ th"]}
        added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 7, "content": "<|im_end|>", "special": True}]
        document = {"model": model, "added_tokens": added, "normalizer": REPLACE, **more}
        (checkpoint / "tokenizer.json").write_text(json.dumps(document))
        (checkpoint / "tokenizer_config.json").write_text("{}")
        (checkpoint / "generation_config.json").unlink()
        return checkpoint

    def test_scores_follow_the_order_of_merges(self, tmp_path: Path) -> None:
        vocabulary = load_vocabulary(self.write_checkpoint(tmp_path), 12)
        assert vocabulary.model == "llama"
        assert list(vocabulary.token_types[:9]) == [2, 6, 1, 1, 1, 1, 1, 3, 5]
        assert list(vocabulary.scores[2:7]) == [-2.0, -2.0, -2.0, 0.0, -1.0]

    @pytest.mark.parametrize(
        ("step", "adds"),
        [
            ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}}, True),
            ({"pre_tokenizer": {"type": "Metaspace"}}, True),
            ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
            ({"normalizer": REPLACE}, False),
            ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE]}}, False),
            ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}}, True),
        ],
    )
    def test_the_leading_space_follows_normalizer_and_pre_tokenizer(
        self, step: dict[str, Any], adds: bool, tmp_path: Path
    ) -> None:
        assert dict(load_vocabulary(self.write_checkpoint(tmp_path, **step), 12).add_flags) == {"space": adds}

    @pytest.mark.parametrize(
        "step", [None, {"type": "Prepend", "prepend": "▁"}, {"type": "Sequence", "normalizers": []}]
    )
    def test_a_tokenizer_that_keeps_spaces_is_refused(self, step: Any, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="it keeps spaces before tokenizing"):
            load_vocabulary(self.write_checkpoint(tmp_path, normalizer=step), 12)

    def test_a_space_before_the_first_word_only_is_noted(self, tmp_path: Path) -> None:
        """transformers 5 writes Llama's tokenizers like that."""
        step = {"type": "Metaspace", "prepend_scheme": "first", "split": False}
        vocabulary = load_vocabulary(self.write_checkpoint(tmp_path, pre_tokenizer=step), 12)
        assert vocabulary.add_flags["space"] is True
        assert any("llama.cpp also does after control tokens" in note for note in vocabulary.notes)

    @pytest.mark.parametrize("pre_tokenizer", [5, [], {"type": "Metaspace", "replacement": "_"}])
    def test_other_pre_tokenizers_are_refused(self, pre_tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="it changes text before tokenizing"):
            load_vocabulary(self.write_checkpoint(tmp_path, pre_tokenizer=pre_tokenizer), 12)

    @pytest.mark.parametrize("key", ["dropout", "continuing_subword_prefix", "ignore_merges"])
    def test_other_bpe_settings_are_refused(self, key: str, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match=f"its tokenizer has {key} = "):
            load_vocabulary(set_bpe_model(self.write_checkpoint(tmp_path), **{key: 1}), 12)

    @pytest.mark.parametrize(
        "step",
        [{"type": "NFKC"}, {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, {}, {"type": []}, [], "NFC"],
    )
    def test_other_normalizers_are_refused(self, step: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="it changes text before tokenizing"):
            load_vocabulary(self.write_checkpoint(tmp_path, normalizer=step), 12)

    def test_a_missing_id_is_refused(self, tmp_path: Path) -> None:
        folder = set_bpe_model(self.write_checkpoint(tmp_path), vocab={"a": 0, "b": 2})
        with pytest.raises(BadCheckpoint, match="no token has the id 1"):
            load_vocabulary(folder, 12)

    @pytest.mark.parametrize(
        "step",
        [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            {"type": "Replace", "pattern": {"String": "\n"}, "content": "▁"},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"},
            {"type": "Prepend", "prepend": "_"}, {"type": "Metaspace", "replacement": "_"}, {"type": "NFC"},
        ],
        ids=str,
    )  # fmt: skip
    def test_replacing_anything_but_spaces_is_refused(self, step: dict[str, Any], tmp_path: Path) -> None:
        steps = {"type": "Sequence", "normalizers": [step]}
        with pytest.raises(UnsupportedCheckpoint, match="it changes text before tokenizing"):
            load_vocabulary(self.write_checkpoint(tmp_path, normalizer=steps), 12)


@fuzz
@given(
    pieces=st.lists(
        st.builds(Piece, st.text(max_size=8), st.floats(-1000, 0, width=32), st.integers(1, 6)), min_size=1, max_size=8
    ),
    adds_space=st.booleans(),
)
def test_written_pieces_are_read_back_unchanged(pieces: list[Piece], adds_space: bool, tmp_path: Path) -> None:
    model = read_sentencepiece(write_sentencepiece(tmp_path / "tokenizer.model", pieces, adds_space=adds_space))
    assert (model.pieces, model.adds_space) == (pieces, adds_space)


@fuzz
@given(data=st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model", PIECES, adds_space=True)
    content = data.draw(st.one_of(st.binary(max_size=60), mutations(path.read_bytes())))
    path.write_bytes(content)
    try:
        assert read_sentencepiece(path).pieces
    except (BadCheckpoint, UnsupportedCheckpoint) as refused:
        assert str(path) in str(refused)
