"""tokenizer.json, tokenizer_config.json, vocab.json and merges.txt: vocabulary, merges, added and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import VOCAB_SIZE, load_vocab, load_vocabulary, make_plan, set_bpe_model, set_json, write_minimal
from commands import expect_exit
from conftest import Run

from qwenlocal.errors import BadCheckpoint, UnsupportedCheckpoint
from qwenlocal.testing import SPECIALS
from qwenlocal.weights.gguf_reader import CONTROL, USER_DEFINED


class TestVocabulary:
    def test_every_embedding_row_gets_a_token_and_unused_rows_get_padding(self, tmp_path: Path) -> None:
        vocabulary = load_vocabulary(write_minimal(tmp_path))
        assert (vocabulary.model, vocabulary.pre) == ("gpt2", "qwen2")
        assert len(vocabulary.tokens) == len(vocabulary.token_types) == VOCAB_SIZE
        assert list(vocabulary.tokens[256:263]) == ["th", "the", *SPECIALS, "[PAD261]", "[PAD262]"]
        assert list(vocabulary.token_types[256:263]) == [1, 1, 3, 3, 3, 5, 5]
        assert vocabulary.first_unused == 261
        assert list(vocabulary.merges) == ["t h", "th e"]

    def test_a_missing_id_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        tokens = load_vocab(folder)
        del tokens["A"]
        with pytest.raises(BadCheckpoint, match="no token has the id 65, although the ids go up to 257"):
            load_vocabulary(set_bpe_model(folder, vocab=tokens))

    def test_a_duplicate_id_is_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(BadCheckpoint, match="“A” and “B” have the same id, 65"):
            load_vocabulary(set_bpe_model(folder, vocab={**load_vocab(folder), "B": 65}))

    @pytest.mark.parametrize("number", [VOCAB_SIZE, 10**9, 10**30])
    def test_an_id_beyond_the_embeddings_is_refused(self, number: int, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(BadCheckpoint, match=f"“new” has the id {number:,}, but the embeddings have only 288 rows"):
            load_vocabulary(set_bpe_model(folder, vocab={**load_vocab(folder), "new": number}))

    @pytest.mark.parametrize("number", [-1, "65", 65.0, None, True, [65], {}])
    def test_an_id_that_is_not_a_number_is_refused(self, number: object, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        with pytest.raises(BadCheckpoint, match="is malformed"):
            load_vocabulary(set_bpe_model(folder, vocab={**load_vocab(folder), "new": number}))

    def test_an_empty_vocabulary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="its vocabulary is empty"):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), vocab={}))

    @pytest.mark.parametrize("values", [{"type": "Unigram"}, {"type": "WordPiece"}, {"vocab": []}, {"vocab": ...}])
    def test_another_tokenizer_type_is_refused(self, values: dict[str, Any], tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        model = {**json.loads((folder / "tokenizer.json").read_text())["model"], **values}
        set_json(folder, "tokenizer.json", model={key: value for key, value in model.items() if value is not ...})
        with pytest.raises(UnsupportedCheckpoint, match="its tokenizer is not BPE"):
            load_vocabulary(folder)

    @pytest.mark.parametrize("model", [..., None, [], "BPE"])
    def test_a_tokenizer_without_a_model_is_refused(self, model: object, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="its tokenizer is not BPE"):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", model=model))

    def test_more_tokens_than_embedding_rows_are_refused(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path, {"vocab_size": 260})
        with pytest.raises(BadCheckpoint, match="has the id 260, but the embeddings have only 260 rows"):
            make_plan(folder)


class TestMerges:
    @pytest.mark.parametrize("merges", [["t h", "th e"], [["t", "h"], ["th", "e"]], ["t h", ["th", "e"]]])
    def test_merges_may_be_text_or_pairs(self, merges: list[Any], tmp_path: Path) -> None:
        assert list(load_vocabulary(set_bpe_model(write_minimal(tmp_path), merges=merges)).merges) == ["t h", "th e"]

    @pytest.mark.parametrize("merges", [[], None, {}, "t h", 5])
    def test_a_vocabulary_without_merges_is_refused(self, merges: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="it contains no merges"):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), merges=merges))

    @pytest.mark.parametrize(
        "merge", ["th", "t h e", " h", "t ", "", [], ["t"], ["t", "h", "e"], ["", "h"], ["t", 5], [1, 2], 5, None, True]
    )
    def test_a_merge_that_is_not_a_pair_is_refused(self, merge: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="is not a pair of tokens"):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), merges=["t h", merge]))

    @pytest.mark.parametrize("merge", ["t x", "th x", "xx yy", "e th"])
    def test_a_merge_of_an_unknown_token_is_refused(self, merge: str, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="needs a token that is not in the vocabulary"):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), merges=["t h", merge]))

    def test_an_object_as_merge_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint, match="is not a pair of tokens"):
            load_vocabulary(set_bpe_model(write_minimal(tmp_path), merges=[{"t": 0, "h": 1}]))


class TestVocabAndMergesFiles:
    """vocab.json and merges.txt, which older checkpoints have in place of tokenizer.json."""

    def write_vocab_and_merges(self, folder: Path) -> Path:
        checkpoint = write_minimal(folder)
        tokens = load_vocab(checkpoint)
        (checkpoint / "tokenizer.json").unlink()
        (checkpoint / "vocab.json").write_text(json.dumps(tokens))
        (checkpoint / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
        return checkpoint

    def test_both_files_give_the_same_vocabulary_as_tokenizer_json(self, tmp_path: Path) -> None:
        assert load_vocabulary(self.write_vocab_and_merges(tmp_path / "old")) == load_vocabulary(
            write_minimal(tmp_path)
        )

    def test_crlf_line_ends_in_merges_are_accepted(self, tmp_path: Path) -> None:
        folder = self.write_vocab_and_merges(tmp_path)
        (folder / "merges.txt").write_bytes(b"#version: 0.2\r\nt h\r\nth e\r\n")
        assert list(load_vocabulary(folder).merges) == ["t h", "th e"]

    @pytest.mark.parametrize("kind", [..., None, "LlamaTokenizer", 5])
    def test_the_pre_tokenizer_must_be_known_or_given(self, kind: object, tmp_path: Path) -> None:
        folder = set_json(self.write_vocab_and_merges(tmp_path), "tokenizer_config.json", tokenizer_class=kind)
        with pytest.raises(UnsupportedCheckpoint, match="unknown how text is split into words") as caught:
            load_vocabulary(folder)
        assert "--pre qwen2" in caught.value.hint
        assert load_vocabulary(folder, pre="qwen2").pre == "qwen2"

    def test_a_missing_merges_file_is_named(self, tmp_path: Path) -> None:
        folder = self.write_vocab_and_merges(tmp_path)
        (folder / "merges.txt").unlink()
        with pytest.raises(BadCheckpoint, match=r"There is no file .*merges\.txt\."):
            load_vocabulary(folder)

    @pytest.mark.parametrize("content", [b"\xff\xfe t h", b"", b"#version: 0.2\n", b"th\n", b"t h e\n", b"x y\n"])
    def test_a_damaged_merges_file_is_refused(self, content: bytes, tmp_path: Path) -> None:
        folder = self.write_vocab_and_merges(tmp_path)
        (folder / "merges.txt").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"merges.txt|vocab.json"):
            load_vocabulary(folder)


class TestAddedTokens:
    def test_added_tokens_come_from_both_files(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer.json", added_tokens=[{"id": 270, "content": "xx", "special": False}]
        )
        vocabulary = load_vocabulary(folder)
        assert (vocabulary.tokens[270], vocabulary.token_types[270]) == ("xx", USER_DEFINED)
        assert (vocabulary.tokens[260], vocabulary.token_types[260]) == ("<|im_end|>", CONTROL)

    def test_a_token_that_looks_like_a_control_token_becomes_one(self, tmp_path: Path) -> None:
        entries = [{"id": 270, "content": "<|extra|>", "special": False}]
        assert (
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=entries)).token_types[270]
            == CONTROL
        )

    def test_an_id_with_different_tokens_in_both_files_is_refused(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=[{"id": 260, "content": "x"}])
        with pytest.raises(BadCheckpoint, match=r"“<\|im_end\|>” and “x” have the same id, 260"):
            load_vocabulary(folder)

    def test_an_id_of_another_vocabulary_token_is_refused(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer.json", added_tokens=[{"id": 65, "content": "new", "special": True}]
        )
        with pytest.raises(BadCheckpoint, match="“A” and “new” have the same id, 65"):
            load_vocabulary(folder)

    def test_an_added_token_of_the_vocabulary_takes_its_type(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer.json", added_tokens=[{"id": 65, "content": "A", "special": True}]
        )
        assert load_vocabulary(folder).token_types[65] == CONTROL

    @pytest.mark.parametrize(
        "entry",
        [5, None, "x", [], {}, {"id": 270}, {"content": "x"}, {"id": "270", "content": "x"}, {"id": 270, "content": 5},
         {"id": -1, "content": "x"}, {"id": True, "content": "x"}, {"id": VOCAB_SIZE, "content": "x"}],
    )  # fmt: skip
    def test_a_malformed_added_token_is_refused(self, entry: object, tmp_path: Path) -> None:
        with pytest.raises(BadCheckpoint):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=[entry]))

    @pytest.mark.parametrize("number", ["x", "-1", "", "1.5", "²", "٣٤x", "9" * 5000])
    def test_an_id_in_added_tokens_decoder_that_is_not_a_number_is_refused(self, number: str, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer_config.json", added_tokens_decoder={number: {"content": "x"}}
        )
        with pytest.raises(BadCheckpoint):
            load_vocabulary(folder)

    # llama.cpp aborts when two ids have the same text; a text ends at a zero byte there, and a lone surrogate would be
    # written as "?".
    @pytest.mark.parametrize("text", ["A", "[PAD262]", "A\0b", "\ud800"], ids=ascii)
    def test_a_text_that_two_ids_share_is_refused(self, text: str, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=[{"id": 261, "content": text}])
        with pytest.raises((BadCheckpoint, UnsupportedCheckpoint)):
            load_vocabulary(folder)

    @pytest.mark.parametrize("added", [5, {"a": 1}, [{"id": 258, "content": "", "special": True}]])
    def test_malformed_added_tokens_fail_a_conversion(self, added: Any, checkpoint_copy: Path, invoke: Run) -> None:
        file = checkpoint_copy / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens": added}))
        assert "tokenizer.json: " in expect_exit(invoke("convert", str(checkpoint_copy), "--dry-run"), 5)


class TestSpecialTokens:
    def test_special_tokens_are_found_by_text_and_by_id(self, tmp_path: Path) -> None:
        folder = set_json(
            write_minimal(tmp_path), "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, pad_token=...
        )
        vocabulary = load_vocabulary(set_json(folder, "config.json", pad_token_id=258, bos_token_id=...))
        assert dict(vocabulary.special) == {"eos": 260, "pad": 258, "eot": 260}

    def test_a_contradiction_is_noted_and_tokenizer_config_wins(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", eos_token_id=258)
        vocabulary = load_vocabulary(folder)
        assert vocabulary.special["eos"] == 260
        assert list(vocabulary.notes) == [
            "The eos token is <|im_end|>, as in tokenizer_config.json, although config.json says <|endoftext|>."
        ]

    def test_the_end_of_turn_is_set_in_addition_to_the_end_of_text(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", eos_token="<|endoftext|>")
        vocabulary = load_vocabulary(set_json(folder, "config.json", eos_token_id=...))
        assert (vocabulary.special["eos"], vocabulary.special["eot"]) == (258, 260)

    def test_every_eos_token_of_generation_config_gets_a_key_or_a_note(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "generation_config.json", eos_token_id=[260, 258, 65, 66])
        vocabulary = load_vocabulary(folder)
        assert (vocabulary.special["eot"], vocabulary.special["eom"]) == (260, 65)
        assert list(vocabulary.notes) == ["Left out end tokens for which GGUF has no key: B."]

    @pytest.mark.parametrize("value", [-1, VOCAB_SIZE, 10**30, "260", 260.0, True, None, [[260]], {"a": 1}])
    def test_invalid_eos_ids_are_ignored(self, value: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "generation_config.json", eos_token_id=value)
        assert dict(load_vocabulary(folder).special) == {"bos": 258, "eos": 260, "pad": 258, "eot": 260}

    @pytest.mark.parametrize("value", ["<|nothing|>", "", 5, ["<|im_end|>"], {"content": 5}, {}, "[PAD270]"])
    def test_an_unknown_pad_token_is_ignored(self, value: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", pad_token=value)
        assert "pad" not in load_vocabulary(folder).special

    @pytest.mark.parametrize(
        ("file", "key", "value", "note"),
        [
            (
                "config.json",
                "eos_token_id",
                "end",
                "Ignored eos_token_id in config.json: 'end' is not the id of a token",
            ),
            ("config.json", "pad_token_id", -5, "Ignored pad_token_id in config.json: -5 is not the id of a token"),
            (
                "tokenizer_config.json",
                "eos_token",
                "<nope>",
                "Ignored eos_token in tokenizer_config.json: '<nope>' is not a token",
            ),
        ],
    )
    def test_unknown_special_tokens_are_ignored_with_a_note(
        self, file: str, key: str, value: Any, note: str, checkpoint_copy: Path, invoke: Run
    ) -> None:
        (checkpoint_copy / file).write_text(
            json.dumps({**json.loads((checkpoint_copy / file).read_text()), key: value})
        )
        assert note in expect_exit(invoke("convert", str(checkpoint_copy), "--dry-run"), 0)

    def test_a_byte_level_post_processor_adds_neither_bos_nor_eos(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        neither = {"bos": False, "eos": False}
        assert dict(load_vocabulary(folder).add_flags) == neither
        post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "ByteLevel"}]}
        assert dict(load_vocabulary(set_json(folder, "tokenizer.json", post_processor=post)).add_flags) == neither

    @pytest.mark.parametrize(
        "post", [None, {"type": "TemplateProcessing"}, [], 5, {"processors": [5]}, {"type": []}, {"type": {}}]
    )
    def test_an_unknown_post_processor_leaves_bos_and_eos_open(self, post: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post)
        assert dict(load_vocabulary(folder).add_flags) == {}

    @pytest.mark.parametrize(
        ("single", "flags"),
        [
            ([{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], {"bos": True, "eos": False}),
            ([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}], {"bos": False, "eos": True}),
            ([5, None], {"bos": False, "eos": False}),
        ],
    )
    def test_bos_and_eos_follow_the_template_of_the_post_processor(
        self, single: list[Any], flags: dict[str, bool], tmp_path: Path
    ) -> None:
        post = {"type": "TemplateProcessing", "single": single}
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post)
        assert dict(load_vocabulary(folder).add_flags) == flags

    @pytest.mark.parametrize("post", [None, {"single": [{}]}, {"processors": [{"single": [5]}]}])
    def test_add_bos_token_is_read_from_tokenizer_config(self, post: object, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post)
        set_json(folder, "tokenizer_config.json", add_bos_token=True, add_eos_token="no")
        assert dict(load_vocabulary(folder).add_flags) == {"bos": True}
