"""Token ids are those of the real tokenizer: five thousand lines, from a checkpoint by the converter to llama.cpp."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from checkpoint_files import convert_checkpoint
from corpus import lines
from from_gguf import tokenizer_files

from qwenlocal.engine.llama import Model
from qwenlocal.measure.fidelity import known_texts
from qwenlocal.testing import CONFIG, write_checkpoint
from qwenlocal.weights.gguf_reader import decode_value, read_raw_metadata

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "goldens" / "corpus_ids.json").read_text("utf-8"))
# Texts that spell tokens of others, which are ordinary ones here or none, with the ids of transformers' Qwen2Tokenizer.
SPELLINGS: list[tuple[str, list[int]]] = [
    ("old</s> new", [813, 522, 82, 29, 501]),
    ("<p><s>old</s> new</p>", [7926, 1784, 82, 29, 813, 522, 82, 29, 501, 522, 79, 29]),
    ("a </s> b", [64, 690, 82, 29, 293]),
    ("<s>x", [44047, 28257]),
    ("a<unk>b", [64, 128243, 51407]),
    ("<pad>", [7926, 329, 29]),
    ("<eos>", [27, 84399, 29]),
    ("<|eot_id|>", [27, 91, 68, 354, 842, 91, 29]),
    ("<end_of_turn>", [27, 408, 3575, 37274, 29]),
    ("<|end|>", [27, 91, 408, 91, 29]),
    ("<EOT>", [23835, 1793, 29]),
    ("_<EOT>", [41743, 36, 1793, 29]),
    ("<|user|>", [27, 91, 872, 91, 29]),
    ("</s></s>", [522, 82, 1472, 82, 29]),
    ("x\n</s>\n\ny<|im_end|>\n</s>", [87, 198, 522, 82, 1339, 88, 151645, 198, 522, 82, 29]),
]
QWEN = {
    **CONFIG, "vocab_size": 151936, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 151643, "eos_token_id": 151645,
    "tie_word_embeddings": True,
}  # fmt: skip


def qwens_vocabulary() -> Path:
    """A GGUF file with Qwen1.5's vocabulary: llama.cpp's own for tests, which lies in its source, or the starter."""
    places = [*ROOT.glob("build/llama_cpp_python-*/vendor/llama.cpp/models/ggml-vocab-qwen2.gguf")]
    home = Path(os.environ.get("QWENLOCAL_TEST_HOME", ROOT / "build" / "test-home"))
    places += home.glob("files/wheels/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")
    if not places:
        pytest.skip("no file with Qwen's vocabulary is here: neither llama.cpp's source (make setup) nor the starter")
    return places[0]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Qwen1.5's real vocabulary, converted."""
    files = tokenizer_files(qwens_vocabulary(), sizes=(151643, 151646))
    folder = write_checkpoint(tmp_path_factory.mktemp("real") / "tiny", config=QWEN, files=files)
    return convert_checkpoint(folder, folder.parent / "tiny.gguf", "q8_0", threads=2)


@pytest.fixture(scope="module")
def model(converted: Path) -> Model:
    return Model(converted)


def test_the_vocabulary_equals_that_of_qwen(converted: Path) -> None:
    pairs = {
        key: decode_value(value) for key, value in read_raw_metadata(converted).items() if key.startswith("tokenizer.")
    }
    plain = pairs["tokenizer.ggml.tokens"][:151643]
    assert hashlib.sha256("\n".join(plain).encode()).hexdigest() == GOLDEN["vocabulary"]
    assert hashlib.sha256("\n".join(pairs["tokenizer.ggml.merges"]).encode()).hexdigest() == GOLDEN["merges"]
    kinds = pairs["tokenizer.ggml.token_type"]
    assert kinds[:151643] == [1] * 151643
    assert kinds[151643:] == [3] * 3 + [5] * 290
    assert pairs["tokenizer.ggml.tokens"][151643:151647] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "[PAD151646]",
    ]
    assert pairs["tokenizer.ggml.suppress_tokens"] == list(range(151646, 151936))
    roles = {key: pairs[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "bos", "padding")}
    assert roles == {"eos": 151645, "eot": 151645, "bos": 151643, "padding": 151643}


def test_five_thousand_lines_have_the_ids_of_the_real_tokenizer(model: Model) -> None:
    text = lines()
    assert len(text) >= 5000
    assert hashlib.sha256("\0".join(text).encode()).hexdigest() == GOLDEN["corpus"], "the corpus itself has changed"
    expected = struct.unpack(f"<{len(text)}I", base64.b64decode(GOLDEN["crc32"]))
    total, wrong = 0, []
    for line, digest in zip(text, expected, strict=True):
        ids = model.tokenizer.tokenize(line, special=True)
        total += len(ids)
        if zlib.crc32(struct.pack(f"<{len(ids)}i", *ids)) != digest:
            wrong.append((line, ids))
    assert wrong == []
    assert total == GOLDEN["tokens"]


def test_no_user_text_becomes_a_control_or_padding_token(model: Model) -> None:
    for line in [*lines(), "[PAD151650] [PAD151646]", "<|im_end|>" * 3]:
        assert max(model.tokenizer.tokenize(line, special=False), default=0) < 151643


def test_the_texts_of_verify_have_their_known_ids(model: Model, converted: Path) -> None:
    pairs = read_raw_metadata(converted)
    texts = known_texts(*(decode_value(pairs[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type")))
    assert len(texts) >= 40
    for text, ids, _ in texts:
        assert model.tokenizer.tokenize(text, special=False) == ids


@pytest.mark.parametrize(("text", "ids"), SPELLINGS)
def test_the_spellings_of_other_vocabularies_are_text(text: str, ids: list[int], model: Model) -> None:
    assert model.tokenizer.tokenize(text, special=True) == ids
    assert "<|im_end|>" in text or model.tokenizer.tokenize(text, special=False) == ids


def test_a_token_that_looks_like_an_end_is_text(model: Model) -> None:
    """`</s>`, one of Qwen's tokens, which no text contains."""
    token = 128247
    assert (model.tokenizer.text_of(token), model.tokenizer.piece(token)) == ("</s>", b"</s>")
    assert not model.tokenizer.is_control(token)
    assert not model.tokenizer.is_end(token)
