"""
Converted files are those of llama.cpp's own converter, and token ids those of SentencePiece and Hugging Face's library.

Their programs need torch and transformers: make test-reference
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import UP_PROJ, convert_checkpoint, set_weights
from corpus import lines
from from_gguf import tokenizer_files
from oracle import data_of

from qwenlocal.engine.llama import Model
from qwenlocal.errors import QwenlocalError
from qwenlocal.testing import MOE_CONFIG, write_checkpoint
from qwenlocal.weights import gguf_writer
from qwenlocal.weights.gguf_reader import decode_value, read_header, read_raw_metadata

pytestmark = [pytest.mark.reference, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {**SMALL, "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}
MIXTURE = {**MOE_CONFIG, **QWEN, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
CODE = {**SMALL, "vocab_size": 1280, "bos_token_id": 1, "eos_token_id": 2}
CARD = """---
license: other
license_name: tongyi-qianwen-research
license_link: https://example.org/LICENSE
language: [en, zh]
pipeline_tag: text-generation
tags: [chat]
base_model: [Qwen/Qwen1.5-0.5B]
datasets: [someone/Some-Data]
---
# A model
"""
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def llama_cpp() -> Path:
    """The source of llama.cpp from which set-up compiled it."""
    found = [*ROOT.glob("build/llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py")]
    if not found:
        pytest.skip("llama.cpp's converter is not here: make setup fetches its source")
    return found[-1].parent


@pytest.fixture(autouse=True, scope="module")
def _reference_programs() -> None:
    for name in ("torch", "transformers", "tokenizers", "sentencepiece"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make test-reference installs it")


def convert(source: Path, kind: str, *, like_llama_cpp: bool = True) -> Path:
    return convert_checkpoint(
        source, source.parent / f"ours-{kind}.gguf", kind, threads=2, like_llama_cpp=like_llama_cpp
    )


def convert_as_llama_cpp(source: Path, kind: str) -> Path:
    program, target = llama_cpp() / "convert_hf_to_gguf.py", source.parent / f"theirs-{kind}.gguf"
    done = subprocess.run(
        [sys.executable, str(program), str(source), "--outtype", kind, "--outfile", str(target)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def both(source: Path, kind: str) -> tuple[Path, Path]:
    """Convert with our converter and with llama.cpp's."""
    theirs = convert_as_llama_cpp(source, kind)
    return convert(source, kind), theirs


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    mine, others = data_of(ours), data_of(theirs)
    assert mine.keys() == others.keys()
    assert [name for name in mine if mine[name] != others[name]] == []
    shapes = [{tensor.name: tensor.shape for tensor in read_header(path).tensors} for path in (ours, theirs)]
    assert shapes[0] == shapes[1]


def assert_same_metadata(ours: Path, theirs: Path, *, but: Iterable[str] = ()) -> None:
    """Compare key by key, including the types of values, except for the keys in `but`."""
    mine, others = read_raw_metadata(ours), read_raw_metadata(theirs)
    different = [key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key) and key not in but]
    assert {key: (shown(mine.get(key)), shown(others.get(key))) for key in different} == {}


def shown(value: bytes | None) -> str:
    return "nothing" if value is None else repr(decode_value(value))[:200]


# --- byte-level BPE, with Qwen's own vocabulary


