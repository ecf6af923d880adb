"""tokenizer.json, tokenizer_config.json, vocab.json and merges.txt: vocabulary, merges, added and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import VOCAB_SIZE, load_vocab, load_vocabulary, make_plan, set_bpe_model, set_json, write_minimal
from commands import expect_exit
from conftest import Run

from qwenlocal.errors import BadCheckpoint, BadWeights, UnsupportedCheckpoint
from qwenlocal.testing import SPECIALS
from qwenlocal.weights.gguf_reader import CONTROL, UNUSED, USER_DEFINED


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

    def write_slow_tokenizer(self, folder: Path, **settings: Any) -> Path:
        """The files of a slow tokenizer, as older trainers write them: no list of added tokens in the settings."""
        checkpoint = self.write_vocab_and_merges(folder)
        set_json(
            checkpoint, "added_tokens.json", **{token: 258 + n for n, token in enumerate(SPECIALS)}, **{"<x>": 261}
        )
        roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        set_json(
            checkpoint, "special_tokens_map.json", **roles, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
        )
        return set_json(checkpoint, "tokenizer_config.json", added_tokens_decoder=..., **settings)

    def test_added_tokens_json_completes_a_slow_tokenizer(self, tmp_path: Path) -> None:
        vocabulary = load_vocabulary(self.write_slow_tokenizer(tmp_path))
        assert vocabulary.tokens[258:263] == [*SPECIALS, "<x>", "[PAD262]"]
        assert vocabulary.token_types[258:263] == [CONTROL, CONTROL, CONTROL, USER_DEFINED, UNUSED]
        assert vocabulary.special == {"bos": 258, "eos": 260, "unk": 258, "pad": 258, "eot": 260}
        assert vocabulary.notes == []

    @pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
    def test_special_tokens_without_a_role_are_control_tokens(self, key: str, tmp_path: Path) -> None:
        folder = self.write_slow_tokenizer(tmp_path, **{key: ["<x>"]})
        assert load_vocabulary(folder).token_types[261] == CONTROL
        set_json(folder, "special_tokens_map.json", **{key: [{"content": "<y>", "lstrip": False}]})
        set_json(folder, "added_tokens.json", **{"<y>": 262})
        assert load_vocabulary(folder).token_types[261:263] == [CONTROL, CONTROL]

    def test_roles_in_special_tokens_map_take_precedence_over_old_settings(self, tmp_path: Path) -> None:
        folder = self.write_slow_tokenizer(tmp_path, eos_token="<|endoftext|>")
        assert load_vocabulary(folder).special["eos"] == 260
        set_json(folder, "special_tokens_map.json", eos_token={"content": "<|endoftext|>", "special": True})
        assert load_vocabulary(folder).special["eos"] == 258

    def test_newer_settings_take_precedence_over_both_files(self, tmp_path: Path) -> None:
        decoder = {str(258 + n): {"content": token, "special": True} for n, token in enumerate(SPECIALS)}
        folder = self.write_slow_tokenizer(tmp_path)
        set_json(folder, "tokenizer_config.json", added_tokens_decoder=decoder, eos_token="<|endoftext|>")
        vocabulary = load_vocabulary(folder)
        assert (vocabulary.tokens[261], vocabulary.special["eos"]) == ("[PAD261]", 258)

    def test_a_tokenizer_json_is_completed_in_the_same_way(self, tmp_path: Path) -> None:
        folder = write_minimal(tmp_path)
        set_json(folder, "tokenizer.json", added_tokens=[])
        set_json(folder, "tokenizer_config.json", added_tokens_decoder=...)
        with pytest.raises(BadCheckpoint, match=r"its eos_token, '<\|im_end\|>', is not a token") as caught:
            load_vocabulary(folder)
        assert "Copy the tokenizer files of its base model" in caught.value.hint
        set_json(folder, "added_tokens.json", **{token: 258 + n for n, token in enumerate(SPECIALS)})
        assert load_vocabulary(folder).special["eos"] == 260

    def test_a_missing_end_names_the_file_that_has_it(self, tmp_path: Path) -> None:
        folder = self.write_slow_tokenizer(tmp_path)
        (folder / "added_tokens.json").unlink()
        with pytest.raises(BadCheckpoint, match=r"special_tokens_map\.json: its eos_token"):
            load_vocabulary(folder)

    def test_the_end_of_text_is_appended_to_text_alone(self, tmp_path: Path) -> None:
        """As by Qwen2Tokenizer: Qwen1.5's vocab.json has 151,643 tokens, and `<|endoftext|>` the id after them."""
        folder = self.write_vocab_and_merges(tmp_path)
        set_json(folder, "tokenizer_config.json", added_tokens_decoder=..., eos_token="<|endoftext|>")
        vocabulary = load_vocabulary(folder)
        assert (vocabulary.tokens[258], vocabulary.token_types[258]) == ("<|endoftext|>", CONTROL)
        assert vocabulary.special["eos"] == 258

    @pytest.mark.parametrize("value", [[], 5, "x"])
    def test_malformed_files_are_refused(self, value: Any, tmp_path: Path) -> None:
        for name in ("added_tokens.json", "special_tokens_map.json"):
            folder = self.write_slow_tokenizer(tmp_path / name)
            (folder / name).write_text(json.dumps(value))
            with pytest.raises(BadCheckpoint, match=name):
                load_vocabulary(folder)
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", added_tokens_decoder=value)
        with pytest.raises(BadCheckpoint, match="added_tokens_decoder"):
            load_vocabulary(folder)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
    @pytest.mark.parametrize(
        ("number", "reason"), [("x", "is malformed"), (-1, "is malformed"), (999, "the embeddings have only 288 rows")]
    )
    def test_a_bad_added_token_is_blamed_on_its_file(
        self, number: object, reason: str, name: str, tmp_path: Path
    ) -> None:
        values = {
            "tokenizer.json": {"added_tokens": [{"id": number, "content": "<z>"}]},
            "tokenizer_config.json": {"added_tokens_decoder": {str(number): {"content": "<z>"}}},
            "added_tokens.json": {"<z>": number},
        }
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", added_tokens_decoder=...)
        with pytest.raises(BadCheckpoint, match=reason) as caught:
            load_vocabulary(set_json(folder, name, **values[name]))
        assert caught.value.path == str(folder / name)

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
                "pad_token",
                "<nope>",
                "Ignored pad_token in tokenizer_config.json: '<nope>' is not a token",
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

    def test_without_a_post_processor_bos_and_eos_stay_open(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=None)
        assert dict(load_vocabulary(folder).add_flags) == {}

    @pytest.mark.parametrize(
        "post",
        [[], 5, {"processors": [5]}, {"type": []}, {"type": {}}, {"single": [{}]}, {"type": "RobertaProcessing"},
         {"type": "Sequence", "processors": [{"type": "BertProcessing"}]}],
    )  # fmt: skip
    def test_an_unknown_post_processor_is_refused(self, post: object, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedCheckpoint, match="it changes tokens after tokenizing"):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post))

    @pytest.mark.parametrize(
        ("single", "flags"),
        [
            ([{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}], {"bos": True, "eos": False}),
            ([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_end|>"}}], {"bos": False, "eos": True}),
            ([{"Sequence": {"id": "A"}}], {"bos": False, "eos": False}),
        ],
    )
    def test_bos_and_eos_follow_the_template_of_the_post_processor(
        self, single: list[Any], flags: dict[str, bool], tmp_path: Path
    ) -> None:
        post = {"type": "TemplateProcessing", "single": single}
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post)
        set_json(folder, "config.json", bos_token_id=...)
        vocabulary = load_vocabulary(folder)
        assert dict(vocabulary.add_flags) == flags
        assert vocabulary.special.get("bos") == (258 if flags["bos"] else None)

    @pytest.mark.parametrize(
        ("single", "reason"),
        [
            (None, "its post-processor is malformed"),
            ([5, None], "its post-processor contains 5, which is malformed"),
            ([{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}], "adds “<s>”, which is not a token"),
            ([{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|endoftext|>"}}], "but the eos token is"),
            ([{"SpecialToken": {"id": "a"}}, {"SpecialToken": {"id": "b"}}, {"Sequence": {"id": "A"}}],
             "it adds several tokens to a text"),
        ],
    )  # fmt: skip
    def test_other_templates_are_refused(self, single: Any, reason: str, tmp_path: Path) -> None:
        post = {"type": "TemplateProcessing", "single": single}
        with pytest.raises(BadWeights, match=reason):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=post))

    def test_add_bos_token_is_read_from_tokenizer_config(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", post_processor=None)
        set_json(folder, "tokenizer_config.json", add_bos_token=True, add_eos_token="no")
        assert dict(load_vocabulary(folder).add_flags) == {"bos": True}

    def test_an_end_of_text_that_is_no_token_is_refused(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", eos_token="<nope>")
        with pytest.raises(BadCheckpoint, match=r"tokenizer_config\.json: its eos_token, '<nope>', is not a token"):
            load_vocabulary(folder)

    def test_the_id_of_padding_is_not_an_end(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", eos_token_id=270)
        assert load_vocabulary(folder).special["eos"] == 260
        set_json(folder, "tokenizer.json", added_tokens=[])
        set_json(folder, "tokenizer_config.json", eos_token=..., pad_token=..., added_tokens_decoder={})
        with pytest.raises(BadCheckpoint, match=r"config\.json: its eos_token_id is not the id of a token"):
            load_vocabulary(folder)

    def test_a_list_of_ends_in_config_is_read(self, tmp_path: Path) -> None:
        folder = set_json(write_minimal(tmp_path), "config.json", eos_token_id=[258, 65])
        set_json(folder, "tokenizer_config.json", eos_token=...)
        (folder / "generation_config.json").unlink()
        special = load_vocabulary(folder).special
        assert (special["eos"], special["eot"], special["eom"]) == (258, 260, 65)


class TestFlagsOfAddedTokens:
    """What the tokenizers do with added tokens, and llama.cpp does not."""

    @pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
    @pytest.mark.parametrize("special", [True, False])
    def test_a_flag_is_refused_in_either_file(self, flag: str, special: bool, tmp_path: Path) -> None:
        entry = {"content": "<MASK>", flag: True, "special": special}
        one = set_json(write_minimal(tmp_path / "1"), "tokenizer.json", added_tokens=[{"id": 270, **entry}])
        other = set_json(write_minimal(tmp_path / "2"), "tokenizer_config.json", added_tokens_decoder={"270": entry})
        for folder in (one, other):
            with pytest.raises(UnsupportedCheckpoint, match=f"“<MASK>”.* \\({flag}\\), which llama.cpp does not") as no:
                load_vocabulary(folder)
            assert f'set "{flag}"' in no.value.hint

    @pytest.mark.parametrize("flags", [(True, False), (False, True)])
    def test_a_flag_is_refused_if_the_files_contradict_each_other(
        self, flags: tuple[bool, bool], tmp_path: Path
    ) -> None:
        one, other = ({"id": 270, "content": "<MASK>", "special": True, "lstrip": flag} for flag in flags)
        folder = set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=[one])
        set_json(folder, "tokenizer_config.json", added_tokens_decoder={"270": other})
        with pytest.raises(UnsupportedCheckpoint, match=r"“<MASK>” \(lstrip\)"):
            load_vocabulary(folder)

    def test_a_token_that_no_text_contains_is_refused(self, tmp_path: Path) -> None:
        entries = [{"id": 270, "content": "e\u0301"}]
        with pytest.raises(UnsupportedCheckpoint, match="texts are composed"):
            load_vocabulary(set_json(write_minimal(tmp_path), "tokenizer.json", added_tokens=entries))

    def test_verify_refuses_a_flag(self, checkpoint_copy: Path, tiny_f32: Path, invoke: Run) -> None:
        entry = {"id": 270, "content": "<MASK>", "lstrip": True}
        set_json(checkpoint_copy, "tokenizer.json", added_tokens=[entry])
        error = expect_exit(invoke("verify", str(tiny_f32), "--against", str(checkpoint_copy)), 5)
        assert "removes the spaces before “<MASK>” (lstrip)" in error


def test_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    folder = set_json(write_minimal(tmp_path), "tokenizer_config.json", add_prefix_space=True)
    with pytest.raises(UnsupportedCheckpoint, match="a space before every text"):
        load_vocabulary(folder)


def test_settings_without_effect_on_prompts_are_accepted(tmp_path: Path) -> None:
    folder = write_minimal(tmp_path)
    expected = load_vocabulary(folder)
    set_json(folder, "tokenizer.json", truncation={"max_length": 5}, padding={"strategy": "BatchLongest"}, version="9")
    set_json(folder, "tokenizer_config.json", split_special_tokens=True, model_max_length=5, errors="replace")
    assert load_vocabulary(folder) == expected


@pytest.mark.parametrize(("normalizer", "pre"), [(None, "qwen2"), ({"type": "NFC"}, "deepseek-r1-qwen")])
def test_a_difference_in_composing_characters_is_noted(normalizer: Any, pre: str, tmp_path: Path) -> None:
    folder = set_json(write_minimal(tmp_path), "tokenizer.json", normalizer=normalizer)
    (note,) = load_vocabulary(folder, pre=pre).notes
    assert "NFC" in note
