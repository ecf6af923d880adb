"""Models by name: the local file, a download, or the starter in place of the default model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenlocal.errors import CheckpointOnly, ModelNotFound, SourceUnreachable
from qwenlocal.library.catalog import Catalog
from qwenlocal.library.names import CatalogName, LocalCheckpointName, ModelName
from qwenlocal.library.provider import ModelProvider, describe
from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders, bundled_folder

CATALOG = Catalog.read(bundled_folder("models"))
DEFAULT, STARTER = CatalogName(CATALOG.default), CatalogName(CATALOG.starter)


def record_of(name: object) -> ModelRecord:
    return ModelRecord(str(name), [StoredFile("/models/x.gguf", 1, 0, "")], "hf:owner/repo")


class Library:
    """A provider over stubs: `installed` models are found, `published` ones can be downloaded."""

    def __init__(self, folders: Folders) -> None:
        self.installed: dict[str, ModelRecord] = {}
        self.published: dict[str, ModelRecord | Exception] = {}
        self.sentences: list[str] = []
        self.pulled: list[str] = []
        self.converted: list[str] = []
        self.downloaded: list[StoredFile] = []
        self.store = Store(folders)
        stub: Any = self
        self.provider = ModelProvider(
            folders, lambda: CATALOG, self.store, stub, stub, self.open_puller, say=self.sentences.append
        )

    def find(self, name: ModelName) -> ModelRecord | None:
        return self.installed.get(str(name))

    find_offline = find

    def find_checkpoint(self, _name: ModelName, *, is_offline: bool) -> Path | None:
        return None

    def ensure_converted(self, name: ModelName) -> ModelRecord:
        self.converted.append(str(name))
        return record_of(name)

    @contextlib.contextmanager
    def open_puller(self) -> Iterator[Any]:
        yield self

    def pull(self, name: ModelName) -> ModelRecord:
        self.pulled.append(str(name))
        result = self.published.get(str(name), SourceUnreachable(str(name), ["Hugging Face: no route"]))
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def library(folders: Folders) -> Library:
    return Library(folders)


def test_the_default_model_is_used_if_it_is_installed(library: Library) -> None:
    library.installed = {str(name): record_of(name) for name in (DEFAULT, STARTER)}
    assert library.provider.ensure_default_model().name == DEFAULT
    assert (library.pulled, library.sentences) == ([], [])


def test_an_installed_starter_replaces_the_default_model_without_the_network(library: Library) -> None:
    library.installed = {str(STARTER): record_of(STARTER)}
    assert library.provider.ensure_default_model().name == STARTER
    assert library.pulled == []
    assert library.sentences == [
        f"{DEFAULT} is not downloaded; using {STARTER}. To download it: qwenlocal pull {DEFAULT}"
    ]


def test_the_starter_is_downloaded_if_no_hub_can_be_reached(library: Library) -> None:
    library.published = {str(STARTER): record_of(STARTER)}
    model = library.provider.ensure_default_model()
    assert (model.name, library.pulled) == (STARTER, [str(DEFAULT), str(STARTER)])
    assert "Hugging Face: no route" in library.sentences[0]


def test_an_unreachable_model_names_the_installed_ones(library: Library) -> None:
    library.store.add(record_of("hf:owner/other"))
    with pytest.raises(SourceUnreachable) as caught:
        library.provider.ensure_model(DEFAULT)
    assert caught.value.hint.endswith("Models on this disk: hf:owner/other.")


def test_a_checkpoint_is_converted(library: Library, tmp_path: Path) -> None:
    library.published = {str(DEFAULT): CheckpointOnly(str(DEFAULT), "Qwen/Qwen1.5-0.5B-Chat")}
    library.provider.ensure_model(DEFAULT)
    library.provider.ensure_model(LocalCheckpointName(tmp_path))
    assert library.converted == [str(DEFAULT), str(tmp_path)]


@pytest.mark.parametrize("draft", [None, "starter"])
def test_the_draft_model_is_provided_with_the_model(library: Library, draft: str | None) -> None:
    library.installed = {str(name): record_of(name) for name in (DEFAULT, STARTER)}
    model, draft_model = library.provider.ensure_models("qwen1.5", draft)
    assert model.name == DEFAULT
    assert (draft_model and draft_model.name) == (STARTER if draft else None)


def test_a_deleted_checkpoint_is_a_name_while_its_model_is_installed(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "Tiny"
    with pytest.raises(ModelNotFound):
        library.provider.parse(str(path))
    library.store.add(record_of(path))
    assert library.provider.parse(str(path)) == LocalCheckpointName(path)


def test_a_short_name_is_spelled_out(library: Library) -> None:
    assert library.provider.parse("qwen1.5") == DEFAULT
    assert library.sentences == [f"qwen1.5 is {describe(DEFAULT)}."]


@pytest.mark.parametrize(
    ("sources", "variables"),
    [
        (["Hugging Face: timed out"], "HF_ENDPOINT or HTTPS_PROXY"),
        (["Hugging Face: timed out", "ModelScope: timed out"], "HF_ENDPOINT, MODELSCOPE_DOMAIN or HTTPS_PROXY"),
        (["the package index: timed out"], "PIP_INDEX_URL or HTTPS_PROXY"),
        (["127.0.0.1: Connection refused"], "HTTPS_PROXY"),
    ],
)
def test_the_hint_names_the_variables_of_the_unreachable_sources(sources: list[str], variables: str) -> None:
    assert SourceUnreachable("x", sources).hint.endswith(f"or set {variables}.")
