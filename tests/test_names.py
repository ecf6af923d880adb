"""The catalogue, and what people type to name a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import BadCatalog, BadWeights, ModelNotFound
from qwenlocal.library.catalog import Catalog
from qwenlocal.library.names import CatalogName, HubName, LocalCheckpointName, PathName, UrlName, level_of, parse
from qwenlocal.paths import shipped

CATALOGUE = Catalog.read(shipped("models"))
FAMILY = 'name = "x"\ntitle = "X"\ndefault = "1b"\nlevel = "q4_0"\n'


# --- the catalogue itself


@pytest.mark.parametrize("size", ["0.5b", "1.8b", "4b", "7b", "14b", "32b", "72b", "110b", "moe"])
def test_every_size_of_qwen15_is_there_as_chat_and_base(size: str) -> None:
    chat, base = CATALOGUE.card(f"qwen1.5:{size}-chat"), CATALOGUE.card(f"qwen1.5:{size}-base")
    assert chat
    assert base
    assert base.gguf is None
    assert (chat.gguf is None) == (size == "moe")
    assert chat.licence
    assert chat.kv_bytes_per_token
    assert chat.context == (8192 if size == "moe" else 32768)


def test_every_known_file_belongs_to_its_cards_level_list() -> None:
    for card in CATALOGUE.cards:
        for file in card.files:
            assert level_of(file.path), file.path
            assert file.size > 1e7


def test_names_of_cards_lead_back_to_them() -> None:
    for card in CATALOGUE.cards:
        assert parse(card.name, lambda: CATALOGUE) == CatalogName(card)
        assert parse(str(CatalogName(card)), lambda: CATALOGUE).card == card  # type: ignore[union-attr]


def test_the_kv_cache_of_the_half_billion_model_takes_192_mib_for_2048_tokens() -> None:
    assert CATALOGUE.default.kv_bytes_per_token == 192 * 2**20 / 2048


def test_the_default_is_the_smallest_chat_model_and_the_starter_comes_in_wheels() -> None:
    assert CATALOGUE.default.name == "qwen1.5:0.5b-chat"
    assert CATALOGUE.starter.files[0].wheels


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = [", "cannot be read"),
        ('name = "x"', "“title” is missing"),
        ('name = "X!"\ntitle = "X"', "“name” has the wrong form"),
        (FAMILY + "context = 1\nsurprise = 2", "unknown: surprise"),
        (FAMILY + 'context = "big"', "“context” should be a int"),
        (FAMILY + "context = 1", "no chat model of the default size"),
        (
            FAMILY + 'context = 1\n[[size]]\nname = "1b"\nlicence = "l"\n'
            'chat = "o/r"\n[[size.file]]\npath = "x-q4_0.gguf"\nsize = 1\nsha256 = "short"',
            "size 1, file 1: “sha256” has the wrong form",
        ),
    ],
)
def test_a_mistake_in_the_catalogue_is_named_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadCatalog, match=re.escape(problem)) as caught:
        Catalog.read(tmp_path)
    assert str(tmp_path / "x.toml") in str(caught.value)


def test_a_catalogue_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadCatalog, match="cannot be read"):
        Catalog.read(tmp_path)
    with pytest.raises(BadCatalog, match="not there"):
        Catalog.read(tmp_path / "nothing")


# --- names


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("qwen1.5", "qwen1.5:0.5b-chat-q4_k_m"),
        ("qwen1.5:7b", "qwen1.5:7b-chat-q4_k_m"),
        ("qwen1.5:7b-base", "qwen1.5:7b-base-q4_k_m"),
        ("qwen1.5:7b-chat-q5_k_m", "qwen1.5:7b-chat-q5_k_m"),
        ("qwen1.5:moe", "qwen1.5:moe-chat-q4_k_m"),
        ("qwen15:7b", "qwen1.5:7b-chat-q4_k_m"),
        ("codeqwen1.5", "codeqwen1.5"),
        ("starter", "starter"),
        ("smollm2", "smollm2"),
        ("QWEN1.5:14B", "qwen1.5:14b-chat-q4_k_m"),
        ("Qwen1.5-7B-Chat-Q5_K_M", "qwen1.5:7b-chat-q5_k_m"),
        ("qwen 1.5 7b", "qwen1.5:7b-chat-q4_k_m"),
        ("qwen1_5-0_5b-chat-q4_k_m.gguf", "qwen1.5:0.5b-chat-q4_k_m"),
        ("qwen1.5:1.8b-q8_0", "qwen1.5:1.8b-chat-q8_0"),
        ("hf:owner/repo", "hf:owner/repo"),
        ("hf:owner/repo:Q4_0", "hf:owner/repo:q4_0"),
        ("hf:owner/repo@v1:q4_0", "hf:owner/repo@v1:q4_0"),
        ("hf:owner/repo/folder/file.gguf", "hf:owner/repo/folder/file.gguf"),
        ("ms:owner/repo", "ms:owner/repo"),
        ("owner/repo", "hf:owner/repo"),
        ("https://huggingface.co/o/r/blob/main/x.gguf", "hf:o/r@main/x.gguf"),
        ("https://huggingface.co/o/r", "hf:o/r"),
        ("https://a.example/x.gguf?a=b", "https://a.example/x.gguf?a=b"),
    ],
)
def test_what_a_name_means(text: str, meaning: str) -> None:
    assert str(parse(text, lambda: CATALOGUE)) == meaning


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("qwen1.5:8b", "qwen1.5:1.8b-chat"),
        ("qwne1.5", "qwen1.5:0.5b-chat"),
        ("codeqwen:7", "codeqwen1.5"),
        ("startr", "starter"),
    ],
)
def test_a_near_miss_suggests_names(text: str, suggestion: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse(text, lambda: CATALOGUE)
    assert suggestion in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "../../etc/passwd",
        "qwen1.5:../x",
        "hf:../..",
        "hf:o/r/../../x",
        "nonsense",
        "",
        "hf:",
        "ms:x",
        "./none.gguf",
        "x.gguf",
    ],
)
def test_what_names_nothing_is_not_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        parse(text, lambda: CATALOGUE)


def test_a_folder_of_the_same_name_does_not_hide_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    assert str(parse("starter", lambda: CATALOGUE)) == "starter"


def test_an_unknown_level_of_a_repository_suggests_levels() -> None:
    with pytest.raises(ModelNotFound, match="not a quantization level") as caught:
        parse("hf:o/r:q4_k_x", lambda: CATALOGUE)
    assert "q4_k_" in caught.value.hint


def test_a_path_that_exists_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    assert parse("./x.gguf", lambda: CATALOGUE) == parse("x.gguf", lambda: CATALOGUE) == PathName(tmp_path / "x.gguf")


def test_a_directory_is_no_model_and_what_lies_in_it_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "inside.gguf").touch()
    with pytest.raises(BadWeights, match="a directory") as caught:
        parse(str(tmp_path), lambda: CATALOGUE)
    assert "inside.gguf" in caught.value.hint


def test_a_directory_with_a_config_is_a_checkpoint_and_so_is_a_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert parse(str(tmp_path), lambda: CATALOGUE) == LocalCheckpointName(tmp_path)
    file = tmp_path / "model.safetensors"
    assert parse(str(file), lambda: CATALOGUE) == LocalCheckpointName(file)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_a_clear_error(text: str) -> None:
    try:
        name = parse(text, lambda: CATALOGUE)
    except (ModelNotFound, BadWeights) as error:
        assert str(error)
    except (OSError, ValueError):
        pytest.fail(f"{text!r} was handed to the file system")
    else:
        assert isinstance(name, (CatalogName, LocalCheckpointName, HubName, PathName, UrlName))


@pytest.mark.parametrize(
    ("file", "level"),
    [
        ("qwen1_5-7b-chat-q4_k_m.gguf", "q4_k_m"),
        ("Model.Q8_0.gguf", "q8_0"),
        ("x-fp16.gguf", None),
        ("x-f16.gguf", "f16"),
        ("x-q2_k-00001-of-00002.gguf", "q2_k"),
        ("x-q4_k_m.gguf.a", "q4_k_m"),
        ("model.gguf", None),
        ("x-IQ4_XS.gguf", "iq4_xs"),
    ],
)
def test_the_level_stands_in_the_file_name(file: str, level: str | None) -> None:
    assert level_of(file) == level
