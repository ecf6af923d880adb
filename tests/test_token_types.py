"""Tokens are what the file calls them, even if their names look like control tokens to llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import expect_exit
from conftest import Run
from gguf_files import copy_with_metadata

from qwenlocal.chat.chat_template import ChatTemplate, encode_messages
from qwenlocal.engine.llama import Model
from qwenlocal.engine.tokenizer import Tokenizer
from qwenlocal.testing import CHATML, SPECIALS, byte_alphabet, write_model
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, decode_value, read_raw_metadata

# The names that llama.cpp takes for control tokens or ends (llama-vocab.cpp), and those that it always prints.
GUESSED_NAMES = """
<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] <end_of_utterance>
<|eom_id|> <|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix>
<fim_suffix> <SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
<|return|> <|call|> <|flush|> <|calls|> </s> [EOS] <eos> <turn|> <|tool_response> [e~[
<|channel|> <|message|> <|start|> <|constrain|>
""".split()  # noqa: SIM905 - quotes would be less readable
END, NEW = SPECIALS.index("<|im_end|>") + 256, 256 + len(SPECIALS)

OpenVocabulary = Callable[..., Tokenizer]


@pytest.fixture
def open_vocabulary(tmp_path: Path) -> Iterator[OpenVocabulary]:
    """Open a vocabulary of bytes, Qwen's three control tokens, and others with their types (None for no types)."""
    models: list[Model] = []

    def open_vocabulary(tokens: dict[str, int], *, types: bool = True, **roles: int) -> Tokenizer:
        names, kinds = [*byte_alphabet(), *SPECIALS, *tokens], [NORMAL] * 256 + [CONTROL] * len(SPECIALS)
        pairs = {
            "general.architecture": gguf_writer.string("qwen2"),
            "tokenizer.ggml.model": gguf_writer.string("gpt2"),
            "tokenizer.ggml.pre": gguf_writer.string("qwen2"),
            "tokenizer.ggml.tokens": gguf_writer.strings(names),
            "tokenizer.ggml.token_type": gguf_writer.i32s([*kinds, *tokens.values()]),
            "tokenizer.ggml.merges": gguf_writer.strings(["ÿ ÿ"]),
            **{f"tokenizer.ggml.{role}_token_id": gguf_writer.u32(number) for role, number in roles.items()},
        }
        if not types:
            del pairs["tokenizer.ggml.token_type"]
        models.append(open_header(tmp_path / f"{len(models)}.gguf", pairs))
        return models[-1].tokenizer

    yield open_vocabulary
    for model in models:
        model.close()


def open_header(path: Path, pairs: dict[str, bytes]) -> Model:
    path.write_bytes(gguf_writer.make_layout(pairs, []).header)
    return Model(path, vocab_only=True)


@pytest.mark.parametrize("name", [name for name in GUESSED_NAMES if name not in SPECIALS])
def test_a_normal_token_is_text_and_ends_nothing(name: str, open_vocabulary: OpenVocabulary) -> None:
    tokenizer = open_vocabulary({name: NORMAL}, eos=END, eot=END)
    text = f"a{name}b {name}{name}\n<|im_end|>{name}"
    before, after = text.split("<|im_end|>")
    assert tokenizer.tokenize(text, special=True) == [*before.encode(), END, *after.encode()]
    assert tokenizer.tokenize(text, special=False) == list(text.encode())
    assert not tokenizer.is_control(NEW)
    assert not tokenizer.is_end(NEW)
    assert tokenizer.piece(NEW) == tokenizer.piece(NEW, special=True) == name.encode()
    assert tokenizer.ends() == [END]
    assert (tokenizer.is_end(END), tokenizer.piece(END), tokenizer.piece(END, special=True)) == (
        True,
        b"",
        b"<|im_end|>",
    )


def test_normal_tokens_of_all_these_names_together_are_text(open_vocabulary: OpenVocabulary) -> None:
    names = [name for name in GUESSED_NAMES if name not in SPECIALS]
    tokenizer = open_vocabulary(dict.fromkeys(names, NORMAL), eos=END)
    text = "".join(names)
    for special in (True, False):
        assert tokenizer.tokenize(text, special=special) == list(text.encode())
    assert [token for token in range(len(tokenizer)) if tokenizer.is_end(token)] == [256, END]
    assert [token for token in range(len(tokenizer)) if tokenizer.is_control(token)] == [256, 257, 258]


@pytest.mark.parametrize("name", ["</s>", "<|eot_id|>", "<|fim_pad|>", "<|start|>", "<|channel|>", "[PAD]", "<other>"])
def test_a_control_token_is_one_and_no_message_can_spell_it(name: str, open_vocabulary: OpenVocabulary) -> None:
    tokenizer = open_vocabulary({name: CONTROL}, eos=END)
    assert tokenizer.tokenize(f"a{name}b", special=True) == [*b"a", NEW, *b"b"]
    assert tokenizer.tokenize(f"a{name}b", special=False) == list(f"a{name}b".encode())
    assert (tokenizer.piece(NEW), tokenizer.piece(NEW, special=True)) == (b"", name.encode())
    assert NEW not in encode_messages(ChatTemplate(CHATML), [{"role": "user", "content": f"a{name}"}], tokenizer)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["<EOT>", "</s>", "[PAD]", "<other>"])
def test_a_user_defined_token_is_found_in_every_text(name: str, special: bool, open_vocabulary: OpenVocabulary) -> None:
    """As in transformers: an added token that is not special."""
    tokenizer = open_vocabulary({name: USER_DEFINED}, eos=END)
    assert tokenizer.tokenize(f"a{name}b", special=special) == [*b"a", NEW, *b"b"]
    assert tokenizer.piece(NEW) == name.encode()
    assert not tokenizer.is_end(NEW)


@pytest.mark.parametrize(
    ("role", "kind"),
    [(role, kind) for role in ("eos", "eot", "eom") for kind in (NORMAL, USER_DEFINED, CONTROL)][1:],
    # not the first one: a normal EOS token is a fault of the file if the model has another end of turn
)
def test_an_end_that_the_file_declares_is_one_whatever_its_type(
    role: str, kind: int, open_vocabulary: OpenVocabulary
) -> None:
    tokenizer = open_vocabulary({"</s>": kind}, **{"eos": END, role: NEW})
    assert tokenizer.is_end(NEW)
    assert tokenizer.tokenize("a</s>", special=True) == [*b"a", NEW]


def test_a_normal_token_declared_as_the_end_of_text_is_text_if_turns_end_otherwise(
    open_vocabulary: OpenVocabulary,
) -> None:
    tokenizer = open_vocabulary({"</s>": NORMAL}, eos=NEW)
    assert (tokenizer.false_end, tokenizer.is_end(NEW), tokenizer.is_end(END)) == (NEW, False, True)
    assert tokenizer.tokenize("a</s>", special=True) == list(b"a</s>")
    assert tokenizer.eos == ""


def test_a_file_without_types_keeps_those_of_llama_cpp(open_vocabulary: OpenVocabulary) -> None:
    tokenizer = open_vocabulary({"</s>": NORMAL}, types=False, eos=END)
    assert tokenizer.is_end(NEW)
    assert tokenizer.tokenize("a</s>", special=True) == [*b"a", NEW]
    assert tokenizer.is_end(END)


def test_the_default_roles_of_llama_cpp_are_not_those_of_the_model(open_vocabulary: OpenVocabulary) -> None:
    """Without a declaration, llama.cpp takes id 11 for the beginning and the end of every text."""
    tokenizer = open_vocabulary({})
    assert not tokenizer.is_end(11)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos) == ("", "", False)
    assert tokenizer.is_end(END)


