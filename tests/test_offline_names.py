"""Names of repositories without network: the quantization type is resolved among the files on this disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import expect_exit, list_models
from conftest import Run
from gguf_files import split_gguf
from hub import COMMIT, HubServer
from hub_checkpoints import HF_NAME, OFFLINE, UNREACHABLE

from qwenlocal.library.store import ModelRecord, Store, StoredFile
from qwenlocal.paths import Folders

REPO = "some.one/Tiny-GGUF"
NAME = f"hf:{REPO}"
FILE = "tiny-Q4_1.gguf"
DIGEST = "5" * 64


def hub_snapshot(folders: Folders, commit: str = COMMIT) -> Path:
    return folders.hub_cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / commit


def in_ollama(folders: Folders, tag: str) -> Path:
    """Write the manifest of a tag, and return the path of its blob."""
    folder = folders.user / ".ollama" / "models"
    manifest = folder / "manifests" / "hf.co" / REPO / tag
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'7' * 64}", "size": 5},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{DIGEST}", "size": 5},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    (manifest.parent / "broken").write_text("{")
    return folder / "blobs" / f"sha256-{DIGEST}"


CACHES: dict[str, Callable[[Folders], Path]] = {
    "Hugging Face": lambda folders: hub_snapshot(folders) / FILE,
    "Hugging Face, in a folder": lambda folders: hub_snapshot(folders) / "Q4_1" / FILE,
    "LM Studio": lambda folders: folders.user / ".lmstudio" / "models" / REPO / FILE,
    "llama.cpp": lambda folders: folders.cache / "llama.cpp" / f"{REPO.replace('/', '_')}_{FILE}",
    "Ollama": lambda folders: in_ollama(folders, "Q4_1"),
}
each_cache = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)


def put(model: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(model, path))


@each_cache
@pytest.mark.parametrize("environment_", [OFFLINE, UNREACHABLE], ids=["offline", "nobody answers"])
@pytest.mark.parametrize("name", [NAME, f"{NAME}:q4_1", f"{NAME}:Q4_1"])
def test_a_file_of_another_program_is_found_by_repository_and_type(
    cache: Callable[[Folders], Path], environment_: dict[str, str], name: str, speaking_model: Path, folders: Folders,
    hub: HubServer, invoke: Run,
) -> None:  # fmt: skip
    path = put(speaking_model, cache(folders))
    result = invoke("run", name, "Hi", environment=environment_)
    expect_exit(result, 0)
    assert "Paris, fun" in result.stdout
    assert [entry["path"] for entry in list_models(invoke).values()] == [str(path)]
    for command in ("show", "plan", "verify"):
        expect_exit(invoke(command, name, environment=environment_), 0)
    assert hub.requests == []
    expect_exit(invoke("rm", f"{NAME}:q4_1"), 0)
    assert list_models(invoke) == {}
    assert path.exists()


@each_cache
def test_another_type_is_not_on_this_disk(
    cache: Callable[[Folders], Path], speaking_model: Path, folders: Folders, invoke: Run
) -> None:
    put(speaking_model, cache(folders))
    for name in (f"{NAME}:q8_0", f"{NAME}/other.gguf", f"{NAME}@v2:q4_1", f"{NAME}2:q4_1"):
        assert "is not on this disk" in expect_exit(invoke("run", name, "Hi", environment=OFFLINE), 4), name
        expect_exit(invoke("show", name), 3)
        expect_exit(invoke("rm", name), 3)


@each_cache
def test_capitals_in_the_name_of_a_repository_do_not_matter(
    cache: Callable[[Folders], Path], speaking_model: Path, folders: Folders, invoke: Run
) -> None:
    put(speaking_model, cache(folders))
    for name in (NAME.lower(), f"hf:{REPO.upper()}:q4_1"):
        assert "Paris, fun" in invoke("run", name, "Hi", environment=OFFLINE).stdout, name


def test_the_repositories_of_an_installed_model_mean_it(
    speaking_model: Path, folders: Folders, hub: HubServer, invoke: Run
) -> None:
    files = [StoredFile.from_path(speaking_model, "")]
    Store(folders).add(ModelRecord("qwen1.5:7b-chat-q4_k_m", files, "a file on this disk", owned=False))
    for name in (
        "Qwen/Qwen1.5-7B-Chat",
        "hf:Qwen/Qwen1.5-7B-Chat",
        "Qwen/Qwen1.5-7B-Chat-GGUF",
        "hf:qwen/qwen1.5-7b-chat",
    ):
        result = invoke("run", name, "Hi", environment=OFFLINE)
        assert "is qwen1.5:7b-chat-q4_k_m" in expect_exit(result, 0), name
        assert result.stdout == "Paris, fun\n"
    assert hub.requests == []
    for name in ("Qwen/Qwen1.5-7B", "hf:Qwen/Qwen1.5-7B-Chat:q8_0", "hf:Qwen/Qwen1.5-7B-Chat@v2"):
        expect_exit(invoke("run", name, "Hi", environment=OFFLINE), 4)


def test_every_command_takes_the_repository_of_an_installed_model(
    speaking_model: Path, folders: Folders, hub: HubServer, invoke: Run
) -> None:
    files = [StoredFile.from_path(speaking_model, "")]
    Store(folders).add(ModelRecord("qwen1.5:7b-chat-q4_k_m", files, "a file on this disk", owned=False))
    for command in ("pull", "show", "plan", "inspect", "verify", "rm"):
        result = invoke(command, "Qwen/Qwen1.5-7B-Chat", environment=OFFLINE)
        assert "Qwen/Qwen1.5-7B-Chat is qwen1.5:7b-chat-q4_k_m." in expect_exit(result, 0), command
    assert hub.requests == []
    assert list_models(invoke) == {}


def test_a_short_commit_hash_means_the_commit_on_this_disk(speaking_model: Path, folders: Folders, invoke: Run) -> None:
    put(speaking_model, hub_snapshot(folders) / FILE)
    for name in (f"{NAME}@{COMMIT[:7]}", f"{NAME}@{COMMIT[:12]}:q4_1"):
        assert "Paris, fun" in invoke("run", name, "Hi", environment=OFFLINE).stdout, name
    for revision in (COMMIT[:4], f"{COMMIT[:7]}e", f"{COMMIT}0"):
        expect_exit(invoke("run", f"{NAME}@{revision}", "Hi", environment=OFFLINE), 4)


@pytest.mark.parametrize("pulled", [NAME, f"{NAME}:q4_1", f"{NAME}/{FILE}", f"{NAME}@{COMMIT}/{FILE}"])
def test_a_pulled_model_is_found_by_every_name_of_it(
    pulled: str, speaking_model: Path, hub: HubServer, invoke: Run
) -> None:
    hub.repository(REPO).files = {FILE: speaking_model.read_bytes()}
    expect_exit(invoke("pull", pulled), 0)
    (installed,) = list_models(invoke)
    repo = REPO.upper()
    for name in (
        NAME, f"{NAME}:q4_1", f"{NAME}/{FILE}", f"{NAME}@{COMMIT}:q4_1", f"{NAME}@{COMMIT}",
        f"{NAME}@{COMMIT[:9]}:q4_1", f"hf:{repo}", f"hf:{repo}:q4_1", f"hf:{repo}/{FILE}",
    ):  # fmt: skip
        expect_exit(invoke("run", name, "Hi", environment=OFFLINE), 0)
        assert list(list_models(invoke)) == [installed]
    assert "freed" in expect_exit(invoke("rm", f"{NAME}:q4_1"), 0)
    assert list_models(invoke) == {}


def test_a_model_of_modelscope_is_found_by_its_type(speaking_model: Path, hub: HubServer, invoke: Run) -> None:
    hub.repository(REPO).files = {FILE: speaking_model.read_bytes()}
    expect_exit(invoke("pull", f"ms:{REPO}/{FILE}"), 0)
    nobody = {"MODELSCOPE_DOMAIN": "http://127.0.0.1:1"}
    for name in (f"ms:{REPO}", f"ms:{REPO}:q4_1", f"ms:{REPO}@master:q4_1", f"ms:{REPO.lower()}:q4_1"):
        expect_exit(invoke("run", name, "Hi", environment=nobody), 0)
    expect_exit(invoke("run", NAME, "Hi", environment=OFFLINE), 4)


def test_of_several_types_the_usual_one_is_chosen(
    speaking_model: Path, random_model: Path, folders: Folders, invoke: Run
) -> None:
    put(random_model, hub_snapshot(folders) / "tiny-Q8_0.gguf")
    put(speaking_model, hub_snapshot(folders) / "tiny-Q4_K_M.gguf")
    put(random_model, hub_snapshot(folders) / "mmproj-tiny-f16.gguf")
    assert "Paris, fun" in invoke("run", NAME, "Hi", environment=OFFLINE).stdout
    message = expect_exit(invoke("run", f"{NAME}:q8_0", "Hi", "-n", "1", environment=OFFLINE), 0)
    assert "tiny-Q8_0.gguf" in message


def test_the_hub_chooses_while_it_can_be_reached(
    speaking_model: Path, random_model: Path, folders: Folders, hub: HubServer, invoke: Run
) -> None:
    put(random_model, hub_snapshot(folders, "1" * 40) / "tiny-Q8_0.gguf")
    hub.repository(REPO).files = {"tiny-Q4_K_M.gguf": speaking_model.read_bytes()}
    assert "Paris, fun" in invoke("run", NAME, "Hi").stdout


def test_shards_are_found_if_all_are_there(speaking_model: Path, folders: Folders, invoke: Run, tmp_path: Path) -> None:
    split_gguf(speaking_model, tmp_path)
    names = ["tiny-Q4_1-00001-of-00002.gguf", "tiny-Q4_1-00002-of-00002.gguf"]
    put(tmp_path / "x-00001-of-00002.gguf", hub_snapshot(folders) / names[0])
    expect_exit(invoke("run", f"{NAME}:q4_1", "Hi", environment=OFFLINE), 4)
    put(tmp_path / "x-00002-of-00002.gguf", hub_snapshot(folders) / names[1])
    for name in (f"{NAME}:q4_1", NAME, f"{NAME}/{names[0]}"):
        result = invoke("run", name, "Hi", environment=OFFLINE)
        expect_exit(result, 0)
        assert "Paris, fun" in result.stdout


def test_a_tag_is_found_in_the_names_of_files(speaking_model: Path, folders: Folders, invoke: Run) -> None:
    put(speaking_model, hub_snapshot(folders) / "tiny-UD-Q4_K_XL.gguf")
    expect_exit(invoke("run", f"{NAME}:UD-Q4_K_XL", "Hi", environment=OFFLINE), 0)
    expect_exit(invoke("run", f"{NAME}:UD-Q2_K_XL", "Hi", environment=OFFLINE), 4)


def test_a_converted_type_stands_for_the_repository_once_its_checkpoint_is_gone(
    hub_checkpoint: str, invoke: Run
) -> None:
    expect_exit(invoke("pull", f"{hub_checkpoint}:q8_0"), 0)
    expect_exit(invoke("rm", f"{hub_checkpoint}@checkpoint"), 0)
    expect_exit(invoke("run", HF_NAME, "Hi", "-n", "1", environment=OFFLINE), 0)
    assert list(list_models(invoke)) == [f"{HF_NAME}:q8_0"]


def test_a_tag_is_no_type_to_convert_to(hub_checkpoint: str, invoke: Run) -> None:
    message = expect_exit(invoke("pull", f"{hub_checkpoint}:q4_k_x"), 3)
    assert "There is no quantization type q4_k_x." in message
    assert "q4_k_" in message.partition("Did you mean")[2]


def test_a_catalog_model_without_a_known_digest_is_found_in_its_repository(
    speaking_model: Path, folders: Folders, invoke: Run
) -> None:
    snapshot = folders.hub_cache / "models--Qwen--Qwen1.5-0.5B-Chat-GGUF" / "snapshots" / COMMIT
    put(speaking_model, snapshot / "qwen1_5-0_5b-chat-q2_k.gguf")
    expect_exit(invoke("run", "qwen1.5:0.5b-chat-q2_k", "Hi", environment=OFFLINE), 0)