@functools.cache
def qwen_files() -> dict[str, Any]:
    vocabulary = llama_cpp() / "models" / "ggml-vocab-qwen2.gguf"
    if not vocabulary.exists():
        pytest.skip("llama.cpp's source has no vocabulary of Qwen's")
    return {
        **tokenizer_files(vocabulary, sizes=(151643, 151646)),
        "generation_config.json": {"eos_token_id": [151645, 151643], "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    }


def qwen_checkpoint(folder: Path, *, files: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write a checkpoint with a real name, from which the converters derive metadata."""
    path = write_checkpoint(
        folder / "Qwen1.5-0.5B-Chat", **{"config": QWEN, **more}, files=qwen_files() | (files or {})
    )
    (path / "README.md").write_text(CARD, encoding="utf-8")
    return path


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "in three shards": {"shards": 3},
    "with a head of its own for each key": {"config": {**QWEN, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}},
    "tied": {"config": {**QWEN, "tie_word_embeddings": True}},
    "tied, with a stored head": {
        "config": {**QWEN, "tie_word_embeddings": True},
        "store_tied_head": True,
    },
    "bare": {"config": {**QWEN, "architectures": ["Qwen2Model"]}},
    "with linear scaling": {"config": {**QWEN, "rope_scaling": {"type": "linear", "factor": 4.0}}},
    "with yarn": {"config": {**QWEN, "rope_theta": 10000.0, "rope_scaling": YARN}},
    "with rope as transformers 5 writes it": {
        "config": {**QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    },
    "mixture": {"config": MIXTURE},
    "mixture, experts fused": {"config": MIXTURE, "fused_experts": True},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_becomes_the_file_that_llama_cpps_converter_makes(name: str, tmp_path: Path) -> None:
    source = qwen_checkpoint(tmp_path, **CHECKPOINTS[name])
    ours, theirs = both(source, "bf16")
    assert_same_tensors(ours, theirs)
    assert_same_metadata(ours, theirs)


def test_all_metadata_equals_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    """Added tokens of both kinds, several templates, a license, sampling defaults, and the origin."""
    files = qwen_files()
    added = [
        *files["tokenizer.json"]["added_tokens"],
        {**FLAGS, "id": 151646, "content": "<tool_call>", "special": False},
        {**FLAGS, "id": 151647, "content": "<|box|>", "special": False},
    ]
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    source = qwen_checkpoint(
        tmp_path,
        config={**QWEN, "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat", "tie_word_embeddings": True},
        files={
            "tokenizer.json": {**files["tokenizer.json"], "added_tokens": added},
            "tokenizer_config.json": {
                **files["tokenizer_config.json"],
                "added_tokens_decoder": {str(token["id"]): token for token in added},
                "chat_template": templates,
                "add_prefix_space": False,
            },
            "generation_config.json": {"temperature": 1, "top_k": 50, "top_p": 1, "min_p": 0.05},
        },
    )
    ours, theirs = both(source, "bf16")
    assert_same_metadata(ours, theirs)


def test_the_repetition_penalty_is_written_as_by_llama_cpps_converter(tmp_path: Path) -> None:
    source = code_checkpoint(tmp_path, files={"generation_config.json": {"repetition_penalty": 1.1}})
    assert_same_metadata(*both(source, "bf16"))


# --- floats, with a vocabulary of a thousand tokens


# Halves between two numbers of a type, the smallest and the largest that f16 has, and both zeros. What f32 has below
# 1e-37 is left out: processors that convert to bf16 themselves make zeros of it.
EDGES = [
    0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20,
    2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-26, -(2.0**-24), 65504.0, 65519.0, -65504.0, 1e-37, 3.1415927,
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in ("F32", "F16", "BF16") for kind in ("f32", "f16", "bf16", "q8_0")],
)
def test_floats_are_rounded_as_by_llama_cpps_converter(dtype: str, kind: str, tmp_path: Path) -> None:
    source = code_checkpoint(tmp_path, dtype=dtype)
    if dtype == "F32":
        set_weights(source, UP_PROJ, 0, *EDGES, dtype="F32")
    ours, theirs = both(source, kind)
    assert_same_tensors(ours, theirs)
    assert_same_metadata(ours, theirs)


# --- SentencePiece


def train(**options: Any) -> bytes:
    """A SentencePiece model of the corpus, by default as in Llama and CodeQwen."""
    import sentencepiece

    usual = {
        "model_type": "bpe", "vocab_size": 1200, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True,
        "character_coverage": 0.98, "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    text = (line for block in lines(2000) for line in block.split("\n") if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, **{**usual, **options})
    return model.getvalue()


@functools.cache
def pieces() -> bytes:
    return train()


def code_checkpoint(
    folder: Path, *, model: bytes | None = None, files: dict[str, Any] | None = None, dtype: str = "BF16"
) -> Path:
    """A checkpoint with a SentencePiece model in place of Qwen's vocabulary, as CodeQwen1.5."""
    model = pieces() if model is None else model
    usual = {
        "tokenizer.json": None,
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "generation_config.json": None,
    }
    path = write_checkpoint(folder / "CodeQwen1.5-7B", config=CODE, files=usual | (files or {}), dtype=dtype)
    (path / "tokenizer.model").write_bytes(model)
    return path


def read_values(path: Path, key: str) -> list[Any]:
    found: list[Any] = decode_value(read_raw_metadata(path)[f"tokenizer.ggml.{key}"])
    return found


def test_a_sentencepiece_vocabulary_equals_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    source = code_checkpoint(tmp_path, files={"added_tokens.json": {"<repository>": 1200, "<file>": 1201}})
    ours, theirs = both(source, "bf16")
    assert_same_metadata(ours, theirs)
    kinds = read_values(ours, "token_type")
    assert [kinds.count(kind) for kind in (1, 2, 3, 4, 5, 6)] == [941, 1, 2, 2, 78, 256]


def test_added_tokens_of_a_sentencepiece_vocabulary_equal_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", 1200: "<|im_start|>", 1201: "<|im_end|>", 1202: "<fim_prefix>"}
    added = {str(n): {**FLAGS, "content": text, "special": n != 1202} for n, text in tokens.items()}
    source = code_checkpoint(tmp_path, files={"tokenizer_config.json": {"added_tokens_decoder": added}})
    ours, theirs = both(source, "bf16")
    apart = ("scores", "token_type")
    assert_same_metadata(ours, theirs, but=[f"tokenizer.ggml.{key}" for key in apart])
    # Theirs makes <unk> a control token and gives the three a score of -1000; ours keeps what tokenizer.model says.
    for key in apart:
        assert read_values(ours, key)[3:] == read_values(theirs, key)[3:]
    assert read_values(ours, "token_type")[:3] == [2, 3, 3]
    assert read_values(ours, "scores")[:3] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("adds", [(False, False), (True, False), (False, True)])
def test_tokenizer_config_decides_about_bos_and_eos(adds: tuple[bool, bool], tmp_path: Path) -> None:
    """If the file says nothing, llama.cpp begins every text for SentencePiece with <s>."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": adds[0], "add_eos_token": adds[1]}
    source = code_checkpoint(tmp_path, files={"tokenizer_config.json": settings})
    assert_same_metadata(*both(source, "bf16"))


# --- token ids


WHITE_SPACE = [
    "a\n b\n  c\n   d\n    e", "\n", "\n\n\n", "\t\tif x:\n\t\t\treturn 1\n", "two   three    four  ", "x\u00a0y",
    "\u3000全角", "def f(a, b):\n    return a + b  # sum\n", "1  2\t\t3 \n \n",
]  # fmt: skip
OTHERS = [
    "", "a", "12345 67890", "x▁y", "<0x41>", "🙂👍🏽 ok", "e\u0301 é ﬁ ＡＢ", "\U0001f9ff\u0800", "</s", "\x01",
]  # fmt: skip
LEADING = [" ", "  ", "       ", " a", "  a", "   two  words", "\u3000 b", "▁▁x"]
TEXTS = [*lines(2000)[::50], *WHITE_SPACE, *OTHERS]


def ids_of(file: Path, texts: Iterable[str]) -> list[list[int]]:
    model = Model(file)
    try:
        return [model.tokenizer.tokenize(text, special=False) for text in texts]
    finally:
        model.close()


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}], ids=["a space before", "no space before"])
def test_token_ids_are_those_of_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    import sentencepiece

    model, texts = train(**options), [*TEXTS, *LEADING]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    file = convert(code_checkpoint(tmp_path, model=model), "bf16", like_llama_cpp=False)
    assert ids_of(file, texts) == [processor.encode(text) for text in texts]


def test_user_defined_pieces_are_tokenized_as_by_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    model = train(user_defined_symbols=["▁▁", "▁▁▁▁", "\t"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    file = convert(code_checkpoint(tmp_path, model=model), "bf16", like_llama_cpp=False)
    vocabulary = Model(file).tokenizer
    for text in ("a  b    c", "x\ty", "\tz", "def f():\n    return 1"):
        ids = vocabulary.tokenize(text, special=False)
        assert ids == processor.encode(text)
        assert b"".join(vocabulary.piece(number) for number in ids).decode() == f" {text}"


@pytest.mark.parametrize(
    "options",
    [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}],
    ids=lambda options: next(iter(options)),
)
def test_a_sentencepiece_model_that_llama_cpp_would_read_differently_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """llama.cpp merges by score and changes nothing but spaces."""
    source = code_checkpoint(tmp_path, model=train(**options))
    with pytest.raises(QwenlocalError):
        convert(source, "bf16")


@functools.cache
def hugging_faces_tokenizer() -> dict[str, Any]:
    """tokenizer.json as transformers makes it of a SentencePiece model."""
    import tempfile

    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(pieces())
        Path(folder, "config.json").write_text('{"model_type": "llama"}')
        LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
        found: dict[str, Any] = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))
    assert found["model"]["byte_fallback"]
    return found


Change = Callable[[dict[str, Any]], dict[str, Any]]


def as_transformers_5(found: dict[str, Any]) -> dict[str, Any]:
    assert found["pre_tokenizer"]["type"] == "Metaspace"
    return found


def as_transformers_4(found: dict[str, Any]) -> dict[str, Any]:
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {**found, "pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}


def without_a_space_before(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "pre_tokenizer": {**found["pre_tokenizer"], "prepend_scheme": "never"}}


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        # That of transformers 5 puts no space before a text that begins with one; llama.cpp, as SentencePiece, does.
        (as_transformers_5, TEXTS),
        (as_transformers_4, [*TEXTS, *LEADING]),
        (without_a_space_before, [*TEXTS, *LEADING]),
    ],
    ids=["as transformers 5", "as transformers 4", "without a space before"],
)
def test_token_ids_of_a_tokenizer_json_with_byte_fallback_are_those_of_tokenizers(
    change: Change, texts: list[str], tmp_path: Path
) -> None:
    document = change(hugging_faces_tokenizer())
    import tokenizers

    real = tokenizers.Tokenizer.from_str(json.dumps(document))
    source = code_checkpoint(tmp_path, files={"tokenizer.json": document})
    (source / "tokenizer.model").unlink()
    expected = [real.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids_of(convert(source, "bf16", like_llama_cpp=False), texts) == expected


@pytest.mark.parametrize("first", [[], [{"SpecialToken": {"id": "<s>", "type_id": 0}}]], ids=["no", "yes"])
def test_the_post_processor_of_tokenizer_json_decides_about_bos(first: list[Any], tmp_path: Path) -> None:
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}} if first else {}
    document = {**hugging_faces_tokenizer(), "post_processor": {**template, "special_tokens": special}}
    source = code_checkpoint(tmp_path, files={"tokenizer.json": document})
    (source / "tokenizer.model").unlink()
    pairs = read_raw_metadata(convert(source, "bf16", like_llama_cpp=False))
    assert pairs.get("tokenizer.ggml.add_bos_token") == gguf_writer.boolean(bool(first))
