"""The catalog, and parsing of model names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlocal.errors import BadCatalog, BadWeights, ModelNotFound
from qwenlocal.library.catalog import Catalog
from qwenlocal.library.names import (
    CatalogName,
    HubName,
    LocalCheckpointName,
    PathName,
    UrlName,
    level_from_filename,
    parse_name,
)
from qwenlocal.paths import bundled_folder

CATALOG = Catalog.read(bundled_folder("models"))
FAMILY = 'name = "x"\ntitle = "X"\ndefault = "1b"\nlevel = "q4_0"\n'


# --- the catalog


@pytest.mark.parametrize("size", ["0.5b", "1.8b", "4b", "7b", "14b", "32b", "72b", "110b", "moe"])
def test_every_size_of_qwen15_has_chat_and_base(size: str) -> None:
    chat, base = CATALOG.aliases[f"qwen1.5:{size}-chat"], CATALOG.aliases[f"qwen1.5:{size}-base"]
    assert (chat.name, base.name) == (f"qwen1.5:{size}-chat", f"qwen1.5:{size}-base")
    assert base.gguf is None
    assert (chat.gguf is None) == (size == "moe")
    assert chat.license
    assert chat.kv_bytes_per_token
    assert chat.context == (8192 if size == "moe" else 32768)


def test_every_known_file_has_a_level_and_a_plausible_size() -> None:
    for card in CATALOG.cards:
        for file in card.files:
            assert level_from_filename(file.path), file.path
            assert file.size > 1e7


def test_card_names_parse_to_their_cards() -> None:
    for card in CATALOG.cards:
        assert parse_name(card.name, lambda: CATALOG) == CatalogName(card)
        assert parse_name(str(CatalogName(card)), lambda: CATALOG).card == card  # type: ignore[union-attr]


def test_the_kv_cache_of_the_half_billion_model_takes_192_mib_for_2048_tokens() -> None:
    assert CATALOG.default.kv_bytes_per_token == 192 * 2**20 / 2048


def test_the_default_is_the_smallest_chat_model_and_the_starter_comes_in_wheels() -> None:
    assert CATALOG.default.name == "qwen1.5:0.5b-chat"
    assert CATALOG.starter.files[0].wheels


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = [", "Cannot read the catalog file"),
        ('name = "x"', "“title” is missing"),
        ('name = "X!"\ntitle = "X"', "“name” has the wrong form"),
        (FAMILY + "context = 1\nsurprise = 2", "unknown: surprise"),
        (FAMILY + 'context = "big"', "“context” must be of type int"),
        (FAMILY + "context = 1", "no chat model of the default size"),
        (
            FAMILY + 'context = 1\n[[size]]\nname = "1b"\nlicence = "l"\n'
            'chat = "o/r"\n[[size.file]]\npath = "x-q4_0.gguf"\nsize = 1\nsha256 = "short"',
            "size 1, file 1: “sha256” has the wrong form",
        ),
    ],
)
def test_an_invalid_catalog_names_file_and_place(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadCatalog, match=re.escape(problem)) as caught:
        Catalog.read(tmp_path)
    assert str(tmp_path / "x.toml") in str(caught.value)


def test_an_unreadable_catalog_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadCatalog, match="Cannot read the catalog file"):
        Catalog.read(tmp_path)
    with pytest.raises(BadCatalog, match="the folder is missing"):
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
        ("hf:owner/repo:UD-Q4_K_XL", "hf:owner/repo:ud-q4_k_xl"),
        ("hf:owner/repo:I-Compact", "hf:owner/repo:i-compact"),
        ("hf:owner/repo/folder/file.gguf", "hf:owner/repo/folder/file.gguf"),
        ("ms:owner/repo", "ms:owner/repo"),
        ("owner/repo", "hf:owner/repo"),
        ("https://huggingface.co/o/r/blob/main/x.gguf", "hf:o/r@main/x.gguf"),
        ("https://huggingface.co/o/r", "hf:o/r"),
        ("https://a.example/x.gguf?a=b", "https://a.example/x.gguf?a=b"),
    ],
)
def test_a_name_is_parsed(text: str, meaning: str) -> None:
    assert str(parse_name(text, lambda: CATALOG)) == meaning


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("qwen1.5:8b", "qwen1.5:1.8b-chat"),
        ("qwne1.5", "qwen1.5:0.5b-chat"),
        ("codeqwen:7", "codeqwen1.5"),
        ("startr", "starter"),
    ],
)
def test_a_misspelled_name_gets_suggestions(text: str, suggestion: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_name(text, lambda: CATALOG)
    assert suggestion in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "../../etc/passwd",
        "qwen1.5:../x",
        "hf:../..",
        "hf:o/r/../../x",
        "hf:o/r:a b",
        "hf:o/r:../x",
        f"hf:{'o' * 300}/r",
        f"hf:o/r@{'1' * 300}",
        "nonsense",
        "",
        "hf:",
        "ms:x",
        "./none.gguf",
        "x.gguf",
    ],
)
def test_unknown_names_are_not_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        parse_name(text, lambda: CATALOG)


def test_a_folder_does_not_shadow_a_catalog_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    assert str(parse_name("starter", lambda: CATALOG)) == "starter"


def test_an_unknown_quantization_type_is_named() -> None:
    with pytest.raises(ModelNotFound, match=r"There is no quantization type q9_9\.") as caught:
        parse_name("qwen1.5:7b-q9_9", lambda: CATALOG)
    assert "Known types: f32, f16" in caught.value.hint


def test_an_existing_path_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    assert (
        parse_name("./x.gguf", lambda: CATALOG)
        == parse_name("x.gguf", lambda: CATALOG)
        == PathName(tmp_path / "x.gguf")
    )


def test_spaces_around_an_existing_path_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.gguf ", " y.gguf", "folder "):
        (tmp_path / name).mkdir() if name == "folder " else (tmp_path / name).touch()
    (tmp_path / "folder " / "config.json").touch()
    (tmp_path / "z.gguf").touch()
    assert parse_name("x.gguf ", lambda: CATALOG) == PathName(tmp_path / "x.gguf ")
    assert parse_name(f"{tmp_path}/x.gguf ", lambda: CATALOG) == PathName(tmp_path / "x.gguf ")
    assert parse_name(" y.gguf", lambda: CATALOG) == PathName(tmp_path / " y.gguf")
    assert parse_name("./folder ", lambda: CATALOG) == LocalCheckpointName(tmp_path / "folder ")
    assert parse_name(" z.gguf ", lambda: CATALOG) == PathName(tmp_path / "z.gguf"), "typed by mistake"


def test_a_directory_is_not_a_model_but_suggests_one_in_it(tmp_path: Path) -> None:
    (tmp_path / "inside.gguf").touch()
    with pytest.raises(BadWeights, match=r"is not a checkpoint: it has no config\.json\.") as caught:
        parse_name(str(tmp_path), lambda: CATALOG)
    assert "inside.gguf" in caught.value.hint


def test_checkpoint_directories_and_safetensors_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert parse_name(str(tmp_path), lambda: CATALOG) == LocalCheckpointName(tmp_path)
    file = tmp_path / "model.safetensors"
    assert parse_name(str(file), lambda: CATALOG) == LocalCheckpointName(file)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_a_qwenlocal_error(text: str) -> None:
    try:
        name = parse_name(text, lambda: CATALOG)
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
        ("x-q4_k_m.gguf-split-a", "q4_k_m"),
        ("x.Q4_K_M.gguf.part2of3", "q4_k_m"),
        ("model.gguf", None),
        ("x-IQ4_XS.gguf", "iq4_xs"),
    ],
)
def test_a_quantization_type_is_read_from_a_file_name(file: str, level: str | None) -> None:
    assert level_from_filename(file) == level