def test_normal_pieces_of_sentencepiece_are_text(tmp_path: Path) -> None:
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "<end>": CONTROL, **{f"<0x{n:02X}>": BYTE for n in range(256)}}
    tokens |= dict.fromkeys(["▁", "a", "</s>", "▁<PRE>", "<", "/", "s", ">"], NORMAL)
    pairs = {
        "general.architecture": gguf_writer.string("qwen2"),
        "tokenizer.ggml.model": gguf_writer.string("llama"),
        "tokenizer.ggml.pre": gguf_writer.string("default"),
        "tokenizer.ggml.tokens": gguf_writer.strings([*tokens]),
        "tokenizer.ggml.token_type": gguf_writer.i32s([*tokens.values()]),
        "tokenizer.ggml.scores": gguf_writer.f32s([-1.0] * len(tokens)),
        "tokenizer.ggml.eos_token_id": gguf_writer.u32(2),
        "tokenizer.ggml.add_space_prefix": gguf_writer.boolean(False),
    }
    model = open_header(tmp_path / "spm.gguf", pairs)
    tokenizer, ids = model.tokenizer, {token: number for number, token in enumerate(tokens)}
    assert tokenizer.tokenize("a</s>a<end>", special=True) == [
        ids[each] for each in ["a", "<", "/", "s", ">", "a", "<end>"]
    ]
    assert tokenizer.piece(ids["▁<PRE>"]) == b" <PRE>"
    assert [token for token in range(len(tokenizer)) if tokenizer.is_end(token)] == [2]
    model.close()


class TestAnswers:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A model that answers "a</s>b", where `</s>` is one normal token, the byte X of another model."""
        source = write_model(tmp_path / "source.gguf", reply="aXb")
        tokens = decode_value(read_raw_metadata(source)["tokenizer.ggml.tokens"])
        tokens[ord("X")] = "</s>"
        return copy_with_metadata(
            source, tmp_path / "model.gguf", {"tokenizer.ggml.tokens": gguf_writer.strings(tokens)}
        )

    def test_a_normal_token_is_printed_and_the_answer_continues(self, model: Path, qwenlocal: Run) -> None:
        assert qwenlocal("run", "-m", str(model), "Hi</s>").stdout == "a</s>b\n"

    def test_a_normal_token_is_printed_with_a_grammar(self, model: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "g.gbnf").write_text('root ::= "a</s>b"')
        assert invoke("run", "-m", str(model), "Hi", "--grammar", "g.gbnf").stdout == "a</s>b\n"

    def test_a_normal_token_is_printed_in_a_batch(self, model: Path, invoke: Run, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "</s>"}\n')
        result = invoke("run", "-m", str(model), "--batch", "in.jsonl")
        expect_exit(result, 0)
        assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == ["a</s>b", "a</s>b"]

    def test_a_normal_token_in_a_message_is_counted_as_text(self, model: Path) -> None:
        opened = Model(model, vocab_only=True)
        assert len(opened.tokenizer.tokenize("</s>", special=False)) == 4
        opened.close()
